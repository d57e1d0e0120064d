"""The page in a real browser: nothing is fetched, nothing overflows, hover and keyboard show the right numbers.

Needs playwright and a Chromium; skipped without them, and required where MOE_ROUTE_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.browser import Opened

from moe_route import analysis, report
from moe_route.data.batches import Text
from moe_route.report import Inputs
from moe_route.runs.language_model import LanguageModel

from .conftest import HOSTILE

WIDTHS = (1280, 390)
OF_FIGURES = (1400, 360)


@pytest.fixture(scope="module")
def opened(browser: Any, page_file: Path) -> Iterator[Opened]:
    opened = Opened(browser, page_file, WIDTHS[0])
    yield opened
    opened.page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fetches_nothing_and_does_not_overflow(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, page_file, width, scheme)
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.wait_for_function("document.querySelectorAll('#divergence details table').length")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = page.locator("main").inner_text()
    assert "undefined" not in shown
    assert "NaN" not in shown
    assert opened.requests == [page_file.as_uri()]
    assert opened.complaints == []
    assert page.title() == 'A "title" with <b>&amp;</b> 🦓'
    page.close()


def test_the_page_has_landmarks_names_and_headings(opened: Opened) -> None:
    page = opened.page
    for landmark in ("header", "nav[aria-label]", "main", "footer"):
        assert page.locator(landmark).count() == 1
    assert page.locator("h1").count() == 1
    assert page.evaluate("[...document.querySelectorAll('select, input')].every(e => e.labels.length)")
    assert page.evaluate("[...document.querySelectorAll('button')].every(e => e.textContent.trim() || e.ariaLabel)")
    assert page.evaluate(
        "[...document.querySelectorAll('figure svg[role=img]')].every(e => e.getAttribute('aria-label'))"
    )
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert page.locator("#tokens").inner_text().count("Arabic") > 0  # languages by name


def test_hover_on_the_heat_map_shows_the_frequency_of_the_statistics(opened: Opened, inputs: Inputs) -> None:
    page, statistics = opened.page, inputs.recordings["natural"]
    names = ("deu_Latn", "eng_Latn")
    german, english = (statistics.frequency()[statistics.groups.index(name)] for name in names)
    for layer, expert in ((0, 3), (5, 11)):
        page.locator(f'rect.cell[data-layer="{layer}"][data-expert="{expert}"]').hover()
        own, base = german[layer, expert], english[layer, expert]
        assert f"layer {layer}, expert {expert}" in opened.tip
        assert [float(x) for x in re.findall(r": ([\d.]+)", opened.tip)] == pytest.approx([own, base], abs=1e-4)
        assert float(re.search(r"difference ([-+\d.]+)", opened.tip)[1]) == pytest.approx(own - base, abs=1e-4)  # type: ignore[index]


def test_cards_show_what_an_expert_answers_to(opened: Opened, inputs: Inputs) -> None:
    page, trace = opened.page, inputs.traces["natural"]
    found = analysis.predict(trace, features=("token", "previous and token"))
    layer = found.layers[len(found.layers) // 2]
    of_layer = [expert for at, expert in found.contexts if at == layer]
    cards = page.locator("#cards article")
    assert cards.count() == len(of_layer)
    page.locator("#cards select").select_option("id")
    assert cards.first.locator("h3").inner_text() == f"Expert {min(of_layer)}"
    assert cards.first.locator("li").count() == len(found.contexts[layer, min(of_layer)])
    cards.first.locator("button").click()
    assert f"Expert {min(of_layer)} of layer {layer}" in page.locator("#contexts").inner_text()


def test_an_expert_of_the_heat_map_is_shown_in_every_group(opened: Opened, inputs: Inputs) -> None:
    statistics = inputs.recordings["natural"]
    opened.page.locator('rect.cell[data-layer="2"][data-expert="4"]').click()
    assert opened.page.locator("#experts h3", has_text="Layer 2, expert 4").count() == 1
    shown = opened.page.locator("#experts .bars").inner_text().split("\n")
    values = sorted((float(line) for line in shown if re.fullmatch(r"\d\.\d+", line)), reverse=True)
    assert values == pytest.approx(sorted(statistics.frequency()[:, 2, 4], reverse=True), abs=1e-4)


def test_keys_move_over_the_divergence_and_show_its_values(opened: Opened, inputs: Inputs) -> None:
    page, found = opened.page, analysis.divergence(inputs.recordings["natural"], "eng_Latn")
    page.locator("#divergence svg[role=img]").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    top = found.groups[int(np.nanargmax(found.values.mean(1)))]
    assert "layer 2:" in opened.tip
    assert float(re.search(r"layer 2: ([\d.]+)", opened.tip)[1]) == pytest.approx(found.of(top)[2], abs=5e-4)  # type: ignore[index]
    page.keyboard.press("ArrowDown")
    assert opened.tip.split("\n")[0] != {"deu_Latn": "German", "arb_Arab": "Arabic"}.get(top)


def test_a_language_can_be_brought_out(opened: Opened) -> None:
    page = opened.page
    button = page.locator("#divergence .legend button", has_text="German")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    page.mouse.move(5, 5)
    assert page.locator("#divergence path.series.dim").count() == 3
    button.click()


def test_tokens_show_their_experts_and_hostile_text_is_literal(opened: Opened, inputs: Inputs) -> None:
    page = opened.page
    page.locator("#tokens select").nth(2).select_option(label="English · 1")
    texts = page.locator("#tokens .tokens").all_inner_texts()
    assert len(texts) == 2  # natural beside steered
    assert all(HOSTILE[:60] in re.sub(r"\d/\d", "", text) for text in texts)
    trace = inputs.traces["natural"]
    group = trace.groups.index("eng_Latn")
    rows = [r for r in np.flatnonzero(trace.group == group) if trace.items[trace.sequence[r]] == "1"]
    rows.sort(key=lambda row: trace.position[row])
    slider = page.locator("#tokens input[type=range]")
    layer = int(slider.input_value())
    token = page.locator("#tokens .tokens").first.locator(".token").nth(3)
    token.hover()
    for expert in trace.ids[rows[3], layer]:
        assert f"expert {expert} (" in opened.tip
    token.click()
    table = page.locator("#tokens table").first.inner_text()
    assert len(table.strip().split("\n")) >= len(trace.layers)
    page.keyboard.press("Tab")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert f"Layer {layer - 1}" in slider.locator("xpath=..").inner_text()


def test_arabic_runs_from_right_to_left_though_its_first_token_is_latin(opened: Opened, inputs: Inputs) -> None:
    page = opened.page
    choice = page.locator("#tokens select").nth(2)
    choice.select_option(label="Arabic · 0")
    text = page.locator("#tokens .tokens").first
    assert text.inner_text().startswith("<s>")
    assert text.get_attribute("dir") == "rtl"
    left = [text.locator(".token").nth(i).bounding_box()["x"] for i in (0, 3, 6)]
    assert left == sorted(left, reverse=True)
    trace = inputs.traces["natural"]
    start = next(r for r in np.flatnonzero(trace.position == 0) if trace.groups[trace.group[r]] == "arb_Arab")
    page.locator("#contexts select").nth(1).select_option(value="3")
    page.locator("#contexts select").nth(2).select_option(value=str(trace.ids[start, 3][0]))
    page.evaluate("document.querySelectorAll('#contexts details').forEach(one => one.open = true)")
    shown = page.locator("#contexts details", has_text="Arabic").locator("q")
    assert shown.count() >= 1
    assert {one.get_attribute("dir") for one in shown.all()} == {"rtl"}
    latin = page.locator("#contexts details", has_text="German").locator("q")
    assert {one.get_attribute("dir") for one in latin.all()} <= {"ltr"}
    choice.select_option(label="English · 1")
    assert text.get_attribute("dir") == "ltr"


@pytest.mark.parametrize("width", WIDTHS)
def test_axes_have_names_and_no_label_of_a_figure_is_cut(browser: Any, page_file: Path, width: int) -> None:
    opened = Opened(browser, page_file, width)
    page = opened.page
    assert page.locator("#divergence svg text", has_text="Routing divergence").count() == 1
    cut = page.evaluate("""[...document.querySelectorAll('figure svg text')].filter(text => {
        const box = text.getBoundingClientRect(), figure = text.ownerSVGElement.getBoundingClientRect();
        return box.left < figure.left - 1 || box.right > figure.right + 1 || box.bottom > figure.bottom + 1;
    }).map(text => text.textContent)""")
    assert cut == []
    page.close()


def test_facts_that_recordings_share_are_written_once(opened: Opened) -> None:
    rows = opened.page.locator("#counted table.facts tbody tr")
    cells = {row.locator("th").inner_text(): row.locator("td").count() for row in rows.all()}
    assert cells["Model"] == cells["Counted"] == 1
    assert cells["Steering"] == 2


def test_arrow_keys_move_between_tokens(opened: Opened) -> None:
    page = opened.page
    page.locator("#tokens .tokens").first.locator(".token[tabindex='0']").focus()
    before = int(page.evaluate("document.activeElement.dataset.token"))
    page.keyboard.press("ArrowRight")
    assert int(page.evaluate("document.activeElement.dataset.token")) == before + 1
    assert f"position {before + 1}" in opened.tip


def test_an_expert_lists_its_tokens(opened: Opened, inputs: Inputs) -> None:
    page, trace = opened.page, inputs.traces["natural"]
    page.locator('rect.cell[data-layer="3"][data-expert="5"]').click()
    page.get_by_role("button", name="Show its tokens in context").click()
    chosen = int((trace.ids[:, 3] == 5).any(-1).sum())
    assert f"Expert 5 of layer 3: {chosen} token" in page.locator("#contexts").inner_text()
    page.locator("#contexts select").first.select_option(label="steered")
    page.locator("#contexts select").nth(2).select_option(value="5")
    assert f"{len(trace)} tokens of {len(trace)} traced" in page.locator("#contexts").inner_text()
    assert page.locator("#contexts mark").count() > 10


def test_tables_are_sorted_by_their_headings(opened: Opened) -> None:
    page = opened.page
    heading = page.locator("#experts th button", has_text="Layer")
    heading.click()
    shown = [int(text) for text in page.locator("#experts tbody tr td:first-child").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    heading.click()
    assert page.locator("#experts th", has_text="Layer").get_attribute("aria-sort") == "ascending"


def test_what_is_better_is_blue(opened: Opened) -> None:
    """A loss that falls and an accuracy that rises have one color; no change and an unclear one have neither."""
    figures = opened.page.locator("#results figure")
    loss, accuracy = (
        [circle.get_attribute("fill") for circle in figures.nth(i).locator("circle").all()] for i in (0, 1)
    )
    assert loss == ["var(--quiet)", "var(--negative)", "var(--positive)"]
    assert accuracy == ["var(--negative)", "var(--positive)", "var(--quiet)"]


def test_groups_may_have_any_name(browser: Any, demo: LanguageModel, tmp_path: Path) -> None:
    names = (
        "constructor",
        "__proto__",
        "</script><b onclick=alert(1)>",
        "\u202eright to left",
        "e\u0301\u0301 \n 🦓",
        "7",
    )
    texts = [Text(name, "0", f"The bus leaves at {place}.") for place, name in enumerate(names)]
    path = report.write(tmp_path / "report.html", report.record_inputs(demo, texts), tokenizer=demo.tokenizer)
    opened = Opened(browser, path, WIDTHS[0])
    shown = opened.page.locator("#tokens select").last.locator("option").all_text_contents()
    assert {option.removesuffix(" · 0") for option in shown} == {name.replace("\u202e", "\\u202e") for name in names}
    assert not opened.complaints
    opened.page.close()


def test_selected_experts_are_outlined(opened: Opened) -> None:
    assert opened.page.locator("#experts rect.marked").count() == 3
    opened.page.get_by_label("Outlined experts").select_option(label="none")
    assert opened.page.locator("#experts rect.marked").count() == 0
    assert not opened.complaints


# ---- figures of results


@pytest.mark.parametrize("width", OF_FIGURES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_fit_and_are_drawn(browser: Any, figures_file: Path, width: int, scheme: str, tmp_path: Path) -> None:
    opened = Opened(browser, figures_file, width, scheme, "#effect svg text.strong")
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.requests == [figures_file.as_uri()]
    assert opened.complaints == []
    assert page.locator("#lead").inner_text().startswith(HOSTILE[:40])
    cut = page.evaluate("""[...document.querySelectorAll('#effect svg text, #plain svg text')].filter(text => {
        const box = text.getBoundingClientRect(), figure = text.ownerSVGElement.getBoundingClientRect();
        return box.left < figure.left - 1 || box.right > figure.right + 1;
    }).map(text => text.textContent)""")
    assert cut == []
    picture = page.screenshot(path=tmp_path / "figures.png", full_page=True)
    paper = {"light": (255, 255, 255), "dark": (20, 24, 27)}[scheme]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == f"rgb{paper}"
    assert len(picture) > 20_000
    page.close()


def test_figures_show_the_values(browser: Any, figures_file: Path) -> None:
    opened = Opened(browser, figures_file, OF_FIGURES[0], drawn="#effect svg text.strong")
    page = opened.page
    titles = page.locator("#contents a").all_inner_texts()
    assert titles[:4] == ["A U", "Experts off", "Without draws", "Own experts"]
    assert page.locator("#u path.series").count() == 2
    assert page.locator("#effect svg text.strong").all_text_contents() == ["0.90 → 0.20", "0.70 → 0.40"]
    assert page.locator("#effect figure > div circle.draw").count() == 6
    assert page.locator("#plain circle.draw").count() == 0
    page.locator("#effect figure > div svg > g").first.hover()
    assert "random: 0.70 to 0.95" in opened.tip
    page.locator("#effect summary").click()
    assert page.locator("#effect tbody tr").first.inner_text().split("\t")[1:] == ["0.90", "0.20", "0.70", "0.95"]
    cells = page.locator("#matrix tbody td")
    assert cells.all_inner_texts() == ["+0.31", "-0.12", "0.00", "0.00", "+0.20", "–"]
    assert [cell.get_attribute("class") for cell in cells.all()] == ["own", None, None, None, "own", None]
    assert not opened.complaints
    page.close()

"""The page of the demonstration: what it draws are the findings, and it fits a phone and a desk, in light and dark."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.browser import Opened

from moe_route.demo import DemoReport, demo

LANGUAGES = ["eng_Latn", "deu_Latn", "jpn_Jpan", "arb_Arab"]
TITLES = ["Qwen3-30B-A3B", "Switch off the experts of English sums", "Switch off a language's own experts", "Tokens"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DemoReport:
    """The demonstration on a part of its texts, with its page."""
    return demo(languages=LANGUAGES, limit=8, draws=3, out=tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def page(made: DemoReport) -> Path:
    assert made.page is not None
    return made.page


@pytest.fixture(scope="module")
def content(page: Path) -> dict[str, Any]:
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert data is not None
    parsed: dict[str, Any] = json.loads(data[1])
    return parsed


def test_the_figures_are_the_findings(made, content):
    figures = {one["name"]: one for one in content["figures"]}
    assert list(figures) == ["u", "task-experts", "language-experts"]
    task_off, language_off = made.task_experts_off, made.language_experts_off
    np.testing.assert_allclose(list(figures["u"]["rows"].values()), made.published_u.divergence.values)
    texts = [one["text"] for one in figures.values()]
    assert texts == [one.sentence for _, one in made.findings()]
    bars = figures["task-experts"]["rows"]
    assert list(bars) == ["English", "German", "Japanese", "Arabic"]
    for i, (before, after, draws) in enumerate(bars.values()):
        assert before == pytest.approx(task_off.before.tasks["sums"].correct[:, i].mean())
        assert after == pytest.approx(task_off.after.tasks["sums"].correct[:, i].mean())
        assert len(draws) == 3
        assert all(-1e-9 <= draw <= 1 + 1e-9 for draw in draws)
    matrix = figures["language-experts"]
    assert matrix["columns"][-1] == "random"
    np.testing.assert_allclose(np.array(list(matrix["rows"].values()))[:, :-1], language_off.matrix)


def test_one_problem_is_traced_as_it_is_and_steered(content):
    natural, steered = content["traces"]
    assert (natural["name"], steered["name"]) == ("as it is", "task experts off")
    assert [text["group"] for text in natural["texts"]] == LANGUAGES
    assert len({text["item"] for trace in (natural, steered) for text in trace["texts"]}) == 1
    assert natural["ids"] != steered["ids"], "without its experts, a token chooses others"


def test_the_last_line_names_the_page(made, page):
    assert page.name == "index.html"
    assert str(made).replace("\n", " ").endswith(f"Open {page}")
    assert made.to_dict()["page"] == str(page)
    assert page.stat().st_size < 400_000


@pytest.mark.parametrize("width", [1400, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_browser(browser, page, width, scheme, tmp_path):
    opened = Opened(browser, page, width, scheme, "#task-experts svg text.strong")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.requests == [page.as_uri()]
    assert opened.complaints == []
    heads = opened.page.locator("h2").all_inner_texts()
    assert [head for head, title in zip(heads, TITLES, strict=False) if not head.startswith(title)] == []
    assert len(heads) >= len(TITLES)
    assert opened.page.locator("#u path.series").count() == 4
    assert opened.page.locator("#tokens .tokens").count() == 2  # natural beside steered
    assert len(opened.page.screenshot(path=tmp_path / "page.png", full_page=True)) > 50_000
    opened.page.close()

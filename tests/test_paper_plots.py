"""Figures for a paper: names, levels, columns, panels, large maps and steering tables."""

from __future__ import annotations

import warnings
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra plot")

import matplotlib as mpl
from matplotlib.colors import to_rgb

from moe_route import plots
from moe_route.analysis import Consistency, Difference, Divergence, Entropy
from moe_route.data.languages import codes
from moe_route.plots import frame
from moe_route.plots.end_labels import EndLabels, readable, spread
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection

LANGUAGES = ("deu_Latn", "swh_Latn", "rus_Cyrl", "ukr_Cyrl", "jpn_Jpan", "math")
LEVELS = {"eng_Latn": "high", "deu_Latn": "high", "rus_Cyrl": "mid", "ukr_Cyrl": "mid", "jpn_Jpan": "low"}


@pytest.fixture(autouse=True)
def nothing_global_changes_and_nothing_is_warned_of():
    mpl.get_backend()  # chosen now, not by the first figure
    before = mpl.rcParams.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert mpl.rcParams == before


@pytest.fixture
def div():
    values = np.random.default_rng(0).uniform(0.3, 0.5, (len(LANGUAGES), 6))
    return Divergence(values, LANGUAGES, "eng_Latn", tuple(map(str, range(6))))


def labels_of(ax):
    (found,) = (artist for artist in ax.get_children() if isinstance(artist, EndLabels))
    return found


def drawn(ax):
    ax.figure.canvas.draw()
    return ax


def test_languages_are_named_in_english(div):
    ax = drawn(plots.divergence(div))
    names = {text.get_text() for text in labels_of(ax).texts}
    assert names == {"German", "Swahili", "Russian", "Ukrainian", "Japanese", "math"}
    assert ax.get_ylabel() == "routing divergence from English"
    alike = Divergence(div.values[:2], ("swh_Latn", "sw"), "eng_Latn", div.layers)
    lines = plots.divergence(alike).get_lines()
    assert {line.get_label() for line in lines} == {"Swahili [swh_Latn]", "Swahili [sw]"}


@pytest.mark.parametrize("column", [None, 3.3])
@pytest.mark.parametrize("number", [6, 30])
def test_labels_at_line_ends_do_not_overlap_and_stay_in_the_figure(column, number):
    values = np.random.default_rng(1).uniform(0.3, 0.32, (number, 6))
    found = Divergence(values, codes()[:number], "eng_Latn", tuple(map(str, range(6))))
    if column is None:
        ax = drawn(plots.divergence(found))
    else:
        with plots.style(column=column, size=8):
            ax = drawn(plots.divergence(found))
    boxes = sorted((text.get_window_extent() for text in labels_of(ax).texts), key=lambda box: box.y0)
    assert len(boxes) == number
    for below, above in pairwise(boxes):
        assert (above.y0 + above.y1 - below.y0 - below.y1) / 2 > 0.85 * below.height
    whole = ax.figure.bbox
    assert all(box.x1 <= whole.x1 and box.y1 <= whole.y1 and box.y0 >= whole.y0 for box in boxes)


def test_spread_moves_no_further_than_needed():
    np.testing.assert_allclose(spread(np.array([5.0, 1.0, 9.0]), np.ones(3)), [5, 1, 9])
    np.testing.assert_allclose(spread(np.array([5.0, 5.0]), np.ones(2)), [4.5, 5.5])
    np.testing.assert_allclose(spread(np.array([0.0, 0.1]), np.ones(2), low=0.0), [0.5, 1.5])
    found = np.sort(spread(np.random.default_rng(0).random(40), np.full(40, 0.1)))
    assert (np.diff(found) > 0.1 - 1e-9).all()
    assert spread(np.zeros(0), np.zeros(0)).shape == (0,)


def test_a_language_looks_the_same_whatever_else_is_drawn():
    alone = {code: plots.styles([code])[code] for code in codes()}
    assert plots.styles(codes()) == alone
    by_script = {}
    for code in ("eng_Latn", "swh_Latn", "deu_Latn", "fra_Latn", "ind_Latn", "spa_Latn", "por_Latn"):
        by_script.setdefault(str(alone[code]["linestyle"]), set()).add(alone[code]["color"])
    assert list(map(len, by_script.values())) == [7], "one dash pattern for Latin script, seven colors"
    assert str(alone["rus_Cyrl"]["linestyle"]) not in by_script
    looks = [
        (alone[c]["color"], str(alone[c]["linestyle"]), alone[c].get("marker")) for c in codes() if "_Latn" not in c
    ]
    assert len(set(looks)) == len(looks), "no two languages of other scripts look alike"


def test_colors_can_be_told_apart_without_the_green_cone():
    deuteranope = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])

    def seen(color):
        return np.clip((np.array(to_rgb(color)) ** 2.2) @ deuteranope.T, 0, 1) ** (1 / 2.2)

    for colors in (frame.COLORS, frame.ordered_colors(3), frame.ordered_colors(5)):
        assert min(np.linalg.norm(seen(a) - seen(b)) for a, b in combinations(colors, 2)) > 0.1
    lightness = [seen(color) @ [0.2126, 0.7152, 0.0722] for color in frame.ordered_colors(5)]
    assert lightness == sorted(lightness)
    for color in frame.COLORS:
        light = (
            0.2126 * readable(color)[0] ** 2.2 + 0.7152 * readable(color)[1] ** 2.2 + 0.0722 * readable(color)[2] ** 2.2
        )
        assert 1.05 / (light + 0.05) >= 4, "text in this color can be read on white"


def test_levels_color_and_order_languages(div):
    ax = drawn(plots.divergence(div, levels=LEVELS))
    colors = {line.get_label(): line.get_color() for line in ax.get_lines()}
    high, mid, low = frame.level_colors(LEVELS).values()
    assert (colors["German"], colors["Russian"], colors["Ukrainian"], colors["Japanese"]) == (high, mid, mid, low)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["high (n = 1)", "mid (n = 2)", "low (n = 1)"]
    assert colors["Swahili"] == plots.styles(["swh_Latn"])["swh_Latn"]["color"], "no level is known"


def test_relative_depth(div):
    ax = drawn(plots.divergence(div, depth=True, middle=range(2, 4)))
    assert ax.get_lines()[0].get_xdata()[[0, -1]].tolist() == [0, 1]
    assert ax.get_xlabel() == "relative depth"


def test_panels_by_script_draw_the_others_in_grey(div):
    axes = plots.by_script(div, title="T")
    drawn(axes[0])
    assert [ax.get_title() for ax in axes] == ["Latin script", "Cyrillic script", "other scripts"]
    for ax, own in zip(axes, (2, 2, 2), strict=True):
        assert len(ax.get_lines()) == len(LANGUAGES)
        assert len(labels_of(ax).texts) == own
    with pytest.raises(ValueError, match="of is for entropy"):
        plots.by_script(div, of="token")
    token = np.random.default_rng(0).uniform(1, 2, (2, 3))
    entropy = Entropy(token, token + 0.1, ("deu", "fra"), ("0", "1", "2"), (16,) * 3)
    (only,) = plots.by_script(entropy, of="sequence")
    assert only.get_title() == "Latin script"
    with pytest.raises(ValueError, match=r"record\(sequences=True\)"):
        plots.by_script(entropy, interval=0.9)
    values = tuple(np.random.default_rng(0).random((9, 3)) for _ in range(2))
    found = Consistency(np.stack([v.mean(0) for v in values]), ("deu", "fra"), ("0", "1", "2"), np.full(2, 9), values)
    (only,) = plots.by_script(found, interval=0.9)
    assert only.figure.get_suptitle() == "bands: 90 % interval, bootstrap over 9 sequences per group"


def test_style_sizes_a_figure_for_a_column(div, tmp_path: Path):
    before = mpl.rcParams["font.size"]
    with plots.style(column=3.3, size=7) as settings:
        assert mpl.rcParams["font.size"] == settings["font.size"] == 7
        ax = plots.divergence(div)
    assert mpl.rcParams["font.size"] == before
    drawn(ax)
    assert ax.figure.get_figwidth() == 3.3
    assert {tick.get_fontsize() for tick in ax.get_xticklabels()} == {7.0}, "also those made after the block"
    svg = plots.save(ax, tmp_path / "a.svg").read_text()
    assert ">German<" in svg
    assert 'width="237.6pt"' in svg, "3.3 inches"
    with pytest.raises(ValueError, match="column must be"), plots.style(column=0):
        pass
    with pytest.raises(ValueError, match="no suffix"):
        plots.save(ax, tmp_path / "a.gif")


def test_a_large_map_is_sorted_and_names_its_largest_experts():
    values = np.random.default_rng(0).standard_t(2.5, (12, 64)) * 0.02
    largest = np.unravel_index(values.argmax(), values.shape)
    selected = ExpertSelection({int(largest[0]): [int(largest[1])]}, num_experts=64)
    ax = drawn(plots.heat_map(values, top=3, selected=selected))
    shown = np.asarray(ax.images[0].get_array())
    np.testing.assert_array_equal(shown, -np.sort(-values, axis=1).T)
    names = [text.get_text() for text in labels_of(ax).texts]
    assert f"{largest[0]}: {largest[1]}" in names
    assert ax.collections[0].get_offsets().tolist() == [[largest[0], 0]]
    limit = ax.images[0].get_clim()[1]
    assert limit == pytest.approx(np.percentile(np.abs(values), 98))
    share = (np.abs(values) > limit).mean()
    assert f"({share * 100:.2g} % of cells beyond" in ax.images[0].colorbar.ax.get_ylabel()
    unsorted = plots.heat_map(values, sort=False, selected=selected)
    assert unsorted.collections[0].get_offsets().tolist() == [[*map(int, largest)]]
    with pytest.raises(ValueError, match="outside of the 12 layers"):
        plots.heat_map(values, selected=ExpertSelection({40: [1]}))


def test_maps_of_groups_share_one_range():
    counts = np.random.default_rng(1).integers(1, 50, (4, 3, 5))
    names = ("eng_Latn", "deu_Latn", "swh_Latn", "math")
    tokens = counts.sum(-1)
    statistics = RoutingStatistics.from_token_sums(names, counts=counts, tokens=tokens, top_k=1, num_experts=5)
    axes = plots.heat_maps(statistics, reference="eng_Latn", by="token", selected=ExpertSelection({0: [1]}))
    drawn(axes[0])
    assert [ax.get_title() for ax in axes] == ["German", "Swahili", "math"]
    assert len({ax.images[0].get_clim() for ax in axes}) == 1
    assert len(plots.heat_maps(statistics, by="token")) == 4
    with pytest.raises(ValueError, match="no group to draw"):
        plots.heat_maps(statistics, ["eng_Latn"], reference="eng_Latn")


def difference(value: float) -> Difference:
    return Difference(value, value - 0.01, value + 0.01)


def test_a_steering_table_is_not_ruled_by_one_column():
    found = {
        "soft": {"jpn_Jpan": difference(-0.02), "deu_Latn": difference(0.004)},
        "force": {"jpn_Jpan": difference(0.4), "deu_Latn": difference(0.3)},
        "random": {"jpn_Jpan": (0.001, -0.01, 0.02), "deu_Latn": 0.01},
    }
    ax = drawn(plots.steering_table(found, levels=LEVELS))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["German", "Japanese", "mean"]
    assert ax.images[0].get_clim()[1] == pytest.approx(0.04), "twice the median of 0.02, 0.4 and 0.01"
    title = " ".join(ax.get_title().split())
    assert "bold: 95 % interval excludes 0" in title
    assert "33 % of cells beyond" in title
    weights = {text.get_text(): text.get_fontweight() for text in ax.texts}
    assert weights["-0.020"] == "bold"
    assert weights["+0.004"] == "normal"
    assert weights["+0.010"] == "normal", "no interval"
    with_ends = plots.steering_table(found, intervals=True, mean=False)
    assert any("[-0.030," in text.get_text() for text in with_ends.texts)
    with pytest.raises(ValueError, match="lacks deu_Latn"):
        plots.steering_table({"a": found["soft"], "b": {"jpn_Jpan": difference(1)}})
    with pytest.raises(ValueError, match="no change to draw"):
        plots.steering_table({})
    with pytest.raises(ValueError, match="change of jpn_Jpan in 'soft' is no number"):
        plots.steering_table({"soft": {"deu_Latn": difference(0.1), "jpn_Jpan": (float("nan"),) * 3}})


def test_changes_by_strength():
    change = tuple(tuple(difference(x * g) for x in (2.0, 0.5)) for g in (1, -1))
    found = SimpleNamespace(groups=("deu_Latn", "swh_Latn"), strengths=(2.0, 0.5), change=change, texts=(20, 20))
    ax = drawn(plots.strengths(found))
    line = ax.get_lines()[0]
    assert line.get_xdata().tolist() == [0, 0.5, 2]
    assert line.get_ydata().tolist() == [0, 0.5, 2]
    assert "20 texts per language" in " ".join(ax.get_title().split())
    table = drawn(plots.steering_table(found))
    assert [tick.get_text() for tick in table.get_xticklabels()] == ["× 2", "× 0.5"]

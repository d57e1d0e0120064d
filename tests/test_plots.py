"""moe_route.plots: what is drawn is what was found, on the axes given, and nothing global changes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import combinations, pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from moe_route import analysis, plots
from moe_route.analysis import Correlation, Divergence, DivergenceMatrix, Entropy
from moe_route.plots.end_labels import EndLabels
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection

mpl.use("Agg")
GROUPS = tuple(f"lang{i}" for i in range(10))
LAYERS = 12


@pytest.fixture
def div():
    rng = np.random.default_rng(0)
    height = rng.permutation(10)[:, None] * 0.05
    pairs = np.stack([np.clip(0.3 + h + rng.normal(0, 0.02, (20, LAYERS)), 0, 1) for h in height])
    return Divergence(
        pairs.mean(1),
        GROUPS,
        "eng",
        tuple(map(str, range(LAYERS))),
        pairing="paired",
        pairs=20,
        undefined=np.zeros((10, LAYERS), int),
        pair_values=pairs,
    )


@pytest.fixture
def stats():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 50, (2, 3, 4))
    counts[:, 1, 2:] = 0
    tokens = counts.sum(-1) // 2
    return RoutingStatistics.from_token_sums(
        ["en", "sw"], counts=counts, tokens=tokens, top_k=2, num_experts=(4, 2, 4), tolerance=1
    )


@pytest.fixture(autouse=True)
def nothing_global_changes_and_nothing_is_warned_of():
    mpl.get_backend()  # chosen now, not by the first figure
    before = mpl.rcParams.copy()
    plt.close("all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert mpl.rcParams == before
    assert plt.get_fignums() == []


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def end_labels(ax):
    """Labels at the ends of lines, from the top, after checking that none lies over another one."""
    ax.figure.draw_without_rendering()
    (found,) = (artist for artist in ax.get_children() if isinstance(artist, EndLabels))
    boxes = sorted((text.get_window_extent() for text in found.texts), key=lambda box: -box.y0)
    for above, below in pairwise(boxes):
        assert above.y0 + above.height / 2 - below.y0 - below.height / 2 > 0.85 * below.height
    return [text.get_text() for text in sorted(found.texts, key=lambda text: -text.get_window_extent().y0)]


def rendered(ax):
    """The picture as bytes: whatever cannot be drawn fails here."""
    ax.figure.canvas.draw()
    return bytes(ax.figure.canvas.buffer_rgba())


def test_divergence_draws_each_group_in_the_order_of_the_legend(div):
    ax = plots.divergence(div, title="all", middle=range(3, 8))
    assert isinstance(ax, Axes)
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert end_labels(ax) == sorted(GROUPS, key=lambda g: -div.of(g)[-1])
    assert ax.get_legend() is None
    for group in GROUPS:
        np.testing.assert_array_equal(lines[group].get_ydata(), div.of(group))
        np.testing.assert_array_equal(lines[group].get_xdata(), range(LAYERS))
    assert ax.get_ylabel() == "routing divergence from English"
    assert ax.get_title() == "all"
    assert ax.get_ylim()[0] == 0
    assert rendered(ax)


def test_ten_lines_can_be_told_apart_with_any_color_vision(div):
    lines = plots.divergence(div).get_lines()
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}
    assert len(looks) == 10
    # what a viewer without one kind of cone sees (Vienot, Brettel and Mollon 1999, on linear RGB)
    deuteranope = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    protanope = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    colors = np.array([to_rgb(color) for color in dict.fromkeys(line.get_color() for line in lines)])
    for vision in (np.eye(3), deuteranope, protanope):
        seen = np.clip((colors**2.2) @ vision.T, 0, 1) ** (1 / 2.2)
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 0.1
        assert min(np.linalg.norm(1 - color) for color in seen) > 0.3, "visible on white"


def test_divergence_draws_on_the_axes_given_with_names_and_bands(div):
    figure = mpl.figure.Figure()
    ax = figure.add_subplot()
    drawn = plots.divergence(
        div, ax=ax, groups=["lang1", "lang2"], labels={"lang1": "German", "eng": "English"}, interval=0.9
    )
    assert drawn is ax
    assert set(end_labels(ax)) == {"German", "lang2"}
    assert ax.get_ylabel().endswith("English")
    low, high = div.interval(0.9)
    band = next(c for c in ax.collections if np.isclose(c.get_paths()[0].vertices[:, 1].min(), low[1].min()))
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(high[1].max())
    assert ax.get_title() == "bands: 90 % interval, bootstrap over 20 items"
    assert plots.divergence(div, interval=0.95, title="all").get_title().splitlines()[0] == "all"
    with pytest.raises(ValueError, match="no group 'xx'"):
        plots.divergence(div, groups=["xx"])


def colors(ax):
    return {line.get_label(): line.get_color() for line in ax.get_lines()}


def test_a_language_has_one_color_in_every_picture():
    """Whatever its rank, whatever other groups there are, in pictures of divergence and of entropy."""
    codes = ("eng_Latn", "swh_Latn", "zho_Hans", "hin_Deva")
    values = np.random.default_rng(0).random((3, LAYERS))
    layers = tuple(map(str, range(LAYERS)))
    one = colors(plots.divergence(Divergence(values, codes[1:], codes[0], layers)))
    turned = colors(plots.divergence(Divergence(values[::-1], codes[1:], codes[0], layers)))
    fewer = colors(plots.divergence(Divergence(values[:1], codes[1:2], codes[0], layers)))
    entropies = colors(plots.entropy(Entropy(values, None, codes[1:], layers, (16,) * LAYERS)))
    assert one == turned == entropies == one | fewer
    assert len(set(one.values())) == 3
    assert plots.styles(["sw"])["sw"] == plots.styles(["en", "swh_Latn"])["swh_Latn"]


def test_styles_differ_and_depend_on_the_set_of_names_only():
    names = ["eng_Latn", "zho_Hans", "zho_Hant", "math", "law", *(f"group {i}" for i in range(23))]
    found = plots.styles(names)
    looks = {(style["color"], str(style["linestyle"]), style.get("marker")) for style in found.values()}
    assert len(looks) == len(names) == 28
    assert plots.styles(names[::-1]) == found
    assert len(plots.styles([f"group {i}" for i in range(40)])) == 40


def test_styles_can_be_given(div):
    ax = plots.divergence(div, styles={"lang3": "red", "lang4": {"linewidth": 9}, "elsewhere": "blue"})
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert lines["lang3"].get_color() == "red"
    assert lines["lang4"].get_linewidth() == 9
    assert lines["lang4"].get_color() == colors(plots.divergence(div))["lang4"]


def test_nan_layers_leave_gaps(div):
    values = div.values.copy()
    values[0, 3] = np.nan
    values[1] = np.nan
    ax = plots.divergence(Divergence(values, GROUPS, "eng", div.layers))
    assert GROUPS[0] in end_labels(ax)
    assert GROUPS[1] not in end_labels(ax), "there is nothing to label"


def test_entropy_of_tokens_sequences_and_gap():
    rng = np.random.default_rng(0)
    token = rng.uniform(1, 2, (3, LAYERS))
    found = Entropy(token, token + 0.5, GROUPS[:3], tuple(map(str, range(LAYERS))), (16,) * LAYERS, within=token)
    ax = plots.entropy(found)
    by_name = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    np.testing.assert_allclose(by_name["lang1"], token[1] / np.log(16))
    np.testing.assert_allclose(plots.entropy(found, of="gap").get_lines()[0].get_ydata(), 0.5)
    assert plots.entropy(found, of="sequence", normalized=False).get_ylabel() == "sequence entropy (nats)"
    with pytest.raises(ValueError, match="of must be"):
        plots.entropy(found, of="word")


def test_correlation_marks_what_is_significant():
    r = np.linspace(-0.9, 0.2, LAYERS)
    alone, corrected = (np.where(np.arange(LAYERS) < layers, 0.01, 0.5) for layers in (8, 5))
    r[-1] = np.nan
    ax = plots.correlation(
        Correlation(r, r / 2, alone, corrected, np.full(LAYERS, 9), GROUPS[:9], tuple(map(str, range(LAYERS))), "eng")
    )
    points = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in points] == [5, LAYERS - 6]
    assert legend(ax) == [
        "Pearson r",
        "Spearman ρ",
        "filled: p < 0.05, corrected for 12 layers",
        "hollow: p ≥ 0.05, corrected for 12 layers",
    ]
    assert "n = 9 groups" in ax.get_title()
    assert ax.get_ylim() == (-1.05, 1.05)
    assert rendered(ax)


def test_expert_counts_by_selection_and_threshold():
    one = ExpertSelection({0: [1], 2: [1, 2]}, description="task experts", threshold=0.3, num_experts=[8] * 4)
    two = ExpertSelection({2: [2, 3, 4]}, description="task experts", threshold=0.2, num_experts=[8] * 4)
    ax = plots.expert_counts([one, two])
    assert legend(ax) == ["task experts > 0.3 (3)", "task experts > 0.2 (3)"]
    line = ax.get_lines()[0]
    assert line.get_ydata().tolist() == [1, 0, 2, 0, 0]
    assert line.get_xdata().tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5], "all steps are as wide"
    assert line.get_linewidth() > ax.get_lines()[1].get_linewidth(), "the line behind can be seen"
    nested = plots.expert_counts({"above 0.2": one, "above 0.4": one & ExpertSelection({2: [1]})})
    large, small = nested.collections[0], nested.collections[2]
    assert large.get_paths()[0].vertices[:, 1].max() == 2
    assert small.get_paths()[0].vertices[:, 1].max() == 1
    assert legend(nested) == ["above 0.2 (3)", "above 0.4 (1)"]
    both = plots.expert_counts({"task": one, "multilingual": two}, overlap=True)
    assert legend(both)[-1] == "in both (1)"
    assert plots.expert_counts(one, num_layers=9).get_xlim() == (-0.5, 8.5)
    assert rendered(both)
    for make, message in [
        (lambda: plots.expert_counts({}), "at least one"),
        (lambda: plots.expert_counts(one, overlap=True), "two selections"),
        (lambda: plots.expert_counts(one, num_layers=1), "layer 2"),
        (lambda: plots.expert_counts(ExpertSelection({})), "pass num_layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_heat_map_of_a_group_and_of_a_difference(stats):
    ax = plots.heat_map(stats, "sw", by="token")
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(shown, np.nan)[:, 0], stats.frequency(by="token")[1, 0])
    assert shown.mask[2:, 1].all(), "experts that a layer does not have are blank"
    assert ax.images[0].get_clim()[0] == 0
    change = plots.heat_map(stats, "sw", reference="en", by="token", title="sw - en")
    low, high = change.images[0].get_clim()
    assert low == -high
    delta = analysis.expert_difference(stats, stats, group="sw", baseline_group="en", by="token")
    np.testing.assert_allclose(plots.heat_map(delta, colorbar=False).images[0].get_array(), delta.T)
    assert rendered(change)
    with pytest.raises(ValueError, match="name one of the groups: en, sw"):
        plots.heat_map(stats, by="token")
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.heat_map(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="without group"):
        plots.heat_map(delta, "sw")


def test_divergence_matrix_writes_values_into_cells():
    one = np.array([[0, 0.2, 0.5], [0.2, 0, 0.6], [0.5, 0.6, 0]])
    found = DivergenceMatrix(np.stack([one, one + 0.2 * (1 - np.eye(3))]), ("en", "x", "sw"), ("0", "1"))
    ax = plots.divergence_matrix(found, labels={"sw": "Kiswahili"}, groups=("en", "x", "sw"))
    assert [text.get_text() for text in ax.texts] == ["0.30", "0.60", "0.70"], "each pair once"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["x", "Kiswahili"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["English", "x"]
    ordered = plots.divergence_matrix(found)
    names = [tick.get_text() for tick in (*ordered.get_xticklabels()[:1], *ordered.get_yticklabels())]
    assert abs(names.index("English") - names.index("x")) == 1, "similar groups lie side by side"
    assert rendered(ax)
    assert rendered(ordered)
    with pytest.raises(ValueError, match=r"three groups or more, not en, x: 0\.3000; plots.divergence"):
        plots.divergence_matrix(found, groups=["en", "x"])


def test_without_matplotlib_the_error_names_the_extra(div, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'moe-route\[plot\]'"):
        plots.divergence(div)


def test_importing_plots_does_not_import_matplotlib():
    code = "import sys, moe_route.plots; print([m for m in ('matplotlib', 'pandas', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_floor_and_the_order_of_the_legend():
    rng = np.random.default_rng(0)
    found = Divergence(
        rng.random((3, LAYERS)),
        ("a", "b", "c"),
        "eng",
        tuple(map(str, range(LAYERS))),
        floor=np.full((3, LAYERS), 0.2),
        reference_floor=np.full(LAYERS, 0.1),
    )
    ax = plots.divergence(found, floor=True, order={"a": 1, "b": 3, "c": 2})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b", "c", "a", "floor"]
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), 0.15)
    with pytest.raises(ValueError, match="order lacks c"):
        plots.divergence(found, order={"a": 1, "b": 2})


def test_the_floor_is_that_of_the_groups_drawn():
    floor = np.array([0.1, 0.3, 0.5])[:, None] * np.ones(LAYERS)
    layers = tuple(map(str, range(LAYERS)))
    found = Divergence(floor + 0.2, ("a", "b", "c"), "eng", layers, floor=floor, reference_floor=np.full(LAYERS, 0.1))
    np.testing.assert_allclose(plots.divergence(found, floor=True).lines[-1].get_ydata(), 0.2)
    np.testing.assert_allclose(plots.divergence(found, groups=["c", "b"], floor=True).lines[-1].get_ydata(), 0.25)


def test_correlation_with_a_band_and_a_matrix_in_another_order():
    rng = np.random.default_rng(0)
    pairs = rng.random((6, 10, LAYERS))
    names = tuple("abcdef")
    found = Divergence(
        pairs.mean(1), names, "eng", tuple(map(str, range(LAYERS))), "jsd", "paired", 10, pair_values=pairs
    )
    r = analysis.correlation(found, dict(zip(names, range(6), strict=True)), permutations=20)
    ax = plots.correlation(r, interval=0.9)
    assert any("90 % interval" in text.get_text() for text in ax.get_legend().get_texts())
    ax = plots.divergence_matrix(
        DivergenceMatrix(rng.random((2, 3, 3)), ("a", "b", "c"), ("0", "1")), groups=["c", "a", "b"]
    )
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]


def test_lines_take_no_other_arguments():
    found = analysis.Divergence(np.ones((1, 2)), ("a",), "b", ("0", "1"), undefined=np.zeros((1, 2), int))
    with pytest.raises(TypeError, match="colour"):
        plots.divergence(found, colour="red")
    with pytest.raises(ValueError, match="levels"):
        plots.by_script(found, levels={"a": "high"})


@pytest.mark.parametrize("what", ["labels", "styles", "levels"])
def test_a_misspelt_group_among_labels_styles_and_levels_is_refused(what: str):
    found = analysis.Divergence(np.ones((2, 2)), ("swh_Latn", "deu"), "b", ("0", "1"), undefined=np.zeros((2, 2), int))
    with pytest.raises(ValueError, match=rf'{what}.*"swa_Latn".*"swh_Latn"'):
        plots.divergence(found, **{what: {"swa_Latn": "red", "deu": "red"}})
    plots.divergence(found, **{what: {"fra_Latn": "red", "deu": "red"}})  # as for another figure


def test_layers_to_shade_are_those_of_the_result():
    found = analysis.Divergence(np.ones((1, 2)), ("a",), "b", ("0", "1"), undefined=np.zeros((1, 2), int))
    with pytest.raises(ValueError, match="layer 2"):
        plots.divergence(found, middle=range(1, 3))


def test_a_misspelt_group_is_refused_in_other_figures():
    rng = np.random.default_rng(0)
    matrix = DivergenceMatrix(rng.random((2, 3, 3)), ("aa", "bbb", "cccc"), ("0", "1"))
    with pytest.raises(ValueError, match='"cccd"'):
        plots.divergence_matrix(matrix, labels={"cccd": "C"})
    with pytest.raises(ValueError, match='"deuu"'):
        plots.steering_table({"x": {"deu": 0.1, "swh": 0.2}}, labels={"deuu": "German"})


def test_faces_list_their_names():
    for face in (analysis, plots):
        assert dir(face) == sorted(face.__all__)

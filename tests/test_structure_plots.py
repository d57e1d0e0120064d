"""Figures of the structure of routing: what is drawn, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra plot")

from moe_route import analysis, plots
from moe_route.recording import RoutingStatistics

COUNTS = np.array([[[6, 2, 0], [3, 3, 2]], [[1, 1, 6], [8, 0, 0]]])


def balance():
    statistics = RoutingStatistics.from_token_sums(
        ("eng_Latn", "deu_Latn"), counts=COUNTS, tokens=COUNTS.sum(-1), top_k=1, num_experts=3
    )
    return analysis.load_balance(statistics)


def test_load_balance_has_a_line_per_group():
    found = balance()
    with pytest.raises(ValueError, match="leave interval out"):
        plots.by_script(found, interval=0.9)
    ax = plots.load_balance(found, of="max_share", groups=["deu_Latn"], labels={"deu_Latn": "German"})
    (line,) = ax.get_lines()
    assert line.get_ydata().tolist() == found.max_share[1].tolist()
    assert line.get_label() == "German"
    assert ax.get_ylabel() == "largest share of the load"
    with pytest.raises(ValueError, match="of must be one of"):
        plots.load_balance(found, of="load")


def test_pairs_are_a_matrix():
    pairs = np.array([[[4, 1, 0], [1, 2, 0], [0, 0, 0]]])
    together = analysis.Coactivation(pairs, np.array([5]), ("eng",), ("a",), (2,))
    image = plots.pairs(together, 0).get_images()[0]
    assert image.get_array().filled(np.nan).shape == (2, 2)
    assert image.get_array()[0, 1] == 0.25
    after = analysis.Transitions(pairs, np.array([[5, 3, 0]]), np.array([8]), ("eng",), ("a", "b"), (3, 2))
    ax = plots.pairs(after, 0, title="on")
    assert ax.get_images()[0].get_array().shape == (3, 2)
    assert ax.get_xlabel() == "expert of layer 1"
    with pytest.raises(ValueError, match="no layer 1 to draw"):
        plots.pairs(after, 1)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.pairs(analysis.Coactivation(pairs * 0, np.array([0]), ("eng",), ("a",), (2,)), 0)


def flowing(**groups):
    """Statistics of three layers of 2, 3 and 2 experts, from the tokens that choose (e, f, g) of each group."""
    paths = {name: np.array(chosen) for name, chosen in groups.items()}
    sizes = (2, 3, 2)
    counts, pairs = np.zeros((len(groups), 3, 3), np.int64), np.zeros((len(groups), 2, 3, 3), np.int64)
    for row, chosen in enumerate(paths.values()):
        for layer in range(3):
            np.add.at(counts[row, layer], chosen[:, layer], 1)
        for layer in range(2):
            np.add.at(pairs[row, layer], (chosen[:, layer], chosen[:, layer + 1]), 1)
    made = RoutingStatistics.from_token_sums(
        tuple(groups), counts=counts, tokens=counts.sum(-1), top_k=1, num_experts=sizes
    )
    same = np.zeros((len(groups), 3, 3, 3), np.int64)
    same[:, :, range(3), range(3)] = counts
    made.accumulated = {"co_selection": same, "transitions": pairs}
    return made


def widths(ax):
    """(start, end, color) -> width of the lines of a panel, in places."""
    from matplotlib.colors import to_hex

    (lines,) = [each for each in ax.collections if hasattr(each, "get_segments")]
    found = {}
    for curve, width, color in zip(lines.get_segments(), lines.get_linewidths(), lines.get_colors(), strict=True):
        ends = tuple(tuple(round(float(value)) for value in curve[end]) for end in (0, -1))
        found[(*ends, to_hex(color))] = width
    return found


def test_expert_flow_draws_the_difference_from_a_reference():
    found = flowing(eng_Latn=[[1, 2, 0]] * 3 + [[0, 0, 0]], deu_Latn=[[1, 2, 0]] * 2 + [[0, 1, 1]] * 2)
    (ax,) = plots.expert_flow(found, reference="eng_Latn", title="flow")
    german, english = (plots.styles([name])[name]["color"].lower() for name in ("deu_Latn", "eng_Latn"))
    gray = "#b8b8b8"
    drawn = widths(ax)
    # Places are by frequency in English: experts 1, 2 and 0 of the three layers are first.
    # 3 of 4 in English, 2 of 4 in common
    assert drawn[(0, 0), (1, 0), english] == pytest.approx(1.5 * drawn[(0, 0), (1, 0), gray])
    assert drawn[(0, 1), (1, 2), german] == pytest.approx(drawn[(0, 0), (1, 0), gray])  # 2 of 4, and none in English
    assert drawn[(0, 1), (1, 2), gray] == 0
    assert drawn[(0, 1), (1, 1), english] > drawn[(0, 1), (1, 1), gray] == 0
    assert ax.get_title() == "German: 50% in common"
    assert "flow\nthe 10 largest flows between two layers, 100% to 100% of all" in ax.figure.get_suptitle()


def test_expert_flow_without_a_reference_draws_every_group():
    found = flowing(eng_Latn=[[1, 2, 0]] * 3 + [[0, 0, 1]], deu_Latn=[[0, 1, 1]] * 2)
    axes = plots.expert_flow(found, flows=1, labels={"deu_Latn": "Deutsch"})
    assert [ax.get_title() for ax in axes] == ["English", "Deutsch"]
    assert [len(widths(ax)) for ax in axes] == [2, 2]  # one flow between two layers
    assert "75% to 100% of all" in axes[0].figure.get_suptitle()


def test_expert_flow_moves_the_rare_of_many_experts_together():
    counts = np.zeros((1, 2, 40), np.int64)
    counts[0, :, :3] = [3, 2, 1]
    found = RoutingStatistics.from_token_sums(("x",), counts=counts, tokens=counts.sum(-1), top_k=1, num_experts=40)
    pairs = np.zeros((1, 1, 40, 40), np.int64)
    pairs[0, 0, range(3), range(3)] = [3, 2, 1]
    found.accumulated = {"transitions": pairs}
    (ax,) = plots.expert_flow(found)
    (lines,) = [each for each in ax.collections if hasattr(each, "get_segments")]
    assert [curve[0, 1] for curve in lines.get_segments()] == pytest.approx([2**0.5, 1, 0])


def test_a_reference_of_the_same_color_is_drawn_in_ink():
    found = flowing(rus_Cyrl=[[1, 2, 0]] * 2, deu_Latn=[[0, 1, 1]] * 2)
    assert len({style["color"] for style in plots.styles(found.groups).values()}) == 1
    (ax,) = plots.expert_flow(found, reference="rus_Cyrl")
    assert {color for *_, color in widths(ax)} == {"#009e73", "#333333", "#b8b8b8"}


def test_expert_flow_refuses_what_has_no_flow():
    found = flowing(eng_Latn=[[1, 2, 0]], deu_Latn=[[0, 1, 1]])
    with pytest.raises(ValueError, match="1 or more"):
        plots.expert_flow(found, flows=0)
    with pytest.raises(ValueError, match="besides the reference"):
        plots.expert_flow(found, ["deu_Latn"], reference="deu_Latn")
    with pytest.raises(ValueError, match="no group 'fra_Latn'"):
        plots.expert_flow(found, ["fra_Latn"])
    with pytest.raises(ValueError, match="name one of the groups"):
        plots.expert_flow(found, reference="fra_Latn")
    with pytest.raises(ValueError, match="two layers or more"):
        plots.expert_flow(found.select(layers=[1]))
    found.accumulated["transitions"][1] = 0
    with pytest.raises(ValueError, match="no token of deu_Latn"):
        plots.expert_flow(found)
    found.accumulated = {}
    with pytest.raises(ValueError, match="record\\(pairs=True\\)"):
        plots.expert_flow(found)

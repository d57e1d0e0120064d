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


def test_expert_pairs_are_a_matrix():
    pairs = np.array([[[4, 1, 0], [1, 2, 0], [0, 0, 0]]])
    together = analysis.Coactivation(pairs, np.array([5]), ("eng",), ("a",), (2,))
    image = plots.expert_pairs(together, 0).get_images()[0]
    assert image.get_array().filled(np.nan).shape == (2, 2)
    assert image.get_array()[0, 1] == 0.25
    after = analysis.Transitions(pairs, np.array([[5, 3, 0]]), np.array([8]), ("eng",), ("a", "b"), (3, 2))
    ax = plots.expert_pairs(after, 0, title="on")
    assert ax.get_images()[0].get_array().shape == (3, 2)
    assert ax.get_xlabel() == "expert of layer 1"
    with pytest.raises(ValueError, match="no layer 1 to draw"):
        plots.expert_pairs(after, 1)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.expert_pairs(analysis.Coactivation(pairs * 0, np.array([0]), ("eng",), ("a",), (2,)), 0)

"""Share of items answered alike in two languages, beside chance."""

from __future__ import annotations

import numpy as np
import pytest

from moe_route import analysis
from moe_route.analysis import AnalysisError, answer_similarity


def test_against_loops() -> None:
    draw = np.random.default_rng(0)
    answers = {group: {item: "abc"[draw.integers(3)] for item in draw.permutation(20)} for group in ("x", "y", "z")}
    answers["y"][99] = "a"  # an item that the others lack
    found = answer_similarity(answers)
    assert (found.groups, found.pairs, found.rule) == (("x", "y", "z"), 20, "answers")
    for i, a in enumerate(found.groups):
        for j, b in enumerate(found.groups):
            alike = [answers[a][item] == answers[b][item] for item in range(20)]
            assert found.values[0, i, j] == np.mean(alike)
            if i != j:
                pairs = [answers[a][one] == answers[b][other] for one in range(20) for other in range(20)]
                assert found.by_chance[0, i, j] == pytest.approx(np.mean(pairs))
    assert "share of items answered alike, 20 items" in repr(found)
    assert len(found.clusters(2)) == 2


def test_refuses_with_the_fix() -> None:
    with pytest.raises(AnalysisError, match="two groups or more"):
        analysis.answer_similarity({"x": {}})
    with pytest.raises(AnalysisError, match="0 items are common to all groups: give at least 10"):
        analysis.answer_similarity({"x": {1: True}, "y": {2: True}})

"""Overlap of selections: hand-computed sets, and chance against an enumeration of all sets."""

from __future__ import annotations

import json
from itertools import combinations, product

import numpy as np
import pytest

from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.analysis.overlap import chance_of_overlap
from moe_route.steering import ExpertSelection, PlanModel

SIZES = (6, 4)
A = ExpertSelection({0: [0, 1, 2], 1: [3]}, num_experts=SIZES)
B = ExpertSelection({0: [1, 2, 5], 1: [0]}, num_experts=SIZES)
EMPTY = ExpertSelection({}, num_experts=SIZES)


def test_overlap_of_hand_made_sets():
    found = analysis.overlap({"a": A, "b": B, "none": EMPTY})
    assert found.sizes.tolist() == [[3, 1], [3, 1], [0, 0]]
    assert found.shared[0, 1].tolist() == found.shared[1, 0].tolist() == [2, 0]
    assert found.jaccard()[0, 1] == 2 / 6
    assert found.jaccard(by_layer=True)[0, 1].tolist() == [0.5, 0]
    assert found.containment()[0, 1] == 0.5
    assert found.jaccard()[0, 0] == found.containment()[0, 0] == 1
    assert (found.jaccard()[0, 2], found.containment()[0, 2]) == (0, 0)
    assert np.isnan(found.jaccard()[2, 2])
    assert np.isnan(found.containment()[2, 0])
    assert found.expected[0, 1] == pytest.approx(3 * 3 / 6 + 1 / 4)
    one = analysis.overlap({"a": A, "b": B}, layers=[1])
    assert (one.shared[0, 1].tolist(), one.num_experts.tolist()) == ([0, 0], [0, 4])
    assert one.p_fewer[0, 1] == pytest.approx(3 / 4)


def test_chance_is_that_of_all_random_sets():
    """Every pair of sets with the sizes of A and B in the two layers, counted one by one."""
    first = {(0, 0), (0, 1), (0, 2), (1, 3)}
    sums = [
        len(first & ({(0, e) for e in layer0} | {(1, e) for e in layer1}))
        for layer0, layer1 in product(combinations(range(6), 3), combinations(range(4), 1))
    ]
    expected, p_more, p_fewer = chance_of_overlap(np.array(SIZES), np.array([3, 1]), np.array([3, 1]), 2)
    assert expected == pytest.approx(np.mean(sums))
    assert p_more == pytest.approx(np.mean(np.array(sums) >= 2))
    assert p_fewer == pytest.approx(np.mean(np.array(sums) <= 2))


def test_chance_in_one_layer_is_hypergeometric():
    stats = pytest.importorskip("scipy.stats")
    law = stats.hypergeom(128, 20, 31)
    _, p_more, p_fewer = chance_of_overlap(np.array([128]), np.array([20]), np.array([31]), 7)
    assert p_more == pytest.approx(law.sf(6))
    assert p_fewer == pytest.approx(law.cdf(7))


def test_overlap_refuses_and_says_how_to_fix_it():
    other = ExpertSelection({0: [1]}, model=PlanModel("b", num_experts=(8, 8)))
    unknown = ExpertSelection({0: [1]})
    cases = [
        (lambda: analysis.overlap({"a": A}), "two selections or more"),
        (lambda: analysis.overlap(A), "two selections or more"),
        (lambda: analysis.overlap({"a": A, "b": other}), "'b' is of another model"),
        (lambda: analysis.overlap({"a": unknown, "b": unknown}), "pass num_experts"),
        (lambda: analysis.overlap({"a": A, "b": ExpertSelection({4: [1]})}), "layer 4"),
        (
            lambda: analysis.overlap(
                {"a": ExpertSelection({0: [1]}, num_experts=8), "b": ExpertSelection({0: [1]}, num_experts=16)}
            ),
            "differs",
        ),
        (lambda: analysis.overlap({"a": A, "b": B}, layers=[2]), "some of the 2 layers"),
    ]
    for make, message in cases:
        with pytest.raises(AnalysisError, match=message):
            make()
    assert analysis.overlap({"a": unknown, "b": ExpertSelection({1: [2]})}, num_experts=8).sizes.tolist() == [
        [1, 0],
        [0, 1],
    ]


def test_the_result_shows_itself():
    found = analysis.overlap({"a": A, "b": B})
    frame = found.to_pandas()
    assert frame["shared"].tolist() == [2, 0]
    assert "by chance" in repr(found)
    assert found.tables()[0].head[:4] == ("first", "experts", "second", "experts")
    a, b = next(iter(found._pairs()))
    sizes = found.sizes.sum(-1)
    assert found.tables()[0].rows[0][:4] == [found.names[a], sizes[a], found.names[b], sizes[b]]
    json.dumps(found.to_dict(), allow_nan=False)

"""Segment routing best performance, against a search over all sets of runs and against loops."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from harness.traces import trace

from moe_route import analysis
from moe_route.analysis import AnalysisError


def runs(found, layer, segment, experts=6):
    """f of every (run, expert): number of the run's tokens that chose the expert."""
    frequency = []
    for sequence in np.unique(found.sequence):
        rows = np.flatnonzero(found.sequence == sequence)
        rows = rows[np.argsort(found.position[rows])]
        for start in range(len(rows) - segment + 1):
            part = rows[start : start + segment]
            if found.position[part[-1]] - found.position[part[0]] == segment - 1:
                frequency.append([sum(e in found.ids[t, layer] for t in part) for e in range(experts)])
    return np.array(frequency)


def best(frequency, segment):
    """F1 of choosing the pairs with f of at least a, for the best a, and the pairs chosen there."""
    found = []
    for least in range(1, segment + 1):
        chosen = frequency >= least
        right = frequency[chosen].sum()
        found.append((2 * right / (segment * chosen.sum() + frequency.sum()), -least, chosen.sum()))
    return max(found)


@pytest.mark.parametrize("segment", [1, 2, 4])
def test_srp_is_that_of_loops(segment):
    traced = trace(texts=20)
    found = analysis.local_consistency(traced, segment=segment)
    for layer in range(4):
        frequency = runs(traced, layer, segment)
        f1, _, active = best(frequency, segment)
        assert found.segments[layer] == len(frequency)
        assert found.values[layer] == pytest.approx(f1)
        assert found.size_ratio[layer] == pytest.approx(active * segment / frequency.sum())
        for expert in range(6):
            assert found.by_expert[layer, expert] == pytest.approx(best(frequency[:, expert : expert + 1], segment)[0])


def test_no_segment_router_does_better():
    """Every choice of (run, expert) pairs of a small trace, as the definition has it."""
    traced = trace(texts=1, layers=1, experts=3)
    small = trace(
        texts=1,
        layers=1,
        experts=3,
        **{name: getattr(traced, name)[:6] for name in ("sequence", "group", "position", "token", "phase")},
        ids=traced.ids[:6],
        weights=traced.weights[:6],
    )
    frequency = runs(small, 0, 3, experts=3).reshape(-1)
    scores = [
        2 * (frequency * chosen).sum() / (3 * sum(chosen) + frequency.sum())
        for chosen in product((0, 1), repeat=len(frequency))
    ]
    assert analysis.local_consistency(small, segment=3).values[0] == pytest.approx(max(scores))


def test_gaps_break_runs_and_the_order_of_rows_does_not_matter():
    traced = trace()
    position = traced.position.copy()
    position[position > 3] += 2
    found = analysis.local_consistency(trace(position=position), segment=3)
    assert found.segments[0] == len(runs(trace(position=position), 0, 3))
    order = np.random.default_rng(0).permutation(len(traced))
    columns = ("sequence", "group", "position", "token", "phase", "ids", "weights")
    shuffled = trace(**{name: getattr(traced, name)[order] for name in columns})
    whole = analysis.local_consistency(traced, segment=3)
    assert np.array_equal(analysis.local_consistency(shuffled, segment=3).by_expert, whole.by_expert)


def test_one_set_of_experts_for_all_is_perfect():
    ids = np.broadcast_to(np.array([1, 4], np.int8), trace().ids.shape)
    found = analysis.local_consistency(trace(ids=ids), segment=4, num_experts=6)
    assert found.values.tolist() == [1, 1, 1, 1]
    assert found.size_ratio.tolist() == [1, 1, 1, 1]
    assert np.isnan(found.by_expert[0, 0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"segment": 50}, "no sequence has 50 consecutive tokens"),
        ({"segment": 0}, "1 token or more"),
        ({"num_experts": 3}, "num_experts is not 3"),
        ({"num_experts": [6, 6]}, "one for each of the 4"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(AnalysisError, match=words):
        analysis.local_consistency(trace(), **options)


def test_beams_are_refused():
    traced = trace()
    position = traced.position.copy()
    position[1] = 0
    with pytest.raises(AnalysisError, match="position 0 twice"):
        analysis.local_consistency(trace(position=position))


def test_shown_and_saved():
    found = analysis.local_consistency(trace(), segment=3)
    assert found.to_dict()["segment"] == 3
    assert "segments of 3 tokens" in repr(found)
    pytest.importorskip("pandas")
    assert found.to_pandas()["srp"].tolist() == found.values.tolist()

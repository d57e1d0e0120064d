"""Entropy of tokens and of sequences with intervals, from sequences that a recording kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness.stub_model import StubModel

from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.analysis.stats import interval_of
from moe_route.recording import Recorder, RoutingStatistics


@pytest.fixture(scope="module")
def statistics() -> RoutingStatistics:
    """Two groups of five sequences with 3 to 9 tokens."""
    model, draw = StubModel([8, 8, 8]), torch.Generator().manual_seed(0)
    valid = torch.arange(9) < torch.tensor([3, 9, 5, 4, 7])[:, None]
    with Recorder(model, sequences=True) as recorder:
        for group in ("a", "b"):
            with recorder.labels(groups=group, items=range(5)):
                model(recorder, [torch.randn(5, 9, 8, generator=draw) for _ in range(3)], valid=valid)
    return recorder.statistics()


def test_kept_values_are_those_of_the_sums(statistics: RoutingStatistics) -> None:
    found = analysis.entropy(statistics)
    for g, group in enumerate(found.groups):
        store, items = statistics.store, range(5)
        within = np.stack([store.token_entropy(item, group) for item in items])
        np.testing.assert_allclose(found.within[g], within.mean(0), atol=1e-8)
        length = np.stack([store.tokens(item, group) for item in items])
        np.testing.assert_allclose(found.token[g], (length * within).sum(0) / length.sum(0), atol=1e-8)
        np.testing.assert_array_equal(found.token_values[g], within)


def test_intervals_are_those_of_a_plain_bootstrap(statistics: RoutingStatistics) -> None:
    found = analysis.entropy(statistics)
    drawn = np.random.default_rng(7).integers(0, 5, (300, 5))  # the draws of the house
    for g in range(2):
        sequence, token, length = found.sequence_values[g], found.token_values[g], found.sequence_tokens[g]
        by_hand = {"sequence": [], "token": [], "gap": []}
        for rows in drawn:
            by_hand["sequence"].append(sequence[rows].mean(0))
            by_hand["token"].append((token * length)[rows].sum(0) / length[rows].sum(0))
            by_hand["gap"].append((sequence - token)[rows].mean(0))
        for of, values in by_hand.items():
            low, high = found.interval(0.9, of=of, resamples=300, seed=7)
            expected = interval_of(np.array(values), 5, 0.9)
            np.testing.assert_allclose([low[g], high[g]], expected, atol=1e-12, err_msg=of)
            estimate = {"sequence": found.sequence, "token": found.token, "gap": found.gap}[of][g]
            assert ((low[g] <= estimate) & (estimate <= high[g])).all()


def test_survives_a_file_and_a_merge(statistics: RoutingStatistics, tmp_path) -> None:
    statistics.save(tmp_path / "s.safetensors")
    loaded = RoutingStatistics.load(tmp_path / "s.safetensors")
    halves = loaded.select(groups=["b"]), loaded.select(groups=["a"], layers=[1])
    expected = analysis.entropy(statistics).interval(of="token")
    np.testing.assert_array_equal(analysis.entropy(loaded).interval(of="token"), expected)
    np.testing.assert_array_equal(analysis.entropy(halves[0]).interval(of="token")[0], expected[0][1:])
    np.testing.assert_array_equal(analysis.entropy(halves[1]).interval(of="token")[1], expected[1][:1, 1:2])


def test_without_token_entropy() -> None:
    model = StubModel([8, 8])
    with Recorder(model, sequences=True, entropy=False) as recorder, recorder.labels(groups="a", items=range(3)):
        model(recorder, [torch.randn(3, 6, 8)] * 2)
    found = analysis.entropy(recorder.statistics(), of="sequence")
    assert np.isfinite(found.interval()).all()
    with pytest.raises(AnalysisError, match="entropy=True"):
        found.interval(of="token")
    with pytest.raises(AnalysisError, match="of must be"):
        found.interval(of="layer")
    with pytest.raises(ValueError, match=r"entropy=True"):
        recorder.statistics().store.token_entropy(0, "a")

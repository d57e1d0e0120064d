"""Rank agreement of metrics with effects, by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest

from moe_route.analysis import AnalysisError, rank_agreement


def test_is_the_mean_of_the_layers_spearman():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    metric, effect = rng.integers(0, 5, (4, 10)).astype(float), rng.normal(size=(2, 4, 10))
    effect[0, 1, 3] = np.nan
    found = rank_agreement({"frequency": metric}, effect, groups=["a", "b"])
    for g in range(2):
        wanted = []
        for layer in range(4):
            seen = ~np.isnan(effect[g, layer])
            wanted.append(stats.spearmanr(metric[layer, seen], effect[g, layer, seen]).statistic)
        np.testing.assert_allclose(found.by_layer[0, g], wanted)
        assert found.rho[0, g] == pytest.approx(np.mean(wanted))
    assert found.experts.tolist() == [39, 40]


def test_layers_are_not_mixed():
    """Two layers of different level, in which the metric ranks the effects backwards."""
    effect = np.array([[1.0, 2.0, 3.0], [101.0, 102.0, 103.0]])
    found = rank_agreement({"m": np.array([[3.0, 2.0, 1.0], [33.0, 32.0, 31.0]])}, effect)
    assert found.rho[0, 0] == pytest.approx(-1)


def test_p_values_hold_what_they_say():
    rng = np.random.default_rng(1)
    metric = {str(i): rng.normal(size=(3, 8)) for i in range(200)}
    found = rank_agreement(metric, rng.normal(size=(3, 8)), permutations=200)
    assert 2 <= (found.p_value < 0.05).sum() <= 20
    effect = np.arange(24.0).reshape(3, 8)
    assert rank_agreement({"m": effect**2}, effect, permutations=999).p_value[0, 0] == 0.001


def test_shown_and_written():
    found = rank_agreement({"m": np.ones((2, 4))}, np.arange(8.0).reshape(2, 4), groups=["x"])
    assert np.isnan(found.rho[0, 0])
    assert found.to_dict()["rho"] == [[None]]
    assert "Spearman" in repr(found)
    assert len(found.to_pandas()) == 1


@pytest.mark.parametrize(
    ("metrics", "effects", "groups", "message"),
    [
        ({}, np.ones((2, 3)), None, "no metric"),
        ({"m": np.ones((2, 4))}, np.ones((2, 3)), None, "same layers"),
        ({"m": np.ones(2)}, np.ones((2, 3)), None, "must be"),
        ({"m": np.ones((2, 3))}, np.ones((2, 3)), ["a", "b"], "names"),
    ],
)
def test_bad_input(metrics, effects, groups, message):
    with pytest.raises(AnalysisError, match=message):
        rank_agreement(metrics, effects, groups=groups)

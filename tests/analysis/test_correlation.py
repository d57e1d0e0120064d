"""Correlations with covariates and blocks: against regressions and loops over all orders, and coverage of intervals."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest
import scipy.stats

from moe_route import analysis
from moe_route.analysis import AnalysisError, Divergence

NAMES = tuple("abcdef")
SCRIPT = dict(zip(NAMES, ["Latn", "Latn", "Cyrl", "Cyrl", "Latn", "Deva"], strict=True))


def divergence_of(values, pairs=None):
    values = np.asarray(values, float)
    names = tuple(map(str, range(values.shape[1])))
    how = ("jsd", "pooled", 0) if pairs is None else ("jsd", "paired", pairs.shape[1])
    return Divergence(values, NAMES[: len(values)], "en", names, *how, pair_values=pairs)


RNG = np.random.default_rng(0)
X, Y, FERTILITY = RNG.random((6, 3)), RNG.random(6), RNG.random(6) * 40
SCORES = dict(zip(NAMES, Y, strict=True))


def residuals(values, *columns):
    design = np.stack([np.ones(len(values)), *columns], axis=1)
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def test_partial_correlations_are_those_of_residuals():
    fertility = dict(zip(NAMES, FERTILITY, strict=True))
    found = analysis.correlation(divergence_of(X), SCORES, covariates={"fertility": fertility})
    ranks = scipy.stats.rankdata
    for layer in range(3):
        expected = np.corrcoef(residuals(X[:, layer], FERTILITY), residuals(Y, FERTILITY))[0, 1]
        assert found.pearson[layer] == pytest.approx(expected)
        rank_of = ranks(FERTILITY)
        expected = np.corrcoef(residuals(ranks(X[:, layer]), rank_of), residuals(ranks(Y), rank_of))[0, 1]
        assert found.spearman[layer] == pytest.approx(expected)
    assert found.covariates == ("fertility",)
    assert "given fertility" in repr(found)
    json.dumps(found.to_dict(), allow_nan=False)
    labels = analysis.correlation(divergence_of(X), SCORES, covariates={"script": SCRIPT}).pearson[0]
    dummies = [np.array([SCRIPT[name] == kind for name in NAMES], float) for kind in ("Cyrl", "Deva")]
    assert labels == pytest.approx(np.corrcoef(residuals(X[:, 0], *dummies), residuals(Y, *dummies))[0, 1])


def test_p_values_permute_residuals_as_freedman_and_lane_do():
    found = analysis.correlation(
        divergence_of(X), SCORES, covariates={"fertility": dict(zip(NAMES, FERTILITY, strict=True))}
    )
    rest = residuals(Y, FERTILITY)
    fitted = Y - rest
    drawn = []
    for order in permutations(range(6)):
        new = fitted + rest[list(order)]
        drawn.append([np.corrcoef(residuals(x, FERTILITY), residuals(new, FERTILITY))[0, 1] for x in X.T])
    drawn = np.abs(drawn)
    reach = np.abs(found.pearson) - 1e-12
    np.testing.assert_allclose(found.p_value, (drawn >= reach).mean(0))
    np.testing.assert_allclose(found.p_corrected, (drawn.max(1)[:, None] >= reach).mean(0))
    assert found.orders == 720


def test_p_values_of_spearman():
    found = analysis.correlation(divergence_of(X), SCORES)
    drawn = np.abs([[scipy.stats.spearmanr(x, Y[list(o)])[0] for x in X.T] for o in permutations(range(6))])
    np.testing.assert_allclose(found.spearman_p_value, (drawn >= np.abs(found.spearman) - 1e-12).mean(0))
    np.testing.assert_allclose(
        found.spearman_p_corrected, (drawn.max(1)[:, None] >= np.abs(found.spearman) - 1e-12).mean(0)
    )


def test_blocks_restrict_the_orders():
    blocks = dict(zip(NAMES, "xxyyzz", strict=True))
    within = analysis.correlation(divergence_of(X), SCORES, blocks=blocks)
    whole = analysis.correlation(divergence_of(X), SCORES, blocks=blocks, exchange="blocks")
    for found, orders, number in (
        (within, [o for o in permutations(range(6)) if all(a // 2 == i // 2 for i, a in enumerate(o))], 8),
        (whole, [o for o in permutations(range(6)) if all(o[i] // 2 == o[i + 1] // 2 for i in (0, 2, 4))], 48),
    ):
        assert len(orders) == found.orders == number
        drawn = np.abs([[np.corrcoef(x, Y[list(o)])[0, 1] for x in X.T] for o in orders])
        np.testing.assert_allclose(found.p_value, (drawn >= np.abs(found.pearson) - 1e-12).mean(0))
    assert "within blocks" in repr(within)
    drawn = analysis.correlation(divergence_of(X), SCORES, blocks=blocks, exchange="blocks", permutations=40)
    assert drawn.orders == 41
    np.testing.assert_allclose(drawn.p_value, whole.p_value, atol=0.3)


def test_refuses_with_the_fix():
    found = divergence_of(X)
    many = {str(n): dict(zip(NAMES, RNG.random(6), strict=True)) for n in range(5)}
    cases = [
        ({"covariates": {"fertility": {"a": 1.0}}}, "no fertility for b, c"),
        ({"covariates": {"script": {"a": "Latn"}}}, "no script for b, c"),
        ({"covariates": many}, "too few for these covariates"),
        ({"blocks": {"a": "x"}}, "no block for b, c"),
        ({"blocks": dict(zip(NAMES, NAMES, strict=True))}, "nothing to exchange"),
        ({"exchange": "all"}, "exchange must be"),
        ({"covariates": {"x": dict.fromkeys(NAMES, float("nan"))}}, "xs must be finite"),
    ]
    for arguments, message in cases:
        with pytest.raises(AnalysisError, match=message):
            analysis.correlation(found, SCORES, **arguments)
    with pytest.raises(AnalysisError, match="needs paired"):
        analysis.correlation(found, SCORES).interval()
    with pytest.raises(AnalysisError, match='"pearson" or "spearman"'):
        analysis.correlation(found, SCORES).interval(of="kendall")


def test_intervals_over_groups_and_sentences_cover_the_truth():
    held, wide = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = rng.multivariate_normal([0, 0], [[1, -0.7], [-0.7, 1]], 12)
        pairs = 0.5 + truth[:, 0][:, None, None] * 0.1 + rng.normal(0, 0.05, (12, 20, 1))
        names = tuple(map(str, range(12)))
        found = Divergence(pairs.mean(1), names, "en", ("0",), "jsd", "paired", 20, pair_values=pairs)
        scores = dict(zip(names, truth[:, 1], strict=True))
        low, high = analysis.correlation(found, scores, permutations=50).interval(0.9, resamples=200, seed=seed)
        held += int(low[0] <= -0.7 <= high[0])
        wide += int(high[0] - low[0] > 1.5)
    assert held >= 48
    assert wide < 10


def test_intervals_of_partial_correlations():
    pairs = X[:, None] + RNG.normal(0, 0.02, (6, 15, 3))
    fertility = dict(zip(NAMES, FERTILITY, strict=True))
    found = analysis.correlation(divergence_of(X, pairs), SCORES, covariates={"fertility": fertility})
    for of in ("pearson", "spearman"):
        low, high = found.interval(0.8, of=of, resamples=100)
        assert (low <= high).all()
        assert (np.abs([low, high]) <= 1).all()

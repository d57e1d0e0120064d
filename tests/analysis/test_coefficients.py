"""Ranks by hand, and correlation coefficients against scipy."""

from __future__ import annotations

import numpy as np
import scipy.stats

from moe_route.analysis.stats import centered, pearson, ranks


def test_ranks_of_equal_values_are_their_mean():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (5, 3, 11)).astype(float)
    below, alike = ((compared(values[..., None], values[..., None, :])) for compared in (np.greater, np.equal))
    np.testing.assert_array_equal(ranks(values), below.sum(-1) + (alike.sum(-1) + 1) / 2)
    np.testing.assert_array_equal(ranks(np.array([3.0, 1.0, 3.0])), [2.5, 1.0, 2.5])
    assert ranks(np.zeros((2, 0))).shape == (2, 0)


def test_pearson_along_the_last_axis():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(4, 9)), rng.normal(size=(4, 9))
    expected = [scipy.stats.pearsonr(x, y)[0] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(pearson(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(pearson(a[0], b)[0], expected[0], rtol=1e-12)


def test_constant_values_have_no_correlation():
    assert np.isnan(pearson(np.full(5, 1 / 3), np.arange(5.0)))
    assert np.isnan(pearson(np.array([1.0, np.nan, 2.0]), np.arange(3.0)))
    assert not centered(np.full(7, 0.1)).any()

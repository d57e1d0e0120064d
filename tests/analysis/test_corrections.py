"""Corrections of p-values against the definitions, written as loops, and p-values of few items by value."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats

from moe_route.analysis import AnalysisError, benjamini_hochberg, holm
from moe_route.analysis.stats import draw_items, interval_of, normal_of_t, p_value_of, t_of_normal


def test_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(benjamini_hochberg([0.01, 0.04, 0.03]), [0.03, 0.04, 0.04])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])


def test_against_loops_with_nan_and_any_shape():
    p = np.random.default_rng(0).random((4, 6)) ** 3
    p[1, 2] = p[3, 0] = np.nan
    tests = sorted((value, place) for place, value in enumerate(p.reshape(-1)) if not np.isnan(value))
    n, expected = len(tests), np.full((2, p.size), np.nan)
    for k, (_, place) in enumerate(tests):
        expected[0, place] = min(1, max((n - j) * tests[j][0] for j in range(k + 1)))
        expected[1, place] = min(n / (j + 1) * tests[j][0] for j in range(k, n))
    np.testing.assert_allclose(holm(p), expected[0].reshape(p.shape))
    np.testing.assert_allclose(benjamini_hochberg(p), expected[1].reshape(p.shape))
    assert holm([]).shape == (0,)


@pytest.mark.parametrize("correct", [holm, benjamini_hochberg])
def test_what_is_no_p_value_is_refused(correct):
    with pytest.raises(AnalysisError, match="between 0 and 1"):
        correct([0.1, 1.2])


def test_a_bootstrap_p_value_agrees_with_the_interval_and_with_the_t_test():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.3, 0.5, 0.9):
        values = rng.normal(shift, 1, 25)
        drawn = draw_items(25, 4000, 0) @ values / 25
        low, high = interval_of(drawn, 25, 0.95)
        p = p_value_of(drawn, 25)
        assert (p < 0.05) == (low > 0 or high < 0)
        assert p == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue, abs=0.06)
    assert np.isnan(p_value_of(drawn, 1))


def test_two_items_have_the_tails_of_cauchys_distribution():
    """Student's t at one degree of freedom, whose quantiles are tangents."""
    assert t_of_normal(NormalDist().inv_cdf(0.975), 1) == pytest.approx(math.tan(0.475 * math.pi))
    assert normal_of_t(math.tan(0.4 * math.pi), 1) == pytest.approx(NormalDist().inv_cdf(0.9))
    reach = -NormalDist().inv_cdf(1 / 1001) / math.sqrt(2)
    assert p_value_of(np.linspace(1, 2, 1000), 2) == pytest.approx(1 - 2 * math.atan(reach) / math.pi)
    low, high = interval_of(np.linspace(0, 1, 100_001), 2, 0.5)  # a quartile of Cauchy's is 1
    assert (low, high) == pytest.approx((NormalDist().cdf(-math.sqrt(2)), NormalDist().cdf(math.sqrt(2))), abs=1e-5)
    assert p_value_of(np.zeros(10), 5) == 1.0

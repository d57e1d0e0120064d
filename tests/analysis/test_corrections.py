"""Corrections for many tests, against the definitions in plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from moe_route.analysis import AnalysisError, benjamini_hochberg, holm


def test_by_hand():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.02, 0.04, 0.04, 0.02])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, 0.06, 0.02])


def test_rejections_are_those_of_the_step_up_and_step_down_rules():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, limit = rng.uniform(size=12) ** 3, 0.1
        ordered = np.sort(p)
        passing = [i for i in range(12) if ordered[i] <= limit * (i + 1) / 12]
        assert (benjamini_hochberg(p) <= limit).sum() == (max(passing) + 1 if passing else 0)
        failing = [i for i in range(12) if ordered[i] > limit / (12 - i)]
        assert (holm(p) <= limit).sum() == min(failing, default=12)


def test_shape_and_nan_stay():
    p = np.array([[0.01, np.nan], [0.5, 0.02]])
    found = benjamini_hochberg(p)
    np.testing.assert_allclose(found, [[0.03, np.nan], [0.5, 0.03]])
    assert np.isnan(holm(np.array([np.nan]))).all()
    assert benjamini_hochberg(np.zeros(0)).shape == (0,)
    with pytest.raises(AnalysisError, match="between 0 and 1"):
        holm(np.array([1.5]))

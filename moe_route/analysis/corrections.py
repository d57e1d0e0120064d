"""Corrections of p-values for the number of tests: Holm, and Benjamini and Hochberg."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError

__all__ = ["benjamini_hochberg", "holm"]


def holm(p_values: Any) -> np.ndarray:
    """Adjust p-values so that the chance of any false finding stays below the level [Holm 1979].

    With n tests, the k-th smallest p-value becomes the largest of ``(n - j + 1) * p_(j)`` over j <= k, at most 1. It
    holds whatever the dependence between the tests.

    Args:
        p_values: array of any shape, in [0, 1]; all its cells are one family of tests. NaN cells are not tests.

    Returns float64 of the same shape, NaN where the input is. Raises ``AnalysisError`` for values outside [0, 1].
    """
    return _adjusted(p_values, lambda p: np.maximum.accumulate(p * np.arange(len(p), 0, -1)))


def benjamini_hochberg(p_values: Any) -> np.ndarray:
    """Adjust p-values so that the expected share of false findings among the findings stays below the level.

    With n tests, the k-th smallest p-value becomes the smallest of ``n / j * p_(j)`` over j >= k, at most 1 [Benjamini
    and Hochberg 1995]. It holds for tests that are independent or positively dependent.

    Args:
        p_values: array of any shape, in [0, 1]; all its cells are one family of tests. NaN cells are not tests.

    Returns float64 of the same shape, NaN where the input is. Raises ``AnalysisError`` for values outside [0, 1].
    """
    return _adjusted(p_values, lambda p: np.minimum.accumulate((p * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1])


def _adjusted(p_values: Any, of_sorted: Any) -> np.ndarray:
    """Apply a correction, given as a function of the p-values in increasing order."""
    p = np.asarray(p_values, dtype=np.float64)
    seen = np.flatnonzero(~np.isnan(p))
    tested = p.reshape(-1)[seen]
    if ((tested < 0) | (tested > 1)).any():
        raise AnalysisError("p-values must lie between 0 and 1: pass p-values, not statistics or logarithms")
    order = np.argsort(tested, kind="stable")
    adjusted = np.full(p.size, np.nan)
    adjusted[seen[order]] = np.minimum(of_sorted(tested[order]), 1.0)
    return adjusted.reshape(p.shape)

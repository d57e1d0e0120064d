"""Correct p-values for the number of tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moe_route.analysis.inputs import AnalysisError

__all__ = ["benjamini_hochberg", "holm"]


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjust p-values so that a limit on them bounds the false discovery rate (Benjamini and Hochberg 1995).

    The i-th smallest of m p-values becomes ``min over j >= i of m * p_j / j``, at most 1. The array may have any shape;
    NaN stays and is not counted as a test. Raises ``AnalysisError`` for values outside [0, 1].
    """
    return _adjusted(p, lambda ordered, rank: np.minimum.accumulate((len(ordered) * ordered / rank)[::-1])[::-1])


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust p-values so that a limit on them bounds the chance of any false discovery (Holm 1979).

    The i-th smallest of m p-values becomes ``max over j <= i of (m - j + 1) * p_j``, at most 1. Shape, NaN and errors
    are as in ``benjamini_hochberg``.
    """
    return _adjusted(p, lambda ordered, rank: np.maximum.accumulate((len(ordered) - rank + 1) * ordered))


def _adjusted(p: np.ndarray, rule: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    values = np.asarray(p, np.float64)
    seen = ~np.isnan(values)
    tests = values[seen]
    if ((tests < 0) | (tests > 1)).any():
        raise AnalysisError("p-values lie between 0 and 1")
    order = np.argsort(tests, kind="stable")
    adjusted, found = np.empty(len(tests)), np.full(values.shape, np.nan)
    adjusted[order] = np.minimum(rule(tests[order], np.arange(1, len(tests) + 1)), 1.0)
    found[seen] = adjusted
    return found

"""The best of several noisy values, and what it comes to by chance alone."""

from __future__ import annotations

import numpy as np

from moe_route.analysis.inputs import AnalysisError

__all__ = ["expected_maximum"]


def expected_maximum(changes: np.ndarray) -> np.ndarray:
    """Expected largest of values [..., R] whose signs are random: what the maximum comes to without any gain.

    If routes neither help nor hurt, a change is as likely positive as negative, and only its size is known. With sizes
    ``a_1 >= ... >= a_R``, the largest signed value is ``a_i`` if the first i - 1 signs are negative and the i-th is
    positive, and ``-a_R`` if all are negative: ``sum_i a_i / 2^i - a_R / 2^R``, exactly.

    Raises ``AnalysisError`` for an array without values on the last axis, and for NaN and infinite ones.
    """
    values = np.asarray(changes, np.float64)
    if not values.ndim or not values.shape[-1]:
        raise AnalysisError("there is no value to take the largest of")
    if not np.isfinite(values).all():
        raise AnalysisError("changes must be finite: leave out what was not measured")
    sizes = -np.sort(-np.abs(values), axis=-1)
    halves = 0.5 ** np.arange(1, sizes.shape[-1] + 1)
    return sizes @ halves - sizes[..., -1] * halves[-1]

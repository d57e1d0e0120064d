"""Pearson and Spearman correlation coefficients: ranks, and values that are centered and of unit length."""

from __future__ import annotations

import numpy as np

__all__ = ["centered", "pearson", "ranks", "unit_length"]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis, float64 [..., n]; equal values get the mean of their ranks."""
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, -1)
    begins = np.ones(ordered.shape, bool)  # runs of equal values
    begins[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    ends = np.ones(ordered.shape, bool)
    ends[..., :-1] = begins[..., 1:]
    place = np.arange(1, values.shape[-1] + 1)
    first = np.maximum.accumulate(np.where(begins, place, 0), -1)
    last = np.minimum.accumulate(np.where(ends, place, place.size)[..., ::-1], -1)[..., ::-1]
    found = np.empty(values.shape)
    np.put_along_axis(found, order, (first + last) / 2, -1)
    return found


def centered(values: np.ndarray) -> np.ndarray:
    """The values minus their mean, of unit length along the last axis; all zero if they do not vary."""
    return unit_length(values - values.mean(-1, keepdims=True), values)


def unit_length(moved: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``moved`` at unit length along the last axis; all zero where it is only the rounding of ``values``."""
    length = np.sqrt((moved * moved).sum(-1, keepdims=True))
    varies = length > 1e-12 * np.abs(values).max(-1, keepdims=True)
    return np.divide(moved, length, out=np.zeros(moved.shape), where=varies)


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation along the last axis, float64 [...]; NaN where one of them does not vary or holds a NaN."""
    x, y = centered(a), centered(b)
    return np.where(x.any(-1) & y.any(-1), np.clip((x * y).sum(-1), -1.0, 1.0), np.nan)

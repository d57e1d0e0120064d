"""Pearson and Spearman correlation coefficients: ranks, and values that are centered and of unit length."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError, check_draws

__all__ = [
    "LINKAGES",
    "Linkage",
    "RESAMPLES",
    "benjamini_hochberg",
    "centered",
    "clusters",
    "draw_items",
    "expected_maximum",
    "holm",
    "interval_of",
    "leaves",
    "linkage",
    "p_value_of",
    "pearson",
    "ranks",
    "resampled_means",
    "t_of_normal",
    "unit_length",
]


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


# Corrections of p-values for the number of tests: Holm, and Benjamini and Hochberg.


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


# Bootstrap over items: resampling weights, and intervals that are wide enough for few items.

RESAMPLES = 4000


def draw_items(items: int, resamples: int, seed: int) -> np.ndarray:
    """float64 [resamples, items]: how often each item is drawn in a sample with replacement of the same size."""
    check_draws(resamples, "resamples")
    drawn = np.random.default_rng(seed).integers(0, items, (resamples, items))
    weights = np.zeros((resamples, items))
    np.add.at(weights, (np.arange(resamples)[:, None], drawn), 1.0)
    return weights


def resampled_means(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means of ``values`` [items, ...] under each row of ``weights`` [resamples, items]: [resamples, ...].

    NaN values are left out.
    """
    flat = values.reshape(len(values), -1)
    seen = ~np.isnan(flat)
    total, count = weights @ np.where(seen, flat, 0.0), weights @ seen
    means = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return means.reshape(len(weights), *values.shape[1:])


def interval_of(resampled: np.ndarray, items: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval (low, high) over axis 0 of a statistic computed from resampled items.

    The percentiles are moved outwards, by as much as a t interval is wider than a normal one with the standard
    deviation of the resampled values (the expanded percentile interval of Hesterberg 2015, arXiv 1411.5279). Plain 95 %
    percentile intervals contain the truth in about 92 of 100 cases with 25 items. NaN where a resample is undefined, or
    with a single item.
    """
    if not 0 < level < 1:
        raise AnalysisError(f"level must lie between 0 and 1, not {level}")
    ends = np.full((2, *resampled.shape[1:]), np.nan)
    if items > 1:
        tail = NormalDist().cdf(-_t_quantile((1 + level) / 2, items - 1) * np.sqrt(items / (items - 1)))
        seen = ~np.isnan(resampled).any(0)
        ends[:, seen] = np.quantile(resampled[:, seen], [tail, 1 - tail], axis=0)
    return ends[0], ends[1]


def p_value_of(resampled: np.ndarray, items: int) -> float:
    """Two-sided p-value of a statistic of items against 0, from its resampled values [resamples].

    It is 1 minus the largest level at which the interval of ``interval_of`` leaves out 0, and at least about
    2 / (resamples + 1). NaN with a single item, or where a resample is undefined.
    """
    if items < 2 or np.isnan(resampled).any():
        return float("nan")
    beyond = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    share = (beyond + 1) / (len(resampled) + 1)
    if share >= 0.5:
        return 1.0
    reach = -NormalDist().inv_cdf(share) * np.sqrt((items - 1) / items)
    low, high = 1e-12, 1.0  # of the p-value, whose t quantile falls as it grows
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if _t_quantile(1 - middle / 2, items - 1) < reach else (middle, high)
    return high


def _t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t."""
    return float(t_of_normal(np.asarray(NormalDist().inv_cdf(probability)), freedom))


def t_of_normal(z: np.ndarray, freedom: int) -> np.ndarray:
    """Quantile of Student's t at the probability of each normal quantile (Abramowitz and Stegun 26.7.5).

    For the usual levels it is within 0.1 percent from five degrees of freedom on.
    """
    square = np.asarray(z, dtype=np.float64) ** 2
    terms = (
        (square + 1) / 4,
        ((5 * square + 16) * square + 3) / 96,
        (((3 * square + 19) * square + 17) * square - 15) / 384,
        ((((79 * square + 776) * square + 1482) * square - 1920) * square - 945) / 92160,
    )
    factor = 1 + sum(term / freedom**power for power, term in enumerate(terms, 1))
    widened: np.ndarray = z * factor
    return widened


# Hierarchical clustering of groups: trees by linkage, the order of their leaves, and clusters.

Linkage = Literal["complete", "average", "single"]
LINKAGES = ("complete", "average", "single")


def linkage(distance: np.ndarray, method: Linkage = "complete") -> np.ndarray:
    """Merge groups to a tree, always the two nearest clusters.

    The distance of two clusters is that of their farthest members ("complete"), the mean over pairs of members
    ("average", UPGMA), or that of their nearest members ("single").

    Args:
        distance: float64 [G, G], symmetric, without NaN.
        method: "complete", "average" or "single".

    Returns float64 [G - 1, 4] in the form of ``scipy.cluster.hierarchy``: the two clusters that merge, their distance,
    and the number of groups in the new cluster, which gets the number G + step.
    """
    if method not in LINKAGES:
        raise AnalysisError(f"no linkage {method!r}: use one of {', '.join(LINKAGES)}")
    d = np.array(distance, dtype=np.float64)
    if d.ndim != 2 or d.shape[0] != d.shape[1] or not np.isfinite(d).all() or not np.allclose(d, d.T):
        raise AnalysisError("a tree needs a symmetric matrix of finite distances: choose layers that saw tokens")
    size = len(d)
    np.fill_diagonal(d, np.inf)
    numbers, members = list(range(size)), [1] * size
    merges = np.zeros((max(size - 1, 0), 4))
    for step in range(size - 1):
        a, b = sorted(map(int, np.unravel_index(int(d.argmin()), d.shape)))
        together = members[a] + members[b]
        merges[step] = *sorted((numbers[a], numbers[b])), d[a, b], together
        if method == "average":
            joined = (members[a] * d[a] + members[b] * d[b]) / together
        else:
            joined = np.maximum(d[a], d[b]) if method == "complete" else np.minimum(d[a], d[b])
        d[a] = d[:, a] = joined
        d[a, a] = np.inf
        d[b] = d[:, b] = np.inf
        numbers[a], members[a] = size + step, together
    return merges


def leaves(merges: np.ndarray) -> list[int]:
    """The leaves of a tree in the form of ``linkage``, in an order in which no branches cross."""
    return _merged(merges, len(merges))[0]


def clusters(merges: np.ndarray, number: int) -> list[list[int]]:
    """The leaves of a tree in this number of clusters, by undoing its last merges."""
    size = len(merges) + 1
    if not 1 <= number <= size:
        raise AnalysisError(f"there can be 1 to {size} clusters of so many groups, not {number}")
    return sorted(map(sorted, _merged(merges, size - number)))


def _merged(merges: np.ndarray, steps: int) -> list[list[int]]:
    """The clusters after the first merges."""
    size = len(merges) + 1
    found = {leaf: [leaf] for leaf in range(size)}
    for step, (a, b, _, _) in enumerate(merges[:steps].tolist()):
        found[size + step] = found.pop(int(a)) + found.pop(int(b))
    return list(found.values())


# The best of several noisy values, and what it comes to by chance alone.


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

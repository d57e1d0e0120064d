"""Correlation, corrections of p-values, the bootstrap, trees of groups, and the best of noisy values.

scipy is imported where it is used, since importing it takes most of a second.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError, check_draws
from moe_route.analysis.measures import ratio


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis, float64 [..., n]; equal values get the mean of their ranks."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=-1))


def centered(values: np.ndarray) -> np.ndarray:
    """The values minus their mean, of unit length along the last axis; all zero if they do not vary."""
    return unit_length(values - values.mean(-1, keepdims=True), values)


def unit_length(moved: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``moved`` at unit length along the last axis; all zero where it is only the rounding of ``values``."""
    length = np.sqrt((moved * moved).sum(-1, keepdims=True))
    varies = length > 1e-12 * np.abs(values).max(-1, keepdims=True)
    return ratio(moved, np.where(varies, length, 0.0), empty=0.0)


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation along the last axis, float64 [...]; NaN where one of them does not vary or holds a NaN."""
    x, y = centered(a), centered(b)
    return np.where(x.any(-1) & y.any(-1), np.clip((x * y).sum(-1), -1.0, 1.0), np.nan)


# ---- corrections of p-values for the number of tests


def holm(p_values: Any) -> np.ndarray:
    """Adjust p-values so that the chance of any false finding stays below the level [Holm 1979].

    With n tests, the k-th smallest p-value becomes the largest of ``(n - j + 1) * p_(j)`` over j <= k, at most 1. It
    holds whatever the dependence between the tests.

    Args:
        p_values: array of any shape, in [0, 1]; all its cells are one family of tests. NaN cells are not tests.

    Returns float64 of the same shape, NaN where the input is. Raises ``AnalysisError`` for values outside [0, 1].
    """

    def in_steps(p: np.ndarray) -> np.ndarray:
        order = np.argsort(p, kind="stable")
        adjusted = np.empty(len(p))
        adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
        return adjusted

    return _adjusted(p_values, in_steps)


def benjamini_hochberg(p_values: Any) -> np.ndarray:
    """Adjust p-values so that the expected share of false findings among the findings stays below the level.

    With n tests, the k-th smallest p-value becomes the smallest of ``n / j * p_(j)`` over j >= k, at most 1 [Benjamini
    and Hochberg 1995]. It holds for tests that are independent or positively dependent.

    Args:
        p_values: array of any shape, in [0, 1]; all its cells are one family of tests. NaN cells are not tests.

    Returns float64 of the same shape, NaN where the input is. Raises ``AnalysisError`` for values outside [0, 1].
    """
    from scipy.stats import false_discovery_control

    return _adjusted(p_values, false_discovery_control)


def _adjusted(p_values: Any, correction: Any) -> np.ndarray:
    """Apply a correction, given as a function of the p-values, to those that are not NaN."""
    p = np.asarray(p_values, dtype=np.float64)
    seen = ~np.isnan(p)
    if ((p[seen] < 0) | (p[seen] > 1)).any():
        raise AnalysisError("p-values must lie between 0 and 1: pass p-values, not statistics or logarithms")
    adjusted = np.full(p.shape, np.nan)
    if seen.any():
        adjusted[seen] = np.minimum(correction(p[seen]), 1.0)
    return adjusted


# ---- bootstrap over items: weights, and intervals that are wide enough for few items

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
    means = ratio(weights @ np.where(seen, flat, 0.0), weights @ seen)
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
    from scipy import stats

    ends = np.full((2, *resampled.shape[1:]), np.nan)
    if items > 1:
        tail = stats.norm.sf(stats.t.ppf((1 + level) / 2, items - 1) * np.sqrt(items / (items - 1)))
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
    from scipy import stats

    return float(2 * stats.t.sf(stats.norm.isf(share) * np.sqrt((items - 1) / items), items - 1))


def t_of_normal(z: Any, freedom: int) -> np.ndarray:
    """Quantile of Student's t that is exceeded as rarely as each normal quantile from 0 on."""
    from scipy import stats

    return np.asarray(stats.t.isf(stats.norm.sf(z), freedom))


def normal_of_t(t: Any, freedom: int) -> np.ndarray:
    """Normal quantile that is exceeded as rarely as each quantile of Student's t from 0 on."""
    from scipy import stats

    return np.asarray(stats.norm.isf(stats.t.sf(t, freedom)))


# ---- trees of groups by linkage, the order of their leaves, and clusters

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
    if len(d) < 2:
        return np.zeros((0, 4))
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    return np.asarray(hierarchy.linkage(squareform((d + d.T) / 2, checks=False), method))


def leaves(merges: np.ndarray) -> list[int]:
    """The leaves of a tree in the form of ``linkage``, in an order in which no branches cross."""
    from scipy.cluster import hierarchy

    return [int(leaf) for leaf in hierarchy.leaves_list(merges)] if len(merges) else [0]


def clusters(merges: np.ndarray, number: int) -> list[list[int]]:
    """The leaves of a tree in this number of clusters, by undoing its last merges."""
    from scipy.cluster import hierarchy

    size = len(merges) + 1
    if not 1 <= number <= size:
        raise AnalysisError(f"there can be 1 to {size} clusters of so many groups, not {number}")
    of_leaf = hierarchy.cut_tree(merges, number)[:, 0] if len(merges) else np.zeros(1, int)
    return sorted(np.flatnonzero(of_leaf == cluster).tolist() for cluster in range(number))


# ---- the best of several noisy values, by chance alone


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

"""Bootstrap over items: resampling weights, and intervals that are wide enough for few items."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from moe_route.analysis.inputs import AnalysisError, check_draws

__all__ = ["RESAMPLES", "draw_items", "interval_of", "p_value_of", "resampled_means", "t_of_normal"]

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

"""Corrections for short texts: a distribution that is estimated from few tokens looks sharper than it is.

So even two samples of one distribution diverge, and the fewer tokens they have, the more. The functions here take
counts of selections (how many tokens of a sequence chose each expert), from which this bias can be estimated. Router
scores over all experts (kind "full") have no such count; for them the floor of ``analysis.divergence`` is the means.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError

__all__ = ["jackknife_divergence", "jackknife_entropy", "miller_madow", "random_partners", "rarefied"]


def miller_madow(counts: Any, top_k: Any = 1) -> np.ndarray:
    """Entropy of counts in nats, with the first-order bias of the plain estimate added back [Miller 1955].

    ``H + (S - k) / (2 N)``: S is the number of experts that were chosen, N the number of selections, and k = ``top_k``
    the number of experts that a token chooses. With k = 1 it is Miller's formula. With more, the k experts of a token
    differ, so the count of expert e varies by ``N p_e (1 - k p_e)`` instead of ``N p_e (1 - p_e)``.

    Args:
        counts: [..., E], whole numbers from 0.
        top_k: k, broadcast against the leading axes.

    Returns float64 [...]; NaN without selections.
    """
    a = _checked(counts)
    total = a.sum(-1)
    seen = total > 0
    p = np.divide(a, total[..., None], out=np.full(a.shape, np.nan), where=seen[..., None])
    added = np.divide((a > 0).sum(-1) - np.asarray(top_k), 2.0 * total, out=np.zeros(total.shape), where=seen)
    return _entropy(p) + np.maximum(added, 0.0)


def jackknife_entropy(counts: Any) -> np.ndarray:
    """Entropy of counts in nats by the jackknife over single selections [Zahl 1977].

    ``N H - (N - 1) mean_i H_(-i)``, where H_(-i) leaves out selection i of N. All selections count as independent
    draws: with more than one expert per token that adds a little too much, about ``(k - 1) / (2 N)``.

    Args:
        counts: [..., E], whole numbers from 0.

    Returns float64 [...]; NaN for fewer than two selections.
    """
    a = _checked(counts)
    total = a.sum(-1)
    left_out = _entropies_without_one(a)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(a > 0, a * left_out, 0.0).sum(-1) / total
        found = total * _entropy(a / total[..., None]) - (total - 1) * mean
    return np.where(total > 1, found, np.nan)


def jackknife_divergence(first: Any, second: Any, num_experts: Any = None) -> np.ndarray:
    """Divergence D of two samples by the jackknife over the single selections of both.

    ``D - (N1 - 1) (mean_i D_(-i) - D) - (N2 - 1) (mean_j D_(-j) - D)``, where D_(-i) leaves out selection i of the
    first sample and D_(-j) selection j of the second. It can fall below 0. The note on independent draws of
    ``jackknife_entropy`` applies.

    Args:
        first, second: counts [..., E], whole numbers from 0.
        num_experts: number of experts, broadcast against the leading axes, for the entropy-normalized D. Without it,
            the plain Jensen-Shannon divergence in nats.

    Returns float64 [...]; NaN with fewer than two selections in a sample, or where D is undefined.
    """
    a, b = _checked(first), _checked(second)
    if a.shape[-1] != b.shape[-1]:
        raise AnalysisError(f"the samples count {a.shape[-1]} and {b.shape[-1]} experts: give both for the same layer")
    if num_experts is not None and ((np.maximum(*np.broadcast_arrays(a, b)) > 0).sum(-1) > num_experts).any():
        raise AnalysisError("more experts were chosen than num_experts: check num_experts")
    totals = [one.sum(-1) for one in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        p, q = (one / total[..., None] for one, total in zip((a, b), totals, strict=True))
        h_p, h_q = _entropy(p), _entropy(q)
        most = None if num_experts is None else np.log(np.asarray(num_experts, dtype=np.float64))
        found = plain = _normalized(_entropy((p + q) / 2), (h_p + h_q) / 2, most)
        for (one, total), other, h_other in (((a, totals[0]), q, h_q), ((b, totals[1]), p, h_p)):
            mean_entropy = (_entropies_without_one(one) + h_other[..., None]) / 2
            middle = _middle_entropies_without_one(one, other)
            left_out = _normalized(middle, mean_entropy, None if most is None else most[..., None])
            mean = np.where(one > 0, one * left_out, 0.0).sum(-1) / total
            found = found - (total - 1) * (mean - plain)
    return np.where((totals[0] > 1) & (totals[1] > 1), found, np.nan)


def rarefied(counts: Any, size: Any, rng: np.random.Generator) -> np.ndarray:
    """Draw ``size`` of the counted selections without replacement: int64 [..., E] (rarefaction).

    Args:
        counts: [..., E], whole numbers from 0.
        size: number of selections to draw, broadcast against the leading axes; at most the number that there are.
        rng: the generator to draw from.

    Which selections belong to one token is not known from counts, so each is drawn by itself.
    """
    a = _checked(counts).astype(np.int64)
    wanted = np.broadcast_to(np.asarray(size, dtype=np.int64), a.shape[:-1]).copy()
    left = a.sum(-1)
    if (wanted > left).any() or (wanted < 0).any():
        raise AnalysisError("more selections are to be drawn than were counted: ask for fewer tokens")
    drawn = np.zeros_like(a)
    for expert in range(a.shape[-1]):
        here = a[..., expert]
        left = left - here
        drawn[..., expert] = rng.hypergeometric(here, left, wanted)
        wanted -= drawn[..., expert]
    return drawn


def random_partners(items: int, number: int, seed: int) -> np.ndarray:
    """int64 [r, items]: r derangements, which give every item r others; r is ``number``, or fewer with few items.

    The items are put into a random circle. The partners are the next r of each.
    """
    if items < 2:
        raise AnalysisError("a floor needs two items or more: unrelated sentences are compared")
    circle = np.random.default_rng(seed).permutation(items)
    partners = np.empty((max(1, min(number, (items - 1) // 2)), items), dtype=np.int64)
    for row in range(len(partners)):
        partners[row, circle] = np.roll(circle, -row - 1)
    return partners


def _checked(counts: Any) -> np.ndarray:
    a = np.asarray(counts, dtype=np.float64)
    if not a.ndim or (a < 0).any() or not (a == np.rint(a)).all() or np.isinf(a).any():
        raise AnalysisError("counts must be whole numbers from 0, [..., expert]: pass selections, not shares")
    return a


def _entropy(p: np.ndarray) -> np.ndarray:
    return -_times_log(p).sum(-1)


def _times_log(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1.0))


def _entropies_without_one(a: np.ndarray) -> np.ndarray:
    """Entropy of the counts without one selection of expert e, for each e: [..., E]; undefined where e has none."""
    left = np.maximum(a.sum(-1, keepdims=True) - 1, 1)
    p, less = a / left, np.maximum(a - 1, 0) / left
    return -(_times_log(p).sum(-1, keepdims=True) - _times_log(p) + _times_log(less))


def _middle_entropies_without_one(a: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Entropy of the mean of ``other`` and of the counts without one selection of expert e, for each e: [..., E]."""
    left = np.maximum(a.sum(-1, keepdims=True) - 1, 1)
    m = (a / left + other) / 2
    less = (np.maximum(a - 1, 0) / left + other) / 2
    return -(_times_log(m).sum(-1, keepdims=True) - _times_log(m) + _times_log(less))


def _normalized(middle: np.ndarray, mean: np.ndarray, most: np.ndarray | None) -> np.ndarray:
    """The divergence from H(m) and the mean entropy; divided by its bound if ``most`` = log E is given."""
    if most is None:
        return middle - mean
    bound = most - mean
    return np.divide(middle - mean, bound, out=np.full(middle.shape, np.nan), where=bound > 1e-13)

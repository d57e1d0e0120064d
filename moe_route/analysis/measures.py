"""Measures on distributions over experts: entropy, Jensen-Shannon divergence, cosine, Jaccard. Natural logarithm.

All take float64 arrays whose last axis is the expert, already normalized (`inputs.normalized`). Layers with fewer
experts than the widest one are zero-padded; ``num_experts`` (broadcast against the leading axes) is the real number.
NaN rows give NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Below this, ``log E - H`` is rounding: both distributions are uniform and D is 0 / 0. Storing a uniform distribution
# in float32 gives about 1e-15 here; one expert chosen once too often in a million tokens gives about 1e-12.
_UNIFORM = 1e-13
_SMALLEST = 1e-300  # stands for 0 in a logarithm that is multiplied by 0


def ratio(above: Any, below: Any, empty: float = np.nan) -> np.ndarray:
    """``above / below``, float64 in the shape that both broadcast to; ``empty`` where ``below`` is not above 0."""
    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.full(above.shape, empty), where=below > 0)


def _times_log(weight: np.ndarray, value: np.ndarray) -> np.ndarray:
    """weight * log(value), 0 where weight is 0."""
    return weight * np.log(np.where(weight > 0, value, 1.0))


def entropy_of(q: np.ndarray) -> np.ndarray:
    """H(q) = -sum q log q in nats over the last axis; 0 log 0 = 0."""
    q = np.asarray(q, dtype=np.float64)
    logs = np.log(np.maximum(q, _SMALLEST))
    logs *= q
    return -logs.sum(-1) + 0.0


def jensen_shannon(q1: np.ndarray, q2: np.ndarray) -> np.ndarray:
    """JSD = H(m) - (H(q1) + H(q2)) / 2 with m = (q1 + q2) / 2, in nats, in [0, log 2].

    Computed as the mean of the two relative entropies to m. So it is never negative from cancellation, and exactly 0
    for equal inputs.
    """
    total = q1 + q2
    safe = np.where(total > 0, total, 1.0)
    terms = _times_log(q1, 2.0 * q1 / safe) + _times_log(q2, 2.0 * q2 / safe)
    x = (q1 - q2) / safe  # q = total (1 ± x) / 2; where x is small, the two terms almost cancel
    near = np.abs(x) < 0.1
    x = np.where(near, x, 0.0)
    terms = np.where(near, 0.5 * total * (np.log1p(-x * x) + 2.0 * x * np.arctanh(x)), terms)
    return np.maximum(0.5 * terms.sum(-1), 0.0)


def normalized_jensen_shannon(q1: np.ndarray, q2: np.ndarray, num_experts: np.ndarray | int) -> np.ndarray:
    """D = (H(m) - Hbar) / (log E - Hbar), Hbar = (H(q1) + H(q2)) / 2, from 0 to 1.

    See arXiv 2510.04694, appendix A.4, eq. 6 to 8. NaN where both are uniform (0 / 0), which includes layers with one
    expert. ``log E - Hbar`` is computed as the mean relative entropy to the uniform distribution.
    """
    experts = np.asarray(num_experts, dtype=np.float64)[..., None]
    bound = 0.5 * (_times_log(q1, q1 * experts).sum(-1) + _times_log(q2, q2 * experts).sum(-1))
    return np.minimum(ratio(jensen_shannon(q1, q2), np.where(bound > _UNIFORM, bound, 0.0)), 1.0)


def cosine_distance(q1: np.ndarray, q2: np.ndarray) -> np.ndarray:
    """1 - cos(q1, q2), in [0, 1] for distributions; exactly 0 for equal inputs."""
    unit = [q / np.sqrt((q * q).sum(-1, keepdims=True)) for q in (q1, q2)]
    return np.minimum(0.5 * ((unit[0] - unit[1]) ** 2).sum(-1), 1.0)


def jaccard_distance(q1: np.ndarray, q2: np.ndarray, top: np.ndarray | int) -> np.ndarray:
    """1 - |A & B| / |A | B| for A, B the ``top`` most used experts of each; ties go to the lower index."""
    top = np.asarray(top)
    seen = ~(np.isnan(q1).any(-1) | np.isnan(q2).any(-1))
    chosen = [places(q) < top[..., None] for q in (q1, q2)]
    shared = (chosen[0] & chosen[1]).sum(-1)
    joined = (chosen[0] | chosen[1]).sum(-1)
    return np.where(seen, 1.0 - shared / np.maximum(joined, 1), np.nan)


def places(q: np.ndarray) -> np.ndarray:
    """Rank of each expert in decreasing order of q, from 0, int64 of the shape of q; ties go to the lower index."""
    order = np.argsort(-q, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")

"""Hierarchical clustering of groups: trees by linkage, the order of their leaves, and clusters."""

from __future__ import annotations

from typing import Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError

__all__ = ["LINKAGES", "Linkage", "clusters", "leaves", "linkage"]

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

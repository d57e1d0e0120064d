"""Does routing like English go with doing well? Correlation over languages, layer by layer [arXiv 2510.04694, section
3.3].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations as all_orders
from math import factorial
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.divergence import Divergence
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.result import by_depth, data_frame, plain

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Correlation", "correlation"]


@dataclass(frozen=True, eq=False)
class Correlation:
    """Correlation over groups between a score of each group and its divergence, float64 [L] each.

    Attributes:
        pearson, spearman: in [-1, 1]; NaN where divergence or scores do not vary, or fewer than three groups are
            defined.
        p_value: two-sided permutation p-value of ``pearson``; NaN where it is.
        number: int64 [L], groups that went in.
        groups: their names.
        layers: names of the layers.
        reference: what divergence was measured from.
    """

    pearson: np.ndarray
    spearman: np.ndarray
    p_value: np.ndarray
    number: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    reference: str

    def to_pandas(self) -> pd.DataFrame:
        """A row per layer with ``pearson``, ``spearman``, ``p_value`` and ``number`` of groups."""
        return data_frame({"layer": np.arange(len(self.layers)), "router": self.layers, **self._columns()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        axes = {"groups": list(self.groups), "layers": list(self.layers), "reference": self.reference}
        return axes | plain(self._columns())

    def _columns(self) -> dict[str, np.ndarray]:
        return {"pearson": self.pearson, "spearman": self.spearman, "p_value": self.p_value, "number": self.number}

    def __repr__(self) -> str:
        shown = np.stack([self.pearson, self.spearman, self.p_value])
        title = f"Correlation of scores with divergence from {self.reference} over {len(self.groups)} groups"
        return f"{title}\n{by_depth(('Pearson r', 'Spearman rho', 'p (permutation)'), shown)}"


def correlation(
    found: Divergence,
    scores: Mapping[str, float],
    *,
    groups: Sequence[str] | None = None,
    permutations: int = 10_000,
    seed: int = 0,
) -> Correlation:
    """Per layer, Pearson r and Spearman rho over groups between ``scores`` (such as accuracy) and divergence.

    Args:
        found: divergence of the groups from a reference (which itself takes no part).
        scores: group -> score; must name every group compared, others are ignored.
        groups: the groups to correlate; all of ``found`` by default.
        permutations: orders of the scores drawn for the p-value; all orders are used where there are no more than that.
        seed: of the drawn orders.

    Raises ``AnalysisError`` for a group without score, scores that are not finite, or fewer than three groups.
    """
    names = tuple(found.groups if groups is None else groups)
    missing = [name for name in names if name not in scores]
    if missing:
        raise AnalysisError(f"no score for {', '.join(missing)}: add it, or name the groups to correlate with groups=")
    if len(names) < 3:
        raise AnalysisError(f"a correlation over {len(names)} groups says nothing: compare at least three")
    y = np.asarray([float(scores[name]) for name in names])
    if not np.isfinite(y).all():
        raise AnalysisError("scores must be finite numbers")
    x = np.stack([found.of(name) for name in names])
    layers = x.shape[1]
    pearson, spearman, p_value = np.full((3, layers), np.nan)
    number = (~np.isnan(x)).sum(0)
    for layer in np.flatnonzero(number >= 3):
        seen = ~np.isnan(x[:, layer])
        here, there = x[seen, layer], y[seen]
        pearson[layer] = _pearson(here, there)
        spearman[layer] = _pearson(_ranks(here), _ranks(there))
        p_value[layer] = _permutation_p(here, there, permutations, seed)
    return Correlation(pearson, spearman, p_value, number, names, found.layers, found.reference)


def _centered(values: np.ndarray) -> np.ndarray:
    """Zero mean and unit length; all zero for values that do not vary beyond rounding."""
    moved = values - values.mean(-1, keepdims=True)
    length = np.sqrt((moved * moved).sum(-1, keepdims=True))
    varies = length > 1e-12 * np.abs(values).max(-1, keepdims=True)
    return np.divide(moved, length, out=np.zeros(moved.shape), where=varies)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    a, b = _centered(x), _centered(y)
    return float(np.clip(a @ b, -1.0, 1.0)) if a.any() and b.any() else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def _permutation_p(x: np.ndarray, y: np.ndarray, draws: int, seed: int) -> float:
    """Share of orders of y whose |r| is at least the observed one; among drawn orders the observed one counts too."""
    a, b = _centered(x), _centered(y)
    if not (a.any() and b.any()):
        return float("nan")
    exact = factorial(len(x)) <= draws
    if exact:
        orders = np.array(list(all_orders(range(len(x)))))
    else:
        rng = np.random.default_rng(seed)
        orders = rng.permuted(np.tile(np.arange(len(x)), (draws, 1)), axis=1)
    reached = int((np.abs(b[orders] @ a) >= abs(float(a @ b)) - 1e-12).sum())
    return reached / len(orders) if exact else (reached + 1) / (draws + 1)

"""Correlation over languages, per layer, between performance and similarity of routing to English.

See arXiv 2510.04694, section 4.3.
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
from moe_route.analysis.result import plain
from moe_route.recording.frames import data_frame
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Correlation", "correlation"]


@dataclass(frozen=True, eq=False, repr=False)
class Correlation(ShownAsTables):
    """Correlation over groups between the score of each group and its divergence, float64 [L] each.

    Attributes:
        pearson, spearman: in [-1, 1]; NaN where divergence or scores do not vary, or with fewer than three groups.
        p_value: two-sided permutation p-value of ``pearson``, for each layer alone; NaN where ``pearson`` is.
        p_corrected: the same, corrected for testing all layers: how often the largest |r| of any layer reaches that of
            this layer. If divergence is unrelated to the scores, at most 5 of 100 results have a layer below 0.05.
        number: int64 [L], number of groups used.
        groups: their names.
        layers: names of the layers.
        reference: the group from which divergence was measured.
    """

    pearson: np.ndarray
    spearman: np.ndarray
    p_value: np.ndarray
    p_corrected: np.ndarray
    number: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    reference: str

    def to_pandas(self) -> pd.DataFrame:
        """A row per layer with ``pearson``, ``spearman``, ``p_value``, ``p_corrected`` and ``number`` of groups."""
        return data_frame({"layer": np.arange(len(self.layers)), "router": self.layers, **self._columns()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        axes = {"groups": list(self.groups), "layers": list(self.layers), "reference": self.reference}
        return axes | plain(self._columns())

    def _columns(self) -> dict[str, np.ndarray]:
        names = ("pearson", "spearman", "p_value", "p_corrected", "number")
        return {name: getattr(self, name) for name in names}

    def tables(self) -> list[Table]:
        """A row per layer; p-values are not averaged over layers."""
        columns = [values.tolist() for values in self._columns().values()]
        rows = [[layer, *row] for layer, row in enumerate(zip(*columns, strict=True))]
        return [
            Table(
                ("layer", "Pearson r", "Spearman rho", "p (this layer)", "p (all layers)", "groups"),
                rows,
                f"Correlation of scores with divergence from {self.reference} over {len(self.groups)} groups",
                "p: two-sided, of Pearson r, by permuting scores; all layers: corrected for the number of layers",
            )
        ]


def correlation(
    found: Divergence,
    scores: Mapping[str, float],
    *,
    groups: Sequence[str] | None = None,
    permutations: int = 10_000,
    seed: int = 0,
) -> Correlation:
    """Compute Pearson r and Spearman rho over groups between ``scores`` (such as accuracy) and divergence, per layer.

    The p-values treat groups as exchangeable, which languages of one family or script are only approximately.

    Args:
        found: divergence of the groups from a reference; the reference itself takes no part.
        scores: group -> score; must name every group compared. Others are ignored.
        groups: the groups to correlate; by default all of ``found``.
        permutations: number of random orders of the scores for the p-values. If there are no more orders than that, all
            are used. All layers share the same orders.
        seed: seed of the random orders.

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
    number = (~np.isnan(x)).sum(0)
    pearson, spearman = np.full((2, x.shape[1]), np.nan)
    for layer in np.flatnonzero(number >= 3):
        seen = ~np.isnan(x[:, layer])
        pearson[layer] = _pearson(x[seen, layer], y[seen])
        spearman[layer] = _pearson(_ranks(x[seen, layer]), _ranks(y[seen]))
    p_value, p_corrected = _permutation_p(x, y, pearson, permutations, seed)
    return Correlation(pearson, spearman, p_value, p_corrected, number, names, found.layers, found.reference)


def _centered(values: np.ndarray) -> np.ndarray:
    """Scale to zero mean and unit length; all zero for values that vary by rounding only."""
    moved = values - values.mean(-1, keepdims=True)
    length = np.sqrt((moved * moved).sum(-1, keepdims=True))
    varies = length > 1e-12 * np.abs(values).max(-1, keepdims=True)
    return np.divide(moved, length, out=np.zeros(moved.shape), where=varies)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    a, b = _centered(x), _centered(y)
    return float(np.clip(a @ b, -1.0, 1.0)) if a.any() and b.any() else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def _permutation_p(
    x: np.ndarray, y: np.ndarray, observed: np.ndarray, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """p-values of the layers' r, float64 [L] each; NaN where r is.

    The first is for each layer alone, the second against the largest |r| of all layers (single-step max-T of Westfall
    and Young 1993).

    Args:
        x, y: divergence [G, L] and scores [G].
        observed: r, float64 [L].
    """
    orders, exact = _orders(len(y), draws, seed)
    defined = np.flatnonzero(~np.isnan(observed))
    if not defined.size:
        return observed.copy(), observed.copy()
    drawn = np.stack([_absolute_r(x[:, layer], y, orders) for layer in defined])
    p_value, p_corrected = np.full((2, len(observed)), np.nan)
    reach = np.abs(observed[defined])[:, None] - 1e-12
    for target, values in ((p_value, drawn), (p_corrected, drawn.max(0)[None])):
        reached = (values >= reach).sum(1)
        # with random orders, the observed order counts too
        target[defined] = reached / len(orders) if exact else (reached + 1) / (len(orders) + 1)
    return p_value, p_corrected


def _orders(size: int, draws: int, seed: int) -> tuple[np.ndarray, bool]:
    """Orders of ``size`` elements, int64 [number, size], and whether these are all orders."""
    if factorial(size) <= draws:
        return np.array(list(all_orders(range(size)))), True
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(size), (draws, 1)), axis=1), False


def _absolute_r(x: np.ndarray, y: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """|r| of x with every order of y, float64 [number], over the groups for which x is defined."""
    seen = ~np.isnan(x)
    return np.abs(_centered(y[orders][:, seen]) @ _centered(x[seen]))

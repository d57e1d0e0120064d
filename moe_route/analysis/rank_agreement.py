"""Rank agreement: what is observed of experts, beside the effect that switching them off has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from moe_route.analysis.inputs import AnalysisError, check_draws
from moe_route.analysis.result import Result
from moe_route.analysis.stats import centered, ranks
from moe_route.base.table import Table

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, eq=False, repr=False)
class RankAgreement(Result):
    """Spearman correlation over the experts of a layer between metrics and effects, averaged over layers.

    Attributes:
        metrics, groups: names of the M metrics and G groups.
        rho: float64 [M, G], in [-1, 1]: mean over layers; NaN where no layer has three experts that differ.
        by_layer: float64 [M, G, L].
        p_value: float64 [M, G], two-sided, by permuting the experts of every layer.
        experts: int64 [G], number of experts with an effect.
    """

    metrics: tuple[str, ...]
    groups: tuple[str, ...]
    rho: Annotated[np.ndarray, "metric group"]
    by_layer: np.ndarray
    p_value: Annotated[np.ndarray, "metric group"]
    experts: Annotated[np.ndarray, "group"]

    def tables(self) -> list[Table]:
        rows = [
            [metric, group, float(self.rho[m, g]), float(self.p_value[m, g]), int(self.experts[g])]
            for m, metric in enumerate(self.metrics)
            for g, group in enumerate(self.groups)
        ]
        title = "Rank agreement of metrics with the effect of experts (Spearman, mean over layers)"
        return [Table(("metric", "group", "rho", "p", "experts"), rows, title)]


def rank_agreement(
    metrics: Mapping[str, np.ndarray],
    effects: np.ndarray,
    *,
    groups: Sequence[str] | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> RankAgreement:
    """Compute how well metrics of experts rank their effects, by Spearman's rho within each layer.

    Layers are not mixed, since both metrics and effects differ in level from layer to layer. arXiv 2606.10703 finds
    that no observational metric predicts the causal importance of experts.

    Args:
        metrics: name -> float [L, E] or [G, L, E], such as a frequency, or a difference of frequencies.
        effects: float [L, E] or [G, L, E], such as ``Knockout.total.mean``; NaN where not measured.
        groups: names of the G groups.
        permutations, seed: of the test.

    Raises ``AnalysisError`` for no metric, shapes that do not fit, or a number of names other than G.
    """
    wide = _three(np.asarray(effects, np.float64), "effects")
    names = tuple(groups) if groups is not None else tuple(f"group {g}" for g in range(len(wide)))
    if len(names) != len(wide):
        raise AnalysisError(f"there are effects of {len(wide)} groups, and {len(names)} names")
    if not metrics:
        raise AnalysisError("there is no metric to compare with: pass {name: array}")
    check_draws(permutations, "permutations")
    rng = np.random.default_rng(seed)
    by_layer, p_value = np.full((len(metrics), *wide.shape[:2]), np.nan), np.full((len(metrics), len(wide)), np.nan)
    for m, (metric, values) in enumerate(metrics.items()):
        observed = _three(np.asarray(values, np.float64), metric)
        if observed.shape[1:] != wide.shape[1:] or len(observed) not in (1, len(wide)):
            raise AnalysisError(
                f"metric {metric!r} has shape {list(np.shape(values))}, the effects are {list(wide.shape)}: give both "
                "for the same layers and experts"
            )
        for g in range(len(wide)):
            of_group = observed[0 if len(observed) == 1 else g]
            by_layer[m, g], p_value[m, g] = _agreement(of_group, wide[g], permutations, rng)
    counted = ~np.isnan(by_layer)
    rho = np.where(counted, by_layer, 0.0).sum(2) / np.where(counted.any(2), counted.sum(2), np.nan)
    return RankAgreement(tuple(metrics), names, rho, by_layer, p_value, (~np.isnan(wide)).sum((1, 2)))


def _three(values: np.ndarray, name: str) -> np.ndarray:
    if values.ndim not in (2, 3):
        raise AnalysisError(f"{name} must be [layer, expert] or [group, layer, expert], not {list(values.shape)}")
    return values[None] if values.ndim == 2 else values


def _agreement(
    metric: np.ndarray, effect: np.ndarray, permutations: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Spearman's rho of each layer [L], and the p-value of their mean."""
    rho, drawn = np.full(len(metric), np.nan), np.zeros(permutations)
    for layer in range(len(metric)):
        seen = ~np.isnan(metric[layer]) & ~np.isnan(effect[layer])
        if seen.sum() < 3:
            continue
        x, y = centered(ranks(metric[layer, seen])), centered(ranks(effect[layer, seen]))
        if not x.any() or not y.any():
            continue
        rho[layer] = x @ y
        drawn += rng.permuted(np.tile(y, (permutations, 1)), axis=1) @ x
    counted = ~np.isnan(rho)
    if not counted.any():
        return rho, float("nan")
    reached = np.abs(drawn) >= abs(rho[counted].sum()) - 1e-12
    return rho, float((reached.sum() + 1) / (permutations + 1))

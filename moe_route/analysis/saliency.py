"""Saliency of experts: how much the output of an expert adds, on average, to the tokens that are routed to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError, group_index, pick_groups
from moe_route.analysis.measures import places
from moe_route.analysis.result import by_depth, mean_of_seen, plain
from moe_route.recording.frames import data_frame
from moe_route.steering.model import PlanModel
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from moe_route.recording import RoutingStatistics
    from moe_route.steering import ExpertSelection

__all__ = ["Saliency", "real_experts", "saliency"]

_SHOWN = 3  # experts per layer at either end of the table


@dataclass(frozen=True, eq=False, repr=False)
class Saliency(ShownAsTables):
    """Saliency of every expert, in units of the norm of the hidden states.

    Attributes:
        values: float64 [G, L, E]; NaN for experts that no token of the group chose, and for padding experts.
        tokens: int64 [G, L, E], number of tokens that chose the expert.
        groups: names of the groups, or ("all groups",) for all of them together.
        layers: names of the layers.
        num_experts: experts of each layer.
        model: the model, which selections inherit.
    """

    values: np.ndarray
    tokens: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    model: PlanModel = field(default_factory=PlanModel)

    def least(self, number: int, group: str | None = None) -> ExpertSelection:
        """Select the ``number`` least salient experts of each layer; experts that no token chose come first."""
        return self._select(number, group, "least", np.nan_to_num(-self._of(group), nan=np.inf))

    def most(self, number: int, group: str | None = None) -> ExpertSelection:
        """Select the ``number`` most salient experts of each layer."""
        return self._select(number, group, "most", np.nan_to_num(self._of(group), nan=-np.inf))

    def _of(self, group: str | None) -> np.ndarray:
        """Values [L, E] of one group."""
        if group is None and len(self.groups) != 1:
            raise AnalysisError(f"name the group: there is saliency of {', '.join(self.groups)}")
        if group is not None and group not in self.groups:
            raise AnalysisError(f"no group {group!r}: there is saliency of {', '.join(self.groups)}")
        return self.values[0 if group is None else self.groups.index(group)]

    def _select(self, number: int, group: str | None, which: str, order: np.ndarray) -> ExpertSelection:
        from moe_route.steering import ExpertSelection

        if not 1 <= number <= min(self.num_experts):
            raise AnalysisError(f"number must be from 1 to {min(self.num_experts)} experts per layer, not {number}")
        chosen = places(np.where(real_experts(self.num_experts, order.shape[1]), order, -np.inf)) < number
        values = np.nan_to_num(self._of(group))
        found = {
            layer: {int(expert): float(values[layer, expert]) for expert in np.flatnonzero(chosen[layer])}
            for layer in range(len(chosen))
        }
        text = f"{which} salient experts{'' if group is None else f' of {group}'}"
        return ExpertSelection(found, scores=found, description=text, num_experts=self.num_experts, model=self.model)

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (group, layer, expert): ``saliency`` and ``tokens``."""
        groups, layers, experts = np.nonzero(np.broadcast_to(self._real, self.values.shape))
        return data_frame(
            {
                "group": np.asarray(self.groups, dtype=object)[groups],
                "layer": layers,
                "router": np.asarray(self.layers, dtype=object)[layers],
                "expert": experts,
                "saliency": self.values[groups, layers, experts],
                "tokens": self.tokens[groups, layers, experts],
            }
        )

    @property
    def _real(self) -> np.ndarray:
        return real_experts(self.num_experts, self.values.shape[-1])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        axes = {"groups": list(self.groups), "layers": list(self.layers), "num_experts": list(self.num_experts)}
        return {**axes, "saliency": plain(self.values), "tokens": plain(self.tokens)}

    def tables(self) -> list[Table]:
        means = mean_of_seen(self.values, 2)[0]
        found = [by_depth(self.groups, means, title="saliency, mean over the experts that were chosen")]
        for group, values in zip(self.groups, self.values, strict=True):
            rows = [[layer, *_ends(of_layer)] for layer, of_layer in enumerate(values)]
            found.append(Table(("layer", "most salient", "least salient"), rows, title=f"experts of {group}"))
        return found


def _ends(values: np.ndarray) -> tuple[str, str]:
    """The experts with the largest and the smallest values, in words."""
    seen = [int(expert) for expert in np.argsort(-values, kind="stable") if not np.isnan(values[expert])]
    shown = [f"{expert} ({values[expert]:.3f})" for expert in seen]
    return ", ".join(shown[:_SHOWN]) or "-", ", ".join(shown[::-1][:_SHOWN]) or "-"


def saliency(
    statistics: RoutingStatistics,
    *,
    groups: Sequence[str] | str | None = None,
    pool: bool = False,
) -> Saliency:
    """Measure the saliency of every expert, as REAP does [arXiv 2510.13999, eq. 8].

    ``S_e = mean over the tokens t routed to e of g_e(t) * ||f_e(x_t)||``, with the routing weight g_e that the experts
    receive and the Euclidean norm of the expert's output. It needs ``record(expert_outputs=True)``.

    Args:
        groups: the groups to use; by default all.
        pool: join the groups into one, "all groups".

    Raises ``AnalysisError`` for unknown or empty groups, ``ValueError`` if expert outputs were not recorded.
    """
    names = pick_groups(statistics, groups)
    rows = [group_index(statistics, name) for name in names]
    sums = statistics.expert_outputs("weighted_norm")[rows]
    tokens = statistics.token_sum("counts")[rows]
    if pool:
        sums, tokens, names = sums.sum(0, keepdims=True), tokens.sum(0, keepdims=True), ("all groups",)
    values = np.divide(sums, tokens, out=np.full(sums.shape, np.nan), where=tokens > 0)
    sizes = tuple(statistics.num_experts)
    model = PlanModel.of_recording(statistics.metadata, sizes)
    return Saliency(values, tokens, names, tuple(statistics.layers), sizes, model)


def real_experts(num_experts: Sequence[int], width: int) -> np.ndarray:
    """bool [L, E]: false for the padding of layers with fewer experts than the widest."""
    return np.arange(width) < np.asarray(num_experts)[:, None]

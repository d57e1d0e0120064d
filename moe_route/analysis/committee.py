"""The experts that every group uses most, and how much of the routing they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError, pick_groups, selection
from moe_route.analysis.measures import places
from moe_route.analysis.result import by_depth, plain
from moe_route.recording.frames import data_frame
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

    from moe_route.recording import RoutingStatistics
    from moe_route.steering import ExpertSelection

__all__ = ["Committee", "committee"]


@dataclass(frozen=True, eq=False, repr=False)
class Committee(ShownAsTables):
    """Experts that are among the most used of every group, and concentration of the load.

    Attributes:
        experts: the committee: experts among the ``top`` most used of every group. The score is the smallest share of
            the choices that an expert has in any group.
        gini: float64 [G, L], Gini coefficient of the loads: 0 if all experts have the same load, (E - 1) / E if one
            expert has all.
        coverage: float64 [G, L], share of a group's choices that go to the ``top`` experts most used over all groups.
        share: float64 [G, L], share of a group's choices that go to the committee; 0 in a layer without one.
        top: number of experts in each layer that count as most used.
        groups, layers: names of the axes.
        num_experts: experts of each layer.
    """

    experts: ExpertSelection
    gini: np.ndarray
    coverage: np.ndarray
    share: np.ndarray
    top: tuple[int, ...]
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]

    @property
    def sizes(self) -> np.ndarray:
        """int64 [L]: number of committee members per layer."""
        counts = self.experts.counts
        return np.array([counts.get(layer, 0) for layer in range(len(self.layers))], dtype=np.int64)

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (group, layer)."""
        repeated = {"router": np.asarray(self.layers, dtype=object), "members": self.sizes, "top": np.asarray(self.top)}
        columns: dict[str, Any] = {name: np.tile(values, len(self.groups)) for name, values in repeated.items()}
        columns |= {name: getattr(self, name).reshape(-1) for name in ("gini", "coverage", "share")}
        return data_frame(columns, {"group": self.groups, "layer": range(len(self.layers))})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        axes = {"groups": list(self.groups), "layers": list(self.layers), "num_experts": list(self.num_experts)}
        values = {name: plain(getattr(self, name)) for name in ("gini", "coverage", "share")}
        return axes | {"top": list(self.top), "experts": self.experts.to_dict()} | values

    def tables(self) -> list[Table]:
        top = "/".join(map(str, sorted(set(self.top))))
        rows = {
            "members": self.sizes.astype(np.float64),
            "Gini": self.gini.mean(0),
            f"share of the {top} most used": self.coverage.mean(0),
            "share of the committee": self.share.mean(0),
        }
        title = f"experts among the {top} most used of each of {len(self.groups)} groups: {len(self.experts)}"
        return [by_depth(list(rows), np.stack(list(rows.values())), title=title, note="shares, Gini: mean over groups")]

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.experts!r}"


def committee(
    statistics: RoutingStatistics,
    *,
    top: int | None = None,
    groups: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    by: Literal["token", "sequence"] = "token",
) -> Committee:
    """Find the experts that every group uses most: a committee that serves all languages or domains.

    The idea of a domain-invariant "standing committee" is that of arXiv 2601.03425. The measures here are defined in
    :class:`Committee` and are not claimed to be those of the paper.

    Args:
        top: number of most used experts per layer; by default the layer's top-k. Ties go to the lower index; an expert
            that a group never chose is not among them.
        groups: by default all; at least two.
        phase, by: as in ``load_balance``.

    Raises ``AnalysisError`` for fewer than two groups, groups without tokens of the phase, and a ``top`` out of range.
    """
    names = pick_groups(statistics, groups, phase=phase)
    if len(names) < 2:
        raise AnalysisError("a committee is what several groups share: give two groups or more")
    limits = np.asarray(statistics.top_k if top is None else [top] * len(statistics.layers))
    sizes = np.asarray(statistics.num_experts)
    if (limits < 1).any() or (limits > sizes).any():
        raise AnalysisError(f"top must be between 1 and {sizes.min()}, the experts of the smallest layer, not {top}")
    load = statistics.mean_distribution("count", phase, by)[[statistics.groups.index(name) for name in names]]
    known = np.nan_to_num(load)
    most_used = (places(known) < limits[:, None]) & (known > 0)
    members = most_used.all(0)
    overall = places(known.sum(0)) < limits[:, None]
    seen = ~np.isnan(load).any(-1)
    text = f"among the most used experts of {len(names)} groups"
    return Committee(
        experts=selection(members, known.min(0), statistics, threshold=None, description=text),
        gini=_gini(known, sizes, seen),
        coverage=np.where(seen, (known * overall).sum(-1), np.nan),
        share=np.where(seen, (known * members).sum(-1), np.nan),
        top=tuple(limits.tolist()),
        groups=names,
        layers=tuple(statistics.layers),
        num_experts=tuple(statistics.num_experts),
    )


def _gini(load: np.ndarray, sizes: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """float64 [G, L]: mean absolute difference of two experts' loads over twice the mean load; NaN without tokens.

    ``load`` sums to 1 over the experts of a layer. Sorted in increasing order, padding first, the load in place i (from
    0) is weighted by ``2 i + 1 - width``, which counts the padding; ``width - E`` takes it out again.
    """
    width = load.shape[-1]
    weight = 2.0 * np.arange(width) + 1.0 - width
    unevenness = (np.sort(load, axis=-1) * weight).sum(-1) - (width - sizes)
    return np.where(seen, unevenness / sizes, np.nan)

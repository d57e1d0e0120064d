"""Super experts: the few experts whose outputs hold the largest activations of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError, group_index, pick_groups, selection
from moe_route.analysis.result import plain
from moe_route.analysis.saliency import real_experts
from moe_route.recording.frames import data_frame
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from moe_route.recording import RoutingStatistics
    from moe_route.steering import ExpertSelection

__all__ = ["SuperExperts", "super_experts"]


@dataclass(frozen=True, eq=False, repr=False)
class SuperExperts(ShownAsTables):
    """The n super experts, by falling peak.

    Attributes:
        selection: the experts; their scores are the peaks.
        layer, expert: int64 [n].
        peak: float64 [n], largest absolute element of the expert's output.
        first: float64 [n], share of the first tokens of all sequences that chose the expert.
        threshold: an expert is super if its peak is above this.
        largest: the largest peak of the model.
    """

    selection: ExpertSelection
    layer: np.ndarray
    expert: np.ndarray
    peak: np.ndarray
    first: np.ndarray
    threshold: float
    largest: float

    def __len__(self) -> int:
        return len(self.layer)

    @property
    def _columns(self) -> dict[str, np.ndarray]:
        return {"layer": self.layer, "expert": self.expert, "peak": self.peak, "first": self.first}

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with a row per super expert."""
        return data_frame(self._columns)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        rows = zip(*map(plain, self._columns.values()), strict=True)
        experts = [dict(zip(self._columns, row, strict=True)) for row in rows]
        return {"super_experts": experts, "threshold": self.threshold, "largest": self.largest}

    def tables(self) -> list[Table]:
        rows = list(zip(*(column.tolist() for column in self._columns.values()), strict=True))
        note = f"peak above {self.threshold:.3f}; the largest of the model is {self.largest:.3f}"
        return [Table(("layer", "expert", "peak", "share of first tokens"), rows, "super experts", note)]


def super_experts(
    statistics: RoutingStatistics,
    *,
    quantile: float = 0.995,
    share: float = 0.1,
    groups: Sequence[str] | str | None = None,
) -> SuperExperts:
    """Find the super experts of a model [arXiv 2507.23279, eq. 6].

    The peak of an expert is the largest absolute element of its output over all tokens routed to it. An expert is super
    if its peak is above the ``quantile`` of the peaks of all experts, and above ``share`` of the largest peak. Super
    experts serve the first tokens (attention sinks) of a text. Without them a model fails on any text, so controls
    should leave them out (``plan.random(seed, exclude=found.selection)``). It needs ``record(expert_outputs=True)``.

    Args:
        quantile: the paper's is 0.995.
        share: the paper's is a tenth.
        groups: the groups whose tokens count; by default all.

    Experts that no token chose have peak 0. Raises ``AnalysisError`` for a quantile or share outside [0, 1) and for
    outputs that are all zero or not finite, ``ValueError`` if expert outputs were not recorded.
    """
    for name, value in (("quantile", quantile), ("share", share)):
        if not 0 <= value < 1:
            raise AnalysisError(f"{name} must be at least 0 and below 1, not {value}")
    rows = [group_index(statistics, name) for name in pick_groups(statistics, groups)]
    peak = statistics.expert_outputs("peak")[rows].max(0)
    first = statistics.expert_outputs("first")[rows].sum(0)
    if not np.isfinite(peak).all() or not peak.any():
        raise AnalysisError("the peaks of expert outputs are all zero or not finite: record texts the model can read")
    peaks = peak[real_experts(statistics.num_experts, peak.shape[1])]
    threshold = max(float(np.quantile(peaks, quantile)), share * float(peaks.max()))
    sequences = first.sum(1, keepdims=True) / np.asarray(statistics.top_k)[:, None]
    shares = np.divide(first, sequences, out=np.zeros(first.shape), where=sequences > 0)
    text = f"super experts (peak above {threshold:.3g})"
    found = selection(peak > threshold, peak, statistics, threshold=threshold, description=text)
    layer, expert = np.nonzero(peak > threshold)
    order = np.argsort(-peak[layer, expert], kind="stable")
    layer, expert = layer[order], expert[order]
    columns = (layer, expert, peak[layer, expert], shares[layer, expert])
    return SuperExperts(found, *columns, threshold, float(peaks.max()))

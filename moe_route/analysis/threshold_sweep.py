"""How many task and multilingual experts there are by threshold, and from which threshold on they are different."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.expert_difference import expert_difference
from moe_route.analysis.expert_masks import above, in_layers
from moe_route.analysis.experts import multilingual_difference
from moe_route.analysis.inputs import AnalysisError, Frequencies, Statistics
from moe_route.analysis.overlap import chance_of_overlap, share
from moe_route.analysis.result import plain
from moe_route.recording.frames import data_frame
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["THRESHOLDS", "Sweep", "sweep"]

THRESHOLDS = tuple(step / 20 for step in range(1, 13))


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(ShownAsTables):
    """Task and multilingual experts at several thresholds.

    Attributes:
        thresholds: in increasing order.
        task, multilingual, both: int64 [threshold, layer], number of experts of each set, and of both.
        expected: float64 [threshold], mean number of experts in both if as many in each layer were drawn at random.
        p_more, p_fewer: float64 [threshold], probability that random sets share as many experts or more, and as few or
            fewer.
        separate_from: the smallest threshold, of all numbers of 0 or more, at which no expert is in both sets.
        layers: the layers that were looked at.
    """

    thresholds: tuple[float, ...]
    task: np.ndarray
    multilingual: np.ndarray
    both: np.ndarray
    expected: np.ndarray
    p_more: np.ndarray
    p_fewer: np.ndarray
    separate_from: float
    layers: tuple[int, ...]

    @property
    def jaccard(self) -> np.ndarray:
        """|A & B| / |A | B| over all layers, float64 [threshold]; NaN where both sets are empty."""
        both = self.both.sum(1)
        return share(both, self.task.sum(1) + self.multilingual.sum(1) - both)

    @property
    def containment(self) -> np.ndarray:
        """Share of the task experts that are multilingual experts too, float64 [threshold]."""
        return share(self.both.sum(1), self.task.sum(1))

    def to_pandas(self) -> pd.DataFrame:
        """A row per threshold and layer."""
        names = ("task", "multilingual", "both")
        columns = {name: getattr(self, name)[:, list(self.layers)].reshape(-1) for name in names}
        return data_frame(columns, {"threshold": self.thresholds, "layer": self.layers})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        counts = ("thresholds", "task", "multilingual", "both", "jaccard", "containment")
        names = (*counts, "expected", "p_more", "p_fewer", "separate_from", "layers")
        return plain({name: getattr(self, name) for name in names})  # type: ignore[no-any-return]

    def tables(self) -> list[Table]:
        counts = [values.sum(1).tolist() for values in (self.task, self.multilingual, self.both)]
        chance = [values.tolist() for values in (self.expected, self.jaccard, self.p_more, self.p_fewer)]
        rows = [list(row) for row in zip(map(float, self.thresholds), *counts, *chance, strict=True)]
        head = ("threshold", "task", "multilingual", "both", "by chance", "Jaccard", "p (more)", "p (fewer)")
        note = f"no expert is in both sets from threshold {self.separate_from:.3f} on"
        return [Table(head, rows, f"Experts by threshold in {len(self.layers)} layers", note)]


def sweep(
    task: Frequencies,
    baseline: Statistics,
    *,
    reference: str,
    thresholds: Iterable[float] = THRESHOLDS,
    group: str | None = None,
    languages: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    phase: str | None = None,
    by: str = "sequence",
) -> Sweep:
    """Count task experts and multilingual experts, and those that are both, by threshold [arXiv 2510.04694, section 5].

    The paper finds that the two sets do not meet from a threshold of 0.3 on.

    Args:
        task: routing of task text in the reference language.
        baseline: routing of general text in several languages, the reference among them.
        reference: group of ``baseline`` that both rules compare with, such as "eng_Latn".
        thresholds: numbers of 0 or more.
        group: group of ``task``; by default ``reference`` if ``task`` has it, else the only group.
        languages: groups of ``baseline`` for the multilingual experts; by default all others.
        layers: count in these layers only.
        phase, by: as in ``expert_difference``.
    """
    taus = tuple(sorted({float(threshold) for threshold in thresholds}))
    if not taus or taus[0] < 0 or not np.isfinite(taus).all():
        raise AnalysisError("thresholds must be one or more numbers of 0 or more")
    if group is None and isinstance(task, Statistics) and reference in task.groups:
        group = reference
    ours = expert_difference(task, baseline, group=group, baseline_group=reference, phase=phase, by=by)
    others = multilingual_difference(baseline, reference, groups=languages, phase=phase, by=by)
    kept = in_layers(len(ours), layers)
    sets = [np.stack([above(values, tau) & kept for tau in taus]) for values in (ours, others)]
    counts = [chosen.sum(-1) for chosen in (*sets, sets[0] & sets[1])]
    width = np.asarray(baseline.num_experts)
    chance = [chance_of_overlap(width, a, b, int(both.sum())) for a, b, both in zip(*counts, strict=True)]
    expected, p_more, p_fewer = np.array(chance).T
    smaller = np.minimum(*(np.nan_to_num(values, nan=-np.inf) for values in (ours, others)))
    separate_from = max(float(smaller[kept[:, 0]].max()), 0.0)
    looked_at = tuple(np.flatnonzero(kept[:, 0]).tolist())
    return Sweep(taus, counts[0], counts[1], counts[2], expected, p_more, p_fewer, separate_from, looked_at)

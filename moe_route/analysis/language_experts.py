"""Find the experts that are specific to a language, from their frequencies in several languages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route import files
from moe_route.analysis.expert_masks import largest
from moe_route.analysis.inputs import AnalysisError, Statistics, pick_groups, selection
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    from moe_route.steering import ExpertSelection

__all__ = ["LanguageExperts", "entropy_experts", "frequencies_of", "frequency_share_experts"]


@dataclass(frozen=True, eq=False, repr=False)
class LanguageExperts(ShownAsTables, Mapping[str, "ExpertSelection"]):
    """Mapping from group to the selection of its experts; ``shared`` holds the experts that are exclusive to none."""

    by_group: dict[str, ExpertSelection]
    shared: ExpertSelection | None = None

    def __getitem__(self, group: str) -> ExpertSelection:
        return self.by_group[group]

    def __iter__(self) -> Any:
        return iter(self.by_group)

    def __len__(self) -> int:
        return len(self.by_group)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        groups = {group: found.to_dict() for group, found in self.by_group.items()}
        return {"groups": groups, "shared": None if self.shared is None else self.shared.to_dict()}

    def ids(self) -> dict[str, dict[str, list[int]]]:
        """group -> {layer: expert ids}, JSON-able, as programs read it that tune only some experts."""
        return {group: {str(layer): list(ids) for layer, ids in found.items()} for group, found in self.items()}

    def save_ids(self, path: str | os.PathLike[str]) -> None:
        """Write ``ids()`` to ``path`` as JSON, whole or not at all."""
        files.write_text(path, f"{files.readable_json(self.ids())}\n")

    def tables(self) -> list[Table]:
        rows = [[group, len(found)] for group, found in self.by_group.items()]
        shared = [] if self.shared is None else [["(shared)", len(self.shared)]]
        return [Table(["group", "experts"], [*rows, *shared])]


def frequency_share_experts(
    statistics: Statistics,
    *,
    top: int,
    threshold: float,
    groups: Sequence[str] | None = None,
    phase: str | None = None,
    by: str = "token",
) -> LanguageExperts:
    """Select exclusive and shared experts by share of frequency [arXiv 2601.14050].

    In each layer and language the ``top`` most frequent experts are kept, and their frequencies are divided by the sum
    over languages. An expert is exclusive to a language whose share is above ``threshold``. It is shared if it is kept
    but no language has such a share. From a threshold of 0.5 on, an expert is exclusive to at most one language.
    """
    if not 0 < threshold < 1:
        raise AnalysisError(f"threshold must lie between 0 and 1, not {threshold}")
    names = pick_groups(statistics, groups, phase=phase)
    frequency = np.nan_to_num(frequencies_of(statistics, names, phase, by))
    kept = np.where(largest(frequency, top), frequency, 0.0)
    total = kept.sum(0)
    share = np.divide(kept, total, out=np.zeros(kept.shape), where=total > 0)
    found = {
        name: selection(
            share[i] > threshold, share[i], statistics, threshold=threshold, description=f"exclusive experts of {name}"
        )
        for i, name in enumerate(names)
    }
    none_alone = (total > 0) & (share <= threshold).all(0)
    shared = selection(none_alone, share.max(0), statistics, threshold=threshold, description="shared experts")
    return LanguageExperts(found, shared)


def entropy_experts(
    statistics: Statistics,
    *,
    top_n: int | None = None,
    share: float | None = None,
    percentile: float = 95.0,
    groups: Sequence[str] | None = None,
    phase: str | None = None,
    by: str = "token",
) -> LanguageExperts:
    """Select the language-specific experts of each group, by lowest entropy over groups [LAPE, arXiv 2402.16438].

    An expert's frequencies are divided by their sum over groups; low entropy means that few groups use it. Candidates
    are the experts that some group uses more often than the bar, the ``percentile`` of all frequencies. Ties go to the
    lower layer and expert.

    Args:
        top_n: give each group this number of experts, the lowest in entropy of those it uses above the bar.
        share: the original rule: take this share of all experts (published: 0.01 of the neurons), the lowest in
            entropy, and give each to every group that uses it above the bar. Groups get different numbers, some none.

    Raises ``AnalysisError`` unless either ``top_n`` or ``share`` is given, or for a share that takes no expert.
    """
    if (top_n is None) == (share is None):
        raise AnalysisError("give either top_n, experts per group, or share, of all experts")
    if not 0 <= percentile <= 100 or (top_n is not None and top_n < 1) or (share is not None and not 0 < share <= 1):
        raise AnalysisError("top_n must be 1 or more, share above 0 and up to 1, percentile between 0 and 100")
    names = pick_groups(statistics, groups, phase=phase)
    frequency = frequencies_of(statistics, names, phase, by)
    real = np.arange(frequency.shape[-1]) < np.asarray(statistics.num_experts)[:, None]
    seen = real & ~np.isnan(frequency)
    cut = np.percentile(frequency[seen], percentile)
    frequency = np.where(seen, frequency, 0.0)
    total = frequency.sum(0)
    of_group = np.divide(frequency, total, out=np.zeros(frequency.shape), where=total > 0)
    spread = -(of_group * np.log(np.where(of_group > 0, of_group, 1.0))).sum(0) + 0.0
    above = seen & (frequency > cut)
    lowest = None
    if share is not None:
        number = int(share * real.sum())
        if number < 1:
            raise AnalysisError(f"share={share} of {real.sum()} experts is none: use {1 / real.sum():.3g} or more")
        lowest = _lowest(spread, above.any(0), number)
    found = {}
    for i, name in enumerate(names):
        chosen = above[i] & (_lowest(spread, above[i], top_n) if lowest is None else lowest)
        text = f"low-entropy experts of {name}"
        found[name] = selection(chosen, spread, statistics, threshold=None, description=text)
    return LanguageExperts(found)


def _lowest(values: np.ndarray, candidates: np.ndarray, number: int | None) -> np.ndarray:
    """Where the lowest values of the candidates are, bool in the shape of ``values``; the first of equal ones."""
    order = np.argsort(np.where(candidates, values, np.inf).reshape(-1), kind="stable")[:number]
    chosen = np.zeros(values.size, dtype=bool)
    chosen[order] = True
    return chosen.reshape(values.shape) & candidates


def frequencies_of(statistics: Statistics, names: Sequence[str], phase: str | None, by: str) -> np.ndarray:
    """Frequencies of these groups, float64 [group, layer, expert]."""
    return statistics.frequency(phase, by)[[statistics.groups.index(name) for name in names]]

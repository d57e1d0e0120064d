"""Consistency of routing: the overlap of the experts that two tokens of one sequence choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from moe_route.analysis.inputs import AnalysisError, pick_groups
from moe_route.analysis.result import Result, by_depth, plain
from moe_route.analysis.stats import RESAMPLES, draw_items, interval_of, resampled_means
from moe_route.base.table import Table
from moe_route.recording import RoutingStatistics


@dataclass(frozen=True, eq=False, repr=False)
class Consistency(Result, hidden=("sequence_values",)):
    """Mean Jaccard index of the experts of two tokens of one sequence.

    Attributes:
        values: float64 [G, L], mean over sequences; NaN where no sequence has two tokens.
        groups, layers: names of the axes.
        sequences: int64 [G], number of sequences with a value, in the layer that has most.
        sequence_values: for each group float64 [n, L], the value of each sequence; None if sequences were not kept.
    """

    values: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    sequences: np.ndarray
    sequence_values: tuple[np.ndarray, ...] | None = None

    def interval(
        self, level: float = 0.95, *, resamples: int = RESAMPLES, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap interval (low, high) of the mean over sequences, each float64 [G, L].

        The sequences of each group are drawn with replacement, with all layers of a sequence together. The ends are
        NaN for a group with one sequence.

        Raises ``AnalysisError`` if sequences were not kept.
        """
        if self.sequence_values is None:
            raise AnalysisError("an interval needs single sequences: record(consistency=True, sequences=True)")
        ends = []
        for values in self.sequence_values:
            if not len(values):
                ends.append(np.full((2, len(self.layers)), np.nan))
                continue
            means = resampled_means(draw_items(len(values), resamples, seed), values)
            ends.append(np.stack(interval_of(means, len(values), level)))
        low, high = np.stack(ends, axis=1)
        return low, high

    def columns(self) -> dict[str, Any]:
        """``consistency``; with single sequences also ``low`` and ``high``, the 95 % interval."""
        return self.over("group layer", {"consistency": self.values, **self._ends()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None); with single sequences also the 95 % interval."""
        return {**super().to_dict(), **plain(self._ends())}

    def _ends(self) -> dict[str, np.ndarray]:
        return {} if self.sequence_values is None else dict(zip(("low", "high"), self.interval(), strict=True))

    def tables(self) -> list[Table]:
        title = "consistency: mean Jaccard index of the experts of two tokens of a sequence"
        note = ""
        if self.sequence_values is not None:
            low, high = self.interval()
            widest = np.fmax.reduce((high - low).reshape(-1), initial=np.nan) / 2
            if not np.isnan(widest):
                note = f"95 % intervals up to ± {widest:.3f} (bootstrap over sequences)"
        sequences = {"sequences": self.sequences.tolist()}
        return [by_depth(self.groups, self.values, title=title, note=note, before=sequences)]


@overload
def consistency(source: RoutingStatistics, *, groups: Sequence[str] | None = None) -> Consistency: ...
@overload
def consistency(source: np.ndarray, *, chunk: int = 1024) -> float: ...
def consistency(
    source: RoutingStatistics | np.ndarray, *, groups: Sequence[str] | None = None, chunk: int = 1024
) -> Consistency | float:
    """Mean Jaccard index of the chosen experts over pairs of tokens of one sequence.

    With N_m the number of pairs that share m of K experts, it is ``sum_m N_m * m / (2 K - m) / N`` (arXiv 2510.04694
    section 4). Tokens that chose no expert are left out.

    Args:
        source: statistics recorded with ``consistency=``, for the mean over sequences by group and layer; or the ids
            of one sequence and layer, int [T, K], -1 for an empty slot.
        groups: the groups of statistics to take; all by default.
        chunk: number of tokens of ids that are compared at once, so that memory stays at chunk x T.

    Returns a ``Consistency`` for statistics, and a number for ids: NaN with fewer than two tokens.

    Raises ``AnalysisError`` for unknown or empty groups and for ids of another form, ``ValueError`` for statistics
    without consistency.
    """
    if isinstance(source, (np.ndarray, Sequence)):
        return _of_ids(np.asarray(source), chunk)
    names = pick_groups(source, groups)
    rows = [source.groups.index(name) for name in names]
    values = source.consistency()[rows]
    sequences = source.accumulated["consistency_sequences"][rows].max(axis=1, initial=0)
    kept = None if source.store is None else _by_group(source.store, names)
    return Consistency(values, names, tuple(source.layers), sequences, kept)


def _by_group(store: Any, names: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Values of the sequences of each group that have one in some layer, float64 [n, L]."""
    rows_of: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for shard in store.shards():
        for (_, group), values in zip(shard.keys, shard.arrays["consistency"], strict=True):
            if group in rows_of and not np.isnan(values).all():
                rows_of[group].append(values)
    layers = len(store.layers)
    return tuple(np.array(rows, dtype=np.float64).reshape(-1, layers) for rows in rows_of.values())


def _of_ids(chosen: np.ndarray, chunk: int) -> float:
    if chosen.ndim != 2 or not np.issubdtype(chosen.dtype, np.integer) or chunk < 1:
        raise AnalysisError("ids must be integers [tokens, k], and chunk 1 or more")
    chosen = chosen[(chosen >= 0).any(axis=1)]
    tokens = len(chosen)
    if tokens < 2:
        return float("nan")
    member = np.zeros((tokens, int(chosen.max()) + 1), dtype=np.float32)
    rows, slots = np.nonzero(chosen >= 0)
    member[rows, chosen[rows, slots]] = 1.0
    sizes = member.sum(1)
    total = 0.0
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        shared = member[part] @ member.T
        total += float((shared / (sizes[part, None] + sizes[None] - shared)).sum(dtype=np.float64))
    return (total - tokens) / (tokens * (tokens - 1))

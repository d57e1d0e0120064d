"""Read the kept sequences of groups as arrays, a group at a time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_route.analysis.inputs import Statistics, normalized
from moe_route.recording.store import SequenceStore

__all__ = ["GroupSequences", "batches", "blocks", "groups_of", "tokens_per_sequence"]

_ARRAYS = {"full": "full", "topk": "topk", "count": "counts"}
_BATCH_BYTES = 512 << 20  # groups are read together up to this size, one at least
_BLOCK = 1 << 15  # elements that are compared at once: temporaries then stay in the processor's cache


@dataclass(frozen=True)
class GroupSequences:
    """The routing of n sequences of one group.

    Attributes:
        group: name of the group.
        values: the stored distributions, float32 [n, L, E], or counts, int32 (kind "count").
        tokens: number of tokens, int64 [n, L].
    """

    group: str
    values: np.ndarray
    tokens: np.ndarray

    def distributions(self) -> np.ndarray:
        """q_i, float64 [n, L, E]; rows without tokens are NaN."""
        return normalized(self.values.astype(np.float64))

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens per sequence, in the layer that counted most."""
        return float(self.tokens.max(1).mean())


def groups_of(
    statistics: Statistics, groups: Sequence[str], items: Sequence[Any], kind: str
) -> Iterator[GroupSequences]:
    """Yield the sequences of these groups, one group at a time, with a row per item in the order of ``items``."""
    for batch in batches(statistics, groups, len(items)):
        yield from _read(statistics.store, batch, items, kind)


def batches(statistics: Statistics, groups: Sequence[str], items: int) -> list[Sequence[str]]:
    """Divide groups into portions whose sequences are read together."""
    one = items * len(statistics.layers) * max(statistics.num_experts) * 8  # as float64
    number = max(1, _BATCH_BYTES // max(one, 1))
    return [groups[start : start + number] for start in range(0, len(groups), number)]


def _read(store: SequenceStore, groups: Sequence[str], items: Sequence[Any], kind: str) -> list[GroupSequences]:
    """The sequences of these groups, read in one pass over the store."""
    store.distributions(items[0], groups[0], kind)  # type: ignore[arg-type]  # raises for what was not recorded
    place = {(item, group): (g, i) for g, group in enumerate(groups) for i, item in enumerate(items)}
    shape = (len(groups), len(items), len(store.layers))
    tokens = np.zeros(shape, np.int64)
    widest = max(store.num_experts)
    values = np.zeros((*shape, widest), np.int32 if kind == "count" else np.float32)
    for shard in store.shards():
        rows = [(row, place[key]) for row, key in enumerate(shard.keys) if key in place]
        if rows:
            here = [row for row, _ in rows]
            at = tuple(np.array([to for _, to in rows]).T)
            values[at] = shard.arrays[_ARRAYS[kind]][here]
            tokens[at] = shard.arrays["tokens"][here]
    return [GroupSequences(group, values[g], tokens[g]) for g, group in enumerate(groups)]


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the items of an array [item, layer, expert], small enough for the processor's cache."""
    size = max(1, _BLOCK // max(int(np.prod(shape[1:])), 1))
    for start in range(0, shape[0], size):
        yield slice(start, start + size)


def tokens_per_sequence(statistics: Any, groups: Sequence[str]) -> np.ndarray:
    """Mean number of tokens per finished sequence, float64 [G]; NaN where no sequences were counted."""
    count = getattr(statistics, "sequences", None)  # sums over tokens alone have none
    if count is None:
        return np.full(len(groups), np.nan)
    rows = [statistics.groups.index(group) for group in groups]
    tokens = statistics.tokens()[rows].max(1, initial=0)
    numbers = count()[rows]
    return np.divide(tokens, numbers, out=np.full(len(rows), np.nan), where=numbers > 0)

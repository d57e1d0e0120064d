"""Read the kept sequences of groups as arrays, a group at a time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_route.analysis.inputs import Statistics, normalized
from moe_route.recording.store import SequenceStore

__all__ = ["GroupSequences", "batches", "blocks", "groups_of", "mean_tokens", "read_sequences", "tokens_per_sequence"]

_ARRAYS = {"full": "full", "topk": "topk", "count": "counts", "hidden": "hidden"}
_BATCH_BYTES = 512 << 20  # groups are read together up to this size, one at least
_BLOCK = 1 << 15  # elements that are compared at once: temporaries then stay in the processor's cache


@dataclass(frozen=True)
class GroupSequences:
    """The routing of n sequences of one group.

    Attributes:
        group: name of the group.
        values: the stored distributions, float32 [n, L, E]; counts, int32 (kind "count"); or hidden states, float32
            [n, L, H] (kind "hidden").
        tokens: number of tokens, int64 [n, L].
        token_entropy: mean of H(p_t) over tokens in nats, float64 [n, L]; NaN where it was not kept.
    """

    group: str
    values: np.ndarray
    tokens: np.ndarray
    token_entropy: np.ndarray
    kind: str = "full"

    def vectors(self) -> np.ndarray:
        """Hidden states as they are, or distributions, float64 [n, L, H or E]."""
        return self.values.astype(np.float64) if self.kind == "hidden" else self.distributions()

    def distributions(self) -> np.ndarray:
        """q_i, float64 [n, L, E]; rows without tokens are NaN."""
        return normalized(self.values.astype(np.float64))

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens per sequence, in the layer that counted most."""
        return float(self.tokens.max(1).mean())


def groups_of(
    statistics: Statistics, groups: Sequence[str], items: Sequence[Any] | Mapping[str, Sequence[Any]], kind: str
) -> Iterator[GroupSequences]:
    """Yield the sequences of these groups, one group at a time.

    They have a row per item, in the order of ``items``: the same for all groups, or those of each.
    """
    wanted = items if isinstance(items, Mapping) else dict.fromkeys(groups, items)
    for batch in batches(statistics, groups, max(len(wanted[group]) for group in groups)):
        yield from read_sequences(statistics.store, {group: wanted[group] for group in batch}, kind)


def batches(statistics: Statistics, groups: Sequence[str], items: int) -> list[Sequence[str]]:
    """Divide groups into portions whose sequences are read together."""
    one = items * len(statistics.layers) * max(statistics.num_experts) * 8  # as float64
    number = max(1, _BATCH_BYTES // max(one, 1))
    return [groups[start : start + number] for start in range(0, len(groups), number)]


def read_sequences(store: SequenceStore, items: Mapping[str, Sequence[Any]], kind: str) -> list[GroupSequences]:
    """The sequences of these items of each group, read in one pass over the store.

    Raises ``ValueError`` for a ``kind`` that does not exist or was not recorded.
    """
    if kind not in _ARRAYS:
        raise ValueError(f"no distribution kind {kind!r}: full, topk or count")
    group, wanted = next(iter(items.items()))
    shard = next(store.shards({(wanted[0], group)}))  # not by its key: the store would keep the shard in memory
    width = shard.array(_ARRAYS[kind]).shape[-1]
    layers = len(store.layers)
    dtype = np.int32 if kind == "count" else np.float32
    place = {(item, group): row for group, wanted in items.items() for row, item in enumerate(wanted)}
    found = {
        group: GroupSequences(
            group,
            np.zeros((len(wanted), layers, width), dtype),
            np.zeros((len(wanted), layers), np.int64),
            np.full((len(wanted), layers), np.nan),
            kind,
        )
        for group, wanted in items.items()
    }
    for shard in store.shards(place):
        rows: dict[str, list[tuple[int, int]]] = {}
        for row, key in enumerate(shard.keys):
            if key in place:
                rows.setdefault(key[1], []).append((row, place[key]))
        for group, pairs in rows.items():
            here, there = (list(part) for part in zip(*pairs, strict=True))
            found[group].values[there] = shard.arrays[_ARRAYS[kind]][here]
            found[group].tokens[there] = shard.arrays["tokens"][here]
            if "token_entropy" in shard.arrays:  # not in files of earlier recordings
                found[group].token_entropy[there] = shard.arrays["token_entropy"][here]
    return list(found.values())


def mean_tokens(store: SequenceStore, groups: Sequence[str], items: Sequence[Any]) -> np.ndarray:
    """Mean number of tokens of these items in each group, in the layer that counted most, float64 [G]."""
    wanted, total = set(items), dict.fromkeys(groups, 0)
    for shard in store.shards():
        for (item, group), tokens in zip(shard.keys, shard.arrays["tokens"], strict=True):
            if group in total and item in wanted:
                total[group] += int(tokens.max(initial=0))
    return np.array([total[group] for group in groups]) / len(items)


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

"""How alike the tokens of one sequence route: the Jaccard index of the experts of two tokens, by sequence and layer.

Two tokens that share m experts, and choose s experts together with repetition, have the index m / (s - m). So the
number of pairs by (m, s) gives the mean. These numbers are integers, and do not depend on how sequences are batched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moe_route.contract.tables import FIXED_POINT
from moe_route.recording.accumulators import Accumulator
from moe_route.recording.choices import ObservedCall
from moe_route.recording.sequences import RunningSequences
from moe_route.recording.tables import RecordedRouter

__all__ = ["SequenceConsistency"]

_MOST_AT_ONCE = 1 << 22  # pairs of tokens that are compared at once, over all layers


class SequenceConsistency(Accumulator):
    """Adds up the mean Jaccard index of the token pairs of each finished sequence, by group and layer.

    The ids of a sequence are kept until it ends. Tokens that chose no expert in a layer (dropped, or not given to its
    router) are left out there. A sequence with fewer than two tokens left has no value.
    """

    option = "consistency"

    def __init__(self, routers: Sequence[RecordedRouter], groups: int, pairs: int | None) -> None:
        """Prepare the sums. ``pairs``: number of pairs drawn per sequence; None for all pairs."""
        super().__init__(routers, groups, {"consistency": (), "consistency_sequences": ()})
        self._pairs = pairs
        self._kept: list[tuple[Tensor, Tensor]] = []  # of each call: segment of each token [T], ids [L, T, k]

    def begin_sequences(self, sequences: RunningSequences, groups: int) -> None:
        super().begin_sequences(sequences, groups)
        self._kept = []

    def take(self, observed: ObservedCall) -> None:
        """Keep the ids of a call."""
        if not observed.ids:
            return
        device = observed.call.device
        widest = max(ids.shape[1] for ids in observed.ids.values())
        blank = next(iter(observed.ids.values())).new_full((observed.batch * observed.length, widest), -1)
        layers = [observed.ids.get(layer, blank) for layer in range(len(self.routers))]
        self._kept.append(
            (observed.segments(device), torch.stack([_widened(ids, widest).to(device) for ids in layers]))
        )

    def sequence_values(self, sequences: RunningSequences) -> Mapping[str, np.ndarray]:
        """The mean index of each segment, float64 ``[segments, L]``; NaN without pairs. Waits for the device."""
        values = np.full((sequences.segments, len(self.routers)), np.nan)
        if self._kept:
            widest = max(ids.shape[2] for _, ids in self._kept)
            device = self._kept[0][1].device
            ids = torch.cat([_widened(ids, widest).to(device) for _, ids in self._kept], dim=1)
            segments = torch.cat([rows.to(device) for rows, _ in self._kept]).cpu().numpy()
            places = _places(segments, sequences.segments)
            if self._pairs is None:
                self._compare_all(ids, places, values)
            else:
                self._compare_drawn(ids, places, sequences, values)
        return {"consistency": values}

    def end_sequences(self, sequences: RunningSequences, values: Mapping[str, np.ndarray] | None) -> None:
        self._kept = []
        if values is None:
            return
        means = values["consistency"]
        rounded = np.rint(np.nan_to_num(means) / FIXED_POINT).astype(np.int64)
        self.add_rows("consistency", sequences.segment_group, rounded)
        self.add_rows("consistency_sequences", sequences.segment_group, (~np.isnan(means)).astype(np.int64))

    def _compare_all(self, ids: Tensor, places: Sequence[np.ndarray], values: np.ndarray) -> None:
        for some in _batches([len(place) for place in places], len(ids)):
            longest = max(len(places[segment]) for segment in some)
            table = np.full((len(some), longest), -1)
            for row, segment in enumerate(some):
                table[row, : len(places[segment])] = places[segment]
            values[some] = _mean(_all_pairs(_gathered(ids, table), self._experts), ids.shape[2])

    def _compare_drawn(
        self, ids: Tensor, places: Sequence[np.ndarray], sequences: RunningSequences, values: np.ndarray
    ) -> None:
        assert self._pairs is not None
        for segment, place in enumerate(places):
            tokens = len(place)
            if tokens * (tokens - 1) // 2 <= self._pairs:
                self._compare_all(ids, [place], values[segment : segment + 1])
                continue
            drawn = drawn_pairs(tokens, self._pairs, sequences.identity(int(sequences.segment_sequence[segment])))
            left, right = (_gathered(ids, place[None, side]) for side in drawn)
            values[segment] = _mean(_pairs_by_overlap(left[0], right[0]), ids.shape[2])

    @property
    def _experts(self) -> int:
        return max(router.num_experts for router in self.routers)


def drawn_pairs(tokens: int, pairs: int, name: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Draw pairs of different tokens of one sequence, as indices; they depend on these arguments only."""
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), np.uint64)
    raw = np.random.Philox(key=key).random_raw(2 * pairs).reshape(2, pairs)
    first = raw[0] % tokens
    second = (first + 1 + raw[1] % (tokens - 1)) % tokens
    return first.astype(np.int64), second.astype(np.int64)


def _widened(ids: Tensor, slots: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, slots - ids.shape[-1]), value=-1)


def _places(segments: np.ndarray, count: int) -> list[np.ndarray]:
    """Indices of the tokens of each segment, in the order in which they ran."""
    order = np.argsort(segments, kind="stable")
    bounds = np.searchsorted(segments[order], np.arange(count + 1))
    return [order[first:last] for first, last in pairwise(bounds)]


def _batches(lengths: Sequence[int], layers: int) -> Iterator[list[int]]:
    """Segments to compare together, of similar length; those with a single token are left out."""
    some: list[int] = []
    for segment in sorted((s for s, length in enumerate(lengths) if length > 1), key=lambda s: lengths[s]):
        if some and (len(some) + 1) * layers * lengths[segment] ** 2 > _MOST_AT_ONCE:
            yield some
            some = []
        some.append(segment)
    if some:
        yield some


def _gathered(ids: Tensor, places: np.ndarray) -> Tensor:
    """The ids ``[L, T, k]`` at ``places [N, n]``, as ``[N, L, n, k]``; -1 gives empty slots."""
    index = torch.from_numpy(places).to(ids.device)
    found = ids[:, index.clamp(min=0)]  # [L, N, n, k]
    return torch.where((index >= 0)[None, :, :, None], found, -1).transpose(0, 1)


def _codes(slots: int) -> int:
    """Number of codes for one number m of shared experts; tokens without experts have sizes that give codes apart."""
    return 4 * slots + 3


def _all_pairs(ids: Tensor, experts: int) -> np.ndarray:
    """Number of pairs of tokens by (m, s): int64 ``[N, L, k+1, 4k+3]`` from ids ``[N, L, n, k]``."""
    number, layers, tokens, slots = ids.shape
    rows = ids.reshape(number * layers, tokens, slots)
    step = max(_MOST_AT_ONCE // (tokens * experts), 1)
    parts = [_pairs_of_rows(rows[start : start + step], experts) for start in range(0, len(rows), step)]
    numbers: np.ndarray = torch.cat(parts).cpu().numpy()
    return numbers.reshape(number, layers, *numbers.shape[1:])


def _pairs_of_rows(ids: Tensor, experts: int) -> Tensor:
    """Number of pairs of tokens by (m, s): int64 ``[R, k+1, 4k+3]`` from ids ``[R, n, k]``."""
    rows, tokens, slots = ids.shape
    member = torch.zeros((rows, tokens, experts + 1), device=ids.device)
    member.scatter_(2, torch.where(ids >= 0, ids.long(), experts), 1.0)
    member = member[..., :experts]
    sizes = member.sum(2, keepdim=True)
    marked = torch.where(sizes > 0, sizes, 2 * slots + 1)
    ones = torch.ones_like(sizes)
    codes = _codes(slots)
    left = torch.cat([codes * member, marked, ones], dim=2)  # one product gives m * codes + s
    right = torch.cat([member, ones, marked], dim=2).transpose(1, 2)
    first = torch.arange(rows, device=ids.device)[:, None, None] * ((slots + 1) * codes)
    found = torch.zeros(rows * (slots + 1) * codes, dtype=torch.int64, device=ids.device)
    step = max(_MOST_AT_ONCE // (rows * tokens), 1)
    with torch.autocast(ids.device.type, enabled=False):
        for start in range(0, tokens, step):
            code = (left[:, start : start + step] @ right).long() + first
            found += torch.bincount(code.reshape(-1), minlength=len(found))
    found = found.view(rows, slots + 1, codes)
    for size in range(1, slots + 1):  # each token was compared with itself too
        found[:, size, 2 * size] -= (sizes == size).sum((1, 2))
    return found // 2


def _pairs_by_overlap(left: Tensor, right: Tensor) -> np.ndarray:
    """Number of pairs by (m, s): int64 ``[L, k+1, 4k+3]`` from the ids ``[L, n, k]`` of both tokens of n pairs."""
    layers, _, slots = left.shape
    shared = ((left[..., :, None] == right[..., None, :]) & (left >= 0)[..., None]).sum((-1, -2))
    sizes = [(ids >= 0).sum(-1) for ids in (left, right)]
    first, second = (torch.where(size > 0, size, 2 * slots + 1) for size in sizes)
    bins = (slots + 1) * _codes(slots)
    code = shared * _codes(slots) + first + second + torch.arange(layers, device=left.device)[:, None] * bins
    found = torch.bincount(code.reshape(-1), minlength=layers * bins)
    numbers: np.ndarray = found.view(layers, slots + 1, _codes(slots)).cpu().numpy()
    return numbers


def _mean(numbers: np.ndarray, slots: int) -> np.ndarray:
    """Mean Jaccard index from numbers of pairs by (m, s) ``[..., k+1, 4k+3]``; NaN without pairs."""
    numbers = numbers[..., : 2 * slots + 1].astype(np.float64)
    shared, together = np.indices(numbers.shape[-2:])
    index = shared / np.maximum(together - shared, 1)
    pairs = numbers.sum((-1, -2))
    total = (numbers * index).sum((-1, -2))
    return np.divide(total, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)

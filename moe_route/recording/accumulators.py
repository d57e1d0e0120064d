"""Add up arrays per group from the choices of every call, beside the tables of the gate.

Pairs of experts, sizes of expert outputs, router inputs, and how consistently a sequence routes: one class each.
`arrays.ACCUMULATED` lists the arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moe_route.base.devices import widest
from moe_route.contract.experts import SeenOutputs
from moe_route.contract.tables import FIXED_POINT
from moe_route.recording.arrays import ACCUMULATED, SIZE_UNIT
from moe_route.recording.choices import ChoiceObserver, ObservedCall
from moe_route.recording.sequences import RunningSequences
from moe_route.recording.statistics import RecordingError
from moe_route.recording.tables import RecordedRouter

_MOST_AT_ONCE = 1 << 22  # pairs of tokens whose experts are compared at once, over all layers


class Accumulator(ChoiceObserver):
    """Adds up arrays per group from the choices of every call.

    A subclass names its arrays. Token sums are added in ``take``, to the tensors that ``table`` gives, without waiting
    for the device. Sums over finished sequences are added in ``end_sequences``, by ``add_rows``.
    """

    def __init__(self, routers: Sequence[RecordedRouter], groups: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Prepare the arrays. ``shapes``: name from ``ACCUMULATED`` -> shape of the axes after group and layer."""
        self.routers = tuple(routers)
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._capacity = groups
        self._tables: dict[tuple[str, int], Tensor] = {}
        self._rows: dict[str, np.ndarray] = {}  # sums that are on the host, [groups, L, ...]

    def begin_sequences(self, sequences: RunningSequences, groups: int) -> None:
        self._reserve(groups)

    def table(self, name: str, layer: int, device: torch.device) -> Tensor:
        """The array of one layer (or pair of layers), ``[groups, ...]`` on ``device``; zeros at first.

        Add to it in place, and do not keep it: it is replaced when there are more groups, or the layer moves.
        """
        key = (name, layer)
        known = self._tables.get(key)
        if known is None:
            self._tables[key] = known = self._zeros(name, self._capacity, device)
        elif known.device != device:
            self._tables[key] = self._zeros(name, len(known), device).copy_(known)
            known = self._tables[key]
        return known

    @torch.inference_mode(False)  # the tables outlive the inference mode in which a model may be called
    def _zeros(self, name: str, groups: int, device: torch.device) -> Tensor:
        dtype = torch.int64 if ACCUMULATED[name].dtype == "int64" else widest(device)
        return torch.zeros((groups, *self._shapes[name]), dtype=dtype, device=device)

    def add_rows(self, name: str, groups: np.ndarray, rows: np.ndarray) -> None:
        """Add row i of ``rows [n, L, ...]``, which are on the host, to group ``groups[i]``."""
        of = ACCUMULATED[name]
        if name not in self._rows:
            shape = (self._capacity, of.rows(len(self.routers)), *self._shapes[name])
            self._rows[name] = np.zeros(shape, of.dtype)
        (np.maximum if of.merge == "max" else np.add).at(self._rows[name], groups, rows)

    def _reserve(self, groups: int) -> None:
        if groups <= self._capacity:
            return
        for (name, layer), table in self._tables.items():
            wide = self._zeros(name, groups, table.device)
            wide[: len(table)] = table
            self._tables[name, layer] = wide
        for name, sums in self._rows.items():
            room = np.zeros((groups - len(sums), *sums.shape[1:]), sums.dtype)
            self._rows[name] = np.concatenate([sums, room])
        self._capacity = groups

    def arrays(self, groups: int) -> dict[str, np.ndarray]:
        """The sums so far, name -> ``[groups, L, ...]`` (or pairs of layers, L - 1). Waits for the device."""
        arrays = {}
        for name, shape in self._shapes.items():
            rows = ACCUMULATED[name].rows(len(self.routers))
            arrays[name] = np.zeros((groups, rows, *shape), ACCUMULATED[name].dtype)
        for (name, layer), table in self._tables.items():
            known = min(groups, len(table))
            arrays[name][:known, layer] = table[:known].cpu().numpy()
        for name, sums in self._rows.items():
            arrays[name][:] = sums[:groups]
        return arrays


class PairCounts(Accumulator):
    """Counts pairs of experts that a token chose: co-selection ``[G, L, E, E]``, transitions ``[G, L-1, E, E]``.

    The latter are counted between neighboring layers whose routers are of one kind. An empty slot is in no pair.
    """

    option = "pairs"

    def __init__(self, routers: Sequence[RecordedRouter], groups: int) -> None:
        """Prepare the arrays, of E x E x 8 bytes for each group and layer, twice."""
        widest = max(router.num_experts for router in routers)
        super().__init__(routers, groups, dict.fromkeys(("co_selection", "transitions"), (widest, widest)))
        self._follows = [False, *(before.role == after.role for before, after in pairwise(routers))]

    def take(self, observed: ObservedCall) -> None:
        """Count the pairs of a call."""
        for layer, ids in observed.ids.items():
            groups = observed.groups(ids.device)
            _count(self.table("co_selection", layer, ids.device), groups, ids, ids)
            before = observed.ids.get(layer - 1) if self._follows[layer] else None
            if before is not None:
                _count(self.table("transitions", layer - 1, ids.device), groups, before.to(ids.device), ids)


def _count(table: Tensor, groups: Tensor, first: Tensor, second: Tensor) -> None:
    """Add 1 to ``table[g, e, e']`` for each token of group g with e in ``first`` and e' in ``second``.

    ``groups [T]``; ``first [T, k]`` and ``second [T, k']``; -1 is left out.
    """
    experts = table.shape[-1]
    rows, columns = first.long()[:, :, None], second.long()[:, None, :]
    cell = (groups[:, None, None] * experts + rows) * experts + columns
    counted = (groups[:, None, None] >= 0) & (rows >= 0) & (columns >= 0)
    cell = torch.where(counted, cell, 0)  # a mask instead of a selection, which would wait for the device
    table.view(-1).index_add_(0, cell.reshape(-1), counted.reshape(-1).to(table.dtype))


class ExpertOutputs(Accumulator):
    """Adds up sizes of expert outputs per (group, layer, expert), over the tokens t that chose e with weight g_e(t):

    - ``weighted_norm``: sum of g_e(t) * |f_e(x_t)|, in multiples of `SIZE_UNIT`;
    - ``norm``: sum of |f_e(x_t)|, in multiples of `SIZE_UNIT`;
    - ``peak``: largest absolute element of any f_e(x_t);
    - ``first``: number of first tokens of a sequence (position 0) that chose e.
    """

    option = "expert_outputs"
    weights_dtype = torch.float32

    def __init__(self, routers: Sequence[RecordedRouter], groups: int) -> None:
        widest = max((router.num_experts for router in routers), default=0)
        super().__init__(routers, groups, dict.fromkeys(("weighted_norm", "norm", "peak", "first"), (widest,)))
        self._call: ObservedCall | None = None
        self._is_first: Tensor | None = None  # bool [T]
        self._seen: dict[int, SeenOutputs] = {}

    def begin_call(self, observed: ObservedCall) -> None:
        self._call, self._seen = observed, {}
        self._is_first = (observed.call.tokens_before() == 0).expand(observed.batch, -1).reshape(-1)

    def drop_call(self) -> None:
        self._call, self._is_first, self._seen = None, None, {}

    def awaits(self, layer: int) -> Tensor | None:
        """The choice ids [T, k] of a layer (-1: an empty slot) whose outputs are wanted now, or None."""
        return None if self._call is None or layer in self._seen else self._call.ids.get(layer)

    def add_outputs(self, layer: int, seen: SeenOutputs) -> None:
        """Receive the outputs for that choice."""
        self._seen[layer] = seen

    def take(self, observed: ObservedCall) -> None:
        first, seen = self._is_first, self._seen
        self.drop_call()
        assert first is not None
        for layer, ids in observed.ids.items():
            if layer not in seen:
                raise RecordingError(
                    f"the router of layer {layer} chose experts, and their outputs were not seen: something replaces "
                    "the block's experts (a kernel, a compiled graph). Record without expert_outputs"
                )
            self._add(
                layer, ids, observed.weights[layer], observed.groups(ids.device), first.to(ids.device), seen[layer]
            )

    def _add(self, layer: int, ids: Tensor, weights: Tensor, groups: Tensor, first: Tensor, seen: SeenOutputs) -> None:
        counted = (ids >= 0) & (groups >= 0)[:, None]
        experts = self._shapes["norm"][0]
        place = torch.where(counted, groups[:, None] * experts + ids, 0).reshape(-1)

        def table(name: str) -> Tensor:
            return self.table(name, layer, ids.device).view(-1)

        wide = widest(ids.device)
        norms = torch.where(counted, seen.norms.to(wide), 0.0)
        for name, values in (("weighted_norm", norms * weights.to(wide)), ("norm", norms)):
            table(name).index_add_(0, place, _as_units(values).reshape(-1))
        peaks = torch.where(counted, seen.peaks.to(wide), 0.0).reshape(-1)
        table("peak").scatter_reduce_(0, place, peaks, "amax")
        table("first").index_add_(0, place, (counted & first[:, None]).long().reshape(-1))


def _as_units(values: Tensor) -> Tensor:
    """Round to multiples of `SIZE_UNIT`, as int64. Values that are not finite become 0; the peaks keep them."""
    return torch.nan_to_num(values / SIZE_UNIT, nan=0.0, posinf=0.0, neginf=0.0).round().long()


class HiddenStates(Accumulator):
    """Averages the router inputs of each sequence, and adds them up over the finished sequences of a group.

    - ``hidden``: sum over sequences of the mean over tokens, in multiples of `SIZE_UNIT`;
    - ``hidden_sequences``: number of sequences with a token in the layer.

    Sums over tokens are float64 on the device, float32 where it has none. The number of elements H is that of the first
    router that runs.
    """

    option = "hidden"

    def __init__(self, routers: Sequence[RecordedRouter], groups: int) -> None:
        super().__init__(routers, groups, {})
        self._call: ObservedCall | None = None
        self._inputs: dict[int, Tensor] = {}  # of the running call: sums by segment, or the inputs of drafts
        self._sums: dict[int, Tensor] = {}  # layer -> [segments, H + 1], the last column counts tokens
        self._segments = 0
        self._width: int | None = None
        self._totals: dict[str, np.ndarray] = {}

    def needs(self, layer: int) -> bool:
        return False

    def begin_sequences(self, sequences: RunningSequences, groups: int) -> None:
        super().begin_sequences(sequences, groups)
        self._segments, self._sums = sequences.segments, {}

    def begin_call(self, observed: ObservedCall) -> None:
        self._call, self._inputs = observed, {}

    def drop_call(self) -> None:
        self._call, self._inputs = None, {}

    def add_input(self, layer: int, hidden: Tensor) -> None:
        """Add the input of one router, [..., H] for all tokens of the call, without waiting for the device."""
        call = self._call
        if call is None:
            return
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        if len(rows) != call.batch * call.length:
            raise RecordingError(
                f"layer {layer} is given {len(rows)} of {call.batch * call.length} tokens, so they cannot be told "
                "apart: record without hidden"
            )
        self._width = self._width or rows.shape[1]
        if rows.shape[1] != self._width:
            raise RecordingError(
                f"the router of layer {layer} is given {rows.shape[1]} elements per token, others {self._width}: "
                "record without hidden"
            )
        # which of the drafts are text is known only later
        sums = rows.clone() if call.drafted else self._summed(call, rows)
        self._inputs[layer] = sums

    def _summed(self, observed: ObservedCall, rows: Tensor) -> Tensor:
        segments = observed.segments(rows.device)
        wide = widest(rows.device)
        sums = torch.zeros((self._segments + 1, rows.shape[1] + 1), dtype=wide, device=rows.device)
        counted = torch.cat([rows.to(wide), torch.ones_like(rows[:, :1], dtype=wide)], dim=1)
        sums.index_add_(0, torch.where(segments < 0, self._segments, segments), counted)
        return sums[:-1]

    def take(self, observed: ObservedCall) -> None:
        inputs = self._inputs
        self.drop_call()
        for layer, found in inputs.items():
            sums = self._summed(observed, found) if observed.drafted else found
            self._sums[layer] = sums if layer not in self._sums else self._sums[layer].to(sums.device) + sums

    def sequence_values(self, sequences: RunningSequences) -> Mapping[str, np.ndarray]:
        if self._width is None:
            return {}
        means = np.full((sequences.segments, len(self.routers), self._width), np.nan)
        for layer, sums in self._sums.items():
            table = sums.cpu().numpy()
            tokens = table[:, -1:]
            np.divide(table[:, :-1], tokens, out=means[:, layer], where=tokens > 0)
        return {"hidden": means.astype(np.float32)}

    def end_sequences(self, sequences: RunningSequences, values: Mapping[str, np.ndarray] | None) -> None:
        self._sums = {}
        if values is None or self._width is None:
            return
        means = values["hidden"].astype(np.float64)
        seen = ~np.isnan(means[..., 0])
        terms = np.rint(np.nan_to_num(means) / SIZE_UNIT).astype(np.int64)
        totals = self._grown()
        np.add.at(totals["hidden"], sequences.segment_group, terms)
        np.add.at(totals["hidden_sequences"], sequences.segment_group, seen.astype(np.int64))

    def _grown(self) -> dict[str, np.ndarray]:
        """The sums, with room for all groups."""
        assert self._width is not None
        shape = (self._capacity, len(self.routers), self._width)
        old = self._totals
        self._totals = {"hidden": np.zeros(shape, np.int64), "hidden_sequences": np.zeros(shape[:2], np.int64)}
        for name, array in old.items():
            self._totals[name][: len(array)] = array
        return self._totals

    def arrays(self, groups: int) -> dict[str, np.ndarray]:
        return {} if self._width is None else {name: array[:groups] for name, array in self._grown().items()}


class SequenceConsistency(Accumulator):
    """Adds up the mean Jaccard index of the token pairs of each finished sequence, by group and layer.

    Two tokens that share m experts, and choose s experts together with repetition, have the index m / (s - m). So the
    number of pairs by (m, s) gives the mean. These numbers are integers, and do not depend on how sequences are
    batched.

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
    gathered = ids[:, index.clamp(min=0)]  # [L, N, n, k]
    return torch.where((index >= 0)[None, :, :, None], gathered, -1).transpose(0, 1)


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
    pairs = torch.zeros(rows * (slots + 1) * codes, dtype=torch.int64, device=ids.device)
    step = max(_MOST_AT_ONCE // (rows * tokens), 1)
    with torch.autocast(ids.device.type, enabled=False):
        for start in range(0, tokens, step):
            code = (left[:, start : start + step] @ right).long() + first
            pairs += torch.bincount(code.reshape(-1), minlength=len(pairs))
    pairs = pairs.view(rows, slots + 1, codes)
    for size in range(1, slots + 1):  # each token was compared with itself too
        pairs[:, size, 2 * size] -= (sizes == size).sum((1, 2))
    return pairs // 2


def _pairs_by_overlap(left: Tensor, right: Tensor) -> np.ndarray:
    """Number of pairs by (m, s): int64 ``[L, k+1, 4k+3]`` from the ids ``[L, n, k]`` of both tokens of n pairs."""
    layers, _, slots = left.shape
    shared = ((left[..., :, None] == right[..., None, :]) & (left >= 0)[..., None]).sum((-1, -2))
    sizes = [(ids >= 0).sum(-1) for ids in (left, right)]
    first, second = (torch.where(size > 0, size, 2 * slots + 1) for size in sizes)
    bins = (slots + 1) * _codes(slots)
    code = shared * _codes(slots) + first + second + torch.arange(layers, device=left.device)[:, None] * bins
    pairs = torch.bincount(code.reshape(-1), minlength=layers * bins)
    numbers: np.ndarray = pairs.view(layers, slots + 1, _codes(slots)).cpu().numpy()
    return numbers


def _mean(numbers: np.ndarray, slots: int) -> np.ndarray:
    """Mean Jaccard index from numbers of pairs by (m, s) ``[..., k+1, 4k+3]``; NaN without pairs."""
    numbers = numbers[..., : 2 * slots + 1].astype(np.float64)
    shared, together = np.indices(numbers.shape[-2:])
    index = shared / np.maximum(together - shared, 1)
    pairs = numbers.sum((-1, -2))
    total = (numbers * index).sum((-1, -2))
    return np.divide(total, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)

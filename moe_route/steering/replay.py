"""``ReplayTable``: the recorded experts of each token of some sequences, to be chosen again (routing replay)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import Any, Protocol

import numpy as np

from moe_route import files
from moe_route.steering.layers import show_numbers
from moe_route.steering.model import PlanError

__all__ = ["RecordedChoices", "ReplayTable"]

Item = str | int
Key = tuple[Item, str | None]


class RecordedChoices(Protocol):
    """The part of a trace that a replay uses (``recording.Trace``)."""

    @property
    def layer_numbers(self) -> Sequence[int]: ...
    @property
    def groups(self) -> Sequence[str]: ...
    @property
    def items(self) -> Sequence[Item | None]: ...
    @property
    def sequence(self) -> np.ndarray: ...
    @property
    def group(self) -> np.ndarray: ...
    @property
    def position(self) -> np.ndarray: ...
    @property
    def ids(self) -> np.ndarray: ...
    @property
    def truncated(self) -> bool: ...


class ReplayTable:
    """Choices of n tokens, one sequence after another. Immutable; tables with equal content are equal.

    Attributes:
        ids: int16 ``[n, L, k]``, the experts of each token in the order of their slots. A row that begins with -1 has
            no choice; a later -1 is an empty slot.
        lengths: number of tokens of each of the N sequences, from position 0.
        layers: indices of the L MoE layers, in increasing order; None for all layers of the model.
        keys: (item, group) of each sequence, with group None where the item alone identifies it. None if sequence i is
            row i of the batch.
        digest: SHA-256 (hex) of all fields above.

    Raises ``PlanError`` for an invalid shape, id or key.
    """

    __slots__ = ("_chosen", "digest", "ids", "keys", "layers", "lengths")

    def __init__(
        self,
        ids: np.ndarray,
        lengths: Iterable[int],
        layers: Iterable[int] | None,
        keys: Iterable[Key] | None,
    ) -> None:
        self.ids = _checked_ids(ids)
        self.lengths = tuple(index(length) for length in lengths)
        self.layers = None if layers is None else tuple(index(layer) for layer in layers)
        self.keys = None if keys is None else tuple((item, group) for item, group in keys)
        if min(self.lengths, default=0) < 0 or sum(self.lengths) != len(self.ids):
            raise PlanError(f"the sequences have {sum(self.lengths)} tokens, the ids are of {len(self.ids)}")
        if self.layers is not None and len(self.layers) != self.ids.shape[1]:
            raise PlanError(f"the ids are of {self.ids.shape[1]} layers, {len(self.layers)} layers are named")
        if self.keys is not None:
            _check_keys(self.keys, len(self.lengths))
        # bool [L]: whether some token has a choice in the layer
        self._chosen: np.ndarray = np.any(self.ids[:, :, 0] >= 0, axis=0)
        self.digest = files.content_hash({"ids": self.ids}, self.header())

    @classmethod
    def of_trace(cls, trace: RecordedChoices) -> ReplayTable:
        """The choices of a trace.

        Sequences are matched by item, or by item and group if an item was recorded in several groups. Sequences without
        items are matched by batch row.
        """
        if trace.truncated:
            raise PlanError("the trace is cut, its later tokens are missing: record with a larger trace_limit")
        sequence, position = trace.sequence.astype(np.int64), trace.position.astype(np.int64)
        lengths = np.zeros(len(trace.items), np.int64)
        np.maximum.at(lengths, sequence, position + 1)
        place = (np.cumsum(lengths) - lengths)[sequence] + position
        # moves empty slots behind the chosen experts, since a leading -1 would mean that there is no choice
        recorded = np.take_along_axis(trace.ids, np.argsort(trace.ids < 0, axis=2, kind="stable"), axis=2)
        ids = np.full((int(lengths.sum()), *recorded.shape[1:]), -1, np.int16)
        chosen = recorded[:, :, :1] >= 0 if recorded.shape[2] else np.zeros((*recorded.shape[:2], 1), bool)
        for layer in range(recorded.shape[1]):
            here = chosen[:, layer, 0]
            at = place[here]
            if len(np.unique(at)) != len(at):
                raise PlanError(
                    "a token of the trace has several choices in one layer (beams, or several returned sequences, "
                    "share their item): record the text that is to be replayed in a call of its own"
                )
            ids[at, layer] = recorded[here, layer]
        return cls(ids, lengths.tolist(), trace.layer_numbers, _trace_keys(trace))

    @classmethod
    def of_ids(cls, ids: Any, layers: Sequence[int] | None = None, items: Sequence[Item] | None = None) -> ReplayTable:
        """The choices of a batch, as integers ``[B, T, L, k]``, or ``[T, L, k]`` for one sequence."""
        array = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)
        if array.dtype.kind not in "iu" or array.ndim not in (3, 4):
            raise PlanError(
                "replay takes a trace, or integer ids [batch, tokens, layers, k] (or [tokens, layers, k] of one "
                f"sequence), not {array.dtype} {list(array.shape)}; Plan.fix_choice takes one choice for all tokens"
            )
        batch, length = (array.shape[0] if array.ndim == 4 else 1), array.shape[-3]
        flat = array.reshape(batch * length, *array.shape[-2:])
        names = None
        if layers is not None:
            names = [index(layer) for layer in layers]
            if len(set(names)) != len(names) or min(names, default=0) < 0 or len(names) != flat.shape[1]:
                raise PlanError(
                    f"layers must name each of the {flat.shape[1]} layers of the ids once, from 0, not {names}"
                )
            order = np.argsort(names)
            names, flat = sorted(names), flat[:, order]
        keys = None
        if items is not None:
            keys = [(item.item() if hasattr(item, "item") else item, None) for item in items]
        return cls(flat, [length] * batch, names, keys)

    # ---- matching sequences

    def sequences(self, batch: int, items: Sequence[Item] | None, groups: Sequence[str | None] | None) -> np.ndarray:
        """int64 ``[batch]``: the recorded sequence of each row of a batch.

        ``items`` and ``groups`` are those of the N sequences of the batch (or None). Rows beyond N are beams or
        returned sequences of them. Raises ``PlanError`` for a row without a recorded sequence.
        """
        if self.keys is None:
            return _spread(np.arange(len(self.lengths)), batch)
        if items is None:
            raise PlanError(
                "the plan replays recorded choices by item, and the call has no items: run it inside "
                "`with routed.labels(items=[...])`, or `rec.labels(...)` while recording"
            )
        by_group = dict(zip(self.keys, range(len(self.keys)), strict=True))
        found = []
        for row, item in enumerate(items):
            sequence = by_group.get((item, None))
            if sequence is None:
                sequence = by_group.get((item, None if groups is None else groups[row]))
            if sequence is None:
                raise PlanError(f"the plan replays no sequence of item {item!r}{self._known(item)}")
            found.append(sequence)
        return _spread(np.asarray(found, np.int64), batch)

    def _known(self, item: Item) -> str:
        of_item = [group for known, group in self.keys or () if known == item]
        if of_item:
            return f" in that group: it has {', '.join(map(repr, of_item))}; label the batch with groups= as recorded"
        shown = ", ".join(repr(known) for known, _ in (self.keys or ())[:4])
        return f": it has {shown}{', ...' if len(self.lengths) > 4 else ''}; run other texts outside the steer block"

    @property
    def first(self) -> np.ndarray:
        """int64 ``[N]``: index in ``ids`` at which each sequence begins."""
        lengths = np.asarray(self.lengths, np.int64)
        return np.cumsum(lengths) - lengths

    # ---- one layer

    def layer_ids(self, layer: int) -> np.ndarray | None:
        """int16 ``[n, k]``: the ids of one MoE layer, or None if the table has none."""
        if self.layers is not None and layer not in self.layers:
            return None
        place = layer if self.layers is None else self.layers.index(layer)
        return self.ids[:, place] if self._chosen[place] else None

    def relabeled(self, order: Callable[[int, int], np.ndarray]) -> ReplayTable:
        """Rename expert e of each layer to ``order(layer, largest)[e]``; see ``Rule.relabeled``."""
        ids = self.ids.copy()
        for place, layer in enumerate(range(ids.shape[1]) if self.layers is None else self.layers):
            before = self.ids[:, place]
            if self._chosen[place]:
                to = order(layer, int(before.max()))
                ids[:, place] = np.where(before >= 0, to[np.maximum(before, 0)], -1)
        return ReplayTable(ids, self.lengths, self.layers, self.keys)

    # ---- content

    def header(self) -> dict[str, Any]:
        """JSON-able content without the ids."""
        return {
            "lengths": list(self.lengths),
            "layers": None if self.layers is None else list(self.layers),
            "keys": None if self.keys is None else [list(key) for key in self.keys],
        }

    @classmethod
    def of_header(cls, ids: Any, header: Mapping[str, Any]) -> ReplayTable:
        """Rebuild a table from ``ids`` (an array, or lists) and its ``header``."""
        return cls(np.asarray(ids), header["lengths"], header["layers"], header["keys"])

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, ReplayTable) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        by = "batch row" if self.keys is None else "item"
        tokens, sequences = len(self.ids), len(self.lengths)
        return (
            f"{tokens} token{'' if tokens == 1 else 's'} of {sequences} sequence{'' if sequences == 1 else 's'}, "
            f"found by {by}"
        )

    def __repr__(self) -> str:
        where = "every layer" if self.layers is None else f"layers {show_numbers(self.layers)}"
        return f"ReplayTable({self}, {where}, {self.digest[:12]})"


def _checked_ids(ids: np.ndarray) -> np.ndarray:
    """Check and convert ids: int16, contiguous, with rows that begin with -1 filled with -1."""
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or not ids.size:
        raise PlanError(
            f"there is nothing to replay: the ids must be integers of tokens, layers and slots, not {ids.dtype} "
            f"{list(ids.shape)}"
        )
    if ids.min() < -1 or ids.max() > np.iinfo(np.int16).max:
        wrong = int(ids.min() if ids.min() < -1 else ids.max())
        raise PlanError(f"{wrong} is not an expert: ids count from 0, and -1 is a slot without one")
    kept = ids.astype(np.int16, order="C")
    kept[kept[:, :, 0] < 0] = -1
    sorted_ids = np.sort(kept, axis=2)
    twice = (sorted_ids[:, :, 1:] == sorted_ids[:, :, :-1]) & (sorted_ids[:, :, 1:] >= 0)
    if twice.any():
        token, layer, slot = np.argwhere(twice)[0]
        raise PlanError(
            f"expert {sorted_ids[token, layer, slot + 1]} is in two slots of token {token}, in layer {layer} of the "
            "ids: a token can choose an expert only once"
        )
    kept.flags.writeable = False
    return kept


def _check_keys(keys: Sequence[Key], sequences: int) -> None:
    if len(keys) != sequences:
        raise PlanError(f"there are {len(keys)} items for {sequences} sequences: give one per sequence")
    for item, _ in keys:
        if isinstance(item, bool) or not isinstance(item, (str, int)):
            raise PlanError(f"an item is a string or an integer, not {type(item).__name__}")
    if len(set(keys)) != len(keys):
        item, group = next(key for key in keys if keys.count(key) > 1)
        of = "" if group is None else f" of group {group!r}"
        raise PlanError(f"item {item!r}{of} is there more than once: give each sequence an item of its own")


def _trace_keys(trace: RecordedChoices) -> list[Key] | None:
    """(item, group) of each sequence; the group is that of its first token, None if the item has one group only."""
    items = [item for item in trace.items if item is not None]
    if not items:
        return None
    if len(items) != len(trace.items):
        raise PlanError("some sequences of the trace have items and some have none: label all of them, or none")
    groups: list[str | None] = [None] * len(items)
    sequences, first = np.unique(trace.sequence, return_index=True)
    for sequence, at in zip(sequences, first, strict=True):
        groups[sequence] = trace.groups[trace.group[at]]
    times: dict[Item, int] = {}
    for item in items:
        times[item] = times.get(item, 0) + 1
    return [(item, group if times[item] > 1 else None) for item, group in zip(items, groups, strict=True)]


def _spread(sequences: np.ndarray, batch: int) -> np.ndarray:
    if not len(sequences) or batch % len(sequences):
        raise PlanError(
            f"the plan replays {len(sequences)} sequences at a time, the batch has {batch}: give each sequence an "
            "item, Plan.replay(ids, items=[...]) and labels(items=[...]), to run them in other batches"
        )
    return np.repeat(sequences, batch // len(sequences))

"""``ReplayTable``: the recorded experts of each token of some sequences, to be chosen again (routing replay)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from moe_route.steering.model import PlanError
from moe_route.steering.sequence_table import Item, Key, SequenceTable, as_keys, layer_order

__all__ = ["RecordedChoices", "ReplayTable"]


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


class ReplayTable(SequenceTable):
    """Recorded choices, as int16 ``[n, L, k]``: the experts of each token in the order of their slots.

    A row that begins with -1 has no choice; a later -1 is an empty slot.
    """

    field: ClassVar[str] = "ids"
    does: ClassVar[str] = "replays recorded choices"
    __slots__ = ()

    @property
    def ids(self) -> np.ndarray:
        """int16 ``[n, L, k]``."""
        return self.values

    @staticmethod
    def _checked(values: np.ndarray) -> np.ndarray:
        return _checked_ids(values)

    @staticmethod
    def _has_value(values: np.ndarray) -> np.ndarray:
        return values[:, :, 0] >= 0

    @staticmethod
    def _renamed(values: np.ndarray, to: np.ndarray) -> np.ndarray:
        return np.where(values >= 0, to[np.maximum(values, 0)], -1)

    @staticmethod
    def _largest(values: np.ndarray) -> int:
        return int(values.max())

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
        names, order = layer_order(layers, flat.shape[1], "ids")
        return cls(flat[:, order], [length] * batch, names, as_keys(items))


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

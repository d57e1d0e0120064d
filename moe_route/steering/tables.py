"""Arrays of a plan: values for each token (``ReplayTable``, ``ScoreTable``), and ``DirectionTable`` of single experts.

A sequence is found by its item or by its batch row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from moe_route.base import files
from moe_route.base.schema import Natural
from moe_route.steering.layers import show_numbers
from moe_route.steering.model import PlanError

Item = str | int
Key = tuple[Item, str | None]


class SequenceTable(ABC):
    """Values of n tokens, one sequence after another. Immutable; tables with equal content are equal.

    Attributes:
        values: array ``[n, L, ...]``, the values of each token in each layer.
        lengths: number of rows of each of the N sequences, from position 0.
        layers: indices of the L MoE layers, in increasing order; None for all layers of the model.
        keys: (item, group) of each sequence, with group None where the item alone identifies it. None if sequence i is
            row i of the batch.
        constant: whether each sequence has one row, which holds for all of its tokens.
        digest: SHA-256 (hex) of all fields above.

    Raises ``PlanError`` for an invalid shape, value or key.
    """

    field: ClassVar[str]  # name of the values in a file
    does: ClassVar[str]  # what a plan does with them
    what: ClassVar[str]  # the values, in words

    __slots__ = ("_filled", "constant", "digest", "keys", "layers", "lengths", "values")

    def __init__(
        self,
        values: np.ndarray,
        lengths: Iterable[int],
        layers: Iterable[int] | None,
        keys: Iterable[Key] | None,
        *,
        constant: bool = False,
    ) -> None:
        self.values = self._checked(values)
        self.lengths = tuple(index(length) for length in lengths)
        self.layers = None if layers is None else tuple(index(layer) for layer in layers)
        self.keys = None if keys is None else tuple((item, group) for item, group in keys)
        self.constant = bool(constant)
        if min(self.lengths, default=0) < 0 or sum(self.lengths) != len(self.values):
            raise PlanError(
                f"the sequences have {sum(self.lengths)} tokens, the {self.field} are of {len(self.values)}"
            )
        if self.layers is not None and len(self.layers) != self.values.shape[1]:
            raise PlanError(
                f"the {self.field} are of {self.values.shape[1]} layers, {len(self.layers)} layers are named"
            )
        if self.keys is not None:
            _check_keys(self.keys, len(self.lengths))
        # bool [L]: whether some token has a value in the layer
        self._filled: np.ndarray = np.any(self._has_value(self.values), axis=0)
        self.digest = files.content_hash({self.field: self.values}, self.header())

    @staticmethod
    @abstractmethod
    def _checked(values: np.ndarray) -> np.ndarray:
        """Check and convert the values; the result is contiguous and read-only."""

    @staticmethod
    @abstractmethod
    def _has_value(values: np.ndarray) -> np.ndarray:
        """bool ``[n, L]``: whether a token has a value in a layer."""

    @staticmethod
    @abstractmethod
    def _renamed(values: np.ndarray, to: np.ndarray) -> np.ndarray:
        """Values ``[n, ...]`` of a layer with expert e renamed to ``to[e]``."""

    @staticmethod
    @abstractmethod
    def _largest(values: np.ndarray) -> int:
        """The largest expert that values ``[n, ...]`` of a layer name."""

    # ---- matching sequences

    def sequences(self, batch: int, items: Sequence[Item] | None, groups: Sequence[str | None] | None) -> np.ndarray:
        """int64 ``[batch]``: the sequence of the table for each row of a batch.

        ``items`` and ``groups`` are those of the N sequences of the batch (or None). Rows beyond N are beams or
        returned sequences of them. Raises ``PlanError`` for a row without a sequence.
        """
        if self.keys is None:
            return self._spread(np.arange(len(self.lengths)), batch)
        if items is None:
            raise PlanError(
                f"the plan {self.does} by item, and the call has no items: run it inside "
                "`with routed.labels(items=[...])`, or `rec.labels(...)` while recording"
            )
        by_group = dict(zip(self.keys, range(len(self.keys)), strict=True))
        rows = []
        for row, item in enumerate(items):
            sequence = by_group.get((item, None))
            if sequence is None:
                sequence = by_group.get((item, None if groups is None else groups[row]))
            if sequence is None:
                raise PlanError(f"the plan {self.does} for no sequence of item {item!r}{self._known(item)}")
            rows.append(sequence)
        return self._spread(np.asarray(rows, np.int64), batch)

    def _known(self, item: Item) -> str:
        of_item = [group for known, group in self.keys or () if known == item]
        if of_item:
            return f" in that group: it has {', '.join(map(repr, of_item))}; label the batch with groups= as recorded"
        shown = ", ".join(repr(known) for known, _ in (self.keys or ())[:4])
        return f": it has {shown}{', ...' if len(self.lengths) > 4 else ''}; run other texts outside the steer block"

    def _spread(self, sequences: np.ndarray, batch: int) -> np.ndarray:
        if not len(sequences) or batch % len(sequences):
            raise PlanError(
                f"the plan {self.does} for {len(sequences)} sequences at a time, the batch has {batch}: give each "
                "sequence an item, items=[...] of the plan and labels(items=[...]), to run them in other batches"
            )
        return np.repeat(sequences, batch // len(sequences))

    @property
    def first(self) -> np.ndarray:
        """int64 ``[N]``: index in ``values`` at which each sequence begins."""
        lengths = np.asarray(self.lengths, np.int64)
        return np.cumsum(lengths) - lengths

    # ---- one layer

    def in_layer(self, layer: int) -> np.ndarray | None:
        """The values ``[n, ...]`` in one MoE layer, or None if the table has none."""
        if self.layers is not None and layer not in self.layers:
            return None
        place = layer if self.layers is None else self.layers.index(layer)
        return self.values[:, place] if self._filled[place] else None

    def relabeled(self, order: Callable[[int, int], np.ndarray]) -> SequenceTable:
        """Rename expert e of each layer to ``order(layer, largest)[e]``; see ``Rule.relabeled``."""
        values = self.values.copy()
        for place, layer in enumerate(range(values.shape[1]) if self.layers is None else self.layers):
            before = self.values[:, place]
            if self._filled[place]:
                values[:, place] = self._renamed(before, order(layer, self._largest(before)))
        return type(self)(values, self.lengths, self.layers, self.keys, constant=self.constant)

    @abstractmethod
    def check_layer(self, layer: int, num_experts: int, top_k: int) -> None:
        """Raise ``PlanError`` for values that a layer of this shape cannot take."""

    @abstractmethod
    def rows_of(self, layer: int, num_experts: int, top_k: int) -> np.ndarray:
        """The values ``[n, ...]`` of a layer in the shape that the layer needs."""

    # ---- content

    def header(self) -> dict[str, Any]:
        """JSON-able content without the values."""
        content: dict[str, Any] = {
            "lengths": list(self.lengths),
            "layers": None if self.layers is None else list(self.layers),
            "keys": None if self.keys is None else [list(key) for key in self.keys],
        }
        return content | ({"constant": True} if self.constant else {})

    def to_list(self) -> Any:
        """The values as lists that JSON can hold; NaN becomes None."""
        if self.values.dtype.kind != "f":
            return self.values.tolist()
        held = self.values.astype(object)
        held[np.isnan(self.values)] = None
        return held.tolist()

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, SequenceTable) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        by = "batch row" if self.keys is None else "item"
        tokens, sequences = len(self.values), len(self.lengths)
        of = "" if self.constant else f"{tokens} token{'' if tokens == 1 else 's'} of "
        return f"{of}{sequences} sequence{'' if sequences == 1 else 's'}, found by {by}"

    def __repr__(self) -> str:
        where = "every layer" if self.layers is None else f"layers {show_numbers(self.layers)}"
        return f"{type(self).__name__}({self}, {where}, {self.digest[:12]})"


def layer_order(layers: Sequence[int] | None, count: int, what: str) -> tuple[list[int] | None, Any]:
    """The named layers in increasing order, and the index that sorts an axis of ``count`` layers like them."""
    if layers is None:
        return None, slice(None)
    names = [index(layer) for layer in layers]
    if len(set(names)) != len(names) or min(names, default=0) < 0 or len(names) != count:
        raise PlanError(f"layers must name each of the {count} layers of the {what} once, from 0, not {names}")
    return sorted(names), np.argsort(names)


def as_keys(items: Sequence[Item] | None) -> list[Key] | None:
    """Keys of sequences that are matched by item."""
    return None if items is None else [(item.item() if hasattr(item, "item") else item, None) for item in items]


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
    what: ClassVar[str] = "replayed ids"
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

    def check_layer(self, layer: int, num_experts: int, top_k: int) -> None:
        ids = self.in_layer(layer)
        if ids is None:
            return
        if int(ids.max()) >= num_experts:
            raise PlanError(
                f"the plan replays expert {int(ids.max())} of layer {layer}, which has {num_experts} experts "
                f"(0-{num_experts - 1}): replay what was recorded with this model"
            )
        if (ids[:, top_k:] >= 0).any():
            raise PlanError(
                f"the plan replays more than {top_k} experts for a token of layer {layer}, which has {top_k} slots: "
                "replay what was recorded with the model's own top-k, or leave the layer out, plan.only(layers=[...])"
            )

    def rows_of(self, layer: int, num_experts: int, top_k: int) -> np.ndarray:
        """int16 ``[n, k]``, with as many slots as the layer has."""
        ids = self.in_layer(layer)
        assert ids is not None  # the rule applies to the layer, so it has ids
        return np.pad(ids[:, :top_k], ((0, 0), (0, max(top_k - ids.shape[1], 0))), constant_values=-1)

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


class ScoreTable(SequenceTable):
    """Given scores, as float32 ``[n, L, E]``: those of each token; a row of NaN has no scores."""

    field: ClassVar[str] = "scores"
    does: ClassVar[str] = "replaces scores"
    what: ClassVar[str] = "scores"
    __slots__ = ()

    @staticmethod
    def _checked(values: np.ndarray) -> np.ndarray:
        if values.ndim != 3 or values.dtype.kind not in "fiuO" or not values.size:
            raise PlanError(
                f"there are no scores: they must be numbers of tokens, layers and experts, not {values.dtype} "
                f"{list(values.shape)}"
            )
        with np.errstate(over="ignore"):
            kept = values.astype(np.float32, order="C")  # None, as NaN is written in JSON, becomes NaN
        missing = np.isnan(kept)
        wrong = (missing.any(2) & ~missing.all(2)) | np.isinf(kept).any(2) | (np.nan_to_num(kept) < 0).any(2)
        wrong |= (kept == 0).all(2)
        if wrong.any():
            token, layer = np.argwhere(wrong)[0]
            raise PlanError(
                f"the scores of token {token}, layer {layer} of the table must be finite, 0 or more, and one of them "
                "above 0; a row of NaN leaves the token to the router"
            )
        kept.flags.writeable = False
        return kept

    @staticmethod
    def _has_value(values: np.ndarray) -> np.ndarray:
        return ~np.isnan(values[:, :, 0])

    @staticmethod
    def _renamed(values: np.ndarray, to: np.ndarray) -> np.ndarray:
        renamed = values.copy()
        renamed[:, to] = values[:, : len(to)]
        return renamed

    @staticmethod
    def _largest(values: np.ndarray) -> int:
        return int(np.nonzero(np.nan_to_num(values).any(0))[0].max())

    def check_layer(self, layer: int, num_experts: int, top_k: int) -> None:
        scores = self.in_layer(layer)
        if scores is not None and (scores.shape[1] < num_experts or np.nan_to_num(scores[:, num_experts:]).any()):
            raise PlanError(
                f"the plan has scores of {scores.shape[1]} experts for layer {layer}, which has {num_experts}: give "
                "scores of all its experts, in order, and 0 behind them where another layer has more"
            )

    def rows_of(self, layer: int, num_experts: int, top_k: int) -> np.ndarray:
        """float32 ``[n, E]``, NaN for tokens without scores."""
        scores = self.in_layer(layer)
        assert scores is not None  # the rule applies to the layer, so it has scores
        return scores[:, :num_experts].copy()

    @classmethod
    def of_scores(
        cls,
        scores: Any,
        layers: Sequence[int] | None = None,
        items: Sequence[Item] | None = None,
        *,
        per: str = "token",
    ) -> ScoreTable:
        """Scores by token, ``[B, T, L, E]`` (``[T, L, E]`` of one sequence), or by sequence, ``[B, L, E]``."""
        array = np.asarray(scores.detach().cpu() if hasattr(scores, "detach") else scores)
        if per not in ("token", "sequence"):
            raise PlanError(f'scores are per "token" or per "sequence", not {per!r}')
        shape = "[batch, tokens, layers, experts] (or [tokens, layers, experts] of one sequence)"
        dims: tuple[int, ...] = (3, 4)
        if per == "sequence":
            shape, dims = "[batch, layers, experts]", (3,)
        if array.dtype.kind not in "fiu" or array.ndim not in dims:
            raise PlanError(
                f"replace_scores takes {{layer: {{expert: score}}}}, or scores per {per} {shape}, not {array.dtype} "
                f"{list(array.shape)}"
            )
        batch = array.shape[0] if array.ndim == 4 or per == "sequence" else 1
        flat = array.reshape(-1, *array.shape[-2:])
        names, order = layer_order(layers, flat.shape[1], "scores")
        lengths = [len(flat) // batch if batch else 0] * batch
        return cls(flat[:, order], lengths, names, as_keys(items), constant=per == "sequence")


class DirectionTable:
    """Vectors that are added to outputs of single experts. Immutable; tables with equal content are equal.

    Attributes:
        values: float32 ``[n, H]``, one row per expert.
        experts: (layer, expert) of each row, in increasing order.
        layers: the layers in it.
        digest: SHA-256 (hex) of values and experts.

    Raises ``PlanError`` for vectors of different lengths or values that are not finite.
    """

    field: ClassVar[str] = "directions"
    what: ClassVar[str] = "directions"

    def __init__(self, values: Any, experts: Iterable[Sequence[int]]) -> None:
        pairs = [(index(layer), index(expert)) for layer, expert in experts]
        made = np.asarray(values)
        if made.ndim != 2 or not made.size or made.dtype.kind not in "fiu" or len(made) != len(pairs):
            raise PlanError(
                "directions are {layer: {expert: vector}}, with vectors of one length, that of the model's hidden "
                f"states, not {made.dtype} {list(made.shape)} for {len(pairs)} experts"
            )
        if len(set(pairs)) != len(pairs) or min(map(min, pairs)) < 0:
            raise PlanError(f"directions name each layer and expert once, from 0, not {pairs}")
        order = sorted(range(len(pairs)), key=lambda place: pairs[place])
        with np.errstate(over="ignore"):
            self.values = made[order].astype(np.float32, order="C")
        if not np.isfinite(self.values).all():
            raise PlanError("a direction holds a number that is not finite")
        self.values.flags.writeable = False
        self.experts = tuple(pairs[place] for place in order)
        self.layers: tuple[int, ...] = tuple(sorted({layer for layer, _ in self.experts}))
        self.digest = files.content_hash({self.field: self.values}, self.header())

    @classmethod
    def of(cls, directions: Mapping[int, Mapping[int, Any]]) -> DirectionTable:
        """From ``directions[layer][expert]``, tensors, arrays or lists ``[H]``."""
        try:
            rows = {
                (layer, expert): np.asarray(v.detach().float().cpu() if hasattr(v, "detach") else v, np.float64)
                for layer, of_layer in directions.items()
                for expert, v in of_layer.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise PlanError(f"directions are {{layer: {{expert: vector}}}}, not {type(directions).__name__}") from error
        if not rows or len({row.shape for row in rows.values()}) > 1:
            shapes = ", ".join(sorted({str(list(row.shape)) for row in rows.values()})) or "none"
            raise PlanError(f"directions are {{layer: {{expert: vector}}}}, with vectors of one length, not {shapes}")
        return cls(np.stack([*rows.values()]), rows)

    def in_layer(self, layer: int) -> list[tuple[int, np.ndarray]] | None:
        """(expert, vector) pairs of one MoE layer, or None if there are none."""
        return [(e, v) for (at, e), v in zip(self.experts, self.values, strict=True) if at == layer] or None

    def relabeled(self, order: Callable[[int, int], np.ndarray]) -> DirectionTable:
        """Rename expert e of each layer to ``order(layer, largest)[e]``; see ``Rule.relabeled``."""
        largest = dict(self.experts)  # in increasing order, so the last of a layer stays
        return DirectionTable(self.values, [(at, int(order(at, largest[at])[e])) for at, e in self.experts])

    def check_layer(self, layer: int, num_experts: int, top_k: int) -> None:
        wrong = [expert for at, expert in self.experts if at == layer and expert >= num_experts]
        if wrong:
            raise PlanError(
                f"the plan names expert {wrong[0]} of layer {layer}, which has {num_experts} experts "
                f"(0-{num_experts - 1}): make it from this model"
            )

    def header(self) -> dict[str, Any]:
        """JSON-able content without the vectors."""
        return {"experts": [list(pair) for pair in self.experts]}

    def to_list(self) -> Any:
        """The vectors as lists."""
        return self.values.tolist()

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, DirectionTable) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        count = len(self.experts)
        return f"{count} expert{'' if count == 1 else 's'}"

    def __repr__(self) -> str:
        return f"DirectionTable({self}, layers {show_numbers(self.layers)}, {self.digest[:12]})"


PlanTable = SequenceTable | DirectionTable


@dataclass(frozen=True)
class TableContent:
    """Values for each token of some sequences, one sequence after another: ids to replay, or scores.

    Attributes:
        lengths: number of tokens of each sequence.
        layers: the MoE layers, in increasing order; null for all.
        keys: item and group of each sequence; null if sequence i is row i of the batch.
        constant: whether each sequence has one row of values, for all of its tokens.
        field: which values a safetensors file holds.
        ids: experts [token, layer, slot].
        scores: scores [token, layer, expert]; null for a token without any.
    """

    lengths: tuple[Natural, ...]
    layers: tuple[Natural, ...] | None
    keys: tuple[tuple[str | int, str | None], ...] | None
    constant: bool = False
    field: Literal["ids", "scores"] | None = None
    ids: Any = None
    scores: Any = None


@dataclass(frozen=True)
class DirectionContent:
    """Vectors that are added to outputs of single experts.

    Attributes:
        experts: layer and expert of each vector.
        directions: the vectors [expert, hidden size].
        field: which values a safetensors file holds.
    """

    experts: tuple[tuple[Natural, Natural], ...]
    directions: Any
    field: Literal["directions"] | None = None


def table_of(content: TableContent | DirectionContent) -> PlanTable:
    """The table of what a file says. Raises ``PlanError`` where its values are no array."""
    if isinstance(content, DirectionContent):
        return DirectionTable(_array(content.directions, DirectionTable.field), content.experts)
    if (content.ids is None) is (content.scores is None):
        raise PlanError("a table of values per token holds either ids or scores")
    kind, values = (ReplayTable, content.ids) if content.scores is None else (ScoreTable, content.scores)
    return kind(_array(values, kind.field), content.lengths, content.layers, content.keys, constant=content.constant)


def _array(values: Any, field: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise PlanError(f"the {field} of a table are no array: their rows differ in length") from error

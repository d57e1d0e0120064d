"""``SequenceTable``: values for each token of some sequences, found by the sequence's item or by its batch row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import Any, ClassVar

import numpy as np

from moe_route.base import files
from moe_route.steering.layers import show_numbers
from moe_route.steering.model import PlanError

__all__ = ["Item", "Key", "SequenceTable", "as_keys", "layer_order"]

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
        found = []
        for row, item in enumerate(items):
            sequence = by_group.get((item, None))
            if sequence is None:
                sequence = by_group.get((item, None if groups is None else groups[row]))
            if sequence is None:
                raise PlanError(f"the plan {self.does} for no sequence of item {item!r}{self._known(item)}")
            found.append(sequence)
        return self._spread(np.asarray(found, np.int64), batch)

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

    # ---- content

    def header(self) -> dict[str, Any]:
        """JSON-able content without the values."""
        content: dict[str, Any] = {
            "lengths": list(self.lengths),
            "layers": None if self.layers is None else list(self.layers),
            "keys": None if self.keys is None else [list(key) for key in self.keys],
        }
        return content | ({"constant": True} if self.constant else {})

    @classmethod
    def of_header(cls, values: Any, header: Mapping[str, Any]) -> SequenceTable:
        """Rebuild a table from ``values`` (an array, or lists) and its ``header``."""
        constant = header.get("constant", False)
        return cls(np.asarray(values), header["lengths"], header["layers"], header["keys"], constant=constant)

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

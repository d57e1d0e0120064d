"""Labels of the sequences of a batch, as the user passes them: groups, items, and which tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_route.calls.call import NamedGroups
from moe_route.recording.store import Item, is_unnamed


@dataclass(frozen=True, eq=False)
class LabelBlock:
    """Labels of N sequences, for one or more calls. Columns are positions from the start, padding included.

    An item is the id that pairs a sentence with its translations.

    Attributes:
        names: the groups that occur.
        codes: int64, indices into ``names``, for all sequences ``[]``, per sequence ``[N]`` or per token ``[N, S]``.
        items: N item ids, or None.
        mask: bool ``[N, S]``, which tokens count, or None for all.
    """

    names: tuple[str, ...]
    codes: np.ndarray
    items: tuple[Item, ...] | None = None
    mask: Tensor | None = None

    @classmethod
    def parse(cls, groups: Any, items: Any, mask: Any, known: Sequence[str] | None) -> LabelBlock:
        """Read the labels that a user passes as lists, tuples, numpy arrays, tensors or pandas series.

        Args:
            groups: one name, N names, or ``[N, S]`` names per token. Indices into ``known`` may stand for names.
            items: N item ids, or None.
            mask: bool ``[N, S]``, or None.
            known: the only groups allowed; None allows any name.

        Raises:
            ValueError: an unknown group (the message names the known ones), or lengths that do not agree.
            TypeError: a label that is neither a name nor an index.
        """
        names, codes = _read_groups(groups, known)
        parsed_items = None if items is None else _read_items(items)
        parsed_mask = None if mask is None else _read_mask(mask)
        given = {"groups": codes.shape[0] if codes.ndim else None, "items": parsed_items and len(parsed_items)}
        given["mask"] = None if parsed_mask is None else parsed_mask.shape[0]
        lengths = {what: n for what, n in given.items() if n is not None}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{n} {what}" for what, n in lengths.items())
            raise ValueError(
                f"labels do not agree on the number of sequences ({shown}): give one per sequence of the batch"
            )
        return cls(names, codes, parsed_items, parsed_mask)

    @property
    def named(self) -> NamedGroups:
        """The groups, for adapters that are chosen by group."""
        return NamedGroups(self.names, self.codes)

    @property
    def sequences(self) -> int | None:
        """N if some label is given per sequence; None if one name applies to all."""
        if self.items is not None:
            return len(self.items)
        if self.mask is not None:
            return self.mask.shape[0]
        return self.codes.shape[0] if self.codes.ndim else None

    @property
    def sequence_groups(self) -> tuple[str, ...] | None:
        """The group of each of the N sequences, or None if their number is unknown.

        With groups per token, the group of the first token counts.
        """
        if self.codes.ndim:
            return tuple(self.names[code] for code in self.codes.reshape(len(self.codes), -1)[:, 0])
        return None if self.sequences is None else self.names * self.sequences

    def values(self, of_name: Sequence[int]) -> np.ndarray:
        """``codes`` translated to other integers: ``of_name[i]`` stands for ``names[i]``. int64 of the same shape."""
        return np.asarray(of_name, dtype=np.int64)[self.codes]


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _read_groups(groups: Any, known: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    listed = _listed(groups)
    if isinstance(listed, (str, int)):
        return (_name(listed, known),), np.zeros((), np.int64)
    rows = [_listed(row) for row in listed]
    if not rows:
        raise ValueError("labels of no sequences: give one group per sequence of the batch, or one name for all")
    nested = [isinstance(row, (list, tuple)) for row in rows]
    if any(nested) and (not all(nested) or len({len(row) for row in rows}) != 1):
        raise ValueError("groups per token must be rectangular, [sequences, tokens]: pad the rows with any known group")
    shape = (len(rows), len(rows[0])) if nested[0] else (len(rows),)
    flat = [label for row in rows for label in row] if nested[0] else rows
    index: dict[str, int] = {}
    codes = [index.setdefault(_name(label, known), len(index)) for label in flat]
    return tuple(index), np.asarray(codes, np.int64).reshape(shape)


def _name(label: Any, known: Sequence[str] | None) -> str:
    label = _listed(label)
    if isinstance(label, str):
        if known is not None and label not in known:
            raise ValueError(f"unknown group {label!r}: this recording has {', '.join(known)}")
        return label
    if isinstance(label, bool) or not isinstance(label, int):
        raise TypeError(f"a group is a name or an id, not {type(label).__name__}")
    if known is None:
        raise ValueError(
            f"group id {label} means nothing without a list of groups: record(groups=[...]), or give names"
        )
    if not 0 <= label < len(known):
        raise ValueError(
            f"group id {label} is out of range: this recording has {len(known)} groups, {', '.join(known)}"
        )
    return known[label]


def _read_items(items: Any) -> tuple[Item, ...]:
    listed = _listed(items)
    if isinstance(listed, (str, int)):
        listed = [listed]
    read = tuple(_listed(item) for item in listed)
    for item in read:
        if isinstance(item, bool) or not isinstance(item, (str, int)):
            raise TypeError(
                f"an item id is a string or an integer, not {type(item).__name__}: number or name the sentences"
            )
        if is_unnamed(item):
            raise ValueError(f"item ids like {item!r} are kept for sequences without an id: take another")
    return read


def _read_mask(mask: Any) -> Tensor:
    tensor = torch.as_tensor(mask)
    if tensor.dim() != 2 or tensor.is_floating_point():
        raise ValueError(f"count_mask must be bool [sequences, tokens], not {tensor.dtype} {list(tensor.shape)}")
    return tensor.bool()

"""Sequences in progress: the table rows they count into, and the fingerprint of their tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from moe_route.base import files
from moe_route.base.devices import upload
from moe_route.calls.call import Call
from moe_route.calls.token_table import columns, rows_on_device
from moe_route.recording.labels import LabelBlock
from moe_route.recording.special_tokens import SpecialTokens
from moe_route.recording.store import Item

_HASH_BYTES = 16
_PADDING = torch.iinfo(torch.int32).min  # stands for the token id of padding


class RunningSequences:
    """N sequences, from their first call to the end of their label block.

    A *segment* is the part of one sequence that lies in one group. Segment tables and the sequence store have one row
    per segment. A sequence labeled per token has as many segments as groups. If the batch is n * N (beams, several
    returned sequences), rows i * n to i * n + n - 1 continue sequence i.
    """

    def __init__(
        self, block: LabelBlock, batch: int, group_index: Mapping[str, int], special: SpecialTokens | None = None
    ):
        """Begin the sequences of a block. ``special``: tokens that are not counted."""
        self.block = block
        self._special = special
        self.count = block.sequences or batch
        self.groups: np.ndarray = block.values([group_index[name] for name in block.names])  # shape [], [N] or [N, S]
        self._find_segments(len(group_index))
        self.broken = False  # whether a call failed
        # whether a row of the tables is that of a sequence, whatever the column and the token
        self.by_sequence = self.groups.ndim < 2 and block.mask is None and special is None
        self.fixed_rows: dict[object, tuple[int | Tensor, int | Tensor]] = {}  # kept by the recorder, if `by_sequence`
        self._rows: dict[tuple[str, int, torch.device], int | Tensor] = {}
        self._tokens: list[tuple[Tensor | None, int]] = []

    def _find_segments(self, num_groups: int) -> None:
        self.segment_of: np.ndarray = np.arange(self.count)
        self.segment_sequence: np.ndarray = self.segment_of
        self.segment_group: np.ndarray = self.groups
        if self.groups.ndim == 0:
            self.segment_group = np.full(self.count, self.groups)
        elif self.groups.ndim == 2:
            pairs, segment_of = np.unique(self.segment_of[:, None] * num_groups + self.groups, return_inverse=True)
            self.segment_sequence, self.segment_group = np.divmod(pairs, num_groups)
            self.segment_of = segment_of.reshape(self.groups.shape)

    @property
    def begun(self) -> bool:
        """Whether one of their calls reached the model itself; before that, a vision tower may fail."""
        return bool(self._tokens)

    @property
    def segments(self) -> int:
        return len(self.segment_sequence)

    def item(self, sequence: int) -> Item | None:
        return None if self.block.items is None else self.block.items[sequence]

    def fits(self, batch: int) -> bool:
        """Whether a call of this batch size can continue these sequences."""
        return batch % self.count == 0

    def group_rows(self, call: Call, offset: int) -> int | Tensor:
        """Row of the group tables for each token: an int, ``[N]`` or ``[N, length]``; -1 where it is not counted."""
        return self._masked(self._row("group", self.groups, call, offset), call)

    def segment_rows(self, call: Call, offset: int) -> int | Tensor:
        """Row of the segment tables for each token, in the form of ``group_rows``."""
        return self._masked(self._row("segment", self.segment_of, call, offset), call)

    def _row(self, what: str, rows: np.ndarray, call: Call, offset: int) -> int | Tensor:
        key = (what, offset, call.device)
        if key not in self._rows:
            self._rows[key] = rows_on_device(rows + offset, call.device)
        return columns(self._rows[key], call)

    def _masked(self, rows: int | Tensor, call: Call) -> int | Tensor:
        rows = self._in_mask(rows, call)
        return rows if self._special is None else self._special.left_out(rows, call)

    def _in_mask(self, rows: int | Tensor, call: Call) -> int | Tensor:
        if self.block.mask is None:
            return rows
        key = ("mask", 0, call.device)
        if key not in self._rows:
            self._rows[key] = upload(self.block.mask, call.device)
        counted = columns(self._rows[key], call, after=False)
        assert isinstance(counted, Tensor)
        if isinstance(rows, int):
            return torch.where(counted, rows, -1)
        return torch.where(counted, rows if rows.dim() == 2 else rows[:, None], -1)

    def keep_tokens(self, call: Call, first: int, end: int) -> None:
        """Keep the token ids of a call's columns `first` to `end` for the fingerprint, without waiting for a device."""
        ids = call.input_ids
        if ids is not None and ids.shape == (call.batch, call.length):
            # a copy, because callers may reuse their input buffer for the next step
            kept = ids.clone() if call.valid is None else torch.where(call.valid, ids, _PADDING)
            self._tokens.append((kept if end - first == call.length else kept[:, first:end], end - first))
        else:
            self._tokens.append((None, end - first))

    def drop_last(self, columns: int) -> None:
        """Drop the last ``columns`` of the latest call, which belong to no text."""
        ids, length = self._tokens[-1]
        self._tokens[-1] = (None if ids is None else ids[:, : ids.shape[1] - columns], length - columns)

    def fingerprint(self) -> int:
        """128-bit hash of the item, groups and token ids of every sequence, added up.

        Padding is left out. If a call was given embeddings, its number of columns is hashed in place of ids. Chunks
        give the same hash as the whole sequence, and the sum does not depend on the order of the sequences.
        """
        hashes = [hashlib.blake2b(self.identity(i), digest_size=_HASH_BYTES) for i in range(self.count)]
        for _, calls in itertools.groupby(self._tokens, key=_alike):
            for sequence, tokens in self._tokens_of(list(calls)):
                hashes[sequence].update(tokens)
        return sum(int.from_bytes(h.digest(), "big") for h in hashes)

    def identity(self, sequence: int) -> bytes:
        """The item and groups of a sequence; the same in every batch."""
        codes = self.block.codes if self.block.codes.ndim == 0 else self.block.codes[sequence]
        names = [self.block.names[code] for code in np.atleast_1d(codes)]
        return files.canonical_json([self.item(sequence), names]).encode()

    def _tokens_of(self, calls: list[tuple[Tensor | None, int]]) -> list[tuple[int, bytes]]:
        kept = [ids for ids, _ in calls if ids is not None]
        if not kept:
            lengths = np.asarray([length for _, length in calls], np.int32).tobytes()
            return [(sequence, lengths) for sequence in range(self.count)]
        tokens = torch.cat(kept, dim=1).to(torch.int32).cpu().numpy()
        repeats = tokens.shape[0] // self.count
        return [(i // repeats, row[row != _PADDING].tobytes()) for i, row in enumerate(tokens)]


def _alike(call: tuple[Tensor | None, int]) -> object:
    """Properties that calls must share so that their token ids can be concatenated."""
    ids, _ = call
    return None if ids is None else (ids.shape[0], ids.device)

"""Build the token table that the gate reads: int32 [T, 4] with columns steering row, group, segment, valid.

A segment is the part of one sequence that lies in one group. Padding tokens are routed, because the model routes them
too, but they are neither counted nor steered: their steering row, group and segment are -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_route.base.devices import upload
from moe_route.calls.call import Call

# A label says which table row each token of a call belongs to. It is an int for all tokens, integers [N] for N
# sequences, or integers [N, S] for their tokens.

IntLike = int | Tensor | Sequence[int]


def broadcast_rows(value: IntLike, call: Call, what: str) -> int | Tensor:
    """A label as an int, or as integers that broadcast to [B, S]; `what` names it in error messages."""
    if isinstance(value, int):
        return value
    labels = upload(torch.as_tensor(value), call.device)
    if labels.is_floating_point() or labels.dim() > 2:
        raise ValueError(
            f"{what} must be integers, one number, [batch] or [batch, length], not {labels.dtype} {list(labels.shape)}"
        )
    if labels.dim() == 0:
        return labels
    if labels.shape[0] == 0 or call.batch % labels.shape[0]:
        raise ValueError(
            f"{what} has {labels.shape[0]} rows, the batch has {call.batch}: give one per sequence (fewer only where "
            "they divide the batch, as with beams)"
        )
    if labels.shape[0] != call.batch:
        labels = labels.repeat_interleave(call.batch // labels.shape[0], dim=0)
    if labels.dim() == 1:
        return labels[:, None]
    if labels.shape[1] not in (1, call.length):
        raise ValueError(f"{what} has {labels.shape[1]} columns, the call has {call.length} tokens a sequence")
    return labels


def one_per_token(values: Tensor, call: Call) -> Tensor:
    """int64 [T] from integers that broadcast to [B, S], or [T, M] from integers that broadcast to [B, S, M]."""
    more = values.shape[2:]
    return upload(values, call.device).expand(call.batch, call.length, *more).reshape(-1, *more)


def rows_on_device(rows: np.ndarray, device: torch.device) -> int | Tensor:
    """Rows as an int if all are equal, else as an int32 tensor on `device`, without waiting for the device.

    Token tables of equal rows are reused from call to call.
    """
    if rows.size and (rows == rows.flat[0]).all():
        return int(rows.reshape(-1)[0])
    return upload(torch.from_numpy(rows.astype(np.int32)), device)


def columns(rows: int | Tensor, call: Call, *, after: bool | None = None) -> int | Tensor:
    """The columns of per-token rows ``[N, S]`` that a call covers, ``[N, length]``; an int or ``[N]`` stays as is.

    Tokens past the last column (generated tokens) take the row of the last column, or ``after`` if it is given.
    """
    if isinstance(rows, int) or rows.dim() < 2:
        return rows
    part = rows[:, call.past_length : call.past_length + call.length]
    missing = call.length - part.shape[1]
    if not missing:
        return part
    last = rows[:, -1:] if after is None else torch.full_like(rows[:, -1:], after)
    return torch.cat([part, last.expand(-1, missing)], dim=1)


def as_table(rows: int | Tensor, call: Call) -> Tensor:
    """Rows of a call's tokens as an int32 tensor ``[N or 1, length]``."""
    if isinstance(rows, int):
        return torch.full((1, call.length), rows, dtype=torch.int32, device=call.device)  # does not wait for a device
    table = rows.to(device=call.device, dtype=torch.int32)
    return (table[:, None] if table.dim() == 1 else table).expand(-1 if table.dim() else 1, call.length)


def in_phases(before: int | Tensor, now: int | Tensor, call: Call) -> int | Tensor:
    """Combine rows of a call: ``before`` for its first ``prompt`` columns, which are prefill, ``now`` for the rest."""
    if isinstance(before, int) and isinstance(now, int) and before == now:
        return before
    prompt = torch.arange(call.length, device=call.device) < call.prompt
    return torch.where(prompt, as_table(before, call), as_table(now, call))


@dataclass(slots=True, eq=False)
class Labels:
    """Labels of the tokens of a call: each an int for all tokens, or integers [B] or [B, S].

    If the batch is a multiple of the labeled rows (beams, several returned sequences), each row is repeated.
    """

    steering_row: IntLike = -1  # row of the steering tables; -1: not steered
    group: IntLike = 0  # row of the group tables; -1: not counted
    segment: IntLike = -1  # row of the segment tables; -1: not counted
    counter: Tensor | None = None  # int64 [B, S]: a number per token that seeds its random draws
    entries: Tensor | None = None  # int64 [B, S, M]: each token's row in M tables of recorded choices; -1: none
    told: Tensor | None = None  # int64 [B, S, 4]: what functions are told of each token (`contract.Where`)

    @property
    def columns(self) -> tuple[IntLike, IntLike, IntLike]:
        """The labels steering row, group and segment."""
        return self.steering_row, self.group, self.segment

    @property
    def uniform(self) -> bool:
        """Whether all tokens have the same labels."""
        row, group, segment = self.columns
        return self.entries is None and isinstance(row, int) and isinstance(group, int) and isinstance(segment, int)


class CallListener:
    """Receives the calls of an attached model. This base class gives no labels and ignores all notifications."""

    def labels_of(self, call: Call) -> Labels | None:
        """Give the labels of the tokens of a call that is about to run, or None for no labels."""

    def after_call(self, call: Call) -> None:
        """Called when a call has completed."""

    def reject_drafts(self, count: int) -> None:
        """Called when the last `count` drafted tokens of the latest call were rejected and belong to no text."""


Tables = dict[torch.device, Tensor]
"""One tensor of a call, copied to each device that needs it."""


def on_device(tables: Tables, device: torch.device) -> Tensor:
    """The tensor on `device`; it is copied there once."""
    if device not in tables:
        tables[device] = upload(next(iter(tables.values())), device)
    return tables[device]


def build_table(call: Call, labels: Labels, steering_row: int | Tensor) -> Tensor:
    """Build int32 [T, 4] on the call's device; `steering_row` is the label of that name, already broadcast."""
    group, segment = (broadcast_rows(labels.group, call, "group"), broadcast_rows(labels.segment, call, "segment"))
    table = torch.empty((call.batch, call.length, 4), dtype=torch.int32, device=call.device)
    for column, value in enumerate((steering_row, group, segment, 1)):
        table[..., column] = value
    if call.valid is not None:
        table[..., 1:3].masked_fill_(~call.valid[..., None], -1)
        steered = call.valid if call.again is None else call.valid | call.again
        table[..., 0].masked_fill_(~steered, -1)
    return table.view(-1, 4)


def any_row(row: int | Tensor) -> bool:
    """Whether some token may have a steering row, as far as that is known without waiting for a device."""
    if isinstance(row, int):
        return row >= 0
    return row.device.type != "cpu" or bool((row >= 0).any())

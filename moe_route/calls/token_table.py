"""Build the token table that the gate reads: int32 [T, 4] with columns steering row, group, segment, valid.

A segment is the part of one sequence that lies in one group. Padding tokens are routed, because the model routes them
too, but they are neither counted nor steered: their steering row, group and segment are -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_route.calls.call import Call
from moe_route.calls.token_rows import IntLike, broadcast_rows
from moe_route.devices import upload


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

    @property
    def columns(self) -> tuple[IntLike, IntLike, IntLike]:
        """The labels steering row, group and segment."""
        return self.steering_row, self.group, self.segment

    @property
    def uniform(self) -> bool:
        """Whether all tokens have the same labels."""
        row, group, segment = self.columns
        return self.entries is None and isinstance(row, int) and isinstance(group, int) and isinstance(segment, int)


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

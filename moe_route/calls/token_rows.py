"""Labels as one integer per token: the table row that each token of a call belongs to.

A label is an int for all tokens, integers [N] for N sequences, or integers [N, S] for their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_route.calls.call import Call
from moe_route.devices import upload

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

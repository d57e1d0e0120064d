"""Reference for dispatch, permute and combine."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_route.contract.experts import Dispatch


def in_range(ids: Tensor, num_experts: int) -> Tensor:
    """ids as int64, with -1 in place of ids outside 0..E-1."""
    ids = ids.to(torch.int64)
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)


def dispatch(ids: Tensor, num_experts: int, *, block: int = 1) -> Dispatch:
    """Sort routed slots by expert, stably; see `moe_route.ops.dispatch`."""
    num_tokens, k = ids.shape
    flat = in_range(ids.reshape(-1), num_experts)
    expert = torch.where(flat >= 0, flat, num_experts)
    counts = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    zero = counts.new_zeros(1)
    offsets = torch.cat([zero, ((counts + block - 1) // block * block).cumsum(0)])
    first = torch.cat([zero, counts.cumsum(0)])
    slots = torch.argsort(expert, stable=True)[: int(first[-1])]
    owner = expert[slots]
    rows = offsets[owner] + torch.arange(slots.numel(), device=ids.device) - first[owner]
    capacity = num_tokens * k + num_experts * (block - 1)
    order = torch.full((capacity,), -1, dtype=torch.int64, device=ids.device)
    order[rows] = slots
    inverse = torch.full((num_tokens * k,), -1, dtype=torch.int64, device=ids.device)
    inverse[slots] = rows
    return Dispatch(offsets, offsets[1:].to(torch.int32), counts, order, inverse.view(num_tokens, k))


def permute(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Copy rows of x [T, H] into the order of their experts, [R, H]. Differentiable.

    Rows that serve no slot, or for which order and inverse disagree, are zero.
    """
    order, inverse = dispatch.order, dispatch.inverse
    if inverse.numel() == 0:
        return x.new_zeros(order.shape[0], x.shape[1])
    slot = torch.where((order >= 0) & (order < inverse.numel()), order, 0)
    used = (slot == order) & (inverse.reshape(-1)[slot] == torch.arange(order.shape[0], device=order.device))
    return torch.where(used[:, None], x[slot // inverse.shape[1]], 0)


def combine(rows: Tensor, weights: Tensor, dispatch: Dispatch, residual: Tensor | None = None) -> Tensor:
    """Compute residual + sum over slots of weights * rows, [T, H]. Differentiable in rows, weights and residual.

    Summed in slot order in float32 (float64 for float64) and rounded once. Rows of skipped slots are never read.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    num_tokens, k = dispatch.inverse.shape
    total = rows.new_zeros(num_tokens, rows.shape[1], dtype=wide) if residual is None else residual.to(wide)
    for slot in range(k):
        at = dispatch.inverse[:, slot]
        served = (at >= 0)[:, None]
        if rows.shape[0] == 0:
            continue
        row = torch.where(served, rows[at.clamp(min=0)].to(wide), 0.0)
        total = total + torch.where(served, weights[:, slot, None].to(wide), 0.0) * row
    return total.to(rows.dtype)

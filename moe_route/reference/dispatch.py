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
    slots, capacity = num_tokens * k, num_tokens * k + num_experts * (block - 1)
    flat = in_range(ids.reshape(-1), num_experts)
    expert = torch.where(flat >= 0, flat, num_experts)  # skipped slots come last
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    zero, used = counts.new_zeros(1), counts[:num_experts]
    offsets = torch.cat([zero, ((used + block - 1) // block * block).cumsum(0)])
    first = torch.cat([zero, used.cumsum(0)])
    by_expert = torch.argsort(expert, stable=True)
    owner = expert[by_expert]
    row = offsets[owner] + torch.arange(slots, device=ids.device) - first[owner]
    row = torch.where(owner < num_experts, row, capacity)
    # Skipped slots write into one row more, which is cut off: how many there are is not read.
    order = torch.full((capacity + 1,), -1, dtype=torch.int64, device=ids.device).scatter_(0, row, by_expert)
    inverse = torch.full((slots,), -1, dtype=torch.int64, device=ids.device)
    inverse.scatter_(0, by_expert, torch.where(owner < num_experts, row, -1))
    ends = offsets[1:].to(torch.int32)
    return Dispatch(offsets, ends, used.clone(), order[:capacity].clone(), inverse.view(num_tokens, k))


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
        served = ((at >= 0) & (at < rows.shape[0]))[:, None]
        if rows.shape[0] == 0:
            continue
        row = torch.where(served, rows[at.clamp(0, rows.shape[0] - 1)].to(wide), 0.0)
        total = total + torch.where(served, weights[:, slot, None].to(wide), 0.0) * row
    return total.to(rows.dtype)

"""Dispatch, permute and combine: token rows to their experts and back (contract: csrc/include/moe_route/dispatch.h)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Dispatch", "combine", "dispatch", "permute"]

_dispatch = torch.ops.moe_route.dispatch.default
_permute = torch.ops.moe_route.permute.default
_combine = torch.ops.moe_route.combine.default


class Dispatch(NamedTuple):
    """Where every routed slot goes; int64.

    The number of rows R depends on shapes alone, never on the ids (no host synchronisation): T * k with block 1, at
    most E * (block - 1) more with padding. Rows from ``offsets[E]`` on are not in use.
    """

    offsets: Tensor
    """[E + 1]: the row where expert e starts, a multiple of ``block``; offsets[E]: rows in use."""
    counts: Tensor
    """[E]: real rows of expert e."""
    order: Tensor
    """[R]: the slot t * k + j that a row serves, or -1."""
    inverse: Tensor
    """[T, k]: the row of a slot, or -1 if it is skipped."""


def dispatch(ids: Tensor, num_experts: int, *, block: int = 1) -> Dispatch:
    """Sort routed slots by expert, stably: a counting sort, the same for any number of threads.

    Args:
        ids: int32 or int64 [T, k]; a slot with an id outside 0..E-1 is skipped.
        num_experts: E, 1..4096.
        block: every expert's rows start at a multiple of this.

    Raises:
        ValueError: an argument with a wrong shape, dtype or range.
    """
    return Dispatch(*_dispatch(ids, num_experts, block))


def permute(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows of the tokens in the order of their experts. Differentiable in x.

    Args:
        x: [T, H], float32, bfloat16, float16 or float64.
        dispatch: of the same T tokens.

    Returns:
        [R, H] in the dtype of x; rows that serve no slot are zero.

    Raises:
        ValueError: an argument with a wrong shape or dtype.
    """
    return _permute(x, dispatch.order, dispatch.inverse)


def combine(rows: Tensor, weights: Tensor, dispatch: Dispatch, residual: Tensor | None = None) -> Tensor:
    """``residual + sum_j weights[t, j] * rows[inverse[t, j]]``. Differentiable in rows, weights and residual.

    Accumulated in float32 (float64 for float64 rows) in the order of j and rounded once. Skipped slots are left out:
    their rows are never read.

    Args:
        rows: [R, H], float32, bfloat16, float16 or float64.
        weights: [T, k]; converted to float32 (float64 for float64 rows).
        dispatch: what ``rows`` was laid out by.
        residual: [T, H] in the dtype of rows, or None.

    Returns:
        [T, H] in the dtype of rows.

    Raises:
        ValueError: an argument with a wrong shape or dtype.
    """
    wide = torch.float64 if rows.dtype is torch.float64 else torch.float32
    if weights.dtype is not wide:
        weights = weights.to(wide)
    return _combine(rows, weights, dispatch.order, dispatch.inverse, residual)


# ---- what torch knows of the operators --------------------------------------------------------------------------


@torch.library.register_fake("moe_route::dispatch")
def _dispatch_fake(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check_value(ids.dim() == 2, lambda: f"ids must be [tokens, k], got {list(ids.shape)}")
    tokens, k = ids.shape
    sizes = ((num_experts + 1,), (num_experts,), (tokens * k + num_experts * (block - 1),), (tokens, k))
    made = [ids.new_empty(size, dtype=torch.int64) for size in sizes]
    return made[0], made[1], made[2], made[3]


@torch.library.register_fake("moe_route::permute")
def _permute_fake(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    torch._check_value(x.dim() == 2, lambda: f"x must be [tokens, hidden], got {list(x.shape)}")
    return x.new_empty((order.shape[0], x.shape[1]))


@torch.library.register_fake("moe_route::combine")
def _combine_fake(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, *_: Any, **__: Any) -> Tensor:
    torch._check_value(rows.dim() == 2, lambda: f"rows must be [dispatched rows, hidden], got {list(rows.shape)}")
    return rows.new_empty((inverse.shape[0], rows.shape[1]))


def _keep_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order, inverse = inputs
    ctx.save_for_backward(order, inverse)


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A token's gradient is the sum over its rows: combine with weights of one."""
    order, inverse = ctx.saved_tensors
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    ones = torch.ones(inverse.shape, dtype=dtype, device=grad.device)
    return _combine(grad.contiguous(), ones, order, inverse, None), None, None


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, order, inverse, residual = inputs
    ctx.save_for_backward(rows, weights, order, inverse)
    ctx.has_residual = residual is not None


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A row's gradient is its weight times its token's; a weight's is the product of its row with its token's."""
    rows, weights, order, inverse = ctx.saved_tensors
    of_rows = of_weights = None
    if ctx.needs_input_grad[0]:
        of_rows = (_permute(grad.contiguous(), order, inverse) * _by_row(weights, order)).to(rows.dtype)
    if ctx.needs_input_grad[1]:
        of_weights = torch.stack([_product(rows, grad, inverse[:, j]) for j in range(inverse.shape[1])], 1)
        of_weights = of_weights.to(weights.dtype)
    return of_rows, of_weights, None, None, grad if ctx.has_residual else None


def _by_row(weights: Tensor, order: Tensor) -> Tensor:
    """The weight [R, 1] of the slot that each row serves; 0 where it serves none."""
    if weights.numel() == 0:
        return weights.new_zeros(order.shape[0], 1)
    return torch.where(order >= 0, weights.reshape(-1)[order.clamp(min=0)], 0.0)[:, None]


def _product(rows: Tensor, grad: Tensor, at: Tensor) -> Tensor:
    """Inner products [T] of the rows at ``at`` with grad [T, H]; 0 where ``at`` is -1 (that row may hold anything)."""
    if rows.shape[0] == 0:
        return grad.new_zeros(at.shape)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    product = (rows[at.clamp(min=0)].to(wide) * grad.to(wide)).sum(1)
    return torch.where(at >= 0, product, 0.0)


torch.library.register_autograd("moe_route::permute", _permute_backward, setup_context=_keep_order)
torch.library.register_autograd("moe_route::combine", _combine_backward, setup_context=_keep_combine)

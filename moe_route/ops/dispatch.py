"""Dispatch, permute and combine: move token rows to their experts and back (see csrc/include/moe_route/dispatch.h).

They run on the CPU or a CUDA device, wherever the first tensor is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_route.contract.experts import Dispatch
from moe_route.ops import registration  # noqa: F401 (defines the operators)
from moe_route.ops.arguments import FAILURES, refuse_types

_dispatch = torch.ops.moe_route.dispatch.default
_permute = torch.ops.moe_route.permute.default
_combine = torch.ops.moe_route.combine.default


def dispatch(ids: Tensor, num_experts: int, *, block: int = 1) -> Dispatch:
    """Sort routed slots by expert, stably: a counting sort whose result does not depend on the number of threads.

    A slot is one chosen expert of one token.

    Args:
        ids: int32 or int64 [T, k]; a slot with an id outside 0..E-1 is skipped.
        num_experts: E, 1..4096.
        block: the first row of every expert is a multiple of this.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument with a wrong shape, dtype or range, more than 2^30 rows, or a tensor without memory.
    """
    try:
        return Dispatch(*_dispatch(ids, num_experts, block))
    except FAILURES:
        refuse_types(ids=ids, num_experts=num_experts, block=block)
        raise


def permute(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Copy token rows into the order of their experts. Differentiable in x.

    Args:
        x: [T, H], float32, bfloat16, float16 or float64.
        dispatch: the result of `dispatch` for the same T tokens.

    Returns:
        [R, H] in the dtype of x. Rows that serve no slot are zero. So are rows for which ``order`` and ``inverse`` of a
        modified dispatch disagree.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument with a wrong shape or dtype, or a tensor without memory.
    """
    try:
        if forward_ad._current_level >= 0:  # the operator has no forward-mode derivative
            from moe_route import reference

            return reference.permute(x, dispatch)
        return _permute(x, dispatch.order, dispatch.inverse)
    except FAILURES:
        refuse_types(x=x, dispatch=dispatch)
        raise


def combine(rows: Tensor, weights: Tensor, dispatch: Dispatch, residual: Tensor | None = None) -> Tensor:
    """Compute ``residual + sum_j weights[t, j] * rows[inverse[t, j]]``. Differentiable in rows, weights and residual.

    Accumulates in float32 (float64 for float64 rows) in the order of j, and rounds once. Rows of skipped slots are
    never read.

    Args:
        rows: [R, H], float32, bfloat16, float16 or float64.
        weights: [T, k]; converted to float32 (float64 for float64 rows).
        dispatch: the dispatch by which ``rows`` was laid out.
        residual: [T, H] in the dtype of rows, or None.

    Returns:
        [T, H] in the dtype of rows.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument with a wrong shape or dtype, or a tensor without memory.
    """
    try:
        if forward_ad._current_level >= 0:  # the operator has no forward-mode derivative
            from moe_route import reference

            return reference.combine(rows, weights, dispatch, residual)
        wide = torch.float64 if rows.dtype is torch.float64 else torch.float32
        if weights.dtype is not wide:
            weights = weights.to(wide)
        return _combine(rows, weights, dispatch.order, dispatch.inverse, residual)
    except FAILURES:
        refuse_types(("residual",), rows=rows, weights=weights, dispatch=dispatch, residual=residual)
        raise

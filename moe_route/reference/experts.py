"""Reference for the products of experts and what stands between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_route.contract.experts import Activation, Dispatch


def expert_rows(
    x: Tensor,
    dispatch: Dispatch,
    up: Tensor,
    down: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Activation | None = None,
    pairing: str = "halves",
) -> Tensor:
    """Run the expert of each row, [R, H]; see `moe_route.ops.expert_rows`. Rows that serve no slot are zero.

    Computed in float32 (float64 for float64), and rounded to the dtype of x after the activation and at the end.
    """
    activation = Activation() if activation is None else activation
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    num_slots, k = dispatch.inverse.numel(), dispatch.inverse.shape[1]
    rows = x.new_zeros(dispatch.order.shape[0], down.shape[1])
    for expert, (first, count) in enumerate(zip(dispatch.offsets.tolist(), dispatch.counts.tolist(), strict=False)):
        if count == 0:
            continue
        slots = dispatch.order[first : first + count].clamp(0, num_slots - 1)
        inner = _linear(x[slots // k].to(wide), up, up_bias, expert)
        inner = _activated(inner, activation, pairing).to(x.dtype)
        rows[first : first + count] = _linear(inner.to(wide), down, down_bias, expert).to(x.dtype)
    return rows


def expert_activation(
    rows: Tensor,
    dispatch: Dispatch,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    pairing: str = "halves",
) -> Tensor:
    """Bias, activation and gate of dispatched rows, [R, I]; see `moe_route.ops.expert_activation`. Differentiable.

    Computed in float32 (float64 for float64) and rounded once. Rows behind the last expert's are computed too, without
    a bias.
    """
    wide = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    if bias is not None:
        padded = torch.cat([bias, bias.new_zeros(1, bias.shape[1])]).to(wide.dtype)
        row = torch.arange(rows.shape[0], device=rows.device)
        wide = wide + padded[torch.searchsorted(dispatch.offsets[1:], row, right=True)]
    return _activated(wide, Activation() if activation is None else activation, pairing).to(rows.dtype)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    return F.linear(rows, weight[expert].to(rows.dtype), None if bias is None else bias[expert].to(rows.dtype))


def _activated(inner: Tensor, activation: Activation, pairing: str) -> Tensor:
    if pairing == "none":
        return _function(inner.clamp(max=activation.limit), activation)
    gate, up = inner.chunk(2, dim=-1) if pairing == "halves" else (inner[..., ::2], inner[..., 1::2])
    up = up.clamp(-activation.limit, activation.limit) + activation.shift
    return _function(gate.clamp(max=activation.limit), activation) * up


def _function(x: Tensor, activation: Activation) -> Tensor:
    match activation.kind:
        case "silu":
            return x * torch.sigmoid(activation.alpha * x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case _:
            return F.relu(x).square()

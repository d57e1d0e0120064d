"""Reference for the products of experts and what stands between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_route.contract.experts import Activation, Dispatch

_ROWS = 16  # rows whose weights are gathered at once: how many an expert has is not read


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
    capacity, k = dispatch.order.shape[0], dispatch.inverse.shape[1]
    if capacity == 0 or x.shape[0] == 0:
        return x.new_zeros(capacity, down.shape[1])
    row = torch.arange(capacity, device=x.device)
    owner = torch.searchsorted(dispatch.offsets[1:], row, right=True).clamp(max=up.shape[0] - 1)
    source = dispatch.order.clamp(0, x.shape[0] * k - 1) // k
    parts = []
    for begin in range(0, capacity, _ROWS):
        expert, tokens = owner[begin : begin + _ROWS], x[source[begin : begin + _ROWS]]
        inner = _activated(_linear(tokens.to(wide), up, up_bias, expert), activation, pairing).to(x.dtype)
        parts.append(_linear(inner.to(wide), down, down_bias, expert).to(x.dtype))
    return torch.where((dispatch.order >= 0)[:, None], torch.cat(parts), 0)


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


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    """Each row's product with the weight of its expert."""
    made = torch.bmm(weight[expert].to(rows.dtype), rows[:, :, None])[:, :, 0]
    return made if bias is None else made + bias[expert].to(rows.dtype)


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

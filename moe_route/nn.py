"""Router, experts and a whole sparse block as `torch.nn` modules, usable and trainable without transformers.

Parameter names and shapes are those of current checkpoints (`weight` [E, H]; `gate_up_proj` [E, 2I, H]; `down_proj`
[E, H, I]). `TopKRouter` returns the tuple of a transformers router: logits, weights, ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route import ops
from moe_route.contract.experts import Activation, Dispatch
from moe_route.contract.spec import RouterSpec
from moe_route.ops.arguments import refuse_types
from moe_route.ops.expert_paths import ACTIVATED, STREAMED, Call, choose
from moe_route.ops.grouped import grouped_linear

__all__ = ["ACTIVATIONS", "Experts", "SparseMoE", "TopKRouter", "load_balancing_loss"]


def _relu_squared(rows: Tensor) -> Tensor:
    return F.relu(rows).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": _relu_squared,
}


class TopKRouter(nn.Module):
    """Routes with a gate matrix and one `route` call.

    SparseMixer specs use the inference weights in training too (no Gumbel sampling).

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: experts per token.
        spec: the routing function.
        bias: add a bias [E] to the logits.
        correction_bias: keep a float32 buffer `correction_bias` [E], added for the choice only (DeepSeek-V3, arXiv
            2412.19437 section 2.1.2; `e_score_correction_bias`). Gradients do not train it; a trainer updates it.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        spec: RouterSpec,
        bias: bool = False,
        correction_bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        refuse_types(spec=spec)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts = {num_experts}, got {top_k}")
        self.hidden_size, self.num_experts, self.top_k, self.spec = hidden_size, num_experts, top_k, spec
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=dtype, device=device)) if bias else None
        held = torch.zeros(num_experts, dtype=torch.float32, device=device) if correction_bias else None
        self.register_buffer("correction_bias", held)
        self.correction_bias: Tensor | None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize uniformly in +-1/sqrt(H), as `nn.Linear` does."""
        _reset(self.hidden_size, self.weight, self.bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route hidden [..., H]: returns router_logits [T, E], weights [T, k], ids int64 [T, k].

        The weights have the dtype spec.weight_dtype, or that of the logits if it is None.
        """
        logits = F.linear(hidden.reshape(-1, self.hidden_size), self.weight, self.bias)
        weights, ids = ops.route(logits, self.top_k, self.spec, correction_bias=self.correction_bias)
        return logits, weights.to(self.spec.weight_dtype or logits.dtype), ids.long()

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, spec={self.spec}"


class Experts(nn.Module):
    """E feed-forward networks, each run on the rows that are routed to it: dispatch, permute, products, combine.

    Where no gradient is wanted, few rows are multiplied by `ops.expert_rows`, and on CUDA more rows have
    `ops.expert_activation` between their products (`moe_route.ops.expert_paths`). Last bits then differ from those of
    the path that trains, since these round after the activation and not before it. On CUDA no size depends on the
    routing, so the host never waits and the forward can be captured into a graph.

    With `gated`, an expert is `down(activation(gate(x)) * up(x))`, and `gate_up_proj` [E, 2I, H] holds the gate first
    (arXiv 2002.05202 eq. 5). Otherwise it is `down(activation(up(x)))` with `up_proj` [E, I, H]. `down_proj` is [E, H,
    I]. `bias` adds a bias to each product.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.activation, self.gated = activation, gated
        self._up_name = "gate_up_proj" if gated else "up_proj"
        width = intermediate_size * (2 if gated else 1)
        make = partial(torch.empty, dtype=dtype, device=device)
        self.register_parameter(self._up_name, nn.Parameter(make(num_experts, width, hidden_size)))
        self.down_proj = nn.Parameter(make(num_experts, hidden_size, intermediate_size))
        self.register_parameter(f"{self._up_name}_bias", nn.Parameter(make(num_experts, width)) if bias else None)
        self.down_proj_bias = nn.Parameter(make(num_experts, hidden_size)) if bias else None
        self.reset_parameters()

    @property
    def up(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the first product."""
        return getattr(self, self._up_name), getattr(self, f"{self._up_name}_bias")

    def reset_parameters(self) -> None:
        """Initialize uniformly in +-1/sqrt(fan in), as `nn.Linear` does."""
        _reset(self.hidden_size, *self.up)
        _reset(self.intermediate_size, self.down_proj, self.down_proj_bias)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run hidden [T, H] with ids [T, k] and weights [T, k]: residual + sum of weight * expert(hidden), [T, H].

        A slot whose id is negative or >= E is skipped: no expert runs for it and its weight is never read.
        """
        dtype = self.down_proj.dtype
        if hidden.dtype != dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise ValueError(f"hidden states are {hidden.dtype} and expert weights {dtype}; convert one to the other")
        slots = ops.dispatch(ids, self.num_experts)
        stored = [each for each in (*self.up, self.down_proj, self.down_proj_bias) if each is not None]
        path = choose(Call.of(hidden, ids.numel(), stored, dtype))
        if path.name == STREAMED:
            rows = self._streamed_rows(hidden, slots)
        elif path.name == ACTIVATED:
            rows = self._activated_rows(hidden, slots)
        else:
            rows = self._grouped_rows(hidden, slots)
        return ops.combine(rows, weights, slots, None if residual is None else residual.to(rows.dtype))

    def _streamed_rows(self, hidden: Tensor, slots: Dispatch) -> Tensor:
        (up, up_bias), down_bias = self.up, self.down_proj_bias
        return ops.expert_rows(hidden, slots, up, self.down_proj, up_bias=up_bias, down_bias=down_bias, **self._gate)

    def _activated_rows(self, hidden: Tensor, slots: Dispatch) -> Tensor:
        up, up_bias = self.up
        rows = grouped_linear(ops.permute(hidden, slots), up, None, slots)
        rows = ops.expert_activation(rows, slots, bias=up_bias, **self._gate)
        return grouped_linear(rows, self.down_proj, self.down_proj_bias, slots)

    @property
    def _gate(self) -> dict[str, Any]:
        return {"activation": Activation(self.activation), "pairing": "halves" if self.gated else "none"}

    def _grouped_rows(self, hidden: Tensor, slots: Dispatch) -> Tensor:
        rows = grouped_linear(ops.permute(hidden, slots), *self.up, slots)
        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = rows.chunk(2, dim=-1)
            rows = act(gate) * up
        else:
            rows = act(rows)
        return grouped_linear(rows, self.down_proj, self.down_proj_bias, slots)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation!r}, gated={self.gated}"
        )


class SparseMoE(nn.Module):
    """Router, experts, and an optional shared expert that runs on every token.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: experts per token.
        intermediate_size: width of each expert.
        spec: the routing function; default `RouterSpec()`, softmax.
        shared_expert: any module [T, H] -> [T, H]; its output is added to the sum over routed experts.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        intermediate_size: int,
        spec: RouterSpec | None = None,
        shared_expert: nn.Module | None = None,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        router_bias: bool = False,
        correction_bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        spec = RouterSpec() if spec is None else spec
        self.router = TopKRouter(
            hidden_size=hidden_size,
            num_experts=num_experts,
            top_k=top_k,
            spec=spec,
            bias=router_bias,
            correction_bias=correction_bias,
            **place,
        )
        self.experts = Experts(
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activation=activation,
            gated=gated,
            bias=bias,
            **place,
        )
        self.shared_expert = shared_expert

    def forward(self, hidden: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Run the block on hidden [..., H]; with return_routing, also return the router's (logits, weights, ids)."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits, weights, ids = self.router(flat)
        residual = None if self.shared_expert is None else self.shared_expert(flat)
        out = self.experts(flat, ids, weights, residual).reshape(hidden.shape)
        return (out, (logits, weights, ids)) if return_routing else out


def load_balancing_loss(router_logits: Tensor, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Auxiliary loss `E * sum_e f_e * P_e` of the Switch Transformer (arXiv 2101.03961 eq. 4-6), without its alpha.

    f_e is the number of a token's k choices that are expert e, averaged over tokens, so the f_e sum to k and a uniform
    router has loss k. P_e is the softmax probability of e, averaged over tokens. The gradient flows through P.

    Args:
        router_logits: [T, E].
        ids: the choice [T, k]; an id that is negative or >= E is an empty slot.
        valid: bool [T]; False for padding, which is in neither average.
    """
    num_tokens, num_experts = router_logits.shape
    probability = torch.softmax(router_logits.float(), dim=-1)
    kept = (ids >= 0) & (ids < num_experts)
    if valid is None:
        tokens = torch.full((), float(num_tokens), device=router_logits.device)
    else:
        kept = kept & valid[:, None]
        probability = torch.where(valid[:, None], probability, 0.0)
        tokens = valid.sum().float()
    counts = probability.new_zeros(num_experts + 1)
    slots = torch.where(kept, ids.long(), num_experts).reshape(-1)
    counts = counts.index_add(0, slots, torch.ones_like(slots, dtype=counts.dtype))[:num_experts]
    tokens = tokens.clamp(min=1.0)
    return num_experts * (counts / tokens * (probability.sum(0) / tokens)).sum()


def _reset(fan_in: int, *parameters: Tensor | None) -> None:
    bound = 1.0 / math.sqrt(max(fan_in, 1))
    for parameter in parameters:
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound)

"""Router, experts and the whole sparse block as `torch.nn` modules, usable and trainable without transformers.

Parameter names and shapes are those of today's checkpoints (`weight` [E, H]; `gate_up_proj` [E, 2I, H];
`down_proj` [E, H, I]), and `TopKRouter` returns the tuple of a transformers router: logits, weights, ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route import ops
from moe_route.contract.dispatch import Dispatch
from moe_route.contract.spec import RouterSpec

__all__ = ["ACTIVATIONS", "Experts", "SparseMoE", "TopKRouter", "load_balancing_loss"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class TopKRouter(nn.Module):
    """Gate matrix and one `route` call.

    Args:
        hidden_size: H. num_experts: E. top_k: experts per token. spec: how the logits become a choice.
        bias: add a bias [E] to the logits.
        correction_bias: hold a float32 buffer `correction_bias` [E], added for choosing only (DeepSeek-V3,
            arXiv 2412.19437 section 2.1.2). It is not trained by gradient; a trainer updates it.

    SparseMixer specs use the inference weights in training too (no Gumbel sampling).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        spec: RouterSpec,
        *,
        bias: bool = False,
        correction_bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
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
        """Uniform in +-1/sqrt(H), as `nn.Linear`."""
        _reset(self.hidden_size, self.weight, self.bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [..., H] -> router_logits [T, E], weights [T, k], ids int64 [T, k].

        The weights have spec.weight_dtype, else the dtype of the logits. With gradients on, ids come from `ops.route`
        and weights from the differentiable `ops.route_weights`.
        """
        logits = F.linear(hidden.reshape(-1, self.hidden_size), self.weight, self.bias)
        weights, ids = ops.route(logits.detach(), self.top_k, self.spec, correction_bias=self.correction_bias)
        if torch.is_grad_enabled() and logits.requires_grad:
            weights = ops.route_weights(logits, ids, self.spec)
        return logits, weights.to(self.spec.weight_dtype or logits.dtype), ids.long()

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, spec={self.spec}"


class Experts(nn.Module):
    """E feed-forward networks over the rows that are routed to them: dispatch, permute, products, combine.

    gated: `down(activation(gate(x)) * up(x))` with `gate_up_proj` [E, 2I, H], gate first (arXiv 2002.05202 eq. 5);
    otherwise `down(activation(up(x)))` with `up_proj` [E, I, H]. `down_proj` is [E, H, I]. bias adds one per product.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        *,
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
        """Uniform in +-1/sqrt(fan in), as `nn.Linear`."""
        _reset(self.hidden_size, *self.up)
        _reset(self.intermediate_size, self.down_proj, self.down_proj_bias)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
        """hidden [T, H], ids [T, k] and weights [T, k] -> residual + sum of weight * expert(hidden), [T, H].

        Slots with a negative id or one >= E are skipped: no expert sees them and their weight is never read.
        """
        dtype = self.down_proj.dtype
        if hidden.dtype != dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise ValueError(f"hidden states are {hidden.dtype} and expert weights {dtype}; convert one to the other")
        slots = ops.dispatch(ids, self.num_experts)
        rows = grouped_linear(ops.permute(hidden, slots), *self.up, slots)
        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = rows.chunk(2, dim=-1)
            rows = act(gate) * up
        else:
            rows = act(rows)
        rows = grouped_linear(rows, self.down_proj, self.down_proj_bias, slots)
        return ops.combine(rows, weights, slots, None if residual is None else residual.to(rows.dtype))

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation!r}, gated={self.gated}"
        )


class SparseMoE(nn.Module):
    """Router, experts and an optional shared expert that every token passes.

    Args:
        shared_expert: any module [T, H] -> [T, H]; its output is the residual the routed sum is added to.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        intermediate_size: int,
        spec: RouterSpec | None = None,
        shared_expert: nn.Module | None = None,
        *,
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
            hidden_size, num_experts, top_k, spec, bias=router_bias, correction_bias=correction_bias, **place
        )
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation, gated, bias, **place)
        self.shared_expert = shared_expert

    def forward(self, hidden: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """hidden [..., H] -> [..., H]; with return_routing also the router's (logits, weights, ids)."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits, weights, ids = self.router(flat)
        residual = None if self.shared_expert is None else self.shared_expert(flat)
        out = self.experts(flat, ids, weights, residual).reshape(hidden.shape)
        return (out, (logits, weights, ids)) if return_routing else out


def load_balancing_loss(router_logits: Tensor, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Auxiliary loss `E * sum_e f_e * P_e` of the Switch Transformer (arXiv 2101.03961 eq. 4-6), without its alpha.

    f_e is how many of the token's k choices fell on expert e, averaged over the tokens (so the f_e sum to k, and a
    uniform router has loss k); P_e is the softmax probability of e averaged over the tokens. Gradient flows through P.

    Args:
        router_logits: [T, E]. ids: the choice [T, k]; negative or >= E is an empty slot.
        valid: bool [T]; padding counts in neither average.
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


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, slots: Dispatch) -> Tensor:
    """rows [R, in] times its expert's weight [out, in], plus its bias: [R, out], in the dtype of the rows.

    Weights [E, out, in] and biases of another dtype are converted, on CPU expert by expert. Under autocast rows are
    cast first, as for `torch.nn.functional.linear`.

    Rows behind the last expert's range (slots that were skipped) may come out undefined: combine never reads them,
    and neither does the backward of permute.
    """
    if torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64:
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    out = _grouped_product(rows, weight, slots.offsets)
    if bias is None:
        return out
    # One more row of zeros for the rows no expert owns, so that their undefined gradient goes to no expert.
    padded = torch.cat([bias, bias.new_zeros(1, bias.shape[1])]).to(out.dtype)
    row = torch.arange(rows.shape[0], device=rows.device)
    return out + padded[torch.searchsorted(slots.offsets[1:], row, right=True)]


# ---- grouped matrix products ------------------------------------------------------------------------------------
# Operators of their own, so that torch.compile sees through neither the loop nor torch.nn.functional.grouped_mm (which
# it knows only in bfloat16).


@torch.library.custom_op("moe_route::grouped_product", mutates_args=())
def _grouped_product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows[offsets[e]:offsets[e + 1]] @ weight[e].T for every expert e: [R, in], [E, out, in] -> [R, out]."""
    if _grouped_mm_takes(rows, weight.shape[1:]) or _grouped_mm_pays(rows, weight):
        weight = weight.to(rows.dtype)
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets[1:].to(torch.int32))
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    columns = weight.transpose(-2, -1)
    for expert, (begin, end) in enumerate(_ranges(offsets)):
        if begin < end:
            torch.mm(rows[begin:end], columns[expert].to(rows.dtype), out=out[begin:end])
    return out


@torch.library.custom_op("moe_route::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """left[range e].T @ right[range e] for every expert e: [R, out], [R, in] -> [E, out, in]."""
    if _grouped_mm_takes(left, (left.shape[1], right.shape[1])):
        return F.grouped_mm(left.T, right, offs=offsets[1:].to(torch.int32))
    out = left.new_zeros(offsets.shape[0] - 1, left.shape[1], right.shape[1])
    for matrix, (begin, end) in zip(out.unbind(0), _ranges(offsets), strict=True):
        if begin < end:
            torch.mm(left[begin:end].T, right[begin:end], out=matrix)
    return out


def _grouped_mm_takes(rows: Tensor, sizes: Sequence[int]) -> bool:
    """bfloat16 on CUDA with rows of a multiple of 16 bytes."""
    return rows.is_cuda and _aligned(rows, sizes) and rows.dtype == torch.bfloat16 and rows.shape[0] > 0


def _grouped_mm_pays(rows: Tensor, weight: Tensor) -> bool:
    """On CPU it is our loop in C++, with the same bits, over the experts without rows too: of use where there are as
    many rows as experts, and where it takes the weights as they lie."""
    plain = rows.dtype == weight.dtype != torch.float64 and _aligned(rows, weight.shape[1:]) and rows.is_contiguous()
    whole = weight.is_contiguous() or weight.transpose(-2, -1).is_contiguous()
    return rows.is_cpu and plain and whole and rows.shape[0] >= weight.shape[0] and _on_cpu(rows.dtype)


@cache
def _on_cpu(dtype: torch.dtype) -> bool:
    """Whether this version of torch has `grouped_mm` for tensors of a dtype on the CPU."""
    rows, weight = torch.ones(1, 16, dtype=dtype, device="cpu"), torch.ones(1, 16, 16, dtype=dtype, device="cpu")
    try:
        F.grouped_mm(rows, weight, offs=torch.ones(1, dtype=torch.int32, device="cpu"))
    except (AttributeError, RuntimeError):
        return False
    return True


def _aligned(rows: Tensor, sizes: Sequence[int]) -> bool:
    return all(size * rows.element_size() % 16 == 0 for size in sizes)


def _ranges(offsets: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(offsets.tolist()))


@_grouped_product.register_fake
def _grouped_product_fake(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _grouped_outer_fake(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    of_rows = of_weight = None
    if ctx.needs_input_grad[0]:
        of_rows = _grouped_product(grad, weight.transpose(-2, -1), offsets)
    if ctx.needs_input_grad[1]:
        of_weight = _grouped_outer(grad, rows, offsets).to(weight.dtype)
    return of_rows, of_weight, None


_grouped_product.register_autograd(_grouped_product_backward, setup_context=_keep_factors)

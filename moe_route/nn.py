"""Router, experts and a whole sparse block as `torch.nn` modules, usable and trainable without transformers.

Parameter names and shapes are those of current checkpoints (`weight` [E, H]; `gate_up_proj` [E, 2I, H]; `down_proj`
[E, H, I]). `TopKRouter` returns the tuple of a transformers router: logits, weights, ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from moe_route import ops
from moe_route.contract.activation import Activation
from moe_route.contract.dispatch import Dispatch
from moe_route.contract.spec import RouterSpec
from moe_route.ops.arguments import refuse_types
from moe_route.ops.expert_paths import ACTIVATED, STREAMED, Call, choose

__all__ = ["ACTIVATIONS", "Experts", "SparseMoE", "TopKRouter", "load_balancing_loss"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
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


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, slots: Dispatch) -> Tensor:
    """Multiply rows [R, in] by the weight [out, in] of their expert and add its bias: [R, out] in the rows' dtype.

    Weights [E, out, in] and biases of another dtype are converted, on the CPU one expert at a time. Under autocast rows
    are cast first, as in `torch.nn.functional.linear`.

    Rows behind the range of the last expert (skipped slots) may be undefined: neither combine nor the backward of
    permute reads them. There is no forward-mode derivative (NotImplementedError).
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "products of experts have no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use "
            "backward() or torch.func.vjp"
        )
    if torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64:
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    out = _grouped_product(rows, weight, slots.ends)
    if bias is None:
        return out
    # Rows that no expert owns use an extra bias row of zeros, so that their undefined gradient reaches no expert.
    padded = torch.cat([bias, bias.new_zeros(1, bias.shape[1])]).to(out.dtype)
    row = torch.arange(rows.shape[0], device=rows.device)
    return out + padded[torch.searchsorted(slots.offsets[1:], row, right=True)]


# ---- grouped matrix products ------------------------------------------------------------------------------------
# Operators of their own, because torch.compile can trace neither the loop nor torch.nn.functional.grouped_mm, which it
# supports in bfloat16 only.


@torch.library.custom_op("moe_route::grouped_product", mutates_args=())
def _grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows[ends[e - 1]:ends[e]] @ weight[e].T for every expert e: [R, in], [E, out, in], int32 [E] -> [R, out]."""
    return _product(rows, weight, ends)


def _product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    takes = _grouped_mm_takes(rows, weight.shape[1:])
    if rows.is_cuda and not takes:
        return _product_by_tiles(rows, weight, ends)
    if takes or _grouped_mm_pays(rows, weight):
        weight = weight.to(rows.dtype)
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    columns = weight.transpose(-2, -1)
    for expert, (begin, end) in enumerate(_ranges(ends)):
        if begin < end:
            torch.mm(rows[begin:end], columns[expert].to(rows.dtype), out=out[begin:end])
    return out


@torch.library.custom_op("moe_route::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left[range e].T @ right[range e] for every expert e: [R, out], [R, in], int32 [E] -> [E, out, in]."""
    return _outer(left, right, ends)


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    if _grouped_mm_takes(left, (left.shape[1], right.shape[1])):
        return F.grouped_mm(left.T, right, offs=ends)
    if left.is_cuda:
        return _outer_by_tiles(left, right, ends)
    out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
    for matrix, (begin, end) in zip(out.unbind(0), _ranges(ends), strict=True):
        if begin < end:
            torch.mm(left[begin:end].T, right[begin:end], out=matrix)
    return out


def _grouped_mm_takes(rows: Tensor, sizes: Sequence[int]) -> bool:
    """Whether torch multiplies all groups in one CUDA kernel.

    This needs bfloat16, rows of a multiple of 16 bytes, and compute capability 9 or 10. Other devices wait for the
    offsets and loop (pytorch issue 186620).
    """
    plain = rows.is_cuda and rows.dtype == torch.bfloat16 and rows.shape[0] > 0 and _aligned(rows, sizes)
    return plain and _groups_in_one_kernel(rows.device)


@cache
def _groups_in_one_kernel(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _grouped_mm_pays(rows: Tensor, weight: Tensor) -> bool:
    """Whether `grouped_mm` is faster than our loop on the CPU, where it gives the same bits.

    It loops in C++, over experts without rows too. So it pays if there are at least as many rows as experts and it
    accepts the layout of the weights.
    """
    plain = rows.dtype == weight.dtype != torch.float64 and _aligned(rows, weight.shape[1:]) and rows.is_contiguous()
    whole = weight.is_contiguous() or weight.transpose(-2, -1).is_contiguous()
    return rows.is_cpu and plain and whole and rows.shape[0] >= weight.shape[0] and _on_cpu(rows.dtype)


@cache
def _on_cpu(dtype: torch.dtype) -> bool:
    """Whether this version of torch has `grouped_mm` for this dtype on the CPU."""
    rows, weight = torch.ones(1, 16, dtype=dtype, device="cpu"), torch.ones(1, 16, 16, dtype=dtype, device="cpu")
    try:
        F.grouped_mm(rows, weight, offs=torch.ones(1, dtype=torch.int32, device="cpu"))
    except (AttributeError, RuntimeError):
        return False
    return True


# ---- on CUDA devices for which torch has no kernel for groups: tiles ------------------------------------------------
# Rows are divided into tiles, each of which belongs to one expert. The number of tiles depends on shapes only, and the
# device computes the expert of each tile. So the host never waits, and a captured graph is valid for every routing. The
# cost is a copy of each tile's matrix, about two per expert.

_MOST_TILE_ROWS = 256
_COPIED_BYTES = 1 << 28  # largest size of matrices copied at a time


class _Tiles(NamedTuple):
    expert: Tensor  # [tiles]; any value for a tile without rows
    row: Tensor  # [tiles, size]: the rows of a tile; any value where there is no row
    used: Tensor  # bool [tiles, size]: whether there is a row
    place: Tensor  # [R]: index of a row in [tiles * size]; any value for a row that no expert owns


def _tiles(ends: Tensor, num_rows: int) -> _Tiles:
    """Choose the tile size as the mean number of rows per expert, so that tiles hold at most twice the rows."""
    experts, device, end = ends.shape[0], ends.device, ends.to(torch.int64)
    size = min(1 << max(num_rows // experts - 1, 0).bit_length(), _MOST_TILE_ROWS)
    tiles = (num_rows + min(experts, num_rows) * (size - 1)) // size
    begin = F.pad(end[:-1], (1, 0))
    after = ((end - begin + size - 1) // size).cumsum(0)  # per expert: index after its last tile
    numbers = torch.arange(tiles, device=device)
    expert = torch.searchsorted(after, numbers, right=True).clamp(max=experts - 1)
    first = after - (end - begin + size - 1) // size
    row = (begin[expert] + (numbers - first[expert]) * size)[:, None] + torch.arange(size, device=device)
    used = row < end[expert][:, None]
    rows = torch.arange(num_rows, device=device)
    owner = torch.searchsorted(end, rows, right=True).clamp(max=experts - 1)
    place = first[owner] * size + rows - begin[owner]
    return _Tiles(expert, row.clamp(max=num_rows - 1), used, place.clamp(max=tiles * size - 1))


def _product_by_tiles(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Compute `grouped_product` by tiles."""
    if rows.shape[0] == 0:
        return rows.new_zeros(0, weight.shape[1])
    tiles = _tiles(ends, rows.shape[0])
    made = [
        torch.bmm(rows[row], weight[expert].transpose(-2, -1).to(rows.dtype))
        for expert, row in zip(*(part.split(_at_a_time(weight)) for part in (tiles.expert, tiles.row)), strict=True)
    ]
    return torch.cat(made).flatten(0, 1)[tiles.place]


def _outer_by_tiles(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Compute `grouped_outer` by tiles. The order of addition varies, unless torch is set to be deterministic."""
    wide = torch.promote_types(left.dtype, torch.float32)
    out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1], dtype=wide)
    if left.shape[0] == 0:
        return out.to(left.dtype)
    tiles = _tiles(ends, left.shape[0])
    parts = (part.split(_at_a_time(out)) for part in (tiles.expert, tiles.row, tiles.used))
    for expert, row, used in zip(*parts, strict=True):
        one, other = (torch.where(used[:, :, None], side[row], 0.0) for side in (left, right))
        out.index_add_(0, expert, torch.bmm(one.transpose(-2, -1), other).to(wide))
    return out.to(left.dtype)


def _at_a_time(matrices: Tensor) -> int:
    return max(1, _COPIED_BYTES // max(matrices[0].numel() * matrices.element_size(), 1))


def _aligned(rows: Tensor, sizes: Sequence[int]) -> bool:
    return all(size * rows.element_size() % 16 == 0 for size in sizes)


def _ranges(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends.tolist()]))


@_grouped_product.register_fake
def _grouped_product_fake(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _grouped_outer_fake(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    of_rows = of_weight = None
    if ctx.needs_input_grad[0]:
        of_rows = _grouped_product(grad, weight.transpose(-2, -1), ends)
    if ctx.needs_input_grad[1]:
        of_weight = _grouped_outer(grad, rows, ends).to(weight.dtype)
    return of_rows, of_weight, None


_grouped_product.register_autograd(_grouped_product_backward, setup_context=_keep_factors)

"""Run the experts of transformers by this library's dispatch, grouped products and combine.

`experts_forward` has the signature of transformers' experts implementations; `moe_route.experts.layout` reads what a
module is, and `refuse` names what cannot run. `moe_route.ops.expert_paths` chooses how a call runs. Expert parallelism
needs no flag: an expert that this rank does not hold has the id `num_experts`, and its slots are skipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_route import ops
from moe_route.contract.experts import Dispatch, PackedExperts
from moe_route.experts.layout import (
    Gate,
    compute_dtype,
    flag,
    gate_of,
    obstacle,
    stored_weights,
    up_projection,
    weight_and_bias,
)
from moe_route.experts.packing import is_packed, packed_weights
from moe_route.ops.expert_paths import ACTIVATED, PACKED, STREAMED, Call, choose
from moe_route.ops.grouped import grouped_linear
from moe_route.routers.discovery import ModelNotSupportedError


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts: hidden_states [T, H], top_k_index int32 or int64 [T, k], top_k_weights [T, k] -> [T, H].

    The result has the dtype of hidden_states. A slot whose id is negative, or at least the number of experts, is
    skipped whatever its weight. Products are computed in the dtype of the expert weights (under autocast, in its
    dtype). Where no gradient is wanted, other paths may run (`moe_route.ops.expert_paths`), whose last bits differ:
    they round after the activation and not before it. The weighted sum is accumulated in float32 (float64 for float64)
    in the order of the slots and rounded once.
    """
    refuse(module)
    dtype = compute_dtype(module)
    slots = ops.dispatch(top_k_index, module.down_proj.shape[0])
    path = choose(call_of(module, hidden_states, top_k_index.numel()))
    if path.name in (PACKED, STREAMED):
        packed = packed_weights(module) if path.name == PACKED else None
        rows = _streamed_rows(module, hidden_states, slots, packed)
    elif path.name == ACTIVATED:
        rows = _activated_rows(module, hidden_states, slots)
    else:
        rows = _grouped_rows(module, hidden_states, slots, dtype)
    if flag(module, "has_post_expert_norm"):
        rows = module.post_expert_norm(_defined(rows, slots, module.post_expert_norm))
    rows = rows.to(torch.promote_types(rows.dtype, hidden_states.dtype))  # under autocast: round after the sum
    return ops.combine(rows, top_k_weights, slots).to(hidden_states.dtype)


def call_of(module: Any, hidden_states: Tensor, slots: int) -> Call:
    """A call of a module's experts, as the choice of a path sees it."""
    return Call.of(
        hidden_states,
        slots,
        stored_weights(module),
        compute_dtype(module),
        transposed=flag(module, "is_transposed"),
        known_gate=gate_of(module) is not None,
        packed=is_packed(module),
    )


def _streamed_rows(module: Any, hidden_states: Tensor, slots: Dispatch, packed: PackedExperts | None) -> Tensor:
    gate = _known_gate(module)
    (up, up_bias), (down, down_bias) = (weight_and_bias(module, name) for name in (up_projection(module), "down_proj"))
    return ops.expert_rows(
        hidden_states,
        slots,
        up,
        down,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=gate.activation,
        pairing=gate.pairing,
        packed=packed,
    )


def _activated_rows(module: Any, hidden_states: Tensor, slots: Dispatch) -> Tensor:
    gate = _known_gate(module)
    (up, up_bias), (down, down_bias) = (weight_and_bias(module, name) for name in (up_projection(module), "down_proj"))
    rows = grouped_linear(ops.permute(hidden_states, slots), up, None, slots)
    rows = ops.expert_activation(rows, slots, bias=up_bias, activation=gate.activation, pairing=gate.pairing)
    return grouped_linear(rows, down, down_bias, slots)


def _known_gate(module: Any) -> Gate:
    gate = gate_of(module)
    if gate is None:
        raise RuntimeError(f"the activation of {type(module).__name__} is in none of the tables of moe_route.experts")
    return gate


def _grouped_rows(module: Any, hidden_states: Tensor, slots: Dispatch, dtype: torch.dtype) -> Tensor:
    rows = ops.permute(hidden_states, slots)
    rows = _product(module, up_projection(module), rows.to(dtype), slots)
    if flag(module, "has_gate"):
        rows = module._apply_gate(_defined(rows, slots, getattr(module, "act_fn", None)))
    else:
        rows = module.act_fn(_defined(rows, slots, module.act_fn))
    return _product(module, "down_proj", rows.to(dtype), slots)


def refuse(module: Any) -> None:
    """Raise `ModelNotSupportedError` if a module's experts cannot be run here."""
    why = obstacle(module)
    if why is not None:
        raise ModelNotSupportedError(
            f"{type(module).__name__} cannot run as 'moe_route': {why}. Keep the model's own experts: "
            "model.set_experts_implementation('eager') or attach(model, experts_implementation=None)."
        )


def _product(module: Any, name: str, rows: Tensor, slots: Dispatch) -> Tensor:
    return grouped_linear(rows, *weight_and_bias(module, name), slots)


def _defined(rows: Tensor, slots: Dispatch, reader: object) -> Tensor:
    """Set rows that no expert owns to zero, if `reader` has parameters.

    The backward of `reader` sums over every row, and on a device unowned rows may hold any value.
    """
    if isinstance(reader, nn.Module) and next(reader.parameters(), None) is not None:
        return torch.where((slots.order >= 0)[:, None], rows, 0.0)
    return rows

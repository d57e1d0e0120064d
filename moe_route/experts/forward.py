"""Run the experts of transformers by this library's dispatch, grouped products and combine.

`experts_forward` has the signature of transformers' experts implementations. It reads the layout of the weights from
the flags that `use_experts_implementation` sets on a module:

| flag | meaning |
|---|---|
| `has_gate` | the first product is `gate_up_proj` with `_apply_gate`; otherwise `up_proj` with `act_fn` |
| `has_bias` | each product has a bias |
| `is_transposed` | weights are [E, in, out] instead of [E, out, in] |
| `is_concatenated` | gate and up are two halves; otherwise they alternate, and `_apply_gate` separates them |
| `has_post_expert_norm` | `post_expert_norm` is applied to every row before it is weighted |

If a version of transformers lacks a flag, it means the value in `DEFAULTS`. A module that sets a flag outside this
table is refused, and so are weights other than plain floating-point tensors; `refuse` gives the reason and the fix.
`moe_route.ops.expert_paths` chooses how a call runs. Expert parallelism needs no flag: an expert that this rank does
not hold has the id `num_experts`, and its slots are skipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_route import ops
from moe_route.contract.dispatch import Dispatch
from moe_route.experts.gates import Gate, gate_of
from moe_route.ops.expert_paths import ACTIVATED, STREAMED, Call, choose
from moe_route.ops.grouped import grouped_linear
from moe_route.routers.discovery import ModelNotSupportedError

DEFAULTS: dict[str, bool] = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
# Flags of later versions of transformers that are not in the table, with their defaults; set by `register_experts`.
UNKNOWN_FLAGS: dict[str, Any] = {}

# Experts whose own forward multiplies in float32, whatever the dtype of the weights.
COMPUTES_IN_FLOAT32 = frozenset(("OpenAIPrivacyFilterExperts",))

PLAIN = (nn.Parameter, Tensor)  # types of weights that are neither sharded nor quantized
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    if path.name == STREAMED:
        rows = _streamed_rows(module, hidden_states, slots)
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
        _weights(module),
        compute_dtype(module),
        transposed=flag(module, "is_transposed"),
        known_gate=gate_of(module) is not None,
    )


def _streamed_rows(module: Any, hidden_states: Tensor, slots: Dispatch) -> Tensor:
    gate = _known_gate(module)
    (up, up_bias), (down, down_bias) = (_weight(module, name) for name in (up_projection(module), "down_proj"))
    biases = {"up_bias": up_bias, "down_bias": down_bias}
    return ops.expert_rows(hidden_states, slots, up, down, **biases, activation=gate.activation, pairing=gate.pairing)


def _activated_rows(module: Any, hidden_states: Tensor, slots: Dispatch) -> Tensor:
    gate = _known_gate(module)
    (up, up_bias), (down, down_bias) = (_weight(module, name) for name in (up_projection(module), "down_proj"))
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


def flag(module: Any, name: str) -> bool:
    """The value of a layout flag of an experts module."""
    return getattr(module, name, DEFAULTS[name])


def up_projection(module: Any) -> str:
    """Name of the weights of the first product."""
    return "gate_up_proj" if flag(module, "has_gate") else "up_proj"


def compute_dtype(module: Any) -> torch.dtype:
    """The dtype in which products are computed."""
    dtype = module.down_proj.dtype
    if any(kind.__name__ in COMPUTES_IN_FLOAT32 for kind in type(module).__mro__):
        return torch.promote_types(dtype, torch.float32)
    return dtype


def refuse(module: Any) -> None:
    """Raise `ModelNotSupportedError` if a module's experts cannot be run here."""
    why = obstacle(module)
    if why is not None:
        raise ModelNotSupportedError(
            f"{type(module).__name__} cannot run as 'moe_route': {why}. Keep the model's own experts: "
            "model.set_experts_implementation('eager') or attach(model, experts_implementation=None)."
        )


def obstacle(module: Any) -> str | None:
    """Why a module's experts cannot be run here, or None."""
    for name, default in UNKNOWN_FLAGS.items():
        value = getattr(module, name, default)
        if value != default:
            return f"transformers says {name}={value!r} of it, a layout that this version of moe-route does not know"
    for name in (up_projection(module), "down_proj"):
        weight = getattr(module, name, None)
        why = _unfit(weight)
        if why is not None:
            return f"{name} is {why}"
    experts = getattr(module, "num_experts", None)
    if experts != module.down_proj.shape[0]:
        return f"it says it has {experts} experts, and down_proj holds {module.down_proj.shape[0]}"
    if flag(module, "has_gate") and not flag(module, "is_concatenated") and _default_gate(module):
        return "its gate and up columns are interleaved and it has no _apply_gate of its own that takes them apart"
    return None


def _unfit(weight: object) -> str | None:
    """Why these weights cannot be multiplied in their stored form, or None."""
    if not isinstance(weight, Tensor):
        return f"a {type(weight).__name__}, no tensor"
    if type(weight) not in PLAIN:
        return f"a {type(weight).__name__} (sharded or quantized), not a plain tensor"
    if weight.dtype not in FLOATS:
        return f"{weight.dtype} (packed or quantized)"
    if weight.dim() != 3:
        return f"of shape {tuple(weight.shape)}, not [experts, out, in]"
    return None


def _default_gate(module: Any) -> bool:
    """Whether the gate is the default one, which transformers' decorator gives to classes without their own."""
    gate = getattr(type(module), "_apply_gate", None)
    return gate is None or gate.__module__.startswith("transformers.integrations")


def _weights(module: Any) -> list[Tensor]:
    """All weights and biases of both products, as they are stored."""
    names = [up_projection(module), "down_proj"]
    names += [f"{name}_bias" for name in names] if flag(module, "has_bias") else []
    return [getattr(module, name) for name in names]


def _weight(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [E, out, in] and bias [E, out] of a product."""
    weight = getattr(module, name)
    if flag(module, "is_transposed"):
        weight = weight.transpose(-2, -1)
    return weight, getattr(module, f"{name}_bias") if flag(module, "has_bias") else None


def _product(module: Any, name: str, rows: Tensor, slots: Dispatch) -> Tensor:
    return grouped_linear(rows, *_weight(module, name), slots)


def _defined(rows: Tensor, slots: Dispatch, reader: object) -> Tensor:
    """Set rows that no expert owns to zero, if `reader` has parameters.

    The backward of `reader` sums over every row, and on a device unowned rows may hold any value.
    """
    if isinstance(reader, nn.Module) and next(reader.parameters(), None) is not None:
        return torch.where((slots.order >= 0)[:, None], rows, 0.0)
    return rows

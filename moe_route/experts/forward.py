"""The experts of transformers, run by our dispatch, grouped products and combine.

`experts_forward` has the signature of transformers' experts implementations and reads the layout from the flags that
`use_experts_implementation` leaves on a module:

| flag | says |
|---|---|
| `has_gate` | `gate_up_proj` and `_apply_gate`, or `up_proj` and `act_fn` |
| `has_bias` | one bias per product |
| `is_transposed` | weights are [E, in, out] instead of [E, out, in] |
| `is_concatenated` | gate and up lie one after the other; interleaved, `_apply_gate` takes them apart |
| `has_post_expert_norm` | `post_expert_norm` over every row before it is weighted |

A version of transformers that lacks a flag means the value in `DEFAULTS`. A flag that is not in the table is refused
where it is set, and so are weights that are no plain floating-point tensors: `refuse` says why and what to do.
Expert parallelism needs no flag: an expert that this rank does not hold has id `num_experts`, and such slots are
skipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_route import ops
from moe_route.contract.dispatch import Dispatch
from moe_route.nn import grouped_linear
from moe_route.routers.discovery import ModelNotSupportedError

DEFAULTS: dict[str, bool] = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
# Flags of a later transformers that nobody here knows, with their defaults: filled in by `register_experts`.
UNKNOWN_FLAGS: dict[str, Any] = {}

# Experts whose own forward multiplies in float32, whatever the weights are kept in.
COMPUTES_IN_FLOAT32 = frozenset(("OpenAIPrivacyFilterExperts",))

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, H], top_k_index int32 or int64 [T, k], top_k_weights [T, k] -> [T, H], in the dtype of
    hidden_states.

    A slot whose id is negative or at least the number of experts is skipped, whatever its weight. Products are taken in
    the dtype of the expert weights (of autocast, where it is on); the weighted sum is accumulated in float32 (float64
    for float64) in the order of the slots and rounded once.
    """
    refuse(module)
    dtype = compute_dtype(module)
    slots = ops.dispatch(top_k_index, module.down_proj.shape[0])
    rows = ops.permute(hidden_states, slots)
    rows = _product(module, up_projection(module), rows.to(dtype), slots)
    if flag(module, "has_gate"):
        rows = module._apply_gate(_defined(rows, slots, getattr(module, "act_fn", None)))
    else:
        rows = module.act_fn(_defined(rows, slots, module.act_fn))
    rows = _product(module, "down_proj", rows.to(dtype), slots)
    if flag(module, "has_post_expert_norm"):
        rows = module.post_expert_norm(_defined(rows, slots, module.post_expert_norm))
    rows = rows.to(torch.promote_types(rows.dtype, hidden_states.dtype))  # under autocast: round after the sum
    return ops.combine(rows, top_k_weights, slots).to(hidden_states.dtype)


def flag(module: Any, name: str) -> bool:
    """A layout flag of an experts module."""
    return getattr(module, name, DEFAULTS[name])


def up_projection(module: Any) -> str:
    """Name of the first product's weights."""
    return "gate_up_proj" if flag(module, "has_gate") else "up_proj"


def compute_dtype(module: Any) -> torch.dtype:
    """The dtype that products are taken in."""
    dtype = module.down_proj.dtype
    if any(kind.__name__ in COMPUTES_IN_FLOAT32 for kind in type(module).__mro__):
        return torch.promote_types(dtype, torch.float32)
    return dtype


def refuse(module: Any) -> None:
    """Raise `ModelNotSupportedError` where a module's experts cannot be run here."""
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
    """Why these weights cannot be multiplied as they lie, or None."""
    if not isinstance(weight, Tensor):
        return f"a {type(weight).__name__}, no tensor"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"a {type(weight).__name__} (sharded or quantized), no plain tensor"
    if weight.dtype not in FLOATS:
        return f"{weight.dtype} (packed or quantized)"
    if weight.dim() != 3:
        return f"of shape {tuple(weight.shape)}, not [experts, out, in]"
    return None


def _default_gate(module: Any) -> bool:
    """Whether the gate is the one that the decorator gives to classes without their own."""
    gate = getattr(type(module), "_apply_gate", None)
    return gate is None or gate.__module__.startswith("transformers.integrations")


def _product(module: Any, name: str, rows: Tensor, slots: Dispatch) -> Tensor:
    weight = getattr(module, name)
    if flag(module, "is_transposed"):
        weight = weight.transpose(-2, -1)
    bias = getattr(module, f"{name}_bias") if flag(module, "has_bias") else None
    return grouped_linear(rows, weight, bias, slots)


def _defined(rows: Tensor, slots: Dispatch, reader: object) -> Tensor:
    """Rows that no expert owns set to zero, where `reader` has parameters: its backward sums over every row, and on a
    device those may hold anything."""
    if isinstance(reader, nn.Module) and next(reader.parameters(), None) is not None:
        return torch.where((slots.order >= 0)[:, None], rows, 0.0)
    return rows

"""The layout of the experts of transformers, read from the flags that `use_experts_implementation` sets on a module.

| flag | meaning |
|---|---|
| `has_gate` | the first product is `gate_up_proj` with `_apply_gate`; otherwise `up_proj` with `act_fn` |
| `has_bias` | each product has a bias |
| `is_transposed` | weights are [E, in, out] instead of [E, out, in] |
| `is_concatenated` | gate and up are two halves; otherwise they alternate, and `_apply_gate` separates them |
| `has_post_expert_norm` | `post_expert_norm` is applied to every row before it is weighted |

If a version of transformers lacks a flag, it means the value in `DEFAULTS`. A module that sets a flag outside this
table cannot be run, and neither can weights other than plain floating-point tensors; `obstacle` gives the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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


def stored_weights(module: Any) -> list[Tensor]:
    """All weights and biases of both products, as they are stored."""
    names = [up_projection(module), "down_proj"]
    names += [f"{name}_bias" for name in names] if flag(module, "has_bias") else []
    return [getattr(module, name) for name in names]


def weight_and_bias(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [E, out, in] and bias [E, out] of a product."""
    weight = getattr(module, name)
    if flag(module, "is_transposed"):
        weight = weight.transpose(-2, -1)
    return weight, getattr(module, f"{name}_bias") if flag(module, "has_bias") else None

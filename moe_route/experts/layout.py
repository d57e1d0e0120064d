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

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route.contract.experts import Activation

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


# ---- what stands between the products, if `ops.expert_rows` can compute it


@dataclass(frozen=True)
class Gate:
    """What a module applies between its products, as `ops.expert_rows` takes it."""

    activation: Activation
    pairing: str


# Activation modules by class name, of torch and transformers.
_FUNCTIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu_squared",
}
_PLAIN_FUNCTIONS = ((F.silu, "silu"), (F.gelu, "gelu"), (F.relu, "relu"))


@dataclass(frozen=True)
class _OwnGate:
    """An `_apply_gate` of a class's own; `alpha` and `limit` are names of attributes."""

    pairing: str = "halves"
    limit: str = "limit"
    alpha: str | None = None
    shift: float = 0.0
    own_function: bool = False
    """Whether it calls silu itself; otherwise `act_fn` (or silu with `alpha`)."""


_OWN_GATES = {
    "DeepseekV4Experts": _OwnGate(),
    "Glm5NextTextExperts": _OwnGate(limit="swiglu_limit", own_function=True),
    "GptOssExperts": _OwnGate("alternating", alpha="alpha", shift=1.0),
    "HYV4Experts": _OwnGate(limit="swiglu_limit", own_function=True),
    "HYV4VLExperts": _OwnGate(limit="swiglu_limit", own_function=True),
    "MiniMaxM3VLExperts": _OwnGate(limit="swiglu_limit", alpha="swiglu_alpha", shift=1.0),
    "OpenAIPrivacyFilterExperts": _OwnGate(alpha="alpha", shift=1.0),
}


def gate_of(module: Any) -> Gate | None:
    """What a module applies between its products, or None if only the module itself can tell.

    The tables name code of transformers. A gate that was replaced, and an activation that somebody hooked, are left to
    the module.
    """
    if not getattr(module, "has_gate", True):
        kind = _function(module)
        return None if kind is None else Gate(Activation(kind), "none")
    apply = getattr(type(module), "_apply_gate", None)
    if apply is None or "_apply_gate" in vars(module):
        return None
    if apply.__module__.startswith("transformers.integrations"):  # the one that transformers' decorator gives
        kind = _function(module)
        concatenated = getattr(module, "is_concatenated", True)
        return None if kind is None or not concatenated else Gate(Activation(kind), "halves")
    owner: Any
    for owner in type(module).__mro__:  # torch.compile traces this, but no __qualname__
        if owner.__name__ in _OWN_GATES and owner.__module__.startswith("transformers.models."):
            return _own_gate(module, _OWN_GATES[owner.__name__]) if owner._apply_gate is apply else None
    return None


def _own_gate(module: Any, own: _OwnGate) -> Gate | None:
    kind = "silu" if own.alpha is not None or own.own_function else _function(module)
    limit = getattr(module, own.limit)
    if kind is None or limit is None:
        return None
    alpha = 1.0 if own.alpha is None else float(getattr(module, own.alpha))
    return Gate(Activation(kind, alpha, float(limit), own.shift), own.pairing)


def _function(module: Any) -> str | None:
    """Name of the activation function `act_fn`."""
    function = getattr(module, "act_fn", None)
    for known, name in _PLAIN_FUNCTIONS:
        if function is known:
            return name
    if not isinstance(function, nn.Module) or function._forward_hooks or function._forward_pre_hooks:
        return None
    kind = type(function)
    if kind.__module__.split(".")[0] not in ("torch", "transformers") or "forward" in vars(function):
        return None
    if isinstance(function, nn.GELU) and function.approximate != "none":
        return "gelu_tanh"
    return _FUNCTIONS.get(kind.__name__)

"""What stands between the products of a module's experts, if `ops.expert_rows` can compute it: `gate_of`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from moe_route.contract.activation import Activation

__all__ = ["Gate", "gate_of"]


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

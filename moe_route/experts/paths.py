"""Which of the library's ways runs a call of a module's experts: `PATHS`, in the order of preference.

| path | what runs | where |
|---|---|---|
| streamed | dispatch, `ops.expert_rows`, combine | few slots on a CUDA device, nothing to train |
| grouped, one activation | as grouped, with `ops.expert_activation` between the products | more slots, else as above |
| grouped | dispatch, permute, two grouped products around the module's own activation, combine | everything else |

Few slots mean a decode step: then reading the weights of the chosen experts is what takes time, and the streamed path
reads nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route.contract.activation import Activation
from moe_route.ops.experts import FEW_SLOTS, FEW_SLOTS_PER_EXPERT

__all__ = ["ACTIVATED", "GROUPED", "PATHS", "STREAMED", "Call", "Gate", "Path", "choose", "gate_of", "only"]

STREAMED, ACTIVATED, GROUPED = "streamed", "grouped, one activation", "grouped"


@dataclass(frozen=True)
class Path:
    """A way to run experts, and the calls that it is for; None: all of them."""

    name: str
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    most_slots: int | None = None
    """Largest T * k."""
    most_slots_per_expert: int | None = None
    """Largest T * k / E."""
    trains: bool = True
    """Whether gradients flow through it."""
    any_gate: bool = True
    """Whether the module's own activation runs; otherwise `gate_of` must know it."""

    def takes(self, call: Call) -> bool:
        """Whether a call may run this way."""
        return (
            (self.devices is None or call.device in self.devices)
            and (self.dtypes is None or call.dtype in self.dtypes)
            and (self.most_slots is None or call.slots <= self.most_slots)
            and (self.most_slots_per_expert is None or call.slots <= self.most_slots_per_expert * call.experts)
            and (self.trains or not call.trains)
            and (self.any_gate or call.gate is not None)
        )


@dataclass(frozen=True)
class Gate:
    """What a module applies between its products, as `ops.expert_rows` and `ops.expert_activation` take it."""

    activation: Activation
    pairing: str


class Call:
    """One call of a module's experts, as far as the choice of a path needs it.

    `weights` are all weights and biases of both products, and `dtype` is the one that they are to be computed in.
    """

    def __init__(self, module: Any, hidden: Tensor, slots: int, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.module, self.slots, self.experts = module, slots, weights[0].shape[0]
        self.device = hidden.device.type
        tensors = [hidden, *weights]
        self.trains = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
        alike = all(each.dtype == dtype and each.device == hidden.device for each in tensors)
        packed = all(each.is_contiguous() for each in weights)
        autocast = torch.is_autocast_enabled(hidden.device.type)
        self.dtype = dtype if alike and packed and not autocast else None
        """That of everything, and None if not all is in one dtype, on one device and packed."""

    @property
    def gate(self) -> Gate | None:
        """The module's activation, if it is one of the table's."""
        return gate_of(self.module)


PATHS: Sequence[Path] = (
    Path(
        STREAMED,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
        most_slots=FEW_SLOTS,
        most_slots_per_expert=FEW_SLOTS_PER_EXPERT,
        trains=False,
        any_gate=False,
    ),
    Path(
        ACTIVATED,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
        trains=False,
        any_gate=False,
    ),
    Path(GROUPED),
)


def choose(call: Call) -> Path:
    """The first path of `PATHS` that takes a call."""
    return next(path for path in PATHS if path.takes(call))


@contextmanager
def only(name: str) -> Iterator[None]:
    """Run every call that `name` can run that way, whatever its device and number of slots. Not for several threads.

    For benchmarks, which find out from how many slots on a path pays.
    """
    global PATHS
    before = PATHS
    wanted = next(path for path in before if path.name == name)
    PATHS = (replace(wanted, devices=None, most_slots=None, most_slots_per_expert=None), *before)
    try:
        yield
    finally:
        PATHS = before


# ---- what stands between the products --------------------------------------------------------------------------

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

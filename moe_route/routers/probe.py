"""Run a router alone on random hidden states, to learn the order of its output and whether it can be read at all.

Versions of transformers return a decision in different orders. The order is found on a copy of the router with random
weights. So it does not matter on which device the live weights are, or whether they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moe_route.modules.attributes import PUT_BY_OTHERS, managed_by_accelerate
from moe_route.routers.adapter import Adapter
from moe_route.routers.family import Family
from moe_route.routers.output import OutputPart, order_of

PROBES = 64  # random tokens with which a router is checked
TOKENS = 8
_OTHER_FORM = "this version of transformers returns the decision in another form"
_returns: WeakKeyDictionary[type[nn.Module], tuple[OutputPart, ...]] = WeakKeyDictionary()


def random_states(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32 numbers on the CPU, equal in every run; leaves global random states alone."""
    return _normal(shape, torch.Generator().manual_seed(seed))


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device="cpu")


def unreadable(module: nn.Module) -> str | None:
    """Why a module cannot run alone now, or None."""
    for parameter in module.parameters():
        if parameter.is_meta and not managed_by_accelerate(module):
            return "its weights are on the meta device"
        if type(parameter).__name__ == "DTensor":
            return "its weights are sharded (DTensor)"
    return None


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run a module in evaluation mode, and restore it afterwards.

    Restores training flags, random states, plain attributes that its forward set, and the dtype of parameters that its
    forward cast.
    """
    flags = [(inner, inner.training) for inner in module.modules()]
    kept = [(vars(inner), {k: v for k, v in vars(inner).items() if not k.startswith("_")}) for inner, _ in flags]
    data = [(parameter, parameter.data) for parameter in module.parameters()]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(d.index for d in devices)):
            for inner, _ in flags:
                inner.training = False
            yield
    finally:
        for attributes, values in kept:
            for name in [name for name in attributes if not name.startswith("_") and name not in values]:
                del attributes[name]
            attributes.update(values)
        for parameter, before in data:
            if parameter.dtype != before.dtype:
                parameter.data = before
        for inner, training in flags:
            inner.training = training


def as_returned(family: Family, router: nn.Module) -> Family:
    """`family` with the order in which the class of `router` returns its decision."""
    if family.adapter.read is not Adapter.read or family.adapter.probe is not Adapter.probe:
        return family  # the adapter reads a form of its own
    returns = _returns.get(type(router)) or _form(family, router)
    if returns is None:
        return family
    _returns[type(router)] = returns
    if returns == family.returns:
        return family
    return replace(family, returns=returns, gate=None, unfused=_OTHER_FORM)


def _form(family: Family, router: nn.Module) -> tuple[OutputPart, ...] | None:
    """The meaning of the tensors that the class returns, or None where it cannot be found; `check` then decides."""
    experts = family.num_experts_of(router)
    width = next((p.shape[-1] for p in router.parameters() if p.dim() == 2), None)
    if experts is None or width is None:
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = _normal((1, TOKENS, width) if family.input_rank == 3 else (TOKENS, width), generator)
    bias = () if family.bias_argument is None else (torch.zeros(experts),)
    try:
        with torch.no_grad():
            output = _like(router, generator).forward(hidden, *bias)
    except (TypeError, ValueError, LookupError, RuntimeError, AttributeError, AssertionError):
        return None
    return order_of(output)


def _like(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A module of the same class and settings with random weights, in evaluation mode."""
    other = type(module).__new__(type(module))
    nn.Module.__init__(other)
    for name, value in vars(module).items():
        if name not in vars(other) and name not in PUT_BY_OTHERS:
            setattr(other, name, value)
    for name, parameter in module._parameters.items():
        other.register_parameter(name, None if parameter is None else nn.Parameter(_random(parameter, generator)))
    for name, buffer in module._buffers.items():
        other.register_buffer(name, None if buffer is None else _random(buffer, generator))
    for name, child in module._modules.items():
        other.add_module(name, None if child is None else _like(child, generator))
    return other.eval()


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return _normal(tensor.shape, generator) * max(tensor.shape[-1:], default=1) ** -0.5

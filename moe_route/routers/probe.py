"""In which form a router of a known class returns its decision: versions of transformers differ.

A copy of the router with random weights is run on random hidden states. So it does not matter where the weights of the
live one are, or whether they are there at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from moe_route.routers.output import Part
from torch import Tensor, nn

from moe_route.routers.adapter import Adapter
from moe_route.routers.family import Family

TOKENS = 8
_OTHER_FORM = "this version of transformers returns the decision in another form"
_OF_INSTANCES = ("forward", "_hf_hook", "_old_forward")  # what other libraries put on one module
_returns: WeakKeyDictionary[type[nn.Module], tuple[Part, ...]] = WeakKeyDictionary()


def as_returned(family: Family, router: nn.Module) -> Family:
    """`family`, with the form in which the class of `router` returns its decision."""
    if family.adapter.read is not Adapter.read or family.adapter.probe is not Adapter.probe:
        return family  # a form of its own
    returns = _returns.get(type(router)) or _form(family, router)
    if returns is None:
        return family
    _returns[type(router)] = returns
    if returns == family.returns:
        return family
    return replace(family, returns=returns, gate=None, unfused=_OTHER_FORM)


def _form(family: Family, router: nn.Module) -> tuple[Part, ...] | None:
    """What the class returns, in order; None where that cannot be told (`selfcheck` then has the word)."""
    experts = family.num_experts_of(router)
    width = next((p.shape[-1] for p in router.parameters() if p.dim() == 2), None)
    if experts is None or width is None:
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(
        (1, TOKENS, width) if family.input_rank == 3 else (TOKENS, width), generator=generator, device="cpu"
    )
    bias = (torch.zeros(experts),) if (family.correction_bias or "").startswith("argument:") else ()
    try:
        with torch.no_grad():
            output = _like(router, generator).forward(hidden, *bias)
    except (TypeError, ValueError, LookupError, RuntimeError, AttributeError, AssertionError):
        return None
    return parts_of(output)


def _like(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A module of the same class and settings with random weights, in evaluation mode."""
    other = type(module).__new__(type(module))
    nn.Module.__init__(other)
    for name, value in vars(module).items():
        if name not in vars(other) and name not in _OF_INSTANCES:
            setattr(other, name, value)
    for name, parameter in module._parameters.items():
        other.register_parameter(name, None if parameter is None else nn.Parameter(_random(parameter, generator)))
    for name, buffer in module._buffers.items():
        other.register_buffer(name, None if buffer is None else _random(buffer, generator))
    for name, child in module._modules.items():
        other.add_module(name, None if child is None else _like(child, generator))
    return other.eval()


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, device="cpu") * max(tensor.shape[-1:], default=1) ** -0.5


def parts_of(output: Any) -> tuple[Part, ...] | None:
    """What the tensors are that a router returned for some tokens, in order; None where they cannot be told apart."""
    if not isinstance(output, tuple) or not all(isinstance(part, Tensor) and part.dim() == 2 for part in output):
        return None
    top_k = [part.shape[1] for part in output if not part.is_floating_point()]
    if len(top_k) != 1 or len({len(part) for part in output}) != 1:
        return None
    if min(part.shape[1] for part in output) < top_k[0]:
        return None
    found = tuple(_part(part, top_k[0], len(output)) for part in output)
    known = ({"weights", "ids"}, {"scores", "ids"}, {"logits", "weights", "ids"}, {"probabilities", "weights", "ids"})
    return found if len(set(found)) == len(found) and set(found) in known else None


def _part(part: Tensor, top_k: int, of: int) -> Part:
    if not part.is_floating_point():
        return "ids"
    if part.shape[1] == top_k:
        return "weights"
    if of == 2:
        return "scores"  # beside ids alone
    sums = bool((part >= 0).all()) and torch.allclose(part.float().sum(1), torch.ones(len(part), device=part.device))
    return "probabilities" if sums else "logits"

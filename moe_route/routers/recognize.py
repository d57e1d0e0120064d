"""Recognize, by its behavior, a router whose class is not in the table.

Two conditions must hold. First, the router, run in float32 on random hidden states, returns logits [T, E], weights
[T, k] and ids [T, k] in some order, and one specification built from its attributes reproduces exactly those ids and
weights. Second, the block uses them: changing ids and weights changes its output. Otherwise the router stays unknown.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moe_route import ops
from moe_route.base.devices import accelerator
from moe_route.contract.spec import RouterSpec
from moe_route.modules.intercept import PUT_BY_OTHERS, at, managed_by_accelerate
from moe_route.routers.adapter import Adapter, OutputPart, order_of
from moe_route.routers.family import Family

# ---- a router run alone on random hidden states, to learn the order of its output and whether it can be read at all
#
# Versions of transformers return a decision in different orders. The order is found on a copy of the router with
# random weights. So it does not matter on which device the live weights are, or whether they are loaded.

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
    kind = accelerator() or "cuda"  # whose random states torch can keep: the others have no such interface
    devices = {p.device for p in module.parameters() if p.device.type == kind in ("cuda", "xpu")}
    try:
        with torch.random.fork_rng(devices=sorted(d.index for d in devices), device_type=kind):
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


_BIASES = ("e_score_correction_bias", "expert_bias", "correction_bias")
_SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
_GROUPS = (("num_group", "topk_group"), ("n_group", "topk_group"))
_EPS = (0.0, 1e-20)
_ROOM = 1e-5


@dataclass(frozen=True)
class Sample:
    """Output of a router for some probes, sorted into its parts."""

    logits: Tensor  # or probabilities
    weights: Tensor
    ids: Tensor
    returns: tuple[OutputPart, ...]


def recognize(router: nn.Module, block: nn.Module) -> Family | str:
    """A row for the class of `router`, or a sentence that says why it is not recognized."""
    if unreadable(block) or any(p.is_meta for p in block.parameters()) or managed_by_accelerate(router):
        return "its weights cannot be read here"
    samples = _samples(router)
    if isinstance(samples, str):
        return samples
    family = next((row for row in _candidates(router, samples) if _reproduces(row, router, samples)), None)
    if family is None:
        return "no known way of routing gives the ids and weights that it returns"
    return _not_followed(family, router, block) or family


def _samples(router: nn.Module) -> list[Sample] | str:
    """Outputs of a float32 copy for two batches of different size."""
    with undisturbed(router), torch.no_grad():
        alone = copy.deepcopy(router).float()
    alone._forward_hooks.clear()
    matrix = next((p for p in alone.parameters() if p.dim() == 2), None)
    if matrix is None:
        return "it has no gate matrix"
    samples: list[Sample] = []
    for seed, size in enumerate((1.0, 8.0)):
        hidden = random_states((PROBES, matrix.shape[1]), seed).to(matrix.device) * size
        try:
            with undisturbed(alone), torch.no_grad():
                output = alone.forward(hidden)
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            return f"it cannot be run by itself on hidden states [tokens, hidden size] ({type(error).__name__})"
        sample = _sample(output)
        if sample is None:
            return "it does not return logits [tokens, experts], weights [tokens, k] and ids [tokens, k]"
        samples.append(sample)
    return samples


def _sample(output: Any) -> Sample | None:
    returns = order_of(output)
    if returns is None or len(returns) != 3 or len(output[0]) != PROBES:
        return None
    logits = next(part for part, name in zip(output, returns, strict=True) if name in ("logits", "probabilities"))
    weights, ids = output[returns.index("weights")], output[returns.index("ids")]
    if not bool(((ids >= 0) & (ids < logits.shape[1])).all()):
        return None
    return Sample(logits, weights, ids, returns)


def _candidates(router: nn.Module, samples: list[Sample]) -> Iterator[Family]:
    """Rows to try: every way of routing, with and without each setting that the router holds."""
    bias = next((name for name in _BIASES if isinstance(at(router, name), Tensor)), None)
    for scored, chosen, weighed in product(_scores(), _groups(router), _weights(router)):
        spec = RouterSpec(**scored, **chosen, **weighed)
        yield _row(router, samples[0], spec, None)
        if bias is not None:
            yield _row(router, samples[0], spec, bias)


def _scores() -> Iterator[dict[str, Any]]:
    for score, order in product(("softmax", "sigmoid", "sqrt_softplus"), ("score_then_topk", "topk_then_score")):
        yield {"score": score, "order": order}


def _groups(router: nn.Module) -> Iterator[dict[str, Any]]:
    """No groups, then the groups that the router's attributes name."""
    yield {}
    sizes = next(((at(router, a), at(router, b)) for a, b in _GROUPS if isinstance(at(router, a), int)), (1, 1))
    if sizes[0] > 1:
        for of_group, fill in product(("top2_sum", "max"), (float("-inf"), 0.0)):
            yield {"groups": sizes[0], "top_groups": sizes[1], "group_score": of_group, "group_fill": fill}


def _weights(router: nn.Module) -> Iterator[dict[str, Any]]:
    """No renormalization and each kind of it, with and without the factor that the router's attributes name."""
    scale = next((float(at(router, name)) for name in _SCALES if isinstance(at(router, name), (int, float))), 1.0)
    for factor in dict.fromkeys((1.0, scale)):
        yield {"renormalize": "none", "scale": factor}
        for eps in _EPS:
            yield {"renormalize": "sum", "eps": eps, "scale": factor}


def _row(router: nn.Module, sample: Sample, spec: RouterSpec, bias: str | None) -> Family:
    of_chosen = " over the chosen" if spec.order == "topk_then_score" else ""
    name = f"{spec.score.replace('_', '-')}{of_chosen}{' with correction bias' if bias else ''}"
    return Family(
        f"recognized: {name}{', group-limited' if spec.groups > 1 else ''}",
        (type(router).__name__,),
        spec,
        top_k=sample.ids.shape[1],
        num_experts=sample.logits.shape[1],
        correction_bias=bias,
        returns=sample.returns,
        low_precision=True,  # the precision of its scores is unknown
        unfused="it is known by what it does only",
        notes=(f"no class of the table of routers: recognized by what it does ({name})",),
    )


def _reproduces(family: Family, router: nn.Module, samples: list[Sample]) -> bool:
    bias = family.bias_of(router)
    for sample in samples:
        logits = sample.logits.log() if "probabilities" in sample.returns else sample.logits
        weights, ids = ops.route(logits, sample.ids.shape[1], family.spec, correction_bias=bias)
        order, own = ids.long().sort(1), sample.ids.sort(1)
        if not torch.equal(order.values, own.values):
            return False
        own_weights = sample.weights.gather(1, own.indices).float()
        if not torch.allclose(weights.gather(1, order.indices), own_weights, rtol=_ROOM, atol=1e-12):
            return False
    return True


def _not_followed(family: Family, router: nn.Module, block: nn.Module) -> str:
    """Why the block's output does not depend on what the router returns, or an empty string."""
    matrix = next(p for p in router.parameters() if p.dim() == 2)
    hidden = random_states((1, 8, matrix.shape[1]), 1).to(matrix.device, matrix.dtype)

    def run(change: bool) -> Any:
        def turn(module: nn.Module, args: Any, output: Any) -> Any:
            ids_at, experts = family.returns.index("ids"), family.num_experts_of(router)
            return (*output[:ids_at], (output[ids_at] + 1) % experts, *output[ids_at + 1 :])

        handle = router.register_forward_hook(turn) if change else None
        try:
            output = block.forward(hidden.clone())
        finally:
            if handle is not None:
                handle.remove()
        return output[0] if isinstance(output, tuple) else output

    try:
        with undisturbed(block), torch.no_grad():
            same = torch.equal(run(False), run(True))
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        return f"its block cannot be run by itself, to see whether it follows its router ({type(error).__name__})"
    return "its block does not follow it: other ids give the same output" if same else ""

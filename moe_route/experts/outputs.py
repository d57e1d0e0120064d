"""See the output of every chosen expert for every token, while the model runs and without changing it.

A module of experts returns the weighted sum over a token's experts, so the single outputs f_e(x_t) cannot be read from
it. There are two ways to see them:

| experts | how |
|---|---|
| one module, `forward(hidden_states, top_k_index, top_k_weights)` | it runs once more, one slot per row, weight 1 |
| a `ModuleList` or `ModuleDict` with a module per expert | each expert's own output is read as it runs |

The first holds for every implementation of transformers' experts interface, and costs one more forward of the experts.
`NoExpertOutputsError` names experts of any other layout, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_route.contract.experts import SeenOutputs
from moe_route.modules.intercept import Change, ForwardHook, ForwardPreHook, untraced
from moe_route.routers.discovery import ModelNotSupportedError, RouterInfo

# Arguments of a module of experts: hidden states [T, H], ids [T, k], weights [T, k].
_ARGUMENTS = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
    ("hidden", "ids", "weights"),
)
_NEEDS_TWO_SLOTS = frozenset(("LongcatFlashExperts",))  # their loop fails with a single slot per row
_ELEMENTS = 1 << 25  # elements of expert outputs that are held at once
_REFUSED = {
    "Llama4TextExperts": "the weight multiplies the input of these experts, so there is no output apart from it",
    "JetMoeMoE": "its experts are two products of the block, not a module",
    "JetMoeMoA": "its experts are projections of the attention",
    "NllbMoeExperts": "transformers gives them a mask where they expect ids, so they run for tokens of other experts",
    "DogeCDMoE": "its experts are rows of an embedding",
}


class NoExpertOutputsError(ModelNotSupportedError):
    """Raised for experts whose single outputs cannot be seen; names their class and the reason."""


class OutputSink(Protocol):
    """What receives the outputs."""

    def awaits(self, layer: int) -> Tensor | None:
        """The choice ids [T, k] of a layer (-1: an empty slot) whose outputs are wanted now, or None."""

    def add_outputs(self, layer: int, seen: SeenOutputs) -> None:
        """Receive the outputs for that choice; `awaits` answers None from then on."""


def expert_outputs(experts: nn.Module, hidden: Tensor, ids: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the outputs f_e(x_t) of single experts before weighting, [T, k, H].

    Runs the plain forward of a module of experts, without its hooks, with a row per slot and weight 1.

    Args:
        experts: a module whose forward takes hidden states, ids and weights.
        hidden: hidden states, [T, H].
        ids: ids of experts, [T, k].
        dtype: dtype of the weights; by default that of ``hidden``.
    """
    tokens, slots = ids.shape
    width = 2 if type(experts).__name__ in _NEEDS_TWO_SLOTS else 1
    alone = torch.zeros((ids.numel(), width), dtype=hidden.dtype if dtype is None else dtype, device=ids.device)
    alone[:, 0] = 1
    forward: Any = experts.forward  # a call would run the hooks
    rows = hidden.repeat_interleave(slots, dim=0)
    outputs: Tensor = forward(rows, ids.reshape(-1, 1).expand(-1, width), alone)
    return outputs.reshape(tokens, slots, -1)


def watch_experts(router: RouterInfo, sink: OutputSink) -> Sequence[Change]:
    """The hooks that show `sink` the outputs of a router's experts.

    Raises `NoExpertOutputsError` for a layout whose outputs cannot be seen.
    """
    try:
        experts = experts_of(router)
    except NoExpertOutputsError as error:
        raise NoExpertOutputsError(f"{error}. Record without expert_outputs.") from None
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        return _OneByOne(router, experts, sink).changes()
    return (ForwardPreHook(experts, _Again(router, sink, _arguments(experts)).hook, with_kwargs=True),)


def experts_of(router: RouterInfo) -> nn.Module:
    """The module that holds a router's experts; raises `NoExpertOutputsError` if their outputs cannot be seen."""
    for owner in (router.module, router.block):
        if type(owner).__name__ in _REFUSED:
            raise _refusal(router, owner, _REFUSED[type(owner).__name__])
    found = (owner._modules.get("experts") for owner in (router.module, router.block))
    experts = next((module for module in found if module is not None), None)
    if experts is None:
        raise _refusal(router, router.block, "it has no module named experts")
    if type(experts).__name__ in _REFUSED:
        raise _refusal(router, experts, _REFUSED[type(experts).__name__])
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        if len(_modules_of(experts)) != router.num_experts:
            raise _refusal(router, experts, f"it holds {len(experts)} modules for {router.num_experts} experts")
        return experts
    if _arguments(experts) not in _ARGUMENTS:
        raise _refusal(router, experts, f"its forward takes ({', '.join(_arguments(experts))}), not a choice per token")
    return experts


def one_module_of(router: RouterInfo) -> nn.Module:
    """The one module that holds a router's experts, ``experts(hidden, ids, weights)``.

    Raises `NoExpertOutputsError` if each of them is a module of its own, or their outputs cannot be seen.
    """
    experts = experts_of(router)
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        raise _refusal(router, experts, "each of them is a module of its own")
    return experts


def _arguments(experts: nn.Module) -> tuple[str, ...]:
    """Names of the first three arguments of the forward."""
    return tuple(inspect.signature(inspect.unwrap(type(experts).forward)).parameters)[1:4]


def _modules_of(experts: nn.ModuleList | nn.ModuleDict) -> list[nn.Module]:
    """The module of each expert; a `ModuleDict` may hold others, such as a dropout."""
    if isinstance(experts, nn.ModuleList):
        return list(experts)
    return [module for name, module in experts.items() if name.startswith("expert_")]


def _refusal(router: RouterInfo, module: nn.Module, why: str) -> NoExpertOutputsError:
    return NoExpertOutputsError(
        f"the outputs of {type(module).__name__} at {router.name!r} (layer {router.layer}) cannot be seen one by one: "
        f"{why}"
    )


class Adder(Protocol):
    """What says which directions are added in the running call (`patching.Engine`)."""

    def added(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        """float32 [T, H] to add to the experts' output, and bool [T, 1], the tokens that get it; None for nothing."""


def add_to_outputs(router: RouterInfo, adder: Adder) -> Sequence[Change]:
    """The hooks that add directions to the output of a router's experts, as if to outputs of single experts.

    Where ranks of tensor parallelism share the experts, the output is their sum already, so it is added once.

    Raises `NoExpertOutputsError` for experts whose weighted outputs cannot be told apart: not one module that is given
    ids and weights, or one that holds a part of the experts (expert parallelism).
    """
    try:
        experts = one_module_of(router)
        held = {len(p) for p in experts.parameters(recurse=False) if p.dim() == 3}
        a_part = len(held) == 1 and max(held) < router.num_experts and router.num_experts % max(held) == 0
        if a_part or getattr(experts, "_is_expert_parallel", False):
            raise _refusal(router, experts, "this process holds a part of them only (expert parallelism)")
    except NoExpertOutputsError as error:
        raise NoExpertOutputsError(f"{error}. Leave the layer out: plan.only(layers=[...]).") from None
    return _Adding(router, experts, adder).changes()


class _Adding:
    """Adds directions to the output of a module of experts."""

    def __init__(self, router: RouterInfo, experts: nn.Module, adder: Adder) -> None:
        self.router, self.experts, self.adder, self.arguments = router, experts, adder, _arguments(experts)
        self.given: tuple[Tensor, Tensor] | None = None

    def changes(self) -> Sequence[Change]:
        return (
            ForwardPreHook(self.experts, self.enter, with_kwargs=True),
            ForwardHook(self.experts, self.leave),
        )

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the choice."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        _, ids, weights = (given[name] for name in self.arguments)
        self.given = ids, weights

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Add in the dtype of the output; tokens that get nothing keep every bit."""
        given, self.given = self.given, None
        added = None if given is None else self.adder.added(*given)
        if added is None:
            return None
        change, here = added
        if change.shape[-1] != output.shape[-1]:
            raise ValueError(
                f"directions of {change.shape[-1]} numbers are added in layer {self.router.layer}, whose experts "
                f"return {output.shape[-1]}: give vectors of that length"
            )
        rows = output.reshape(-1, output.shape[-1])
        return torch.where(here, rows + change.to(rows.dtype), rows).reshape(output.shape)


class _Again:
    """Runs a module of experts once more, so that each slot of each token has an output row of its own."""

    def __init__(self, router: RouterInfo, sink: OutputSink, arguments: tuple[str, ...]) -> None:
        self.router, self.sink, self.arguments = router, sink, arguments
        self.checked = False  # once, since it waits for the device

    @untraced
    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the experts."""
        chosen = self.sink.awaits(self.router.layer)
        if chosen is None:
            return
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        hidden, ids, weights = (given[name] for name in self.arguments)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if ids.shape != chosen.shape or len(hidden) != len(chosen) or not self._as_chosen(ids, weights, chosen):
            raise RuntimeError(
                f"the experts of layer {self.router.layer} are not given what its router chose: "
                f"{type(module).__name__} is not called as expected. Record without expert_outputs."
            )
        # a slot that was emptied, or skips the experts, is passed to them under another id
        self.sink.add_outputs(self.router.layer, _sizes(module, hidden, ids, weights.dtype, ids == chosen))

    def _as_chosen(self, ids: Tensor, weights: Tensor, chosen: Tensor) -> bool:
        """Whether the experts get the chosen ids, except in slots of weight 0."""
        if not self.checked:
            self.checked = not bool(((ids != chosen) & (chosen >= 0) & (weights != 0)).any())
        return self.checked


@torch.no_grad()
def _sizes(module: nn.Module, hidden: Tensor, ids: Tensor, weight: torch.dtype, kept: Tensor) -> SeenOutputs:
    """Norms and peaks of f_e(x_t) for ids [T, k]; 0 where `kept` [T, k] is false."""
    tokens, slots = ids.shape
    many = max(_ELEMENTS // max(slots * hidden.shape[1], 1), 1)
    seen = []
    for first in range(0, tokens, many):
        part = slice(first, first + many)
        seen.append(_measure(expert_outputs(module, hidden[part], ids[part], dtype=weight).flatten(0, 1)))
    sizes = [torch.cat(parts).reshape(tokens, slots) for parts in zip(*seen, strict=True)] if seen else []
    norms, peaks = sizes or [hidden.new_zeros((0, slots), dtype=torch.float32)] * 2
    return SeenOutputs(norms * kept, peaks * kept)


def _measure(output: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and peak of each row [N, H]."""
    wide = output if output.dtype == torch.float64 else output.float()
    return torch.linalg.vector_norm(wide, dim=1), wide.abs().amax(dim=1)


class _OneByOne:
    """Reads the outputs of experts that are a module each.

    An expert is given its tokens in the order of the slots, then of the tokens, as transformers' loops do. This is
    checked against the hidden states that the block was given.
    """

    def __init__(self, router: RouterInfo, experts: nn.ModuleList | nn.ModuleDict, sink: OutputSink) -> None:
        self.router, self.experts, self.sink = router, experts, sink
        # a plain list has no forward of its own, and its owner's is given the hidden states
        owner = next(each for each in (router.module, router.block) if each._modules.get("experts") is experts)
        self.caller = owner if type(experts) is nn.ModuleList else experts
        self.hidden: Tensor | None = None
        self.chosen: Tensor | None = None
        self.seen: SeenOutputs | None = None

    def changes(self) -> Sequence[Change]:
        reads = enumerate(_modules_of(self.experts))
        return (
            ForwardPreHook(self.caller, self.enter, with_kwargs=True),
            *(ForwardHook(module, partial(self.read, expert)) for expert, module in reads),
            ForwardHook(self.caller, self.leave, always_call=True),
        )

    @untraced
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the hidden states."""
        hidden = (*args, *kwargs.values())[0]
        self.hidden, self.chosen, self.seen = hidden.reshape(-1, hidden.shape[-1]), None, None

    @untraced
    @torch.no_grad()
    def read(self, expert: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Take the sizes of one expert's outputs."""
        if self.chosen is None:
            self.chosen = self.sink.awaits(self.router.layer)
        if self.chosen is None or self.hidden is None:
            return
        slots, tokens = torch.nonzero(torch.eq(self.chosen.T, expert), as_tuple=True)
        rows = args[0].reshape(-1, args[0].shape[-1])
        if len(rows) != len(tokens) or not torch.equal(rows, self.hidden[tokens]):
            raise RuntimeError(
                f"expert {expert} of layer {self.router.layer} is not given the tokens that chose it in their order: "
                f"{type(self.router.block).__name__} is not called as expected. Record without expert_outputs."
            )
        norms, peaks = _measure(output.detach().reshape(len(tokens), -1))
        if self.seen is None:
            self.seen = SeenOutputs(*(norms.new_zeros(self.chosen.shape) for _ in range(2)))
        self.seen.norms[tokens, slots], self.seen.peaks[tokens, slots] = norms, peaks

    @untraced
    def leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Pass on what was seen."""
        seen, self.hidden, self.chosen, self.seen = self.seen, None, None, None
        if output is None:  # the forward raised
            return
        chosen = self.sink.awaits(self.router.layer)
        if seen is None and chosen is not None:  # no expert was chosen
            seen = SeenOutputs(*(torch.zeros(chosen.shape, device=chosen.device) for _ in range(2)))
        if seen is not None:
            self.sink.add_outputs(self.router.layer, seen)

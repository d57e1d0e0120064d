"""Blocks that make the choice themselves: their gate (or router) module returns logits only.

The block takes the place of the router. Some blocks choose in a method, which is replaced. Blocks of transformers 4
choose inside their forward, which is watched. Either way the choice is read and written as (logits, weights, ids).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moe_route.modules.intercept import Change, ReplacedMethod
from moe_route.modules.watch import Decided, WatchedForward
from moe_route.routers.adapter import Adapter, Output, OutputHook, as_scores

METHOD = "route_tokens_to_experts"


class ByMethod(Adapter):
    """Reads a block that chooses in a method, whose last argument are the logits."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the block has that method."""
        return callable(getattr(type(module), METHOD, None))

    def changes(self, hook: OutputHook) -> Sequence[Change]:
        """Replace the method on this one block."""
        self.hook = hook
        return (ReplacedMethod(self.module, METHOD, self.route_tokens_to_experts),)

    def route_tokens_to_experts(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids after the hook, in the order and form in which the block's own method returns them."""
        own = self._own(args)
        output = _triple(args, own)
        changed = self.hook(self.module, (), output)
        if changed is None:
            return own
        _, weights, ids = changed
        first = own[0].is_floating_point()
        dense = own[0] if first else own[1]
        if dense.shape != own[1 if first else 0].shape:
            weights, ids = as_scores(dense, weights, ids)
        return (weights, ids) if first else (ids, weights)

    def _own(self, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        chosen: tuple[Tensor, Tensor] = getattr(type(self.module), METHOD)(self.module, *args)
        return chosen

    def probe(self, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
        """Run the block's method on random logits in the dtype of its gate's output."""
        generator = torch.Generator().manual_seed(3)
        experts = self.form.num_experts
        logits = torch.randn((*hidden.shape[:-1], experts), generator=generator, device="cpu").to(hidden)
        if self.form.float32_weights:
            logits = logits.float()
        places = len(inspect.signature(getattr(type(self.module), METHOD)).parameters) - 1  # beside self
        args = (hidden, logits)[-places:]
        return (), _triple(args, self._own(args))


def _triple(args: tuple[Tensor, ...], own: tuple[Tensor, Tensor]) -> Output:
    """(logits, weights, ids) from the arguments of the method and its result."""
    weights, ids = own if own[0].is_floating_point() else own[::-1]
    if weights.shape != ids.shape:
        weights = weights.gather(1, ids)
    return args[-1].flatten(0, -2), weights, ids


class InForward(Adapter):
    """Reads a block that chooses inside its forward and loops over a list of experts."""

    returns_choice = False

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the experts are a list."""
        return type(module._modules.get("experts")) is nn.ModuleList

    @property
    def widens(self) -> bool:
        """False: the weights are changed in place, so their number per token is fixed."""
        return False

    def changes(self, hook: OutputHook) -> Sequence[Change]:
        """Watch the block's forward."""
        self.hook = hook
        return (WatchedForward(self.module, self._watch, _seen),)

    def _watch(self) -> Decided | None:
        return None if self.idle else self._mode(self._decide)

    def _mode(self, decide: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Decided:
        return Decided(self.form.num_experts, self.form.top_k, decide)

    def _decide(self, logits: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        changed = self.hook(self.module, (), (logits, weights, ids))
        if changed is None:
            return ids
        weights.copy_(changed[1])
        steered: Tensor = changed[2]
        return steered

    def probe(self, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
        """Run the block until it has chosen."""
        try:
            with self._mode(_stop):
                self.module.forward(hidden.clone().reshape(1, -1, hidden.shape[-1]))
        except _Chosen as choice:
            return (), choice.output
        raise AttributeError("its forward ended without a choice")


class _Chosen(Exception):  # noqa: N818 (control flow, not an error)
    """Stops a block's forward once it has chosen."""

    def __init__(self, output: Output) -> None:
        self.output = output


def _stop(logits: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    raise _Chosen((logits, weights, ids))


def _seen(module: nn.Module, args: tuple[object, ...], output: object, watched: Decided) -> None:
    if not watched.decided:
        raise RuntimeError(f"{type(module).__name__} made no choice that is seen: its forward was changed. Detach")

"""Read the decision in what a router returns, and put another one in its place.

Most routers return (logits, weights, ids) in one order or another, or all but the logits: `Adapter` itself reads them
by their `OutputForm`. The others have a subclass each in `architectures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_route.modules.intercept import Change, ForwardHook
from moe_route.modules.watch import Scored, WatchedForward
from moe_route.routers.output import Decision, Output, OutputForm, as_scores

# Modules of a whole model that run by themselves, by the names that transformers gives them.
_ROLES = frozenset(("encoder", "decoder", "thinker", "talker"))

OutputHook = Callable[[nn.Module, tuple[object, ...], Output], Output | None]
"""Called with a router, its arguments and its output; returns another output, or None to leave it."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a router lives: the form of its output, its dotted name, the module that owns it, and that one's owner."""

    form: OutputForm
    name: str
    module: nn.Module
    block: nn.Module
    above: nn.Module | None


class Adapter:
    """Reads and writes the output of one live router.

    Attributes:
        output_is_complete: the router's output can be read later, without its arguments, so that it may be counted
            after the call (`patching.deferred`).
        changes_choice: the model alters the routing decision after the router (capacity, shared experts), so steered
            choices are counted from the result of `write`.
        may_leave_empty: the steering in force can leave a slot empty (set by the engine).
        idle: nothing is counted, steered or traced here now (set by the engine).
    """

    output_is_complete = True
    changes_choice = False
    may_leave_empty = False
    idle = True

    def __init__(self, place: Place) -> None:
        self.place, self.form = place, place.form
        # attributes of transformers' classes are not known to the type checker
        self.module: Any = place.module
        self.block: Any = place.block

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module of a known class has the form that this adapter reads: versions of a class differ."""
        return True

    @property
    def widens(self) -> bool:
        """Whether the experts can be given more choices a token than the router makes."""
        return type(self).write is Adapter.write and not self.form.fixed_slots

    @property
    def role(self) -> str:
        """Which of the model's several kinds of router this is ("attention", "vision"), "" where there is one."""
        pieces = self.place.name.split(".")
        return "vision" if self.patches else next((piece for piece in pieces if piece in _ROLES), "")

    @property
    def patches(self) -> bool:
        """Whether this is a router of a vision tower: what it is given are patches, no tokens of the call."""
        return any(piece.startswith(("vision", "visual")) for piece in self.place.name.split("."))

    def obstacle(self) -> str | None:
        """Why this router cannot be attached to, with the mend, or None."""
        return None

    def notes(self) -> Iterable[str]:
        """Peculiarities of this one router, besides those of its family."""
        if self.patches:
            yield (
                "routes patches of images, which are no tokens of the call: each has the labels of the token that it "
                "becomes part of; where the ids do not say which, labels that differ within the call leave patches "
                "uncounted and unsteered; they are never traced"
            )

    def known_issues(self) -> Iterable[str]:
        """What the installed transformers does wrong here."""
        return ()

    def changes(self, hook: OutputHook) -> Sequence[Change]:
        """The changes to the model by which `hook` sees, and may replace, every output of the router."""
        if not self.form.captured:
            return (ForwardHook(self.module, hook),)
        self.hook = hook
        return (WatchedForward(self.module, self._scored, self._see_scored),)

    def _see_scored(self, module: nn.Module, args: tuple[object, ...], output: Output, scored: Scored) -> Output | None:
        changed = self.hook(module, args, (*output, scored.logits()))
        return None if changed is None else changed[:-1]

    def _scored(self) -> Scored | None:
        return None if self.idle else Scored(self.form.num_experts)

    def token_subset(self) -> Tensor | None:
        """Rows of the call's tokens that the router was given, int64 [T]; None: all of them, in order."""
        return None

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """The decision that the experts get."""
        logits, weights, ids = output[self.form.logits_at], output[self.form.weights_at], output[self.form.ids_at]
        if self.form.probabilities:
            logits = logits.log()  # a softmax of either is the same
        if self.form.dense:
            weights = weights.gather(1, ids)
        return Decision(logits, weights, ids)

    def chosen(self, args: tuple[object, ...], output: Output, decision: Decision) -> Decision:
        """The choice that the scores alone give, before the model changes it (`changes_choice`)."""
        return decision

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """The output with another choice in it, and the weights and ids that the experts get then.

        `weights` are in the dtype of those of `chosen`, `ids` int32 [T, k]; an empty slot has id -1 and weight 0.
        """
        changed, filled = list(output), self.filled(ids).to(decision.ids.dtype)
        weights_at, ids_at = self.form.weights_at, self.form.ids_at
        changed[weights_at], changed[ids_at] = weights, filled
        if self.form.dense:
            changed[weights_at], changed[ids_at] = as_scores(output[weights_at], weights, filled)
        return tuple(changed), weights, ids

    def filled(self, ids: Tensor) -> Tensor:
        """Ids [T, k] that experts can take: -1 becomes the largest id of its row, or 0."""
        if self.may_leave_empty:
            ids = torch.where(ids < 0, ids.amax(dim=1, keepdim=True).clamp_(min=0), ids)
        return ids

    def probe(self, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
        """Run the router by itself on `hidden`: its arguments, and what it returned, with its logits."""
        args = (hidden, *arguments)
        if not self.form.captured:
            return args, self.module.forward(hidden.clone(), *arguments)
        with Scored(self.form.num_experts) as scored:
            output = self.module.forward(hidden.clone(), *arguments)
        return args, (*output, scored.logits())

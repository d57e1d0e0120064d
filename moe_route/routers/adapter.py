"""Where a decision lies in what a router returns, and how another one is put in its place.

Most routers return (logits, weights, ids), in one order or another, or all but the logits: that is `Adapter` itself
(`Family.returns`). The others have a subclass each in `specials`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_route.modules.watch import Scored, WatchedForward

if TYPE_CHECKING:
    from moe_route.routers.family import Family

# Modules of a whole model that run by themselves, by the names that transformers gives them.
_PARTS = frozenset(("encoder", "decoder", "thinker", "talker"))

Output = tuple[Any, ...]  # what a router returns: tensors, some routers lists of numbers beside them
Hook = Callable[[nn.Module, tuple[object, ...], Output], Output | None]


class Removable(Protocol):
    """What `Adapter.listen` put on the model."""

    def remove(self) -> None:
        """Take it away again."""


class Decision(NamedTuple):
    """One decision: router logits [T, E], weights [T, k] and ids, integer [T, k]; -1 is an empty slot of weight 0."""

    logits: Tensor
    weights: Tensor
    ids: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a router lives: its dotted name, the module that owns it, and the module that owns that."""

    family: Family
    name: str
    module: nn.Module
    block: nn.Module
    above: nn.Module | None


class Adapter:
    """Reads and writes the output of one live router.

    `keeps`: what the router returned can be read later, without its arguments (`deferred`).
    `settles`: what reaches the experts is known only after `write` (a capacity, a normalization with others), so that
    steered choices are counted there.
    `may_leave_empty`: the steering in force can leave a slot empty (set by the engine).
    `idle`: nothing is counted, steered or traced here now (set by the engine).
    """

    keeps = True
    settles = False
    may_leave_empty = False
    idle = True

    def __init__(self, place: Place) -> None:
        self.place = place
        self.family: Family = place.family
        self._set_form(self.family.returns)
        # attributes of transformers' classes are not known to the type checker
        self.module: Any = place.module
        self.block: Any = place.block

    def _set_form(self, returns: tuple[str, ...]) -> None:
        """Logits that the router keeps to itself are put behind what it returns."""
        self._dense = "scores" in returns
        self._of_probabilities = "probabilities" in returns
        self._watches = not self._of_probabilities and "logits" not in returns
        self._logits_at = len(returns) if self._watches else _first(returns, "logits", "probabilities")
        self._weights_at, self._ids_at = _first(returns, "weights", "scores"), returns.index("ids")

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module of a known class has the form that this adapter reads: versions of a class differ."""
        return True

    @property
    def widens(self) -> bool:
        """Whether the experts can be given more choices a token than the router makes."""
        return type(self).write is Adapter.write and not self.family.fixed_slots

    @property
    def part(self) -> str:
        """Which of the model's several kinds of router this is ("attention", "vision"), "" where there is one."""
        pieces = self.place.name.split(".")
        return "vision" if self.patches else next((piece for piece in pieces if piece in _PARTS), "")

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

    def defects(self) -> Iterable[str]:
        """What the installed transformers does wrong here."""
        return ()

    def listen(self, hook: Hook) -> Sequence[Removable]:
        """Let `hook` see, and replace, every output of the router."""
        if not self._watches:
            return (self.module.register_forward_hook(hook),)
        self.hook = hook
        return (WatchedForward(self.module, self._scored, self._see_scored),)

    def _see_scored(self, module: nn.Module, args: tuple[object, ...], output: Output, scored: Scored) -> Output | None:
        changed = self.hook(module, args, (*output, scored.logits()))
        return None if changed is None else changed[:-1]

    def _scored(self) -> Scored | None:
        return None if self.idle else Scored(self.family.num_experts_of(self.module))

    def rows(self) -> Tensor | None:
        """Which tokens of the call the router was given, int64 [T]; None: all of them, in order."""
        return None

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """The decision that the experts get."""
        logits, weights, ids = output[self._logits_at], output[self._weights_at], output[self._ids_at]
        if self._of_probabilities:
            logits = logits.log()  # a softmax of either is the same
        if self._dense:
            weights = weights.gather(1, ids)
        return Decision(logits, weights, ids)

    def chosen(self, args: tuple[object, ...], output: Output, decision: Decision) -> Decision:
        """What the router chose before it settled it: the scores' own choice."""
        return decision

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """The output with another choice in it, and the weights and ids that the experts get then.

        `weights` are in the dtype of those of `chosen`, `ids` int32 [T, k]; an empty slot has id -1 and weight 0.
        """
        changed, filled = list(output), self.filled(ids).to(decision.ids.dtype)
        changed[self._weights_at], changed[self._ids_at] = weights, filled
        if self._dense:
            changed[self._weights_at], changed[self._ids_at] = as_scores(output[self._weights_at], weights, filled)
        return tuple(changed), weights, ids

    def filled(self, ids: Tensor) -> Tensor:
        """Ids [T, k] that experts can take: -1 becomes the largest id of its row, or 0."""
        if self.may_leave_empty:
            ids = torch.where(ids < 0, ids.amax(dim=1, keepdim=True).clamp_(min=0), ids)
        return ids

    def probe(self, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
        """Run the router by itself on `hidden`: its arguments, and what it returned, with its logits."""
        args = (hidden, *arguments)
        if not self._watches:
            return args, self.module.forward(hidden.clone(), *arguments)
        with Scored(self.family.num_experts_of(self.module)) as scored:
            output = self.module.forward(hidden.clone(), *arguments)
        return args, (*output, scored.logits())


def empty_ids(ids: Tensor, empty: Tensor) -> Tensor:
    """`ids` with -1 where `empty`."""
    return torch.where(empty, -1, ids)


def as_scores(own: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [T, k] of `ids` [T, k] as scores like `own` [T, E], and the ids that go with them: every slot takes the
    score of its id, so one of weight 0 names an expert that has none."""
    scores = torch.zeros_like(own).scatter_add(1, ids.long(), weights)
    unused = (scores == 0).to(torch.uint8).argmax(1, keepdim=True)
    return scores, torch.where(weights == 0, unused.to(ids.dtype), ids)


def _first(returns: tuple[str, ...], *names: str) -> int:
    return next(returns.index(name) for name in names if name in returns)

"""Where a decision lies in what a router returns, and how another one is put in its place.

Most routers return (logits, weights, ids): that is `Adapter` itself. The others have a subclass each in `specials`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from moe_route.patching.family import Family

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
    `settles`: what reaches the experts is known only after `write` (a capacity, a normalisation with others), so that
    steered choices are counted there.
    `may_leave_empty`: the steering in force can leave a slot empty (set by the engine).
    """

    keeps = True
    settles = False
    may_leave_empty = False

    def __init__(self, place: Place) -> None:
        self.place = place
        self.family: Family = place.family
        # attributes of transformers' classes are not known to the type checker
        self.module: Any = place.module
        self.block: Any = place.block

    @property
    def part(self) -> str:
        """Which of the model's several kinds of router this is ("attention", "vision"), "" where there is one."""
        return "vision" if self.patches else ""

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
                "routes patches of images, which are no tokens of the call: where its labels differ from sequence to "
                "sequence, patches are neither counted nor steered; they are never traced"
            )

    def defects(self) -> Iterable[str]:
        """What the installed transformers does wrong here."""
        return ()

    def listen(self, hook: Hook) -> Sequence[Removable]:
        """Let `hook` see, and replace, every output of the router."""
        return (self.module.register_forward_hook(hook),)

    def rows(self) -> Tensor | None:
        """Which tokens of the call the router was given, int64 [T]; None: all of them, in order."""
        return None

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """The decision that the experts get."""
        family = self.family
        logits = family.logits_of(output) if family.probabilities else output[family.logits_at]
        return Decision(logits, output[family.weights_at], output[family.ids_at])

    def chosen(self, args: tuple[object, ...], output: Output, decision: Decision) -> Decision:
        """What the router chose before it settled it: the scores' own choice."""
        return decision

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """The output with another choice in it, and the weights and ids that the experts get then.

        `weights` are in the dtype of those of `chosen`, `ids` int32 [T, k]; an empty slot has id -1 and weight 0.
        """
        changed = list(output)
        changed[self.family.weights_at] = weights
        changed[self.family.ids_at] = self.filled(ids).to(decision.ids.dtype)
        return tuple(changed), weights, ids

    def filled(self, ids: Tensor) -> Tensor:
        """Ids [T, k] that experts can take: -1 becomes the largest id of its row, or 0."""
        if self.may_leave_empty:
            ids = torch.where(ids < 0, ids.amax(dim=1, keepdim=True).clamp_(min=0), ids)
        return ids

    def probe(self, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
        """Run the router by itself on `hidden`: its arguments, and what it returned."""
        return (hidden, *arguments), self.module.forward(hidden.clone(), *arguments)


def empty_ids(ids: Tensor, empty: Tensor) -> Tensor:
    """`ids` with -1 where `empty`."""
    return torch.where(empty, -1, ids)

"""Read the routing decision from a router's output, and write another decision into it.

Most routers return (logits, weights, ids), or a part of that, in some order. `Adapter` itself reads those by their
`OutputForm`. Every other form has a subclass in `architectures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moe_route.modules.intercept import Change, ForwardHook
from moe_route.modules.watch import Scored, WatchedForward

Output = tuple[Any, ...]
"""The value that a router returns: tensors, in some models with lists of numbers beside them."""

OutputPart = Literal["logits", "probabilities", "weights", "scores", "ids"]
"""The meaning of one tensor that a router returns.

"logits" [T, E]; "probabilities" [T, E], the softmax of the logits, returned in their place; "weights" [T, k]; "scores"
[T, E], weights that are zero where an expert was not chosen; "ids" [T, k].
"""


class Decision(NamedTuple):
    """Router logits [T, E], weights [T, k] and integer ids [T, k] of T tokens; id -1 is an empty slot of weight 0."""

    logits: Tensor
    weights: Tensor
    ids: Tensor


@dataclass(frozen=True)
class OutputForm:
    """The form in which one router returns its decision.

    Attributes:
        returns: meaning of the tensors, in order. Without logits and probabilities among them, the logits are captured
            while the router scores them and are appended as the last tensor.
        num_experts: E, or None where the router does not hold it.
        top_k: k, or None where the router does not hold it.
        float32_weights: whether the weights are float32 whatever the dtype of the hidden states.
        fixed_slots: whether the experts have room for exactly k choices per token.
    """

    returns: tuple[OutputPart, ...] = ("logits", "weights", "ids")
    num_experts: Any = None
    top_k: Any = None
    float32_weights: bool = False
    fixed_slots: bool = False

    probabilities: bool = field(init=False)  # probabilities stand in the place of the logits
    dense: bool = field(init=False)  # the weights are scores over all experts
    captured: bool = field(init=False)  # the router keeps its logits to itself
    logits_at: int = field(init=False)  # index of the logits or probabilities; captured logits come last
    weights_at: int = field(init=False)  # index of the weights or scores
    ids_at: int = field(init=False)

    def __post_init__(self) -> None:
        # plain attributes, which torch.compile reads in a hook
        probabilities, dense = "probabilities" in self.returns, "scores" in self.returns
        captured = not probabilities and "logits" not in self.returns
        parts = {
            "probabilities": probabilities,
            "dense": dense,
            "captured": captured,
            "logits_at": len(self.returns) if captured else self._first("logits", "probabilities"),
            "weights_at": self._first("weights", "scores"),
            "ids_at": self._first("ids"),
        }
        for name, value in parts.items():
            object.__setattr__(self, name, value)

    def _first(self, *names: OutputPart) -> int:
        return next(self.returns.index(name) for name in names if name in self.returns)


def order_of(output: Any) -> tuple[OutputPart, ...] | None:
    """The meaning of the tensors that a router returned, in order; None where it is ambiguous."""
    if not isinstance(output, tuple) or not all(isinstance(part, Tensor) and part.dim() == 2 for part in output):
        return None
    top_k = [part.shape[1] for part in output if not part.is_floating_point()]
    if len(top_k) != 1 or len({len(part) for part in output}) != 1:
        return None
    if min(part.shape[1] for part in output) < top_k[0]:
        return None
    order = tuple(_part(part, top_k[0], len(output)) for part in output)
    known = ({"weights", "ids"}, {"scores", "ids"}, {"logits", "weights", "ids"}, {"probabilities", "weights", "ids"})
    return order if len(set(order)) == len(order) and set(order) in known else None


def _part(part: Tensor, top_k: int, of: int) -> OutputPart:
    if not part.is_floating_point():
        return "ids"
    if part.shape[1] == top_k:
        return "weights"
    if of == 2:
        return "scores"  # a second tensor beside ids only
    sums = bool((part >= 0).all()) and torch.allclose(part.float().sum(1), torch.ones(len(part), device=part.device))
    return "probabilities" if sums else "logits"


def empty_ids(ids: Tensor, empty: Tensor) -> Tensor:
    """`ids` with -1 wherever `empty` is true."""
    return torch.where(empty, -1, ids)


def as_scores(own: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Convert weights [T, k] of `ids` [T, k] to dense scores like `own` [T, E].

    Returns the scores and the ids that match them. Every slot receives the score of its id, so a slot of weight 0 is
    given an id whose score is zero.
    """
    scores = torch.zeros_like(own).scatter_add(1, ids.long(), weights)
    unused = (scores == 0).to(torch.uint8).argmax(1, keepdim=True)
    return scores, torch.where(weights == 0, unused.to(ids.dtype), ids)


# Parts of a whole model that run by themselves, by the attribute names that transformers gives them.
_ROLES = frozenset(("encoder", "decoder", "thinker", "talker"))

OutputHook = Callable[[nn.Module, tuple[object, ...], Output], Output | None]
"""Called with a router, its arguments and its output; returns a new output, or None to keep the router's own."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The place of a router in its model: output form, dotted name, owning module (`block`), and the owner of that."""

    form: OutputForm
    name: str
    module: nn.Module
    block: nn.Module
    above: nn.Module | None


class Adapter:
    """Reads and writes the output of one live router.

    Attributes:
        output_is_complete: whether the decision can be read from the output alone, without the router's arguments. Then
            it may be counted after the call (`patching.deferred`).
        returns_choice: whether the module that is hooked returns the choice, so that hooks of others may change it.
        changes_choice: the model alters the routing decision after the router (capacity, shared experts), so steered
            choices are counted from the result of `write`.
        may_leave_empty: whether the steering in force can leave a slot empty. Set by the engine.
        added: whether the router was added to the model, so that it is numbered after the model's own.
        idle: whether nothing is counted, steered or traced here now. Set by the engine.
    """

    output_is_complete = True
    returns_choice = True
    changes_choice = False
    may_leave_empty = False
    added = False
    idle = True

    def __init__(self, place: Place) -> None:
        self.place, self.form = place, place.form
        # the type checker does not know the attributes of transformers' classes
        self.module: Any = place.module
        self.block: Any = place.block

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether this adapter can read `module`; versions of one class return their decision in different forms."""
        return True

    @property
    def widens(self) -> bool:
        """Whether the experts accept more choices per token than the router makes."""
        return type(self).write is Adapter.write and not self.form.fixed_slots

    @property
    def role(self) -> str:
        """The kind of router ("attention", "vision", "encoder"), or "" where the model has one kind only."""
        pieces = self.place.name.split(".")
        return "vision" if self.patches else next((piece for piece in pieces if piece in _ROLES), "")

    @property
    def patches(self) -> bool:
        """Whether this router belongs to a vision tower, which is given image patches instead of the call's tokens."""
        return any(piece.startswith(("vision", "visual")) for piece in self.place.name.split("."))

    def obstacle(self) -> str | None:
        """Why this router cannot be attached to and how to fix it, or None."""
        return None

    def notes(self) -> Iterable[str]:
        """Peculiarities of this one router, in addition to those of its family."""
        if self.patches:
            yield (
                "routes patches of images, which are not tokens of the call: each has the labels of the token that it "
                "becomes part of; where the ids do not say which, labels that differ within the call leave patches "
                "uncounted and unsteered; they are never traced"
            )

    def known_issues(self) -> Iterable[str]:
        """Known bugs of the installed transformers that concern this router."""
        return ()

    def changes(self, hook: OutputHook) -> Sequence[Change]:
        """Changes to the model through which `hook` sees, and may replace, every output of the router."""
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
        """Indices of the call's tokens that the router was given, int64 [T]; None: all of them, in order."""
        return None

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """The decision that the experts receive."""
        logits, weights, ids = output[self.form.logits_at], output[self.form.weights_at], output[self.form.ids_at]
        if self.form.probabilities:
            logits = logits.log()  # the softmax of logits and the softmax of log-probabilities are equal
        if self.form.dense:
            weights = weights.gather(1, ids)
        return Decision(logits, weights, ids)

    def parts(self) -> Callable[[Output], tuple[Tensor, ...]]:
        """What `read` does with an output alone; for one that holds the decision as it is, a tenth of the time."""
        form = self.form
        if type(self).read is not Adapter.read or form.probabilities or form.dense:
            return partial(self.read, ())
        return itemgetter(form.logits_at, form.weights_at, form.ids_at)

    def chosen(self, args: tuple[object, ...], output: Output, decision: Decision) -> Decision:
        """The choice that follows from the scores alone, before the model alters it (`changes_choice`)."""
        return decision

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """Put another choice into the output.

        Args:
            args: the router's arguments.
            output: the router's own output.
            decision: the decision read from that output.
            weights: new weights [T, k] in the dtype of those of `chosen`; 0 in an empty slot.
            ids: new ids, int32 [T, k]; -1 in an empty slot.

        Returns:
            The new output, and the weights and ids that the experts receive with it.
        """
        changed, filled = list(output), self.filled(ids).to(decision.ids.dtype)
        weights_at, ids_at = self.form.weights_at, self.form.ids_at
        changed[weights_at], changed[ids_at] = weights, filled
        if self.form.dense:
            changed[weights_at], changed[ids_at] = as_scores(output[weights_at], weights, filled)
        return tuple(changed), weights, ids

    def filled(self, ids: Tensor) -> Tensor:
        """Replace -1 in ids [T, k] by the largest id of the row, or 0, because experts cannot take -1."""
        if self.may_leave_empty:
            ids = torch.where(ids < 0, ids.amax(dim=1, keepdim=True).clamp_(min=0), ids)
        return ids

    def probe(self, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
        """Run the router alone on `hidden`. Returns its arguments and its output, logits included."""
        args = (hidden, *arguments)
        if not self.form.captured:
            return args, self.module.forward(hidden.clone(), *arguments)
        with Scored(self.form.num_experts) as scored:
            output = self.module.forward(hidden.clone(), *arguments)
        return args, (*output, scored.logits())

"""Forms of router output: the decision per token, and the tensors in which a router returns it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

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
        found = {
            "probabilities": probabilities,
            "dense": dense,
            "captured": captured,
            "logits_at": len(self.returns) if captured else self._first("logits", "probabilities"),
            "weights_at": self._first("weights", "scores"),
            "ids_at": self._first("ids"),
        }
        for name, value in found.items():
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
    found = tuple(_part(part, top_k[0], len(output)) for part in output)
    known = ({"weights", "ids"}, {"scores", "ids"}, {"logits", "weights", "ids"}, {"probabilities", "weights", "ids"})
    return found if len(set(found)) == len(found) and set(found) in known else None


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

"""How a model routes, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

__all__ = ["RouterSpec"]

Score = Literal["softmax", "sigmoid", "sqrt_softplus", "identity", "sparsemixer"]
Order = Literal["score_then_topk", "topk_then_score"]
GroupScore = Literal["max", "top2_sum"]
Renormalize = Literal["none", "sum", "clamp", "norm"]

# A name's place in its Literal is its code in csrc/include/moe_route/gate.h.
SCORES: tuple[str, ...] = get_args(Score)
ORDERS: tuple[str, ...] = get_args(Order)
GROUP_SCORES: tuple[str, ...] = get_args(GroupScore)
RENORMALIZATIONS: tuple[str, ...] = get_args(Renormalize)
_MAX_GROUPS = (1 << 16) - 1  # bits of the policy


# eps, norm_p, scale, jitter: the defaults of the operators' schemas. group_fill matters with more than one group only.
_USUAL = (0.0, 1.0, 1.0, 0.0)


class _Packed:
    """Room for what the operators take, packed once."""

    __slots__ = ("numbers", "policy", "unusual")
    policy: int
    """The names and group sizes as bits; see ``unpack_spec`` in csrc/torch/operators.cpp."""
    numbers: tuple[float, ...]
    """(group_fill, eps, norm_p, scale, jitter)."""
    unusual: tuple[float, ...]
    """The same, or empty where all have the defaults: an argument left out costs nothing."""


@dataclass(frozen=True, slots=True)
class RouterSpec(_Packed):
    """The routing function of a model; data only. Tensors that belong to the model are passed at each call.

    Args:
        score: function from router logits [E] to scores [E]. ``softmax``; ``sigmoid`` (DeepSeek-V3, arXiv 2412.19437
            eq. 15); ``sqrt_softplus``; ``identity``; ``sparsemixer`` (arXiv 2310.00811; at most two experts).
        order: ``score_then_topk`` selects on the scores, ``topk_then_score`` selects on the logits and scores
            the chosen.
        groups: expert groups of equal size; ``top_groups`` of them stay eligible (DeepSeek-V2, arXiv 2405.04434).
        top_groups: groups that stay eligible, 1..groups.
        group_score: value of a group: its ``max`` or the sum of its two best, ``top2_sum``.
        group_fill: what the selection value of an excluded group becomes (``-inf``, or 0 in some models: then its
            experts are still selectable).
        renormalize: weights w become w (``none``), w / (sum + eps) (``sum``), w / max(sum, eps) (``clamp``) or
            w / (sum |w|^p)^(1/p) with p = ``norm_p`` (``norm``).
        eps: see ``renormalize``.
        norm_p: see ``renormalize``, > 0.
        scale: factor on the weights after renormalization (routed scaling factor).
        jitter: SparseMixer's jitter epsilon; the masking threshold is 2 * jitter.
        weight_dtype: dtype that the model casts its weights to; None: that of the logits. Operators return float32.

    Raises:
        ValueError: a name that is not one of those above, or a number out of its range.
    """

    score: Score = "softmax"
    order: Order = "score_then_topk"
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "top2_sum"
    group_fill: float = float("-inf")
    renormalize: Renormalize = "none"
    eps: float = 0.0
    norm_p: float = 1.0
    scale: float = 1.0
    jitter: float = 0.0
    weight_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        policy = (
            _code("score", self.score, SCORES)
            | _code("order", self.order, ORDERS) << 4
            | _code("group_score", self.group_score, GROUP_SCORES) << 5
            | _code("renormalize", self.renormalize, RENORMALIZATIONS) << 6
        )
        if not 1 <= self.groups <= _MAX_GROUPS:
            raise ValueError(f"RouterSpec.groups = {self.groups} is outside 1..{_MAX_GROUPS}")
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"RouterSpec.top_groups = {self.top_groups} is outside 1..{self.groups} (groups)")
        if not self.norm_p > 0:
            raise ValueError(f"RouterSpec.norm_p = {self.norm_p} must be positive")
        if not self.eps >= 0:
            raise ValueError(f"RouterSpec.eps = {self.eps} must not be negative")
        policy |= int(self.groups) << 16 | int(self.top_groups) << 32
        numbers = tuple(map(float, (self.group_fill, self.eps, self.norm_p, self.scale, self.jitter)))
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "unusual", () if self.groups == 1 and numbers[1:] == _USUAL else numbers)

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are made anew, with their packed arguments
        return (RouterSpec, tuple(getattr(self, field.name) for field in fields(self)))

    @staticmethod
    def from_packed(
        policy: int, group_fill: float, eps: float, norm_p: float, scale: float, jitter: float
    ) -> RouterSpec:
        """The spec with this ``policy`` and ``numbers`` (but for ``weight_dtype``, which operators do not take)."""
        return RouterSpec(
            score=SCORES[policy & 15],  # type: ignore[arg-type]
            order=ORDERS[policy >> 4 & 1],  # type: ignore[arg-type]
            groups=policy >> 16 & 0xFFFF,
            top_groups=policy >> 32 & 0xFFFF,
            group_score=GROUP_SCORES[policy >> 5 & 1],  # type: ignore[arg-type]
            group_fill=group_fill,
            renormalize=RENORMALIZATIONS[policy >> 6 & 7],  # type: ignore[arg-type]
            eps=eps,
            norm_p=norm_p,
            scale=scale,
            jitter=jitter,
        )


def _code(name: str, value: str, names: tuple[str, ...]) -> int:
    if value not in names:
        raise ValueError(f"RouterSpec.{name} = {value!r} is not one of {', '.join(names)}")
    return names.index(value)

"""The routing function of a model, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

Score = Literal["softmax", "sigmoid", "sqrt_softplus", "identity", "sparsemixer"]
Order = Literal["score_then_topk", "topk_then_score"]
GroupScore = Literal["max", "top2_sum"]
Renormalize = Literal["none", "sum", "clamp", "norm"]
# What a choice that comes with a call of `route` is for; the code of a name is its position and 1, 0 is no choice.
ChoiceMode = Literal["natural", "replay", "baseline"]

# The position of a name in its Literal is its code in csrc/include/moe_route/gate.h.
SCORES: tuple[str, ...] = get_args(Score)
ORDERS: tuple[str, ...] = get_args(Order)
GROUP_SCORES: tuple[str, ...] = get_args(GroupScore)
RENORMALIZATIONS: tuple[str, ...] = get_args(Renormalize)
_MAX_GROUPS = (1 << 16) - 1  # 16 bits of the packed policy


# The numbers of a spec in the order of the operators' schemas, and the defaults there of all but the first, which
# matters only with several groups.
NUMBERS = ("group_fill", "eps", "norm_p", "scale", "jitter", "softcap")
_USUAL = (0.0, 1.0, 1.0, 0.0, 0.0)


class _Packed:
    """Holds the operators' arguments, which are packed once."""

    __slots__ = ("numbers", "policy", "unusual")
    policy: int
    """Names and group sizes as bits; see ``unpack_spec`` in csrc/torch/operators.cpp."""
    numbers: tuple[float, ...]
    """The values of ``NUMBERS``."""
    unusual: tuple[float, ...]
    """``numbers``, or empty if all are defaults, because an omitted argument costs nothing."""


@dataclass(frozen=True, slots=True)
class RouterSpec(_Packed):
    """The routing function of a model, as data. Tensors that belong to the model are passed at each call.

    Where Hugging Face configurations have another name for a field, it is given in parentheses.

    Args:
        score: function from router logits [E] to scores [E] (`scoring_func`). ``softmax``; ``sigmoid`` (DeepSeek-V3,
            arXiv 2412.19437 eq. 15); ``sqrt_softplus``; ``identity``; ``sparsemixer`` (arXiv 2310.00811; at most two
            experts).
        order: ``score_then_topk`` selects by score. ``topk_then_score`` selects by logit and scores the chosen only.
        groups: number of expert groups of equal size (`n_group`). Only the best ``top_groups`` of them stay eligible
            (DeepSeek-V2, arXiv 2405.04434).
        top_groups: number of groups that stay eligible, 1..groups (`topk_group`).
        group_score: value of a group: its largest score (``max``), or the sum of its two largest (``top2_sum``).
        group_fill: selection value of experts in excluded groups. ``-inf``, or 0 in some models, where such experts can
            still be selected.
        renormalize: weights w become w (``none``), w / (sum + eps) (``sum``), w / max(sum, eps) (``clamp``) or
            w / (sum |w|^p)^(1/p) with p = ``norm_p`` (``norm``). Models switch it with `norm_topk_prob`.
        eps: see ``renormalize``.
        norm_p: see ``renormalize``, > 0.
        scale: factor on the weights after renormalization (`routed_scaling_factor`).
        jitter: SparseMixer's jitter epsilon (`router_jitter_noise`); the masking threshold is 2 * jitter.
        softcap: a logit z becomes softcap * tanh(z / softcap), in float32, before steering, scores and the choice
            without steering see it (`moe_router_logit_softcapping`); 0: no cap. Infinities become the cap.
        weight_dtype: dtype to which the model casts its weights; None: dtype of the logits. Operators return float32.

    The correction bias of a router (`e_score_correction_bias`) is a tensor, so it is an argument of ``route``.

    Raises:
        ValueError: an unknown name, or a number outside its range.
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
    softcap: float = 0.0
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
        if not 0 <= self.softcap < float("inf"):
            raise ValueError(f"RouterSpec.softcap = {self.softcap} must be a finite number, not negative (0: no cap)")
        policy |= int(self.groups) << 16 | int(self.top_groups) << 32
        numbers = tuple(float(getattr(self, name)) for name in NUMBERS)
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "unusual", () if self.groups == 1 and numbers[1:] == _USUAL else numbers)

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are rebuilt, with their packed arguments
        return (RouterSpec, tuple(getattr(self, field.name) for field in fields(self)))

    @staticmethod
    def from_packed(policy: int, *numbers: float) -> RouterSpec:
        """Rebuild a spec from its ``policy`` and ``numbers``; operators do not take ``weight_dtype``, so it is lost."""
        values: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))
        return RouterSpec(
            score=SCORES[policy & 15],  # type: ignore[arg-type]
            order=ORDERS[policy >> 4 & 1],  # type: ignore[arg-type]
            groups=policy >> 16 & 0xFFFF,
            top_groups=policy >> 32 & 0xFFFF,
            group_score=GROUP_SCORES[policy >> 5 & 1],  # type: ignore[arg-type]
            renormalize=RENORMALIZATIONS[policy >> 6 & 7],  # type: ignore[arg-type]
            **values,
        )


def _code(name: str, value: str, names: tuple[str, ...]) -> int:
    if value not in names:
        raise ValueError(f"RouterSpec.{name} = {value!r} is not one of {', '.join(names)}")
    return names.index(value)

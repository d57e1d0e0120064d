"""DBRX: the router returns logits only; the block chooses, in `route_tokens_to_experts`."""

from __future__ import annotations

from torch import nn

from moe_route.ops import RouterSpec
from moe_route.patching.family import Family
from moe_route.patching.specials.by_block import ByMethod


def _norm(block: nn.Module, spec: RouterSpec) -> RouterSpec:
    p = block.moe_normalize_expert_weights
    if p is None:
        return spec
    return RouterSpec(score="softmax", renormalise="norm", norm_p=float(p))  # type: ignore[arg-type]


FAMILY = Family(
    "softmax, chosen by the block",
    ("DbrxFFN",),
    RouterSpec(score="softmax"),
    adjust=_norm,
    num_experts="experts.num_experts",
    low_precision=True,
    unfused="the block chooses, not the router",
    adapter=ByMethod,
)

"""DBRX: the router returns logits only, and the block chooses in its method `route_tokens_to_experts`."""

from __future__ import annotations

from torch import nn

from moe_route.contract.spec import RouterSpec
from moe_route.routers.architectures.routing_blocks import ByMethod
from moe_route.routers.family import Family


def _norm(block: nn.Module, spec: RouterSpec) -> RouterSpec:
    p = block.moe_normalize_expert_weights
    if p is None:
        return spec
    return RouterSpec(score="softmax", renormalize="norm", norm_p=float(p))  # type: ignore[arg-type]


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

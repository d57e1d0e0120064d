"""Routers whose output has a form of its own: each has its table row and its adapter. All others are in `catalog`."""

from moe_route.routers.architectures import doge, ernie, gpt_oss, jetmoe, nllb, small, switch
from moe_route.routers.family import Family

ARCHITECTURES: tuple[Family, ...] = (
    small.LLAMA4,
    jetmoe.FAMILY,
    small.DBRX,
    switch.FAMILY,
    nllb.FAMILY,
    small.DEEPSEEK_V4,
    small.INKLING,
    small.ZAYA,
    doge.FAMILY,
    ernie.FAMILY,
    gpt_oss.FAMILY,
    small.ADAPTER_ROUTER,
)

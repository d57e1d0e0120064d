"""Routers whose output has a form of its own: one file per model family, with its table row and its adapter."""

from moe_route.routers.architectures import (
    adapter_router,
    dbrx,
    deepseek_v4,
    doge,
    ernie,
    gpt_oss,
    inkling,
    jetmoe,
    llama4,
    nllb,
    switch,
    zaya,
)
from moe_route.routers.family import Family

ARCHITECTURES: tuple[Family, ...] = (
    llama4.FAMILY,
    jetmoe.FAMILY,
    dbrx.FAMILY,
    switch.FAMILY,
    nllb.FAMILY,
    deepseek_v4.FAMILY,
    inkling.FAMILY,
    zaya.FAMILY,
    doge.FAMILY,
    ernie.FAMILY,
    gpt_oss.FAMILY,
    adapter_router.FAMILY,
)

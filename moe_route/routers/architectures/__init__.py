"""Routers that return their decision in a form of their own: a row of the table and an adapter in one file each."""

from moe_route.routers.architectures import dbrx, deepseek_v4, doge, inkling, jetmoe, llama4, nllb, switch, zaya
from moe_route.routers.family import Family

SPECIAL_FAMILIES: tuple[Family, ...] = (
    llama4.FAMILY,
    jetmoe.FAMILY,
    dbrx.FAMILY,
    switch.FAMILY,
    nllb.FAMILY,
    deepseek_v4.FAMILY,
    inkling.FAMILY,
    zaya.FAMILY,
    doge.FAMILY,
)

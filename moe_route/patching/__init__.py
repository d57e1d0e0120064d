"""Hands on a live model: router families, sites, engines, token context, and the attachment that joins them."""

from moe_route.patching.attachment import AlreadyAttached, Attachment, attachment_of
from moe_route.patching.families import FAMILIES, REFUSED, family_of
from moe_route.patching.family import Family, Gate
from moe_route.patching.sites import ModelNotSupported, RouterSite, find_sites
from moe_route.patching.tokens import Call, Labels

__all__ = [
    "FAMILIES",
    "REFUSED",
    "AlreadyAttached",
    "Attachment",
    "Call",
    "Family",
    "Gate",
    "Labels",
    "ModelNotSupported",
    "RouterSite",
    "attachment_of",
    "family_of",
    "find_sites",
]

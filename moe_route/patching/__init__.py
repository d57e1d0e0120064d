"""Hands on a live model: router families, routers, engines, token context, and the attachment that joins them."""

from moe_route.calls.call import Call
from moe_route.calls.token_table import Labels
from moe_route.patching.attachment import AlreadyAttachedError, Attachment, attachment_of
from moe_route.routers.catalog import FAMILIES, REFUSED, family_of
from moe_route.routers.discovery import ModelNotSupportedError, RouterInfo, find_routers
from moe_route.routers.family import Family, Gate

__all__ = [
    "FAMILIES",
    "REFUSED",
    "AlreadyAttachedError",
    "Attachment",
    "Call",
    "Family",
    "Gate",
    "Labels",
    "ModelNotSupportedError",
    "RouterInfo",
    "attachment_of",
    "family_of",
    "find_routers",
]

"""Routers: which classes exist, how each one decides, and where they are in a model.

Modules are read here, never changed, except through `Adapter.install`.
"""

from moe_route.routers.catalog import FAMILIES, REFUSED, family_of
from moe_route.routers.discovery import ModelNotSupportedError, RouterInfo, find_routers
from moe_route.routers.family import Family, Gate

__all__ = [
    "FAMILIES",
    "REFUSED",
    "Family",
    "Gate",
    "ModelNotSupportedError",
    "RouterInfo",
    "family_of",
    "find_routers",
]

"""Routers of a model: which classes are known, how each one decides, and where they sit.

This package only reads modules. The one way it changes a model is `Adapter.changes`, which an engine installs.
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

"""moe-route: fast expert routing for Mixture-of-Experts models, recorded, analyzed and steered.

    import moe_route as mr
    routed = mr.attach(model)

Importing needs torch, numpy, safetensors and tqdm; the rest loads where it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (loads the libraries that _C is linked with)

from moe_route import ops
from moe_route._C import __version__

if TYPE_CHECKING:
    from moe_route import analysis, data, diagnosis, files, nn, patching, plots, recording, reference, steering
    from moe_route.description import describe
    from moe_route.diagnosis import doctor
    from moe_route.experts.interface import register_experts
    from moe_route.recording import Recorder, RoutingStatistics
    from moe_route.routed import RoutedModel, attach
    from moe_route.routers import ModelNotSupportedError, find_routers
    from moe_route.steering import ExpertSelection, Plan

_MODULES = (
    "analysis",
    "data",
    "diagnosis",
    "files",
    "nn",
    "patching",
    "plots",
    "recording",
    "reference",
    "routed",
    "steering",
)
_HOMES = {
    "ExpertSelection": "steering",
    "ModelNotSupportedError": "patching",
    "Plan": "steering",
    "Recorder": "recording",
    "RoutedModel": "routed",
    "RoutingStatistics": "recording",
    "attach": "routed",
    "describe": "routed",
    "doctor": "diagnosis",
    "find_routers": "patching",
    "register_experts": "patching.experts",
}

__all__ = [
    "ExpertSelection",
    "ModelNotSupportedError",
    "Plan",
    "Recorder",
    "RoutedModel",
    "RoutingStatistics",
    "__version__",
    "analysis",
    "attach",
    "data",
    "describe",
    "diagnosis",
    "doctor",
    "files",
    "find_routers",
    "nn",
    "ops",
    "patching",
    "plots",
    "recording",
    "reference",
    "register_experts",
    "steering",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"moe_route.{name}")
    if name in _HOMES:
        value = getattr(import_module(f"moe_route.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'moe_route' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""moe-route: fast expert routing for Mixture-of-Experts models, recorded, analyzed and steered.

    import moe_route as mr
    routed = mr.attach(model)

Importing this package loads nothing else: each name loads its module, and torch with it, on first use. The first use of
``moe_route.ops`` registers the operators ``torch.ops.moe_route.*``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moe_route import (
        analysis,
        calls,
        contract,
        convert,
        data,
        diagnosis,
        evaluation,
        experiments,
        experts,
        files,
        merging,
        nn,
        ops,
        patching,
        plots,
        recipes,
        recording,
        reference,
        report,
        routers,
        steering,
        training,
    )
    from moe_route.description import describe
    from moe_route.diagnosis import doctor
    from moe_route.experts import register_experts
    from moe_route.integrations import vllm
    from moe_route.recipes import recipe
    from moe_route.recording import Recorder, RoutingStatistics
    from moe_route.routed import RoutedModel, attach
    from moe_route.routers import ModelNotSupportedError, find_routers
    from moe_route.steering import ExpertSelection, Plan
    from moe_route.steering.layers import layers

_MODULES = (
    "analysis",
    "calls",
    "contract",
    "convert",
    "data",
    "diagnosis",
    "evaluation",
    "experiments",
    "experts",
    "files",
    "merging",
    "nn",
    "ops",
    "patching",
    "plots",
    "recipes",
    "recording",
    "reference",
    "report",
    "routed",
    "routers",
    "steering",
    "training",
)
_HOMES = {
    "ExpertSelection": "steering",
    "ModelNotSupportedError": "routers",
    "Plan": "steering",
    "Recorder": "recording",
    "RoutedModel": "routed",
    "RoutingStatistics": "recording",
    "attach": "routed",
    "describe": "description",
    "doctor": "diagnosis",
    "find_routers": "routers",
    "layers": "steering.layers",
    "recipe": "recipes",
    "register_experts": "experts",
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
    "calls",
    "contract",
    "convert",
    "data",
    "describe",
    "diagnosis",
    "doctor",
    "evaluation",
    "experiments",
    "experts",
    "files",
    "find_routers",
    "layers",
    "merging",
    "nn",
    "ops",
    "patching",
    "plots",
    "recipe",
    "recipes",
    "recording",
    "reference",
    "register_experts",
    "report",
    "routers",
    "steering",
    "training",
    "vllm",
]


def __getattr__(name: str) -> Any:
    if name == "_C":
        import torch  # noqa: F401  (loads the libraries that _C is linked with)

        return import_module("moe_route._C")
    if name == "vllm":  # beside the others, though it lies in `integrations`
        return import_module("moe_route.integrations.vllm")
    if name in _MODULES:
        return import_module(f"moe_route.{name}")
    if name in _HOMES:
        value = getattr(import_module(f"moe_route.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'moe_route' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

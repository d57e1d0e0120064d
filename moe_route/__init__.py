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
    from moe_route import analysis, convert, data, evaluation, experiments, merging, nn, ops, plots, report, training
    from moe_route.analysis.recipes import recipe
    from moe_route.data.batches import texts_of
    from moe_route.description import describe, doctor
    from moe_route.integrations import vllm
    from moe_route.recording import RoutingStatistics, Trace
    from moe_route.routed import RoutedModel, attach
    from moe_route.runs.language_model import LanguageModel
    from moe_route.runs.record import record_texts
    from moe_route.steering import ExpertSelection, Plan
    from moe_route.steering.layers import layers

__all__ = [
    "ExpertSelection",
    "LanguageModel",
    "Plan",
    "RoutedModel",
    "RoutingStatistics",
    "Trace",
    "__version__",
    "analysis",
    "attach",
    "convert",
    "data",
    "describe",
    "doctor",
    "evaluation",
    "experiments",
    "layers",
    "merging",
    "nn",
    "ops",
    "plots",
    "recipe",
    "record_texts",
    "report",
    "texts_of",
    "training",
    "vllm",
]
# The modules of those names that are no modules of the same name.
_HOMES = {
    "ExpertSelection": "steering",
    "LanguageModel": "runs.language_model",
    "Plan": "steering",
    "RoutedModel": "routed",
    "RoutingStatistics": "recording",
    "Trace": "recording",
    "attach": "routed",
    "describe": "description",
    "doctor": "description",
    "layers": "steering.layers",
    "recipe": "analysis.recipes",
    "record_texts": "runs.record",
    "texts_of": "data.batches",
}


def __getattr__(name: str) -> Any:
    if name == "_C":  # torch loads the libraries that it is linked with
        return import_module("moe_route.ops.library").required()
    if name not in __all__:
        raise AttributeError(f"module 'moe_route' has no attribute {name!r}")
    if name == "vllm":  # beside the others, though it lies in `integrations`
        value: Any = import_module("moe_route.integrations.vllm")
    elif name in _HOMES:
        value = getattr(import_module(f"moe_route.{_HOMES[name]}"), name)
    else:
        value = import_module(f"moe_route.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

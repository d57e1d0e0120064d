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

if TYPE_CHECKING:  # for type checkers; `_HOMES` is what runs
    from moe_route import analysis as analysis
    from moe_route import convert as convert
    from moe_route import data as data
    from moe_route import evaluation as evaluation
    from moe_route import experiments as experiments
    from moe_route import merging as merging
    from moe_route import nn as nn
    from moe_route import ops as ops
    from moe_route import plots as plots
    from moe_route import report as report
    from moe_route import training as training
    from moe_route.analysis.recipes import recipe as recipe
    from moe_route.data.batches import texts_of as texts_of
    from moe_route.description import describe as describe
    from moe_route.description import doctor as doctor
    from moe_route.integrations import vllm as vllm
    from moe_route.recording import RoutingStatistics as RoutingStatistics
    from moe_route.recording import Trace as Trace
    from moe_route.routed import RoutedModel as RoutedModel
    from moe_route.routed import attach as attach
    from moe_route.runs.language_model import LanguageModel as LanguageModel
    from moe_route.runs.record import record_texts as record_texts
    from moe_route.steering import ExpertSelection as ExpertSelection
    from moe_route.steering import Plan as Plan
    from moe_route.steering.layers import layers as layers

# Where each public name lives: a module for a class or a function, "" for a module of the same name.
_HOMES = {
    "ExpertSelection": "steering",
    "LanguageModel": "runs.language_model",
    "Plan": "steering",
    "RoutedModel": "routed",
    "RoutingStatistics": "recording",
    "Trace": "recording",
    "analysis": "",
    "attach": "routed",
    "convert": "",
    "data": "",
    "describe": "description",
    "doctor": "description",
    "evaluation": "",
    "experiments": "",
    "layers": "steering.layers",
    "merging": "",
    "nn": "",
    "ops": "",
    "plots": "",
    "recipe": "analysis.recipes",
    "record_texts": "runs.record",
    "report": "",
    "texts_of": "data.batches",
    "training": "",
    "vllm": "integrations",  # a module, beside the others although it lies in `integrations`
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "_C":
        import torch  # noqa: F401  (loads the libraries that _C is linked with)

        return import_module("moe_route._C")
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_route' has no attribute {name!r}")
    home = f"moe_route.{_HOMES[name]}".rstrip(".")
    if _HOMES[name] in ("", "integrations"):
        value = import_module(f"{home}.{name}")
    else:
        value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

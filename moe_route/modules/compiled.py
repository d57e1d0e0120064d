"""Graphs that torch.compile made of a model before it was attached to."""

from __future__ import annotations

import logging
import sys

import torch
from torch import nn

logger = logging.getLogger(__name__)


def forget_graphs(model: nn.Module) -> None:
    """Where `model` or a part of it was compiled in place, forget every graph of the process: none of them guards on
    hooks, so that those of `model` would go round the routers. They are made anew when they are needed next.

    A graph that only another object holds (`compiled = torch.compile(model)`) is not seen from here.
    """
    if "torch._dynamo" in sys.modules and any(_compiled(module) for module in model.modules()):
        logger.info("%s was compiled before it was attached to: its graphs are made anew", type(model).__name__)
        torch.compiler.reset()


def _compiled(module: nn.Module) -> bool:
    own = vars(module)
    if type(module).__name__ == "OptimizedModule" or own.get("_compiled_call_impl") is not None:
        return True
    called = (own.get("forward"), own.get("_compiled_call"))  # the second is what `generate` keeps
    return any(hasattr(function, "_torchdynamo_orig_callable") for function in called)

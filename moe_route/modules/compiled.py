"""Drop the graphs that torch.compile made of a model before `attach`."""

from __future__ import annotations

import logging
import sys

import torch
from torch import nn

logger = logging.getLogger(__name__)


def drop_graphs(model: nn.Module) -> None:
    """Drop every compiled graph of the process where `model` or a part of it was compiled in place.

    Dynamo does not guard on hooks, so graphs compiled earlier would bypass ours. They are compiled again at the next
    call. A graph that only another object holds (`compiled = torch.compile(model)`) cannot be found from here.
    """
    if "torch._dynamo" in sys.modules and any(_compiled(module) for module in model.modules()):
        logger.info("%s was compiled before it was attached to: its graphs are made anew", type(model).__name__)
        torch.compiler.reset()


def _compiled(module: nn.Module) -> bool:
    own = vars(module)
    if type(module).__name__ == "OptimizedModule" or own.get("_compiled_call_impl") is not None:
        return True
    called = (own.get("forward"), own.get("_compiled_call"))  # `generate` stores its compiled forward in the second
    return any(hasattr(function, "_torchdynamo_orig_callable") for function in called)

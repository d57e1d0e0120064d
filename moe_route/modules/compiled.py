"""Drop the graphs that torch.compile made before hooks of a model changed."""

from __future__ import annotations

import logging
import sys

import torch
from torch import nn

logger = logging.getLogger(__name__)

_graphs_known = 0  # how many Dynamo had made when they were last dropped


def drop_graphs(model: nn.Module) -> None:
    """Drop every compiled graph of the process, if any was made since this was last called.

    Dynamo does not guard on hooks: a graph that it made of this model, or of another one of the same class, would be
    taken for the model and bypass its hooks. All are compiled again at the next call.
    """
    global _graphs_known
    graphs = _graphs_made()
    if graphs != _graphs_known:
        logger.info("graphs were made before hooks of %s changed: they are dropped", type(model).__name__)
        torch.compiler.reset()
    _graphs_known = graphs


def _graphs_made() -> int:
    """How many graphs Dynamo has made in this process."""
    dynamo = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else int(dynamo.utils.counters["stats"]["unique_graphs"])

"""Experiments: run a model on texts under interventions, and measure what they change.

Every experiment takes a ``LanguageModel`` and texts, attaches for its duration (or uses a model that is attached
already), and returns a result with intervals. Its arithmetic is in ``moe_route.analysis``.
"""

from moe_route.experiments.export import CannotExportError, export_pruned
from moe_route.experiments.pruning import PruningCurve, pruning_curve
from moe_route.experiments.weights import router_weights

__all__ = [
    "CannotExportError",
    "PruningCurve",
    "export_pruned",
    "pruning_curve",
    "router_weights",
]

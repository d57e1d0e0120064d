"""Experiments: run a model on texts under interventions, and measure what they change.

Every experiment takes a ``LanguageModel`` and texts, attaches for its duration (or uses a model that is attached
already), and returns a result with intervals. Its arithmetic is in ``moe_route.analysis``.
"""

from moe_route.experiments.expert_patching import ExpertPatching, PromptPair, patch_experts
from moe_route.experiments.knockout import Knockout, knockout
from moe_route.experiments.neighbors import NeighborScores, neighbor_scores
from moe_route.experiments.positive_control import PositiveControl, positive_control
from moe_route.experiments.pruning import CannotExportError, PruningCurve, export_pruned, pruning_curve
from moe_route.experiments.regret import Regret, regret
from moe_route.experiments.routing import LearnedDirections, learn_directions, learn_routing, router_weights
from moe_route.experiments.strength_sweep import StrengthSweep, strength_sweep
from moe_route.experiments.transplant import Transplant, record_trace, transplant

__all__ = [
    "CannotExportError",
    "ExpertPatching",
    "Knockout",
    "LearnedDirections",
    "NeighborScores",
    "PositiveControl",
    "PromptPair",
    "PruningCurve",
    "Regret",
    "StrengthSweep",
    "Transplant",
    "export_pruned",
    "knockout",
    "learn_directions",
    "learn_routing",
    "neighbor_scores",
    "patch_experts",
    "positive_control",
    "pruning_curve",
    "record_trace",
    "regret",
    "router_weights",
    "strength_sweep",
    "transplant",
]

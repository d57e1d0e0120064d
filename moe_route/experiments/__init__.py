"""Experiments: run a model on texts under interventions, and measure what they change.

Every experiment takes a ``LanguageModel`` and texts, attaches for its duration (or uses a model that is attached
already), and returns a result with intervals. Its arithmetic is in ``moe_route.analysis``.
"""

from moe_route.experiments.learn import learn_routing
from moe_route.experiments.neighbors import NeighborScores, neighbor_scores
from moe_route.experiments.sweep import StrengthSweep, strength_sweep

__all__ = [
    "NeighborScores",
    "StrengthSweep",
    "learn_routing",
    "neighbor_scores",
    "strength_sweep",
]

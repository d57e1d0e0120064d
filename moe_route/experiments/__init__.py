"""Experiments: run a model on texts under interventions, and measure what they change.

Every experiment takes a ``LanguageModel`` and texts, attaches for its duration (or uses a model that is attached
already), and returns a result with intervals. Its arithmetic is in ``moe_route.analysis``.
"""

from moe_route.experiments.expert_patching import ExpertPatching, PromptPair, patch_experts
from moe_route.experiments.knockout import Knockout, knockout
from moe_route.experiments.regret import Regret, regret
from moe_route.experiments.transplant import Transplant, record_trace, transplant

__all__ = [
    "ExpertPatching",
    "Knockout",
    "PromptPair",
    "Regret",
    "Transplant",
    "knockout",
    "patch_experts",
    "record_trace",
    "regret",
    "transplant",
]

"""Analysis: compute divergence, entropy, correlations and experts from recorded routing.

It works in numpy float64, without a model and without torch. Every function takes ``RoutingStatistics`` (or an object
with the same accessors), or arrays where these suffice.
"""

from moe_route.analysis.correlation import Correlation, correlation
from moe_route.analysis.divergence import (
    MEASURES,
    Divergence,
    DivergenceMatrix,
    UShape,
    divergence,
    divergence_matrix,
    middle_layers,
    u_shape,
)
from moe_route.analysis.entropy import Entropy, consistency, entropy
from moe_route.analysis.experts import (
    LanguageExperts,
    RiskExperts,
    entropy_experts,
    esft_experts,
    expert_difference,
    frequency_share_experts,
    multilingual_experts,
    risk_experts,
    task_experts,
)
from moe_route.analysis.geometry import Geometry, geometry
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.measures import entropy_of, jensen_shannon, normalized_jensen_shannon
from moe_route.analysis.paired import Difference, RandomControl, paired_difference, random_control
from moe_route.analysis.pruning import PruningStability, prune, pruning_stability
from moe_route.analysis.saliency import Saliency, saliency
from moe_route.analysis.super_experts import SuperExperts, super_experts

__all__ = [
    "MEASURES",
    "AnalysisError",
    "Correlation",
    "Difference",
    "Divergence",
    "DivergenceMatrix",
    "Entropy",
    "Geometry",
    "LanguageExperts",
    "PruningStability",
    "RandomControl",
    "RiskExperts",
    "Saliency",
    "SuperExperts",
    "UShape",
    "consistency",
    "correlation",
    "divergence",
    "divergence_matrix",
    "entropy",
    "entropy_experts",
    "entropy_of",
    "esft_experts",
    "expert_difference",
    "frequency_share_experts",
    "geometry",
    "jensen_shannon",
    "middle_layers",
    "multilingual_experts",
    "normalized_jensen_shannon",
    "paired_difference",
    "prune",
    "pruning_stability",
    "random_control",
    "risk_experts",
    "saliency",
    "super_experts",
    "task_experts",
    "u_shape",
]

"""Analysis: compute divergence, entropy, correlations and experts from recorded routing.

It works in numpy float64, without a model and without torch. Every function takes ``RoutingStatistics`` (or an object
with the same accessors), or arrays where these suffice.
"""

from moe_route.analysis.agreement import RankAgreement, rank_agreement
from moe_route.analysis.chance import expected_maximum
from moe_route.analysis.corrections import benjamini_hochberg, holm
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
from moe_route.analysis.effects import Effects, effects_by_group, mean_effects
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
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.measures import entropy_of, jensen_shannon, normalized_jensen_shannon
from moe_route.analysis.paired import Difference, RandomControl, paired_difference, random_control

__all__ = [
    "MEASURES",
    "AnalysisError",
    "Correlation",
    "Difference",
    "Divergence",
    "DivergenceMatrix",
    "Effects",
    "Entropy",
    "LanguageExperts",
    "RandomControl",
    "RankAgreement",
    "RiskExperts",
    "UShape",
    "benjamini_hochberg",
    "consistency",
    "correlation",
    "divergence",
    "divergence_matrix",
    "effects_by_group",
    "entropy",
    "entropy_experts",
    "entropy_of",
    "esft_experts",
    "expected_maximum",
    "expert_difference",
    "frequency_share_experts",
    "holm",
    "jensen_shannon",
    "mean_effects",
    "middle_layers",
    "multilingual_experts",
    "normalized_jensen_shannon",
    "paired_difference",
    "random_control",
    "rank_agreement",
    "risk_experts",
    "task_experts",
    "u_shape",
]

"""Analysis: compute divergence, entropy, correlations and experts from recorded routing.

It works in numpy float64, without a model and without torch. Every function takes ``RoutingStatistics`` (or an object
with the same accessors), or arrays where these suffice.
"""

from moe_route.analysis.correlation import Correlation, correlation
from moe_route.analysis.difference import ExpertDifference, expert_difference, expert_difference_interval
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
from moe_route.analysis.esft import esft_experts, esft_scores
from moe_route.analysis.experts import multilingual_experts, task_experts
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.language_experts import LanguageExperts, entropy_experts, frequency_share_experts
from moe_route.analysis.measures import entropy_of, jensen_shannon, normalized_jensen_shannon
from moe_route.analysis.overlap import Overlap, overlap
from moe_route.analysis.paired import Difference, RandomControl, paired_difference, random_control
from moe_route.analysis.rise import RiseExperts, rise_experts
from moe_route.analysis.risk import RiskExperts, risk_experts
from moe_route.analysis.stability import Stability, stability_selection
from moe_route.analysis.sweep import Sweep, sweep

__all__ = [
    "MEASURES",
    "AnalysisError",
    "Correlation",
    "Difference",
    "Divergence",
    "DivergenceMatrix",
    "Entropy",
    "ExpertDifference",
    "LanguageExperts",
    "Overlap",
    "RandomControl",
    "RiseExperts",
    "RiskExperts",
    "Stability",
    "Sweep",
    "UShape",
    "consistency",
    "correlation",
    "divergence",
    "divergence_matrix",
    "entropy",
    "entropy_experts",
    "entropy_of",
    "esft_experts",
    "esft_scores",
    "expert_difference",
    "expert_difference_interval",
    "frequency_share_experts",
    "jensen_shannon",
    "middle_layers",
    "multilingual_experts",
    "normalized_jensen_shannon",
    "overlap",
    "paired_difference",
    "random_control",
    "rise_experts",
    "risk_experts",
    "stability_selection",
    "sweep",
    "task_experts",
    "u_shape",
]

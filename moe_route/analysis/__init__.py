"""Analysis: compute divergence, entropy, correlations, experts and the structure of routing from recordings.

It works in numpy float64, without a model and without torch. Every function takes ``RoutingStatistics`` (or an object
with the same accessors), ``SentenceVectors``, a ``Trace``, or arrays where these suffice.
"""

from moe_route.analysis.alignment import Alignment, alignment
from moe_route.analysis.checkpoints import (
    CheckpointSeries,
    Comparison,
    checkpoint_series,
    compare,
    gap_experts,
    specialization,
    specialization_of,
)
from moe_route.analysis.coactivation import Coactivation, ExpertPair, Transitions, coactivation, transitions
from moe_route.analysis.consistency import Consistency, consistency
from moe_route.analysis.correlation import Correlation, correlation
from moe_route.analysis.divergence import Divergence, DivergenceMatrix, divergence, divergence_matrix
from moe_route.analysis.effects import (
    Difference,
    Effects,
    RandomControl,
    effects_by_group,
    mean_effects,
    paired_difference,
    random_control,
)
from moe_route.analysis.entropy import Entropy, entropy
from moe_route.analysis.estimators import MEASURES, jackknife_divergence, jackknife_entropy, miller_madow, rarefied
from moe_route.analysis.experts import (
    ExpertDifference,
    RiskExperts,
    Sweep,
    expert_difference,
    expert_difference_interval,
    multilingual_experts,
    risk_experts,
    sweep,
    task_experts,
)
from moe_route.analysis.geometry import Geometry, geometry
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.language_experts import (
    LanguageExperts,
    RiseExperts,
    entropy_experts,
    esft_experts,
    esft_scores,
    frequency_share_experts,
    rise_experts,
)
from moe_route.analysis.load import Committee, LoadBalance, Narrowing, committee, load_balance, narrowing
from moe_route.analysis.matrices import MatrixComparison, MatrixCorrelation, matrix_correlation, read_matrix
from moe_route.analysis.measures import entropy_of, jensen_shannon, normalized_jensen_shannon
from moe_route.analysis.outcomes import OutcomeTable, by_outcome, outcomes, read_answers
from moe_route.analysis.overlap import Overlap, overlap
from moe_route.analysis.paths import Paths, PathWindow, RoutingPath, Saturation, paths, saturation
from moe_route.analysis.prediction import Prediction, predict
from moe_route.analysis.pruning import (
    PruningStability,
    Saliency,
    SuperExperts,
    prune,
    pruning_stability,
    saliency,
    super_experts,
)
from moe_route.analysis.rank_agreement import RankAgreement, rank_agreement
from moe_route.analysis.resampling import Stability, stability_selection
from moe_route.analysis.similarity import Similarity, answer_similarity, similarity
from moe_route.analysis.stats import benjamini_hochberg, expected_maximum, holm, linkage
from moe_route.analysis.tokens import (
    ClassRouting,
    LocalConsistency,
    TokenShare,
    Vocabulary,
    class_routing,
    local_consistency,
    token_classes,
    vocabulary,
)
from moe_route.analysis.u_shape import UShape, middle_layers, u_shape

__all__ = [
    "MEASURES",
    "Alignment",
    "AnalysisError",
    "CheckpointSeries",
    "ClassRouting",
    "Coactivation",
    "Committee",
    "Comparison",
    "Consistency",
    "Correlation",
    "Difference",
    "Divergence",
    "DivergenceMatrix",
    "Effects",
    "Entropy",
    "ExpertDifference",
    "ExpertPair",
    "Geometry",
    "LanguageExperts",
    "LoadBalance",
    "LocalConsistency",
    "MatrixComparison",
    "MatrixCorrelation",
    "Narrowing",
    "OutcomeTable",
    "Overlap",
    "PathWindow",
    "Paths",
    "Prediction",
    "PruningStability",
    "RandomControl",
    "RankAgreement",
    "RiseExperts",
    "RiskExperts",
    "RoutingPath",
    "Saliency",
    "Saturation",
    "Similarity",
    "Stability",
    "SuperExperts",
    "Sweep",
    "TokenShare",
    "Transitions",
    "UShape",
    "Vocabulary",
    "alignment",
    "answer_similarity",
    "benjamini_hochberg",
    "by_outcome",
    "checkpoint_series",
    "class_routing",
    "coactivation",
    "committee",
    "compare",
    "consistency",
    "correlation",
    "divergence",
    "divergence_matrix",
    "effects_by_group",
    "entropy",
    "entropy_experts",
    "entropy_of",
    "esft_experts",
    "esft_scores",
    "expected_maximum",
    "expert_difference",
    "expert_difference_interval",
    "frequency_share_experts",
    "gap_experts",
    "geometry",
    "holm",
    "jackknife_divergence",
    "jackknife_entropy",
    "jensen_shannon",
    "linkage",
    "load_balance",
    "local_consistency",
    "matrix_correlation",
    "mean_effects",
    "middle_layers",
    "miller_madow",
    "multilingual_experts",
    "narrowing",
    "normalized_jensen_shannon",
    "outcomes",
    "overlap",
    "paired_difference",
    "paths",
    "predict",
    "prune",
    "pruning_stability",
    "random_control",
    "rank_agreement",
    "rarefied",
    "read_answers",
    "read_matrix",
    "rise_experts",
    "risk_experts",
    "saliency",
    "saturation",
    "similarity",
    "specialization",
    "specialization_of",
    "stability_selection",
    "super_experts",
    "sweep",
    "task_experts",
    "token_classes",
    "transitions",
    "u_shape",
    "vocabulary",
]


def __dir__() -> list[str]:
    return __all__

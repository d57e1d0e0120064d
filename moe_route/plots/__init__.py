"""Figures of analysis results, ready for a paper. Each function draws on one matplotlib ``Axes`` and returns it.

No global state changes: no style, no current figure, no ``show``. ``style`` sizes figures for a column of a paper.
Colors can be distinguished with any color vision. A language has its English name, and the same color, dashes and
marker in all figures (:func:`styles`). Lines have their labels at their ends, or a legend in the order of the lines.
``by_script``, ``expert_flow`` and ``heat_maps`` draw several panels and return their axes.
"""

from moe_route.plots.by_layer import (
    alignment,
    by_script,
    checkpoints,
    compared,
    consistency,
    correlation,
    divergence,
    entropy,
    load_balance,
)
from moe_route.plots.expert_flows import expert_flow
from moe_route.plots.expert_maps import heat_map, heat_maps, pairs, weight_change
from moe_route.plots.expert_numbers import expert_counts, sweep, sweep_overlap
from moe_route.plots.frame import Lines, save, style, styles
from moe_route.plots.group_pairs import divergence_matrix, overlap, similarity, tree
from moe_route.plots.steering_effects import steering_table, strengths

__all__ = [
    "Lines",
    "alignment",
    "by_script",
    "checkpoints",
    "compared",
    "consistency",
    "correlation",
    "divergence",
    "divergence_matrix",
    "entropy",
    "expert_counts",
    "expert_flow",
    "heat_map",
    "heat_maps",
    "load_balance",
    "overlap",
    "pairs",
    "save",
    "similarity",
    "steering_table",
    "strengths",
    "style",
    "styles",
    "sweep",
    "sweep_overlap",
    "tree",
    "weight_change",
]


def __dir__() -> list[str]:
    return __all__

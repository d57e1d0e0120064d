"""Find the experts that a task or a language uses more than a baseline does: differences above a threshold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_route.analysis.expert_difference import expert_difference, expert_difference_interval
from moe_route.analysis.expert_masks import above, in_layers
from moe_route.analysis.inputs import AnalysisError, Frequencies, Statistics, group_index, pick_groups, selection

if TYPE_CHECKING:
    from moe_route.steering import ExpertSelection

__all__ = ["multilingual_difference", "multilingual_experts", "task_experts"]


def task_experts(
    task: Frequencies,
    baseline: Frequencies,
    *,
    threshold: float,
    group: str | None = None,
    baseline_group: str | None = None,
    layers: Iterable[int] | None = None,
    top: int | None = None,
    lower: bool = False,
    level: float = 0.95,
    phase: str | None = None,
    by: str = "sequence",
) -> ExpertSelection:
    """Select the experts of a task: ``Delta > threshold`` between task text and general text of one language.

    See arXiv 2510.04694, section 5.2. Takes the arguments of ``expert_difference``, and these:

    Args:
        threshold: published settings are between 0.25 and 0.5.
        layers: only these layers (indices from 0). Leave it out to keep the experts of other layers for controls.
        top: largest number of experts per layer, those with the largest difference.
        lower: ask that the lower end of the difference's joint interval is above the threshold, so that all experts
            selected have such a difference with probability ``level`` (see ``expert_difference_interval``). Needs
            kept sequences, of both phases.
        level: level of that interval.
    """
    text = f"task experts{'' if group is None else f' of {group}'}"
    if not lower:
        delta = expert_difference(task, baseline, group=group, baseline_group=baseline_group, phase=phase, by=by)
        chosen = above(delta, threshold, top)
    else:
        if phase is not None:
            raise AnalysisError("kept sequences join prefill and decode: leave phase out, or lower")
        found = expert_difference_interval(
            task, baseline, group=group, baseline_group=baseline_group, by=by, level=level
        )
        delta = found.values
        chosen = above(delta, threshold, top) & above(found.joint_low, threshold)
        text = f"{text}, lower end of the joint {level * 100:g} % interval"
    return selection(chosen & in_layers(len(delta), layers), delta, task, threshold=threshold, description=text)


def multilingual_experts(
    statistics: Statistics,
    reference: str,
    *,
    threshold: float,
    groups: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    top: int | None = None,
    phase: str | None = None,
    by: str = "sequence",
) -> ExpertSelection:
    """Select experts used more in some other language than in the reference: ``Delta > threshold`` [arXiv 2510.04694].

    The groups must hold the same text in each language. The score of an expert is its largest difference over
    languages.
    """
    delta = multilingual_difference(statistics, reference, groups=groups, phase=phase, by=by)
    chosen = above(delta, threshold, top) & in_layers(len(delta), layers)
    text = f"multilingual experts against {reference}"
    return selection(chosen, delta, statistics, threshold=threshold, description=text)


def multilingual_difference(
    statistics: Statistics,
    reference: str,
    *,
    groups: Sequence[str] | None = None,
    phase: str | None = None,
    by: str = "sequence",
) -> np.ndarray:
    """Largest difference of frequency of each expert between another language and the reference.

    float64 [layer, expert]; NaN in layers that saw no token of any other language.
    """
    frequency = statistics.frequency(phase, by)
    base = frequency[group_index(statistics, reference, "reference group", phase)]
    rows = [statistics.groups.index(name) for name in pick_groups(statistics, groups, reference, phase)]
    delta = frequency[rows] - base
    return np.where(np.isnan(delta).all(0), np.nan, np.where(np.isnan(delta), -np.inf, delta).max(axis=0))

"""Random sets of as many experts under the same plan: what any experts would have done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_route.analysis import RandomControl
from moe_route.steering import ExpertSelection, Plan, PlanError

__all__ = ["random_sets", "shares_of", "standing"]


def random_sets(plan: Plan, number: int) -> tuple[list[Plan], bool]:
    """The plan on `number` random sets of as many experts of each layer, and whether these are all other sets.

    All are taken if there are no more than `number`. A draw may hold experts of the plan: see `shares_of`.
    """
    try:
        return plan.all_random(number), True
    except PlanError:  # more sets than that
        return [plan.random(seed) for seed in range(number)], False


def shares_of(sets: Sequence[Plan], experts: ExpertSelection) -> np.ndarray:
    """float64 [sets]: the share of `experts` that each set holds."""
    return np.array([len(plan.touching(experts)) / len(experts) for plan in sets])


def standing(control: RandomControl) -> str:
    """What the random sets say of a plan, in words."""
    count = len(control.random)
    if control.rank == 1:
        return f"none of the {count} sets comes as far (p = {control.p_value:.3f})"
    as_far = control.rank - 1
    return f"{as_far} of the {count} sets {'comes' if as_far == 1 else 'come'} as far (p = {control.p_value:.3f})"

"""Random sets of as many experts under the same plan: what any experts would have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_route.analysis import Difference, random_control
from moe_route.analysis.result import plain
from moe_route.steering import ExpertSelection, Plan, PlanError

__all__ = ["RandomSets", "beside_random_sets", "random_sets", "shares_of"]


@dataclass(frozen=True)
class RandomSets:
    """The effect of a plan beside that of random sets of as many experts, measured on the same items.

    Attributes:
        effect: of the plan; a mean over languages.
        random: the same of each set.
        difference: the effect minus the mean of the sets. Its interval holds for other items, and for other draws.
        larger: whether larger values are the stronger effect; else smaller ones are.
        enumerated: whether the sets are all others that there are, not draws.
    """

    effect: float
    random: tuple[float, ...]
    difference: Difference
    larger: bool
    enumerated: bool

    @property
    def rank(self) -> int:
        """Rank of the plan among itself and the sets, 1 for the strongest effect; ties count against the plan."""
        return 1 + sum((value >= self.effect) if self.larger else (value <= self.effect) for value in self.random)

    @property
    def p_value(self) -> float:
        """Probability that a random set has as strong an effect: rank / (number of sets + 1), one-sided."""
        return self.rank / (len(self.random) + 1)

    @property
    def strongest(self) -> float:
        """The strongest effect of a set."""
        return max(self.random) if self.larger else min(self.random)

    @property
    def verdict(self) -> str:
        """What the sets say of the plan, in words."""
        count = len(self.random)
        if self.rank == 1:
            return f"none of the {count} sets comes as far (p = {self.p_value:.3f})"
        return f"{self.rank - 1} of the {count} sets come as far (p = {self.p_value:.3f})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        content = plain(asdict(self)) | {"difference": self.difference.to_dict()}
        return content | {"rank": self.rank, "p_value": self.p_value}


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


def beside_random_sets(
    after: np.ndarray,
    random: np.ndarray,
    before: np.ndarray,
    weights: np.ndarray,
    *,
    larger: bool,
    enumerated: bool,
) -> RandomSets:
    """Compare a plan with random sets.

    Args:
        after, before: float64 [items, languages], such as summed nats, with the plan and without it.
        random: the same under each set, [sets, items, languages].
        weights: what the sums are divided by, such as numbers of tokens.
        larger: see `RandomSets`.
        enumerated: likewise.
    """
    found = random_control(after, random, before, weights, enumerated=enumerated)
    return RandomSets(found.plan, found.random, found.difference, larger, enumerated)

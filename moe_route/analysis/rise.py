"""Find the experts to tune for a language, as RISE does [arXiv 2604.03592].

The formulas are those of the authors' published program (github.com/init-neok/rise), with its standard settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_route.analysis.expert_masks import first
from moe_route.analysis.inputs import AnalysisError, Statistics, pick_groups, selection
from moe_route.analysis.language_experts import LanguageExperts, frequencies_of
from moe_route.analysis.result import plain
from moe_route.steering.layers import show_numbers
from moe_route.texttable import Table

__all__ = ["RiseExperts", "rise_experts"]

_ROUNDING = 1e-9  # 0.35 * 20 must round down to 7


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RiseExperts(LanguageExperts):
    """Mapping from group to the selection of the experts to tune for it.

    Attributes:
        specificity: float64 [group, layer, expert], by which experts of the first and last zone are ranked.
        overlap: float64 [layer, expert], by which experts of the middle zone are ranked.
        zones: layers of the first, middle and last zone.
    """

    specificity: np.ndarray
    overlap: np.ndarray
    zones: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        scores = {"specificity": self.specificity, "overlap": self.overlap, "zones": self.zones}
        return {**super().to_dict(), **plain(scores)}

    def tables(self) -> list[Table]:
        head = ["group", *(f"layers {show_numbers(zone)}" if zone else "no layers" for zone in self.zones)]
        rows = [[group, *(len(found.restrict(zone)) for zone in self.zones)] for group, found in self.items()]
        return [Table(head, rows, "Experts to tune: specific to the group, shared, specific to the group")]


def rise_experts(
    statistics: Statistics,
    *,
    top_n: int,
    alpha: float = 10.0,
    zones: Sequence[float] = (0.375, 0.25, 0.375),
    budget: Sequence[float] = (0.35, 0.25, 0.4),
    groups: Sequence[str] | None = None,
    phase: str | None = None,
    by: str = "token",
) -> RiseExperts:
    """Select ``top_n`` experts to tune for each language: specific ones in the outer layers, shared ones in the middle.

    With the frequency ``a`` of an expert in a language and its mean ``abar`` and population standard deviation over
    languages::

        Spec = a / abar * (1 + alpha * a)                      (first and last zone)
        Ovlp = 1 / (1 + std / abar) * (1 + alpha * abar)       (middle zone)

    In each zone, the experts of all its layers compete. Ties go to the lower layer and expert.

    Args:
        statistics: best of parallel texts; other differences of content count as differences of language.
        top_n: number of experts for each language in all layers; the authors take about 2 % of all.
        alpha: weight of how often an expert is used.
        zones: shares of the layers in the first, middle and last zone; the borders are rounded.
        budget: shares of ``top_n`` for the zones, rounded down, with the rest for the last. What a zone has no room
            for goes to the zone with most room.
        groups: the languages; by default all.
        phase, by: as in ``RoutingStatistics.frequency``; RISE pools tokens.

    Experts that are never chosen in the language (in the middle: in any) are not selected, so that fewer than
    ``top_n`` may remain. Raises ``AnalysisError`` for fewer than two languages, shares that do not add up to 1, and
    more experts than there are.
    """
    names = pick_groups(statistics, groups, phase=phase)
    if len(names) < 2:
        raise AnalysisError("one language is specific against nothing: give two groups or more")
    if alpha < 0 or not math.isfinite(alpha):
        raise AnalysisError(f"alpha must be a number of 0 or more, not {alpha}")
    sizes = np.asarray(statistics.num_experts)
    if not 1 <= top_n <= sizes.sum():
        raise AnalysisError(f"top_n must be between 1 and {sizes.sum()}, the number of all experts, not {top_n}")
    layers = _zone_layers(len(sizes), _shares(zones, "zones"))
    numbers = _zone_numbers(top_n, _shares(budget, "budget"), [int(sizes[list(zone)].sum()) for zone in layers])
    frequency = np.nan_to_num(frequencies_of(statistics, names, phase, by))
    specificity, overlap = _scores(frequency, alpha)
    found = {}
    for name, specific in zip(names, specificity, strict=True):
        scores = specific.copy()
        scores[list(layers[1])] = overlap[list(layers[1])]
        chosen = np.zeros(scores.shape, dtype=bool)
        for zone, number in zip(layers, numbers, strict=True):
            rows = list(zone)
            chosen[rows] = first(scores[rows], number)
        text = f"experts to tune for {name} (RISE)"
        found[name] = selection(chosen, scores, statistics, threshold=None, description=text)
    return RiseExperts(found, specificity=specificity, overlap=overlap, zones=layers)


def _scores(frequency: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Spec [group, layer, expert] and Ovlp [layer, expert]; 0 for experts that no group chooses."""
    mean = frequency.mean(0)
    used = mean > 0
    safe = np.where(used, mean, 1.0)
    specificity = frequency / safe * (1 + alpha * frequency)
    overlap = np.where(used, (1 + alpha * mean) / (1 + frequency.std(0) / safe), 0.0)
    return specificity, overlap


def _shares(given: Sequence[float], name: str) -> tuple[float, float, float]:
    shares = tuple(float(share) for share in given)
    if len(shares) != 3 or min(shares) < 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise AnalysisError(f"{name} must be three shares that add up to 1, not {shares}")
    return shares[0], shares[1], shares[2]


def _zone_layers(
    layers: int, shares: tuple[float, float, float]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    start, end = round(layers * shares[0]), round(layers * (shares[0] + shares[1]))
    return tuple(range(start)), tuple(range(start, end)), tuple(range(end, layers))


def _zone_numbers(top_n: int, shares: tuple[float, float, float], room: Sequence[int]) -> list[int]:
    """Number of experts of each zone; together ``top_n``."""
    numbers = [math.floor(top_n * share + _ROUNDING) for share in shares[:2]]
    numbers.append(top_n - sum(numbers))
    over = sum(max(number - most, 0) for number, most in zip(numbers, room, strict=True))
    numbers = [min(number, most) for number, most in zip(numbers, room, strict=True)]
    while over:
        left = [most - number for number, most in zip(numbers, room, strict=True)]
        zone = left.index(max(left))
        taken = min(left[zone], over)
        numbers[zone] += taken
        over -= taken
    return numbers

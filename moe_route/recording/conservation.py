"""Conservation laws of token sums, which hold for every correct recording.

Every slot of every token is either a choice or empty. The probabilities of a token add up to 1. Its shares of weight
add up to at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moe_route.base.table import ShownAsTables, Table
from moe_route.calls.call import Phase
from moe_route.contract.tables import FIXED_POINT, SCALARS

_COUNTED = ("counts", "natural_counts")  # metrics that are integers, not fixed point
_OVERFLOW_TOKENS = 1 << 27  # with fewer tokens, terms up to 16 (entropies, weights) cannot exceed 63 bits
_SCORE_ROUNDING = 1e-6  # scores are float32, so the normalized scores of a token may miss 1 by this much


class TokenSums(Protocol):
    """Sums over tokens by group and layer; `RoutingStatistics` is one."""

    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    phases: tuple[Phase, ...]
    metrics: tuple[str, ...]
    tolerance: float

    def token_sum(self, metric: str, phase: Phase | None = None) -> np.ndarray: ...
    def tokens(self, phase: Phase | None = None) -> np.ndarray: ...
    def scalar(self, name: str, phase: Phase | None = None) -> np.ndarray: ...


@dataclass(frozen=True, eq=False, repr=False)
class Conservation(ShownAsTables):
    """The number of slots that a recording should hold and the number it holds, int64 ``[G, L]``."""

    groups: tuple[str, ...]
    layers: tuple[str, ...]
    tokens: np.ndarray
    expected: np.ndarray  # sum of k over tokens
    found: np.ndarray  # number of choices and empty slots
    tolerance: float  # allowed relative gap; 0 for recordings of this library

    @property
    def gap(self) -> np.ndarray:
        """found / expected - 1, float64 ``[G, L]``; 0 if both are 0, infinite if only ``expected`` is."""
        difference = (self.found - self.expected).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(difference == 0, 0.0, difference / self.expected)

    @property
    def largest_gap(self) -> float:
        """The largest absolute value of the gaps of all groups and layers."""
        return float(np.abs(self.gap).max(initial=0.0))

    @property
    def holds(self) -> bool:
        """Whether every gap is within the tolerance."""
        return self.largest_gap <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content; ``largest_gap`` is None if slots were found where none were expected."""
        sums = {name: getattr(self, name).tolist() for name in ("tokens", "expected", "found")}
        axes = {"groups": list(self.groups), "layers": list(self.layers)}
        largest = self.largest_gap if math.isfinite(self.largest_gap) else None
        return axes | sums | {"largest_gap": largest, "tolerance": self.tolerance}

    def tables(self) -> list[Table]:
        gap = np.abs(self.gap)
        worst = gap.argmax(axis=0) if len(self.groups) else np.zeros(len(self.layers), int)
        rows = [
            [layer, *(f"{int(sums[:, i].sum())}" for sums in (self.tokens, self.expected, self.found))]
            + ([f"{self.gap[worst[i], i]:+.2e}", self.groups[worst[i]]] if len(self.groups) else ["", ""])
            for i, layer in enumerate(self.layers)
        ]
        verdict = "within" if self.holds else "beyond"
        title = f"slots of tokens: largest gap {self.largest_gap:.2e}, {verdict} the tolerance of {self.tolerance:g}"
        return [Table(("layer", "tokens", "slots", "found", "largest gap", "in group"), rows, title)]


def conservation(statistics: TokenSums, phase: Phase | None) -> Conservation:
    """Compare the slots of ``statistics`` with those its tokens need; the statistics must hold counts."""
    counted = statistics.token_sum("counts", phase).sum(-1) + statistics.scalar("empty", phase)
    return Conservation(
        statistics.groups,
        statistics.layers,
        statistics.tokens(phase),
        statistics.scalar("slots", phase),
        counted,
        statistics.tolerance,
    )


def broken_law(statistics: TokenSums, arrays: Mapping[str, np.ndarray]) -> str | None:
    """The first law that the sums break, and where, or None. ``arrays`` holds all sums."""
    broken = _negative(arrays)
    for phase in statistics.phases:
        broken = broken or _broken_in(statistics, phase)
    return broken


def missing(metadata: Mapping[str, Any]) -> str | None:
    """What an engine that serves requests says is missing in its statistics, or None; docs/serving.md."""
    for layer, law in metadata.get("unbalanced", {}).items():
        return f"layer {layer} counted {law['counted']} of the {law['expected']} tokens that ran ({law['kernel']})"
    return next(iter(metadata.get("gaps", ())), None)


def _negative(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Find a negative sum, which an overflow causes.

    Sums of integers are never negative. Fixed-point sums may be slightly negative (rounding, negative weights), unless
    there are so many tokens that a sum of terms up to 16 could have passed 2^63.
    """
    scalars = arrays["scalars"]
    signed = {"scalars": scalars[..., [i for i, name in enumerate(SCALARS) if name not in ("entropy", "moved")]]}
    signed |= {name: array for name, array in arrays.items() if name.removeprefix("metric.") in _COUNTED}
    if scalars[..., SCALARS.index("tokens")].max(initial=0) >= _OVERFLOW_TOKENS:
        signed = dict(arrays)
    for name, array in signed.items():
        if (array < 0).any():
            return f"{name} holds a negative sum: it passed 63 bits; record in several runs and keep them apart"
    return None


def _broken_in(statistics: TokenSums, phase: Phase) -> str | None:
    tokens = statistics.tokens(phase)
    widest = max(statistics.num_experts, default=1)
    # in units of one token: rounding to fixed point and float32, and the error of another recorder's arithmetic
    allowed = tokens * (widest * FIXED_POINT + _SCORE_ROUNDING + statistics.tolerance)
    laws = []
    if "counts" in statistics.metrics:
        slots = conservation(statistics, phase)
        laws.append((np.abs(slots.gap) <= slots.tolerance, "counts and empty slots do not add up to the slots"))
    if "probability" in statistics.metrics:
        scored = tokens - statistics.scalar("unscored", phase)
        error = np.abs(statistics.token_sum("probability", phase).sum(-1) - scored)
        laws.append((error <= allowed, "probability mass does not add up to the scored tokens"))
    if "weight_share" in statistics.metrics:
        excess = statistics.token_sum("weight_share", phase).sum(-1) - tokens
        laws.append((excess <= allowed, "shares of weight add up to more than the tokens"))
    for holds, what in laws:
        if not holds.all():
            group, layer = np.argwhere(~holds)[0]
            return f"{what} (group {statistics.groups[group]!r}, layer {statistics.layers[layer]}, {phase})"
    return None

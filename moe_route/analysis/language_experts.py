"""Find the experts that are specific to a language or a task, by published rules on their frequencies."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_route.analysis.inputs import (
    AnalysisError,
    Frequencies,
    Statistics,
    as_array,
    group_index,
    pick_groups,
    selection,
)
from moe_route.analysis.measures import entropy_of, ratio
from moe_route.analysis.overlap import first, largest
from moe_route.analysis.result import Result, plain
from moe_route.base import files
from moe_route.base.table import Table
from moe_route.steering import ExpertSelection
from moe_route.steering.layers import show_numbers


@dataclass(frozen=True, eq=False, repr=False)
class LanguageExperts(Result, Mapping[str, "ExpertSelection"]):
    """Mapping from group to the selection of its experts; ``shared`` holds the experts that are exclusive to none."""

    by_group: dict[str, ExpertSelection]
    shared: ExpertSelection | None = None

    def __getitem__(self, group: str) -> ExpertSelection:
        return self.by_group[group]

    def __iter__(self) -> Any:
        return iter(self.by_group)

    def __len__(self) -> int:
        return len(self.by_group)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {"groups": plain(self.by_group), "shared": plain(self.shared)}

    def columns(self) -> dict[str, Any]:
        """A row per expert of a group: ``group`` ("" for shared ones), ``layer``, ``expert`` and its ``score``."""
        every = {**self.by_group, **({} if self.shared is None else {"": self.shared})}
        cells = [(group, layer, expert) for group, experts in every.items() for layer, expert in experts.pairs]
        score_of = {group: experts.scores for group, experts in every.items()}
        scores = [score_of[group][layer][expert] for group, layer, expert in cells]
        group, layer, expert = zip(*cells, strict=True) if cells else ((), (), ())
        return {"group": group, "layer": layer, "expert": expert, "score": scores}

    def ids(self) -> dict[str, dict[str, list[int]]]:
        """group -> {layer: expert ids}, JSON-able, as programs read it that tune only some experts."""
        return {group: {str(layer): list(ids) for layer, ids in experts.items()} for group, experts in self.items()}

    def save_ids(self, path: str | os.PathLike[str]) -> None:
        """Write ``ids()`` to ``path`` as JSON, whole or not at all."""
        files.write_text(path, f"{files.readable_json(self.ids())}\n")

    def tables(self) -> list[Table]:
        rows = [[group, len(experts)] for group, experts in self.by_group.items()]
        shared = [] if self.shared is None else [["(shared)", len(self.shared)]]
        return [Table(["group", "experts"], [*rows, *shared])]


def frequency_share_experts(
    statistics: Statistics,
    *,
    top: int,
    threshold: float,
    groups: Sequence[str] | None = None,
    phase: str | None = None,
    by: str = "token",
) -> LanguageExperts:
    """Select exclusive and shared experts by share of frequency [arXiv 2601.14050].

    In each layer and language the ``top`` most frequent experts are kept, and their frequencies are divided by the sum
    over languages. An expert is exclusive to a language whose share is above ``threshold``. It is shared if it is kept
    but no language has such a share. From a threshold of 0.5 on, an expert is exclusive to at most one language.
    """
    if not 0 < threshold < 1:
        raise AnalysisError(f"threshold must lie between 0 and 1, not {threshold}")
    names = pick_groups(statistics, groups, phase=phase)
    frequency = np.nan_to_num(frequencies_of(statistics, names, phase, by))
    kept = np.where(largest(frequency, top), frequency, 0.0)
    total = kept.sum(0)
    share = ratio(kept, total, empty=0.0)
    exclusive = {
        name: selection(
            share[i] > threshold, share[i], statistics, threshold=threshold, description=f"exclusive experts of {name}"
        )
        for i, name in enumerate(names)
    }
    none_alone = (total > 0) & (share <= threshold).all(0)
    shared = selection(none_alone, share.max(0), statistics, threshold=threshold, description="shared experts")
    return LanguageExperts(exclusive, shared)


def entropy_experts(
    statistics: Statistics,
    *,
    top_n: int | None = None,
    share: float | None = None,
    percentile: float = 95.0,
    groups: Sequence[str] | None = None,
    phase: str | None = None,
    by: str = "token",
) -> LanguageExperts:
    """Select the language-specific experts of each group, by lowest entropy over groups [LAPE, arXiv 2402.16438].

    An expert's frequencies are divided by their sum over groups; low entropy means that few groups use it. Candidates
    are the experts that some group uses more often than the bar, the ``percentile`` of all frequencies. Ties go to the
    lower layer and expert. Bar and number are those of the authors' program: of n frequencies the bar is the one with
    place ``round(n * percentile / 100)``, not interpolated, and a share is rounded to the nearest whole number.

    Args:
        top_n: give each group this number of experts, the lowest in entropy of those it uses above the bar.
        share: the original rule: take this share of all experts (published: 0.01 of the neurons), the lowest in
            entropy, and give each to every group that uses it above the bar. Groups get different numbers, some none.

    Raises ``AnalysisError`` unless either ``top_n`` or ``share`` is given, or for a share that takes no expert.
    """
    if (top_n is None) == (share is None):
        raise AnalysisError("give either top_n, experts per group, or share, of all experts")
    if not 0 <= percentile <= 100 or (top_n is not None and top_n < 1) or (share is not None and not 0 < share <= 1):
        raise AnalysisError("top_n must be 1 or more, share above 0 and up to 1, percentile between 0 and 100")
    names = pick_groups(statistics, groups, phase=phase)
    frequency = frequencies_of(statistics, names, phase, by)
    real = np.arange(frequency.shape[-1]) < np.asarray(statistics.num_experts)[:, None]
    seen = real & ~np.isnan(frequency)
    ordered = np.sort(frequency[seen])
    cut = ordered[max(round(ordered.size * percentile / 100), 1) - 1]
    frequency = np.where(seen, frequency, 0.0)
    total = frequency.sum(0)
    of_group = ratio(frequency, total, empty=0.0)
    spread = entropy_of(np.moveaxis(of_group, 0, -1))
    above = seen & (frequency > cut)
    lowest = None
    if share is not None:
        number = round(share * int(real.sum()))
        if number < 1:
            raise AnalysisError(f"share={share} of {real.sum()} experts is none: use {1 / real.sum():.3g} or more")
        lowest = _lowest(spread, above.any(0), number)
    by_group = {}
    for i, name in enumerate(names):
        chosen = above[i] & (_lowest(spread, above[i], top_n) if lowest is None else lowest)
        text = f"low-entropy experts of {name}"
        by_group[name] = selection(chosen, spread, statistics, threshold=None, description=text)
    return LanguageExperts(by_group)


def _lowest(values: np.ndarray, candidates: np.ndarray, number: int | None) -> np.ndarray:
    """Where the lowest values of the candidates are, bool in the shape of ``values``; the first of equal ones."""
    order = np.argsort(np.where(candidates, values, np.inf).reshape(-1), kind="stable")[:number]
    chosen = np.zeros(values.size, dtype=bool)
    chosen[order] = True
    return chosen.reshape(values.shape) & candidates


def frequencies_of(statistics: Statistics, names: Sequence[str], phase: str | None, by: str) -> np.ndarray:
    """Frequencies of these groups, float64 [group, layer, expert]."""
    return statistics.frequency(phase, by)[[statistics.groups.index(name) for name in names]]


# ---- as RISE finds the experts to tune [arXiv 2604.03592]. The formulas are those of the authors' published program
# (github.com/init-neok/rise), with its standard settings.

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
        rows = [[group, *(len(experts.restrict(zone)) for zone in self.zones)] for group, experts in self.items()]
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
    by_group = {}
    for name, specific in zip(names, specificity, strict=True):
        scores = specific.copy()
        scores[list(layers[1])] = overlap[list(layers[1])]
        chosen = np.zeros(scores.shape, dtype=bool)
        for zone, number in zip(layers, numbers, strict=True):
            rows = list(zone)
            chosen[rows] = first(scores[rows], number)
        text = f"experts to tune for {name} (RISE)"
        by_group[name] = selection(chosen, scores, statistics, threshold=None, description=text)
    return RiseExperts(by_group, specificity=specificity, overlap=overlap, zones=layers)


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


# ---- as ESFT finds the experts of a task, by token scores or gate scores [arXiv 2407.01906]

_SHARE_ROUNDING = 1e-12  # larger than the rounding error of a float64 sum of shares
_PRINTED = 0.99  # scores printed with four decimals may add up to a little less


def esft_scores(statistics: Statistics, *, kind: str = "token", group: str | None = None) -> np.ndarray:
    """Scores by which ESFT selects the experts of a task, float64 [layer, expert]; NaN in layers without tokens.

    Args:
        statistics: ``RoutingStatistics`` of the task's texts.
        kind: "token": share of the selections that go to the expert, ``a / (k T)`` with T tokens, so that a layer sums
            to 1. "gate": mean weight of the expert over all tokens, ``sum of weights / T``, 0 where it was not chosen;
            a layer sums to the mean sum of a token's weights. It needs ``record(metrics=[..., "weight"])``.
        group: the group of the task; by default the only one.

    The expert scores that ESFT published are means over all tokens, as here; its paper averages over samples first.
    """
    row = group_index(statistics, group)
    if kind == "token":
        return statistics.mean_distribution("count", None, "token")[row]
    if kind != "gate":
        raise AnalysisError(f'ESFT scores are of kind "token" or "gate", not {kind!r}')
    tokens = statistics.tokens()[row].astype(np.float64)[:, None]
    sums: Any = statistics  # weights are the one thing that the protocol does not ask for
    total = sums.token_sum("weight")[row]
    return ratio(total, tokens)


def esft_experts(
    scores: Frequencies, *, top_p: float = 0.2, kind: str = "token", group: str | None = None
) -> ExpertSelection:
    """Select ESFT's experts of a task: in each layer the fewest, most used first, whose scores add up to ``top_p``.

    Args:
        scores: scores [layer, expert], or ``RoutingStatistics``, of which ``esft_scores`` are taken.
        top_p: sum of scores to reach, in (0, 1]; ESFT uses 0.2 with token scores and 0.1 with gate scores.
        kind, group: as in ``esft_scores``, for statistics.

    Raises ``AnalysisError`` if the scores of a layer do not add up to ``top_p``.
    """
    if not 0 < top_p <= 1:
        raise AnalysisError(f"top_p must be above 0 and at most 1, not {top_p}")
    if isinstance(scores, Statistics):
        values = esft_scores(scores, kind=kind, group=group)
    else:
        values = as_array(scores, "the scores")
    if values.ndim != 2:
        raise AnalysisError("ESFT scores must be [layer, expert]")
    known = np.nan_to_num(values)
    total = known.sum(-1)
    short = np.flatnonzero((total > 0) & (total < top_p * _PRINTED))
    if short.size:
        raise AnalysisError(
            f"the scores of layer {short[0]} add up to {total[short[0]]:.3g}, less than top_p {top_p:g}: pass a "
            "smaller top_p, or scores divided by their sum"
        )
    order = np.argsort(-known, axis=-1, kind="stable")
    reached = np.cumsum(np.take_along_axis(known, order, -1), -1)
    before = np.concatenate([np.zeros((len(values), 1)), reached[:, :-1]], axis=1)
    chosen = np.zeros(values.shape, dtype=bool)
    # 0.7 + 0.1 is below 0.8 by a rounding error only, and counts as reaching it
    np.put_along_axis(chosen, order, before < top_p - _SHARE_ROUNDING, axis=-1)
    chosen &= known > 0
    text = f"ESFT experts{'' if group is None else f' of {group}'}, top_p {top_p:g}"
    return selection(chosen, values, scores, threshold=top_p, description=text)

"""Recordings of one configuration compared: checkpoints of a training, a fine-tune and its base, quantized weights.

Two recordings are compared text by text, several ones as a series [arXiv 2605.29714].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError, Statistics, normalized, pick_groups, selection
from moe_route.analysis.language_experts import LanguageExperts
from moe_route.analysis.measures import (
    entropy_of,
    jaccard_distance,
    jensen_shannon,
    normalized_jensen_shannon,
    ratio,
)
from moe_route.analysis.overlap import largest
from moe_route.analysis.resampling import FEWEST_ITEMS, GroupSequences, groups_of
from moe_route.analysis.result import Result, by_depth, mean_of_seen
from moe_route.analysis.stats import benjamini_hochberg, draw_items, interval_of
from moe_route.base.table import Table

_SHOWN = 10
_HALVES = 8  # random halves that a noise floor averages over


def _check_alike(recordings: Sequence[Statistics]) -> None:
    """Refuse recordings of models of different shapes; their weights may differ."""
    first = recordings[0]
    for one in recordings:
        if not hasattr(one, "num_experts"):
            raise AnalysisError(f"give RoutingStatistics (recorder.statistics()), not {type(one).__name__}")
        if (tuple(one.num_experts), tuple(one.top_k)) != (tuple(first.num_experts), tuple(first.top_k)):
            raise AnalysisError(
                "the recordings come from models of other layers, experts or top-k: compare checkpoints of one "
                "configuration"
            )


def _common_groups(recordings: Sequence[Statistics], groups: Sequence[str] | None) -> tuple[str, ...]:
    shared = tuple(name for name in recordings[0].groups if all(name in one.groups for one in recordings))
    names = tuple(shared if groups is None else groups)
    if not names:
        raise AnalysisError("the recordings have no group in common: record the same texts under the same names")
    for one in recordings:
        pick_groups(one, names)
    return names


# ---- two recordings


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result, hidden=("moved_p",)):
    """How far the routing of the same texts moved from one recording to another.

    Attributes:
        groups, layers: names of the axes.
        values: float64 [group, layer], entropy-normalized divergence of the mean distributions of both recordings.
        low, high: 95 % interval of it from a bootstrap over items, which both recordings share; NaN without items.
        floor: float64 [group, layer], the same divergence between random halves of the items of one recording, the
            mean over both: what other texts of this number would give without any change of the model.
        jsd: float64 [group, layer], ``values`` without normalization, in nats.
        by_text: float64 [group, layer], mean over items of the divergence of each text from itself in the other
            recording; NaN without items.
        overlap: float64 [group, layer], Jaccard index of the top-k experts that each recording uses most.
        change: float64 [group, layer, expert], frequency in the second recording minus that in the first.
        moved_p: float64 [group, layer, expert], p-values of no change from a paired t-test over items, adjusted by
            Benjamini and Hochberg over all experts of a group; NaN without items.
        items: int64 [group], number of items that both recordings hold; 0 where sequences were not kept.
        kind: the router scores compared: "full", "topk" or "count".
    """

    values: Annotated[np.ndarray, "group layer as divergence"]
    low: Annotated[np.ndarray, "group layer"]
    high: Annotated[np.ndarray, "group layer"]
    floor: Annotated[np.ndarray, "group layer"]
    jsd: Annotated[np.ndarray, "group layer"]
    by_text: Annotated[np.ndarray, "group layer"]
    overlap: Annotated[np.ndarray, "group layer"]
    change: np.ndarray
    moved_p: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    items: np.ndarray
    kind: str = "full"

    def moved(self, group: str, level: float = 0.05) -> list[tuple[int, int, float]]:
        """(layer, expert, change of frequency) of the experts that moved, by ``moved_p``; the largest change first."""
        row = self.place_of(group)
        cells = np.argwhere(self.moved_p[row] < level)
        moved = [(int(layer), int(expert), float(self.change[row, layer, expert])) for layer, expert in cells]
        return sorted(moved, key=lambda one: (-abs(one[2]), one[:2]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None), with the experts that moved by group."""
        return super().to_dict() | {"moved": {group: self.moved(group) for group in self.groups}}

    def tables(self) -> list[Table]:
        above = {"floor": mean_of_seen(self.floor, 1)[0].tolist(), "nats": mean_of_seen(self.jsd, 1)[0].tolist()}
        clear = ((self.values > self.floor) & (self.low > self.floor)).sum(1)
        above["above floor"] = [f"{number} of {len(self.layers)}" for number in clear.tolist()]
        note = (
            "floor: between random halves of the texts of one recording; nats: not normalized; both are means over "
            "layers; above floor: layers whose 95 % interval lies above it"
        )
        title = f"Divergence of the two recordings, of the same {int(self.items.max())} texts"
        shown = [by_depth(self.groups, self.values, title=title, note=note, after=above)]
        title = "Jaccard index of the experts that each recording uses most (top-k)"
        shown.append(by_depth(self.groups, self.overlap, title=title))
        rows = [[group, *cell[:2], f"{cell[2]:+.3f}"] for group in self.groups for cell in self.moved(group)[:_SHOWN]]
        if rows:
            numbers = ", ".join(f"{len(self.moved(group))} in {group}" for group in self.groups)
            note = f"paired t-test over items, p < .05 after Benjamini and Hochberg; experts that moved: {numbers}"
            head = ("group", "layer", "expert", "change of frequency")
            shown.append(Table(head, rows, f"Experts that moved: the {_SHOWN} largest of each group", note))
        return shown


def compare(
    first: Statistics,
    second: Statistics,
    *,
    groups: Sequence[str] | None = None,
    kind: str = "full",
    resamples: int = 400,
    seed: int = 0,
) -> Comparison:
    """Compare two recordings of one configuration on the same texts: checkpoints, fine-tunes, quantized weights.

    Args:
        first, second: recorded with ``record(sequences=True)`` and items, for intervals, floor and tests; without
            sequences there are divergence, overlap and change alone.
        groups: by default those that both have.
        kind: the router scores compared: "full", "topk" or "count".

    Raises ``AnalysisError`` for recordings of models of another shape, or without a common group.
    """
    _check_alike((first, second))
    names = _common_groups((first, second), groups)
    layers, sizes = tuple(first.layers), np.asarray(first.num_experts)
    values, low, high, floor, jsd, by_text, overlap = np.full((7, len(names), len(layers)), np.nan)
    change, moved_p = np.full((2, len(names), len(layers), int(sizes.max())), np.nan)
    items = np.zeros(len(names), np.int64)
    for g, name in enumerate(names):
        shared = _shared_items(first, second, name)
        items[g] = len(shared)
        if len(shared) < FEWEST_ITEMS:
            items[g], pooled = 0, [_pooled(one, name, kind) for one in (first, second)]
            frequencies = [one.frequency(None, "token")[one.groups.index(name)] for one in (first, second)]
            change[g] = frequencies[1] - frequencies[0]
        else:
            pair = [next(groups_of(one, (name,), shared, kind)) for one in (first, second)]
            q = [_zero(one) for one in pair]
            pooled = [_mean(one, np.ones(len(shared))) for one in q]
            weights = draw_items(len(shared), resamples, seed)
            drawn = np.stack([_divergence(_mean(q[0], row), _mean(q[1], row), sizes) for row in weights])
            low[g], high[g] = interval_of(drawn, len(shared), 0.95)
            floor[g] = np.mean([_floor(one, sizes, seed) for one in q], axis=0)
            single = _divergence(pair[0].distributions(), pair[1].distributions(), sizes)
            by_text[g] = mean_of_seen(single)[0]
            counted = [next(groups_of(one, (name,), shared, "count")) for one in (first, second)]
            frequencies = [ratio(one.values, one.tokens[..., None]) for one in counted]
            change[g], moved_p[g] = _paired_t(frequencies[1] - frequencies[0], sizes)
        values[g] = _divergence(pooled[0], pooled[1], sizes)
        jsd[g] = jensen_shannon(pooled[0], pooled[1])
        top = np.minimum(np.asarray(first.top_k), sizes)
        used = [one.frequency(None, "token")[one.groups.index(name)] for one in (first, second)]
        overlap[g] = 1 - jaccard_distance(used[0], used[1], top)
    return Comparison(values, low, high, floor, jsd, by_text, overlap, change, moved_p, names, layers, items, kind)


def _shared_items(first: Statistics, second: Statistics, group: str) -> list[Any]:
    if first.store is None or second.store is None:
        return []
    there = set(second.store.items(group))
    return [item for item in first.store.items(group) if item in there and not str(item).startswith("#")]


def _pooled(statistics: Statistics, group: str, kind: str) -> np.ndarray:
    return normalized(statistics.mean_distribution(kind, None, "token"))[statistics.groups.index(group)]


def _zero(sequences: GroupSequences) -> tuple[np.ndarray, np.ndarray]:
    """Distributions [n, L, E], 0 without tokens, and where there are some, float64 [n, L]."""
    q = sequences.distributions()
    seen = ~np.isnan(q).any(-1)
    return np.where(seen[..., None], q, 0.0), seen.astype(np.float64)


def _mean(q: tuple[np.ndarray, np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Mean distribution under weights of the items, float64 [L, E]; NaN without tokens."""
    values, seen = q
    return ratio(np.tensordot(weights, values, 1), (weights @ seen)[:, None])


def _divergence(one: np.ndarray, other: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return normalized_jensen_shannon(one, other, np.broadcast_to(sizes, one.shape[:-1]))


def _floor(q: tuple[np.ndarray, np.ndarray], sizes: np.ndarray, seed: int) -> np.ndarray:
    """Mean divergence of random halves of the items of one recording, float64 [L]."""
    rng, number = np.random.default_rng(seed), len(q[0])
    drawn = []
    for _ in range(_HALVES):
        half = np.zeros(number)
        half[rng.permutation(number)[: number // 2]] = 1
        drawn.append(_divergence(_mean(q, half), _mean(q, 1 - half), sizes))
    return np.mean(drawn, axis=0)


def _paired_t(changes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean change [L, E] over items [n, L, E], and adjusted p-values; 1 where no item changes."""
    from scipy import stats

    mean = mean_of_seen(changes)[0]
    seen = (~np.isnan(changes)).sum(0)
    error = np.sqrt(ratio(np.nansum((changes - mean) ** 2, axis=0), seen - 1) / np.maximum(seen, 1))
    constant = error <= 0
    t = np.abs(mean) / np.where(constant, 1.0, error)
    p = np.where(constant, np.where(mean == 0, 1.0, 0.0), 2 * stats.t.sf(t, np.maximum(seen - 1, 1)))
    p[np.arange(p.shape[1]) >= sizes[:, None]] = np.nan
    return mean, benjamini_hochberg(np.where(np.isnan(mean), np.nan, p))


# ---- several checkpoints


def specialization(
    statistics: Statistics,
    *,
    groups: Sequence[str] | None = None,
    phase: str | None = None,
    weigh: str = "alike",
) -> np.ndarray:
    """Share of the language's entropy that the expert tells, float64 [layer]: 0 nothing of the language, 1 all.

    ``(H(L) - H(L|E)) / H(L)`` of the table [language, expert] of selections, in bits [arXiv 2605.29714].

    Args:
        weigh: "alike" gives every language the same weight, so that unequal samples do not shift it; "tokens" takes
            the selections as they were counted, as the authors do.

    Raises ``AnalysisError`` for fewer than two groups.
    """
    names = pick_groups(statistics, groups, phase=phase)
    if len(names) < 2:
        raise AnalysisError("one language tells nothing from another: give two groups or more")
    if weigh not in ("alike", "tokens"):
        raise AnalysisError(f'weigh must be "alike" or "tokens", not {weigh!r}')
    rows = [statistics.groups.index(name) for name in names]
    source: Any = statistics
    counts = source.token_sum("counts", phase)[rows].astype(np.float64)
    return specialization_of(counts, weigh=weigh)


def specialization_of(counts: Any, *, weigh: str = "alike") -> np.ndarray:
    """``specialization`` of selections [language, expert] or [language, layer, expert]."""
    table = np.asarray(counts, dtype=np.float64)
    if weigh == "alike":
        table = np.nan_to_num(normalized(table))
    joint = ratio(table, table.sum((0, -1), keepdims=True))
    of_language = entropy_of(np.moveaxis(joint.sum(-1), 0, -1))
    given = (
        entropy_of(joint.reshape(-1))
        if joint.ndim == 2
        else entropy_of(np.moveaxis(joint, 1, 0).reshape(joint.shape[1], -1))
    )
    of_expert = entropy_of(joint.sum(0))
    return ratio(of_language - (given - of_expert), of_language)  # H(L|E) = H(L, E) - H(E)


def gap_experts(
    statistics: Statistics,
    *,
    alpha: float = 0.01,
    shared: int = 5,
    high_resource: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    phase: str | None = None,
) -> LanguageExperts:
    """Select experts by activation gap [arXiv 2605.29714]: the most using language leads the second by ``alpha``.

    With q the share of a language's selections of a layer that go to the expert, an expert belongs to the language
    with the largest q if it exceeds the second largest by ``alpha`` or more (published: 0.01). The score is the gap.

    Args:
        shared: so many experts of each layer with the largest mean q over ``high_resource`` languages are "shared"
            (published: 1, 3 or 5).
        high_resource: by default all groups.
    """
    names = pick_groups(statistics, groups, phase=phase)
    if len(names) < 2:
        raise AnalysisError("a gap lies between two languages: give two groups or more")
    if not 0 < alpha < 1:
        raise AnalysisError(f"alpha must lie between 0 and 1, not {alpha}")
    q = np.nan_to_num(statistics.mean_distribution("count", phase, "token"))  # type: ignore[arg-type]
    rows = [statistics.groups.index(name) for name in names]
    ordered = np.sort(q[rows], axis=0)
    gap, best = ordered[-1] - ordered[-2], q[rows].argmax(0)
    by_group = {
        name: selection(
            (best == place) & (gap >= alpha), gap, statistics, threshold=alpha, description=f"gap experts of {name}"
        )
        for place, name in enumerate(names)
    }
    rich = names if high_resource is None else pick_groups(statistics, high_resource, phase=phase)
    mean = q[[statistics.groups.index(name) for name in rich]].mean(0)
    common = selection(
        largest(mean, shared) & (mean > 0), mean, statistics, threshold=None, description="shared experts"
    )
    return LanguageExperts(by_group, common)


@dataclass(frozen=True, eq=False, repr=False)
class CheckpointSeries(Result):
    """Routing of languages over the checkpoints of a training [arXiv 2605.29714].

    Attributes:
        checkpoints: their names, in order.
        layers: names of the L layers.
        groups: the languages.
        jsd: float64 [checkpoint, layer], Jensen-Shannon divergence of selections in nats, mean over pairs of languages.
        jsd_without: the same without ``reference``; None without a reference, or with two languages.
        specialization: float64 [checkpoint, layer], see ``specialization``.
        moved: float64 [checkpoint, layer], divergence (nats) of each language from itself in the first checkpoint, mean
            over languages.
        gap_experts: int64 [checkpoint, layer], experts with an activation gap.
        reference: the language that ``jsd_without`` leaves out.
    """

    jsd: Annotated[np.ndarray, "checkpoint layer"]
    jsd_without: Annotated[np.ndarray | None, "checkpoint layer"]
    specialization: Annotated[np.ndarray, "checkpoint layer"]
    moved: Annotated[np.ndarray, "checkpoint layer"]
    gap_experts: Annotated[np.ndarray, "checkpoint layer"]
    checkpoints: tuple[str, ...]
    layers: tuple[str, ...]
    groups: tuple[str, ...]
    reference: str | None

    def tables(self) -> list[Table]:
        languages = f"{len(self.groups)} languages"
        shown = {
            "jsd": f"Jensen-Shannon divergence of selections (nats), mean over pairs of {languages}",
            "jsd_without": f"The same without {self.reference}",
            "specialization": "Language specialization: share of the language's entropy that the expert tells",
            "moved": "Divergence (nats) from the first checkpoint, mean over languages",
            "gap_experts": "Experts with an activation gap, mean over the layers of a column",
        }
        return [
            by_depth(self.checkpoints, getattr(self, name).astype(float), title=title)
            for name, title in shown.items()
            if getattr(self, name) is not None
        ]


def checkpoint_series(
    checkpoints: Mapping[str, Statistics],
    *,
    groups: Sequence[str] | None = None,
    reference: str | None = None,
    phase: str | None = None,
    weigh: str = "alike",
    alpha: float = 0.01,
) -> CheckpointSeries:
    """Follow divergence and specialization of languages over checkpoints, in the order given [arXiv 2605.29714].

    Args:
        checkpoints: name -> recording of the same texts.
        groups: the languages, two or more; by default those that all recordings have.
        reference: also give the divergence without pairs of this language.
        weigh: as in ``specialization``. alpha: as in ``gap_experts``.
    """
    recordings = list(checkpoints.values())
    if len(recordings) < 2:
        raise AnalysisError("a series needs two checkpoints or more")
    _check_alike(recordings)
    names = _common_groups(recordings, groups)
    if len(names) < 2:
        raise AnalysisError("a series compares languages: give two groups or more")
    if reference is not None and reference not in names:
        raise AnalysisError(f"no group {reference!r}: there are {', '.join(names)}")
    q = np.stack([_shares(one, names, phase) for one in recordings])  # [checkpoint, group, layer, expert]
    pairs = list(combinations(range(len(names)), 2))
    every = np.stack([jensen_shannon(q[:, i], q[:, j]) for i, j in pairs])
    others = [k for k, pair in enumerate(pairs) if reference is not None and names.index(reference) not in pair]
    gaps = [gap_experts(one, alpha=alpha, groups=names, phase=phase) for one in recordings]
    layers = tuple(recordings[0].layers)
    counted = [
        [sum(len(mine[layer]) for mine in one.values() if layer in mine) for layer in range(len(layers))]
        for one in gaps
    ]
    return CheckpointSeries(
        every.mean(0),
        every[others].mean(0) if others else None,
        np.stack([specialization(one, groups=names, phase=phase, weigh=weigh) for one in recordings]),
        jensen_shannon(q, np.broadcast_to(q[:1], q.shape)).mean(1),
        np.asarray(counted, np.int64),
        tuple(checkpoints),
        layers,
        names,
        reference,
    )


def _shares(statistics: Statistics, names: Sequence[str], phase: str | None) -> np.ndarray:
    rows = [statistics.groups.index(name) for name in names]
    return np.asarray(statistics.mean_distribution("count", phase, "token")[rows])

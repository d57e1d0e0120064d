"""Routing divergence between groups, per layer [arXiv 2510.04694, eq. 2 and appendix A.4].

The two estimators estimate different quantities. Paired, as in the paper: D of each sentence and its translation, then
the mean over sentences. Pooled: D of the groups' mean distributions, in which differences between single sentences
average out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Annotated, Any

import numpy as np

from moe_route.analysis.estimators import (
    MEASURE_NAMES,
    Correct,
    Measure,
    PlainEstimator,
    check_choices,
    compare_distributions,
    described,
    estimator,
    floor_of,
    pooled_values,
    refuse_corrections,
)
from moe_route.analysis.inputs import (
    AnalysisError,
    Frequencies,
    Pairing,
    Statistics,
    as_array,
    common_items,
    compared_with,
    group_index,
    normalized,
    pick_groups,
    shape_of,
    warn_of_padding,
)
from moe_route.analysis.measures import entropy_of, ratio
from moe_route.analysis.overlap import in_layers
from moe_route.analysis.resampling import batches, groups_of, tokens_per_sequence
from moe_route.analysis.result import Result, by_depth, mean_of_seen, token_column
from moe_route.analysis.stats import draw_items, interval_of, resampled_means
from moe_route.base.table import Table
from moe_route.recording import Trace
from moe_route.steering.layers import show_numbers

EVEN = 0.98
"""Share of its maximum from which the entropy of a layer's load counts as even."""

_NEEDS_PAIRS = "needs paired divergence: record(sequences=True) with items that pair sentences"


@dataclass(frozen=True, eq=False, repr=False)
class Divergence(Result, hidden=("pair_values",), derived=("even_layers",)):
    """Divergence of groups from one reference.

    Attributes:
        values: float64 [G, L]; 0 = routed alike. NaN where undefined (both uniform, or a layer without tokens).
        groups: the G groups compared, without the reference.
        reference: the group they are compared with.
        layers: names of the L layers.
        measure: "normalized_jsd" (in [0, 1]), "jsd" (nats), "cosine" or "jaccard" (both in [0, 1]).
        pairing: the estimator: "paired" (mean over parallel sequences) or "pooled" (of mean distributions).
        pairs: number of items compared, the same items for every group; 0 when pooled.
        undefined: int64 [G, L], number of pairs (at most 1 when pooled) left out because the measure is undefined.
        pair_values: float64 [G, pairs, L], of which ``values`` is the mean; None when pooled.
        kind: the router scores compared: "full", "topk" or "count".
        correct: the correction for short texts in ``values``, or None.
        raw: float64 [G, L], the values without the floor's correction; None if that was not asked for.
        floor: float64 [G, L], divergence between unrelated sentences of the group; None when pooled.
        reference_floor: float64 [L], the same of the reference; None when pooled.
        tokens: float64 [G], mean number of tokens per sequence; NaN where sequences were not counted.
        reference_tokens: the same of the reference.
        jsd: float64 [G, L], Jensen-Shannon divergence in nats of the same distributions, neither normalized nor less a
            floor; None for other measures than "normalized_jsd".
        load_entropy: float64 [L], entropy of the load over its maximum log E, the mean over groups and reference; 1 is
            an even load. For arrays that of the distributions; None if it is not known.
    """

    values: np.ndarray
    groups: tuple[str, ...]
    reference: str
    layers: tuple[str, ...]
    measure: str = "normalized_jsd"
    pairing: str = "pooled"
    pairs: int = 0
    undefined: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    pair_values: np.ndarray | None = None
    kind: str = "full"
    correct: str | None = None
    raw: np.ndarray | None = None
    floor: np.ndarray | None = None
    reference_floor: np.ndarray | None = None
    tokens: np.ndarray | None = None
    reference_tokens: float = float("nan")
    jsd: np.ndarray | None = None
    load_entropy: np.ndarray | None = None

    @property
    def even_layers(self) -> tuple[int, ...]:
        """Layers whose load is even: its entropy is at least ``EVEN`` of its maximum.

        There the normalized divergence is a small number over a small one and looks large: compare ``jsd``.
        """
        return () if self.load_entropy is None else tuple(np.flatnonzero(self.load_entropy >= EVEN).tolist())

    @property
    def expected_floor(self) -> np.ndarray:
        """float64 [G, L]: the mean of the floors of each group and of the reference.

        It is what two unrelated sentences of such lengths would give without any difference of language.
        """
        if self.floor is None or self.reference_floor is None:
            raise AnalysisError(f"a floor {_NEEDS_PAIRS}")
        return (self.floor + self.reference_floor) / 2

    @property
    def quantity(self) -> str:
        """What the values are, in words that the name of the reference continues."""
        return "divergence from"

    def of(self, group: str) -> np.ndarray:
        """float64 [L]: the divergence of one group."""
        if group not in self.groups:
            raise AnalysisError(f"no group {group!r}: there are {', '.join(self.groups)} (reference {self.reference})")
        return self.values[self.groups.index(group)]

    def interval(self, level: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap interval (low, high) of the mean over pairs, each float64 [G, L].

        Items are drawn with replacement, with all groups and layers of an item together. The interval holds for other
        sentences in the same languages. NaN with a single pair. Needs paired divergence.
        """
        if self.pair_values is None:
            raise AnalysisError(f"an interval {_NEEDS_PAIRS}")
        weights = draw_items(self.pairs, resamples, seed)
        ends = [interval_of(resampled_means(weights, values), self.pairs, level) for values in self.pair_values]
        low, high = np.stack(ends, axis=1)
        return low, high

    def columns(self) -> dict[str, Any]:
        """``group``, ``reference``, ``layer``, ``router`` (the layer's name), ``divergence`` and ``undefined``.

        If they are known, also ``raw``, ``floor``, ``reference_floor``, ``tokens`` (per sequence of the group), ``jsd``
        (nats) and ``load_entropy`` (of the layer).
        """
        columns = self.over(
            "group layer",
            {
                "divergence": self.values,
                "undefined": self.undefined,
                "raw": self.raw,
                "floor": self.floor,
                "reference_floor": self.reference_floor,
                "tokens": None if self.tokens is None else self.tokens[:, None],
                "jsd": self.jsd,
                "load_entropy": self.load_entropy,
            },
        )
        return {"group": columns["group"], "reference": self.reference, **columns}

    def tables(self) -> list[Table]:
        missing = int(self.undefined.sum())
        notes = [f"{missing} undefined (both uniform, or nothing seen), left out"] if missing else []
        how = described(self.pairing, self.pairs, self.kind, self.correct)
        title = f"{MEASURE_NAMES[self.measure]} from {self.reference}, {how}"
        before = token_column(self.tokens)
        if np.isfinite(self.reference_tokens):
            notes.append(f"tokens: mean number per sequence; {self.reference_tokens:.1f} in {self.reference}")
        after = {}
        if self.floor is not None:
            after["mean"] = mean_of_seen(self.values, 1)[0].tolist()
        if self.floor is not None and self.raw is None:
            after["floor"] = mean_of_seen(self.expected_floor, 1)[0].tolist()
            notes.append("mean, floor: over all layers; floor: between unrelated sentences of one language")
        if self.jsd is not None:
            after["nats"] = mean_of_seen(self.jsd, 1)[0].tolist()
            notes.append("nats: Jensen-Shannon divergence, not normalized, mean over all layers")
        even = self.even_layers if self.jsd is not None else ()
        if even:
            notes.append(
                f"*: with layers whose load is even ({show_numbers(even)}: entropy {EVEN:g} of its maximum or more), "
                "where the\nnormalized divergence is large however little differs: read the next table"
            )
        how_shown: dict[str, Any] = {"before": before, "marked": even}
        shown = [by_depth(self.groups, self.values, title=title, note="\n".join(notes), after=after, **how_shown)]
        if even:
            assert self.jsd is not None
            name = "Jensen-Shannon divergence in nats, not normalized"
            shown.append(by_depth(self.groups, self.jsd, title=name, marked=even))
        if self.raw is not None:
            shown.append(by_depth(self.groups, self.raw, title="as measured"))
            rows = np.concatenate([self.reference_floor[None], self.floor])  # type: ignore[index]
            title = "floor: between unrelated sentences of one language"
            shown.append(by_depth((self.reference, *self.groups), rows, title=title))
        return shown


def divergence(
    statistics: Frequencies,
    reference: str | Frequencies,
    *,
    groups: Sequence[str] | str | None = None,
    pairing: Pairing = "paired",
    min_common: float = 0.5,
    measure: Measure = "normalized_jsd",
    kind: str = "full",
    phase: str | None = None,
    by: str = "sequence",
    top: int | None = None,
    num_experts: int | Sequence[int] | None = None,
    correct: Correct | None = None,
    trace: Trace | None = None,
    seed: int = 0,
) -> Divergence:
    """Measure the divergence of groups from a reference, per layer [arXiv 2510.04694, eq. 2].

    Args:
        statistics: ``RoutingStatistics``; or an array [layer, expert] of probability, or [item, layer, expert] whose
            items pair with those of ``reference``. Rows need not be normalized.
        reference: the name of the reference group; or an array of the same shape.
        groups: groups to compare; by default all others.
        pairing: for statistics. "paired": D of every parallel sequence, then the mean, over the items that all of these
            groups have (needs ``record(sequences=True)``). "pooled": D of the mean distributions, which estimates
            another quantity and is mostly lower. "auto": paired if possible, else pooled with a warning that gives the
            reason.
        min_common: smallest allowed share of common items, in (0, 1]: the number of items that all groups have, divided
            by the number of sequences of the largest group. Below it there is no paired divergence.
        measure: "normalized_jsd" (the paper's, in [0, 1]), "jsd" (nats), "cosine" (1 - cos), "jaccard" (of the ``top``
            experts).
        kind: the router scores used: "full", "topk" or "count".
        phase, by: for pooled distributions: "prefill", "decode" or both; mean over "sequence" or "token".
        top: number of experts per group for "jaccard"; by default the layer's top-k.
        num_experts: for arrays, experts of each layer if layers are zero-padded. Without it, experts at the end that
            are never used cause a warning.
        correct: what to do about short texts, for paired divergence. None: only report the floor. "floor": subtract
            the mean of the two floors, where the floor of a group is the divergence between unrelated sentences of that
            group. "rarefy": compare as many selections of each sequence as the shortest translation of its item has
            (mean of up to 10 draws). "jackknife": remove the bias of first order. The last two need ``kind="count"``;
            "rarefy+floor" and "jackknife+floor" then subtract the floor, measured in the same way.
        trace: for "rarefy", the trace of the same texts in all layers: whole tokens are drawn. Without it, selections
            are drawn one by one, since sums do not say which belong to one token.
        seed: of the floor's derangements and of the draws.

    Raises ``AnalysisError`` for unknown or empty groups, sequences that do not pair, values that are not a
    distribution, and corrections that need what was not recorded.
    """
    check_choices(measure, correct)
    if not isinstance(statistics, Statistics):
        refuse_corrections(correct, trace)
        return _of_arrays(statistics, reference, measure, top, num_experts)
    if not isinstance(reference, str):
        raise AnalysisError("name the reference group of the statistics, or pass two arrays")
    group_index(statistics, reference, "reference group", phase)
    names = compared_with(statistics, groups, reference, phase)
    items = common_items(statistics, (reference, *names), pairing, min_common, phase, by)
    if items is None:
        refuse_corrections(correct, trace)
        how = compare_distributions(measure, np.asarray(statistics.num_experts), top, statistics.top_k)
        return _pooled(statistics, reference, names, how, kind, phase, by)
    if correct is not None and "floor" in correct and len(items) < 2:
        raise AnalysisError("a floor compares unrelated sentences: record two common items or more, or leave it out")
    compared = (reference, *names)
    how = estimator(
        statistics, compared, items, measure=measure, kind=kind, top=top, correct=correct, trace=trace, seed=seed
    )
    return _paired(statistics, reference, names, items, how, kind, correct, seed)


def _paired(
    statistics: Statistics,
    reference: str,
    groups: tuple[str, ...],
    items: Sequence[Any],
    measure: PlainEstimator,
    kind: str,
    correct: str | None,
    seed: int,
) -> Divergence:
    layers = tuple(statistics.layers)
    pairs = np.empty((len(groups), len(items), len(layers)))
    plain = _not_normalized(measure)
    jsd = np.empty((len(groups), len(layers)))
    floors, tokens = np.empty_like(pairs), np.empty(len(groups))
    first = next(groups_of(statistics, (reference,), items, kind))
    base = measure.prepare(first)
    base_floor = floor_of(measure, base, seed)
    for g, one in enumerate(groups_of(statistics, groups, items, kind)):
        prepared = measure.prepare(one)
        pairs[g] = measure.compare(base, prepared)
        if plain is not None:
            jsd[g] = mean_of_seen(plain.compare(base, prepared))[0]
        floors[g] = floor_of(measure, prepared, seed)
        tokens[g] = one.mean_tokens
    values, undefined = mean_of_seen(pairs, 1)
    floor, reference_floor = mean_of_seen(floors, 1)[0], mean_of_seen(base_floor)[0]
    raw = None
    if correct is not None and "floor" in correct:
        raw, values = values, values - (floor + reference_floor) / 2
        pairs = pairs - (floors + base_floor) / 2
    return Divergence(
        values,
        groups,
        reference,
        layers,
        measure.measure,
        "paired",
        len(items),
        undefined,
        pairs,
        kind=kind,
        correct=correct,
        raw=raw,
        floor=floor,
        reference_floor=reference_floor,
        tokens=tokens,
        reference_tokens=first.mean_tokens,
        jsd=None if plain is None else jsd,
        load_entropy=_load_entropy(statistics, (reference, *groups), None),
    )


def _not_normalized(measure: PlainEstimator) -> PlainEstimator | None:
    """The same estimator of the Jensen-Shannon divergence in nats; None for measures that are not its ratio."""
    return replace(measure, measure="jsd") if measure.measure == "normalized_jsd" else None


def _load_entropy(statistics: Statistics, groups: Sequence[str], phase: str | None) -> np.ndarray | None:
    """Entropy of the load of each layer over log E, float64 [L], the mean over these groups; None without counts."""
    if "counts" not in getattr(statistics, "metrics", ("counts",)):
        return None
    rows = [statistics.groups.index(group) for group in groups]
    load = normalized(statistics.mean_distribution("count", phase, "token")[rows])
    return _over_maximum(load, np.asarray(statistics.num_experts))


def _over_maximum(load: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return ratio(mean_of_seen(entropy_of(load))[0], np.log(sizes))


def _pooled(
    statistics: Statistics,
    reference: str,
    groups: tuple[str, ...],
    measure: PlainEstimator,
    kind: str,
    phase: str | None,
    by: str,
) -> Divergence:
    values = pooled_values(statistics, reference, groups, measure, kind, phase, by)
    plain = _not_normalized(measure)
    jsd = None if plain is None else pooled_values(statistics, reference, groups, plain, kind, phase, by)
    undefined = np.isnan(values).astype(np.int64)
    tokens = tokens_per_sequence(statistics, (reference, *groups))
    return Divergence(
        values,
        groups,
        reference,
        tuple(statistics.layers),
        measure.measure,
        "pooled",
        0,
        undefined,
        kind=kind,
        tokens=tokens[1:],
        reference_tokens=float(tokens[0]),
        jsd=jsd,
        load_entropy=_load_entropy(statistics, (reference, *groups), phase),
    )


def _of_arrays(
    first: Any, second: Any, measure: str, top: int | None, num_experts: int | Sequence[int] | None
) -> Divergence:
    if isinstance(second, (str, Statistics)):
        raise AnalysisError("pass statistics and the name of a group, or two arrays")
    q1, q2 = as_array(first, "the first array"), as_array(second, "the second array")
    if q1.shape != q2.shape:
        raise AnalysisError(f"the arrays must have one shape, not {list(q1.shape)} and {list(q2.shape)}")
    sizes = shape_of(q1, num_experts)
    shape_of(q2, num_experts)
    if num_experts is None:
        warn_of_padding((q1, q2), stacklevel=3)
    how = compare_distributions(measure, sizes, top, None)
    ends = [how.of_distributions(normalized(q)) for q in (q1, q2)]
    values, plain = how.of_pairs(*ends), _not_normalized(how)
    nats = None if plain is None else plain.of_pairs(*ends)
    names = (("first",), "second", tuple(map(str, range(q1.shape[-2]))), measure)
    load = mean_of_seen(np.stack([end.q.reshape(-1, *end.q.shape[-2:]) for end in ends]), 1)[0]
    flat = _over_maximum(load, sizes)
    if q1.ndim == 2:
        undefined = np.isnan(values)[None].astype(np.int64)
        jsd = None if nats is None else nats[None]
        return Divergence(values[None], *names, "pooled", 0, undefined, jsd=jsd, load_entropy=flat)
    mean, undefined = mean_of_seen(values)
    jsd = None if nats is None else mean_of_seen(nats)[0][None]
    how_many = ("paired", len(values), undefined[None], values[None])
    return Divergence(mean[None], *names, *how_many, jsd=jsd, load_entropy=flat)


# ---- of all pairs of groups

_MATRIX_BYTES = 1 << 30  # the values of single pairs are kept for a matrix up to this size


@dataclass(frozen=True, eq=False, repr=False)
class DivergenceMatrix(Result, hidden=("pair_values",)):
    """Divergence of all pairs of groups.

    ``values`` is float64 [L, G, G], symmetric, 0 on the diagonal. ``pairs`` is the number of items compared, the same
    items for all pairs; 0 when pooled. ``kind``, ``correct``, ``floor`` [G, L] and ``tokens`` [G] are those of
    ``Divergence``. ``pair_values`` is float64 [G (G - 1) / 2, pairs, L], of the pairs of groups in the order of
    ``itertools.combinations``; None when pooled, or if it were larger than 1 GiB.
    """

    values: Annotated[np.ndarray, "layer group other as divergence"]
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    measure: str = "normalized_jsd"
    pairing: str = "pooled"
    pairs: int = 0
    kind: str = "full"
    correct: str | None = None
    floor: np.ndarray | None = None
    tokens: np.ndarray | None = None
    pair_values: np.ndarray | None = None

    def mean(self, layers: Sequence[int] | None = None) -> np.ndarray:
        """float64 [G, G]: the mean over these layers (by default all), NaN where no layer is defined."""
        return mean_of_seen(self.values[in_layers(len(self.values), layers)[:, 0]])[0]

    def interval(
        self, level: float = 0.95, *, layers: Sequence[int] | None = None, resamples: int = 1000, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap interval (low, high) of ``mean(layers)`` for other sentences, float64 [G, G] each.

        Items are drawn with replacement, with all groups and layers of an item together. Needs paired divergence.
        """
        if self.pair_values is None:
            raise AnalysisError(
                "the values of single sentences are not here: measure paired divergence, of fewer groups or layers "
                "(statistics.select(layers=)) if it is a large matrix"
            )
        columns = np.flatnonzero(in_layers(len(self.layers), layers))
        means = np.stack([mean_of_seen(values[:, columns], 1)[0] for values in self.pair_values], axis=1)
        ends = np.zeros((2, len(self.groups), len(self.groups)))
        of_pairs = interval_of(resampled_means(draw_items(self.pairs, resamples, seed), means), self.pairs, level)
        rows, others = np.triu_indices(len(self.groups), 1)
        ends[:, rows, others] = ends[:, others, rows] = np.stack(of_pairs)
        return ends[0], ends[1]

    def tables(self) -> list[Table]:
        how = described(self.pairing, self.pairs, self.kind, self.correct)
        title = f"{MEASURE_NAMES[self.measure]} of all pairs, {how}, mean over {len(self.layers)} layers"
        tokens = token_column(self.tokens)
        columns: dict[str, list[Any]] = {**dict(zip(self.groups, self.mean().tolist(), strict=True)), **tokens}
        notes = ["tokens: mean number per sequence"] if tokens else []
        if self.floor is not None:
            columns["floor"] = mean_of_seen(self.floor, 1)[0].tolist()
            notes.append("floor: between unrelated sentences of one language")
        rows = [list(row) for row in zip(self.groups, *columns.values(), strict=True)]
        return [Table(["", *columns], rows, title, "; ".join(notes))]


def divergence_matrix(
    statistics: Statistics,
    *,
    groups: Sequence[str] | None = None,
    pairing: Pairing = "paired",
    min_common: float = 0.5,
    measure: Measure = "normalized_jsd",
    kind: str = "full",
    phase: str | None = None,
    by: str = "sequence",
    top: int | None = None,
    correct: Correct | None = None,
    trace: Trace | None = None,
    seed: int = 0,
) -> DivergenceMatrix:
    """Measure the divergence of all pairs of groups, with the arguments and errors of ``divergence``.

    Paired divergence uses the items that all groups have.
    """
    check_choices(measure, correct)
    names = pick_groups(statistics, groups, phase=phase)
    if len(names) < 2:
        raise AnalysisError("a matrix needs two groups or more")
    items = common_items(statistics, names, pairing, min_common, phase, by)
    if items is None:
        refuse_corrections(correct, trace)
        return _pooled_matrix(statistics, names, measure, kind, phase, by, top)
    how = estimator(
        statistics, names, items, measure=measure, kind=kind, top=top, correct=correct, trace=trace, seed=seed
    )
    return _paired_matrix(statistics, names, items, how, kind, correct, seed)


def _pooled_matrix(
    statistics: Statistics,
    names: tuple[str, ...],
    measure: str,
    kind: str,
    phase: str | None,
    by: str,
    top: int | None,
) -> DivergenceMatrix:
    how = compare_distributions(measure, np.asarray(statistics.num_experts), top, statistics.top_k)
    values = np.zeros((len(statistics.layers), len(names), len(names)))
    for i, reference in enumerate(names[:-1]):
        row = pooled_values(statistics, reference, names[i + 1 :], how, kind, phase, by)
        values[:, i, i + 1 :] = values[:, i + 1 :, i] = row.T
    tokens = tokens_per_sequence(statistics, names)
    return DivergenceMatrix(values, names, tuple(statistics.layers), measure, "pooled", kind=kind, tokens=tokens)


def _paired_matrix(
    statistics: Statistics,
    names: tuple[str, ...],
    items: Sequence[Any],
    how: PlainEstimator,
    kind: str,
    correct: str | None,
    seed: int,
) -> DivergenceMatrix:
    shape = len(items), len(statistics.layers)
    values = np.zeros((shape[1], len(names), len(names)))
    floors, tokens = np.empty((len(names), *shape)), np.empty(len(names))
    number = len(names) * (len(names) - 1) // 2
    pairs = np.empty((number, *shape)) if number * shape[0] * shape[1] * 8 <= _MATRIX_BYTES else None
    places = {(names[i], names[j]): place for place, (i, j) in enumerate(combinations(range(len(names)), 2))}

    def read(portion: Sequence[str]) -> list[tuple[str, Any]]:
        groups = []
        for one in groups_of(statistics, portion, items, kind):
            prepared, g = how.prepare(one), names.index(one.group)
            floors[g], tokens[g] = floor_of(how, prepared, seed), one.mean_tokens
            groups.append((one.group, prepared))
        return groups

    portions = batches(statistics, names, len(items))
    for number, portion in enumerate(portions):
        here = read(portion)
        for later in portions[number:]:
            others = here if later is portion else read(later)
            for (name, first), (other, second) in product(here, others):
                if (name, other) in places:
                    of_pair = how.compare(first, second)
                    i, j = names.index(name), names.index(other)
                    if correct is not None and "floor" in correct:
                        of_pair -= (floors[i] + floors[j]) / 2
                    values[:, i, j] = values[:, j, i] = mean_of_seen(of_pair)[0]
                    if pairs is not None:
                        pairs[places[name, other]] = of_pair
    return DivergenceMatrix(
        values,
        names,
        tuple(statistics.layers),
        how.measure,
        "paired",
        len(items),
        kind=kind,
        correct=correct,
        floor=mean_of_seen(floors, 1)[0],
        tokens=tokens,
        pair_values=pairs,
    )

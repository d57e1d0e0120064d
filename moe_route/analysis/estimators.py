"""Estimators of the divergence of two sequences: plain, by the jackknife, and of equally many tokens (rarefied).

A distribution that is estimated from few tokens looks sharper than it is. So even two samples of one distribution
diverge, and the fewer tokens they have, the more. From counts of selections (how many tokens of a sequence chose each
expert) this bias can be estimated. Router scores over all experts (kind "full") have no such count; for them the floor
of ``analysis.divergence`` is the means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError, Statistics, normalized
from moe_route.analysis.measures import (
    cosine_distance,
    entropy_of,
    jaccard_distance,
    normalized_jensen_shannon,
    ratio,
)
from moe_route.analysis.resampling import GroupSequences, blocks, groups_of
from moe_route.recording import Trace

Measure = Literal["normalized_jsd", "jsd", "cosine", "jaccard"]
MEASURES = ("normalized_jsd", "jsd", "cosine", "jaccard")
_CORRECTED = {
    "floor": "less the floor",
    "rarefy": "of equally many tokens (rarefied)",
    "jackknife": "by the jackknife",
    "rarefy+floor": "of equally many tokens (rarefied), less the floor",
    "jackknife+floor": "by the jackknife, less the floor",
}
MEASURE_NAMES = {
    "normalized_jsd": "entropy-normalized Jensen-Shannon divergence",
    "jsd": "Jensen-Shannon divergence (nats)",
    "cosine": "cosine distance",
    "jaccard": "Jaccard distance of the top experts",
}
Correct = Literal["floor", "rarefy", "jackknife", "rarefy+floor", "jackknife+floor"]
CORRECTIONS = ("floor", "rarefy", "jackknife", "rarefy+floor", "jackknife+floor")
PARTNERS = 4  # unrelated sentences that each sentence is compared with for the floor, fewer if there are many
COMPARISONS = 400  # enough for a mean over sentences
DRAWS = 10  # samples of equally many tokens that are averaged, fewer if there are many sentences
_NEAR_UNIFORM = 1e-4  # below this bound, differences of entropies are too inexact to be divided by it


def check_choices(measure: str, correct: str | None) -> None:
    """Refuse measures and corrections that do not exist."""
    if measure not in MEASURES:
        raise AnalysisError(f"no measure {measure!r}: use one of {', '.join(MEASURES)}")
    if correct not in (None, *CORRECTIONS):
        raise AnalysisError(f"no correction {correct!r}: use one of {', '.join(CORRECTIONS)}, or None")


def refuse_corrections(correct: str | None, trace: Any) -> None:
    """Refuse corrections where single sequences are not compared."""
    if correct is not None or trace is not None:
        raise AnalysisError(
            "corrections compare single sequences: pass statistics of record(sequences=True), with pairing='paired'"
        )


def described(pairing: str, pairs: int, kind: str, correct: str | None) -> str:
    """How a divergence was estimated, in words."""
    parts = [f"paired over {pairs} items" if pairing == "paired" else "pooled"]
    parts += [{"topk": "of the chosen experts' weights", "count": "of selections"}[kind]] if kind != "full" else []
    return ", ".join([*parts, *([_CORRECTED[correct]] if correct else [])])


@dataclass(frozen=True)
class Prepared:
    """What is computed once per group: distributions (or counts) float64 [n, L, E], and their entropies [n, L]."""

    q: np.ndarray
    entropy: np.ndarray | None = None

    def rows(self, which: Any) -> Prepared:
        return Prepared(self.q[which], None if self.entropy is None else self.entropy[which])


def compare_distributions(
    measure: str, sizes: np.ndarray, top: int | None, top_k: Sequence[int] | None
) -> PlainEstimator:
    """The measure, for distributions [..., L, E] of layers with these numbers of experts.

    Raises ``AnalysisError`` if "jaccard" has no number of experts to compare, or one that takes all experts.
    """
    chosen = None
    if measure == "jaccard":
        if top is None and top_k is None:
            raise AnalysisError('measure="jaccard" needs top, the number of experts to compare')
        chosen = np.minimum(np.asarray(top_k if top is None else top), sizes)
        if (chosen < 1).any():
            raise AnalysisError(f"top must be 1 or more, not {top}")
        if top is not None and top >= sizes.max():
            raise AnalysisError(
                f"top must be below {sizes.max()}, the number of experts, or nothing differs; not {top}"
            )
    return PlainEstimator(measure, sizes, chosen)


@dataclass(frozen=True)
class PlainEstimator:
    """The measure between the recorded distributions of two sequences."""

    measure: str
    sizes: np.ndarray
    top: np.ndarray | None = None

    def prepare(self, one: GroupSequences) -> list[Prepared]:
        """Prepare the sequences of a group: one element per sample whose values are averaged."""
        return [self.of_distributions(one.distributions())]

    def of_distributions(self, q: np.ndarray) -> Prepared:
        if self.measure not in ("normalized_jsd", "jsd"):
            return Prepared(q)
        entropy = np.empty(q.shape[:-1])
        for part in blocks(q.shape):
            entropy[part] = entropy_of(q[part])
        return Prepared(q, entropy)

    def compare(self, first: Sequence[Prepared], second: Sequence[Prepared], order: Any = None) -> np.ndarray:
        """The measure of each item of ``first`` and of ``second``, whose items take another order if one is given.

        float64 [n, L], the mean over the samples.
        """
        total = np.zeros(first[0].q.shape[:-1])
        for one, other in zip(first, second, strict=True):
            for part in blocks(one.q.shape):
                total[part] += self.of_pairs(one.rows(part), other.rows(part if order is None else order[part]))
        return total / len(first)

    def of_pairs(self, first: Prepared, second: Prepared) -> np.ndarray:
        """float64 [n, L] of a few items."""
        if self.measure == "cosine":
            return cosine_distance(first.q, second.q)
        if self.measure == "jaccard":
            assert self.top is not None
            return jaccard_distance(first.q, second.q, self.top)
        assert first.entropy is not None
        assert second.entropy is not None
        mean = (first.entropy + second.entropy) / 2
        values = np.maximum(entropy_of((first.q + second.q) * 0.5) - mean, 0.0)
        bound = np.log(self.sizes) - mean if self.measure == "normalized_jsd" else np.ones(mean.shape)
        near = bound < _NEAR_UNIFORM
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.minimum(values / bound, 1.0)
        if near.any():  # here the relative entropies are added up, without cancellation
            sizes = np.broadcast_to(self.sizes, near.shape)[near]
            values[near] = normalized_jensen_shannon(first.q[near], second.q[near], sizes)
        return values


@dataclass(frozen=True)
class JackknifeEstimator(PlainEstimator):
    """The measure by the jackknife over single selections."""

    def prepare(self, one: GroupSequences) -> list[Prepared]:
        return [Prepared(one.values.astype(np.float64))]

    def of_pairs(self, first: Prepared, second: Prepared) -> np.ndarray:
        sizes = np.broadcast_to(self.sizes, first.q.shape[:-1])
        return jackknife_divergence(first.q, second.q, sizes if self.measure == "normalized_jsd" else None)


@dataclass(frozen=True)
class RarefiedEstimator(PlainEstimator):
    """The measure between equally many selections of each sequence, the mean over several draws.

    ``selections`` int64 [n, L] is the number drawn of each item. ``tokens_of`` holds the choices of single tokens by
    (item, group), from a trace; then ``selections`` counts tokens, and whole tokens are drawn.
    """

    selections: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    seed: int = 0
    items: tuple[Any, ...] = ()
    tokens_of: dict[tuple[Any, str], np.ndarray] | None = None

    def prepare(self, one: GroupSequences) -> list[Prepared]:
        rng = np.random.default_rng([self.seed, *one.group.encode()])
        draws = min(DRAWS, -(-COMPARISONS // max(len(one.tokens), 1)))
        return [self.of_distributions(normalized(self._drawn(one, rng).astype(np.float64))) for _ in range(draws)]

    def _drawn(self, one: GroupSequences, rng: np.random.Generator) -> np.ndarray:
        if self.tokens_of is None:
            return rarefied(one.values, self.selections, rng)
        drawn: np.ndarray = np.zeros(one.values.shape, np.int64)
        layers = np.arange(drawn.shape[1])[:, None]
        for row, item in enumerate(self.items):
            ids = self.tokens_of[item, one.group]
            ids = ids[rng.permutation(len(ids))[: int(self.selections[row, 0])]]
            slots = np.broadcast_to(layers, ids.shape)
            np.add.at(drawn[row], (slots[ids >= 0], ids[ids >= 0]), 1)
        return drawn


def estimator(
    statistics: Statistics,
    groups: Sequence[str],
    items: Sequence[Any],
    *,
    measure: str,
    kind: str,
    top: int | None,
    correct: str | None,
    trace: Trace | None,
    seed: int,
) -> PlainEstimator:
    """The estimator that ``correct`` asks for; raises ``AnalysisError`` if what it needs was not recorded."""
    plain = compare_distributions(measure, np.asarray(statistics.num_experts), top, statistics.top_k)
    if trace is not None and (correct is None or "rarefy" not in correct):
        raise AnalysisError('a trace is read only for correct="rarefy": leave trace out')
    if correct is None or correct == "floor":
        return plain
    if kind != "count":
        raise AnalysisError(
            f'correct="{correct}" works on whole selections, and kind="{kind}" is a mean of router scores: pass '
            'kind="count" (--kind count), or correct="floor", which works for every kind'
        )
    if correct.startswith("jackknife"):
        if measure not in ("normalized_jsd", "jsd"):
            raise AnalysisError(f'the jackknife is of "normalized_jsd" and "jsd", not of {measure!r}: use "rarefy"')
        return JackknifeEstimator(plain.measure, plain.sizes)
    tokens_of = None if trace is None else _tokens_of(statistics, trace, groups, items)
    return RarefiedEstimator(
        plain.measure,
        plain.sizes,
        plain.top,
        selections=_smallest(statistics, groups, items, tokens_of),
        seed=seed,
        items=tuple(items),
        tokens_of=tokens_of,
    )


def pooled_values(
    statistics: Statistics,
    reference: str,
    groups: Sequence[str],
    measure: PlainEstimator,
    kind: str,
    phase: str | None,
    by: str,
) -> np.ndarray:
    """The measure between the mean distributions of these groups and of the reference, float64 [G, L]."""
    q = normalized(statistics.mean_distribution(kind, phase, by))
    rows = [statistics.groups.index(group) for group in groups]
    base = q[[statistics.groups.index(reference)] * len(rows)]
    return measure.of_pairs(measure.of_distributions(base), measure.of_distributions(q[rows]))


def _smallest(
    statistics: Statistics,
    groups: Sequence[str],
    items: Sequence[Any],
    tokens_of: dict[tuple[Any, str], np.ndarray] | None,
) -> np.ndarray:
    """The smallest number of selections that any group has of each item, int64 [n, L]; of tokens with a trace."""
    if tokens_of is not None:
        fewest = [min(len(tokens_of[item, group]) for group in groups) for item in items]
        return np.repeat(np.array(fewest)[:, None], len(statistics.layers), axis=1)
    smallest: np.ndarray | None = None
    for one in groups_of(statistics, groups, items, "count"):
        here = one.values.sum(-1, dtype=np.int64)
        smallest = here if smallest is None else np.minimum(smallest, here)
    assert smallest is not None
    return smallest


def _tokens_of(
    statistics: Statistics, trace: Trace, groups: Sequence[str], items: Sequence[Any]
) -> dict[tuple[Any, str], np.ndarray]:
    """(item, group) -> the experts that its tokens chose, int [tokens, L, k], in the layers of the statistics."""
    if trace.truncated:
        raise AnalysisError("the trace was cut at its limit: record it again with a larger trace_limit")
    missing = [layer for layer in statistics.layers if layer not in trace.layers]
    if missing:
        raise AnalysisError(f"the trace lacks layer {missing[0]}: record(trace=True) traces all layers")
    columns = [trace.layers.index(layer) for layer in statistics.layers]
    place = {name: index for index, name in enumerate(trace.groups)}
    numbers = {item: number for number, item in enumerate(trace.items)}
    order = np.lexsort((trace.group, trace.sequence))
    keys = trace.sequence[order].astype(np.int64) * max(len(trace.groups), 1) + trace.group[order]
    chosen = {}
    for (sequence, item), group in ((pair, group) for pair in enumerate(trace.items) for group in groups):
        key = sequence * max(len(trace.groups), 1) + place.get(group, -1)
        rows = order[np.searchsorted(keys, key) : np.searchsorted(keys, key, side="right")]
        if group in place and len(rows):
            chosen[item, group] = trace.ids[rows][:, columns].astype(np.int64)
    lacking = [(item, group) for item in items for group in groups if (item, group) not in chosen]
    if lacking or not numbers:
        raise AnalysisError(f"the trace lacks item {lacking[0][0]!r} of group {lacking[0][1]!r}: trace the same texts")
    return chosen


def floor_of(measure: PlainEstimator, prepared: Sequence[Prepared], seed: int) -> np.ndarray:
    """Divergence between unrelated sentences of one group, as a value per item, float64 [n, L].

    Each item is compared with up to ``PARTNERS`` others. The mean over items is the floor. The value of an item is
    twice the mean over its comparisons minus the floor, so that resampled items give the spread of a mean over pairs
    [the projection of a U-statistic, Hoeffding 1948]. NaN with a single item.
    """
    items = len(prepared[0].q)
    if items < 2:
        return np.full(prepared[0].q.shape[:-1], np.nan)
    total, count = np.zeros((2, *prepared[0].q.shape[:-1]))
    for partners in random_partners(items, min(PARTNERS, -(-COMPARISONS // items)), seed):
        values = measure.compare(prepared, prepared, partners)
        for rows in (slice(None), partners):  # partners is a permutation: no item comes twice
            total[rows] += np.nan_to_num(values)
            count[rows] += ~np.isnan(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * total / count - total.sum(0) / count.sum(0)


# ---- corrections of counts for short texts


def miller_madow(counts: Any, top_k: Any = 1) -> np.ndarray:
    """Entropy of counts in nats, with the first-order bias of the plain estimate added back [Miller 1955].

    ``H + (S - k) / (2 N)``: S is the number of experts that were chosen, N the number of selections, and k = ``top_k``
    the number of experts that a token chooses. With k = 1 it is Miller's formula. With more, the k experts of a token
    differ, so the count of expert e varies by ``N p_e (1 - k p_e)`` instead of ``N p_e (1 - p_e)``.

    Args:
        counts: [..., E], whole numbers from 0.
        top_k: k, broadcast against the leading axes.

    Returns float64 [...]; NaN without selections.
    """
    a = _checked(counts)
    total = a.sum(-1)
    added = ratio((a > 0).sum(-1) - np.asarray(top_k), 2.0 * total, empty=0.0)
    return entropy_of(ratio(a, total[..., None])) + np.maximum(added, 0.0)


def jackknife_entropy(counts: Any) -> np.ndarray:
    """Entropy of counts in nats by the jackknife over single selections [Zahl 1977].

    ``N H - (N - 1) mean_i H_(-i)``, where H_(-i) leaves out selection i of N. All selections count as independent
    draws: with more than one expert per token that adds a little too much, about ``(k - 1) / (2 N)``.

    Args:
        counts: [..., E], whole numbers from 0.

    Returns float64 [...]; NaN for fewer than two selections.
    """
    a = _checked(counts)
    total = a.sum(-1)
    left_out = _entropies_without_one(a)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(a > 0, a * left_out, 0.0).sum(-1) / total
        corrected = total * entropy_of(a / total[..., None]) - (total - 1) * mean
    return np.where(total > 1, corrected, np.nan)


def jackknife_divergence(first: Any, second: Any, num_experts: Any = None) -> np.ndarray:
    """Divergence D of two samples by the jackknife over the single selections of both.

    ``D - (N1 - 1) (mean_i D_(-i) - D) - (N2 - 1) (mean_j D_(-j) - D)``, where D_(-i) leaves out selection i of the
    first sample and D_(-j) selection j of the second. It can fall below 0. The note on independent draws of
    ``jackknife_entropy`` applies.

    Args:
        first, second: counts [..., E], whole numbers from 0.
        num_experts: number of experts, broadcast against the leading axes, for the entropy-normalized D. Without it,
            the plain Jensen-Shannon divergence in nats.

    Returns float64 [...]; NaN with fewer than two selections in a sample, or where D is undefined.
    """
    a, b = _checked(first), _checked(second)
    if a.shape[-1] != b.shape[-1]:
        raise AnalysisError(f"the samples count {a.shape[-1]} and {b.shape[-1]} experts: give both for the same layer")
    if num_experts is not None and ((np.maximum(*np.broadcast_arrays(a, b)) > 0).sum(-1) > num_experts).any():
        raise AnalysisError("more experts were chosen than num_experts: check num_experts")
    totals = [one.sum(-1) for one in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        p, q = (one / total[..., None] for one, total in zip((a, b), totals, strict=True))
        h_p, h_q = entropy_of(p), entropy_of(q)
        most = None if num_experts is None else np.log(np.asarray(num_experts, dtype=np.float64))
        corrected = plain = _normalized(entropy_of((p + q) / 2), (h_p + h_q) / 2, most)
        for (one, total), other, h_other in (((a, totals[0]), q, h_q), ((b, totals[1]), p, h_p)):
            mean_entropy = (_entropies_without_one(one) + h_other[..., None]) / 2
            middle = _entropies_without_one(one, other)
            left_out = _normalized(middle, mean_entropy, None if most is None else most[..., None])
            mean = np.where(one > 0, one * left_out, 0.0).sum(-1) / total
            corrected = corrected - (total - 1) * (mean - plain)
    return np.where((totals[0] > 1) & (totals[1] > 1), corrected, np.nan)


def rarefied(counts: Any, size: Any, rng: np.random.Generator) -> np.ndarray:
    """Draw ``size`` of the counted selections without replacement: int64 [..., E] (rarefaction).

    Args:
        counts: [..., E], whole numbers from 0.
        size: number of selections to draw, broadcast against the leading axes; at most the number that there are.
        rng: the generator to draw from.

    Which selections belong to one token is not known from counts, so each is drawn by itself.
    """
    a = _checked(counts).astype(np.int64)
    wanted = np.broadcast_to(np.asarray(size, dtype=np.int64), a.shape[:-1]).copy()
    left = a.sum(-1)
    if (wanted > left).any() or (wanted < 0).any():
        raise AnalysisError("more selections are to be drawn than were counted: ask for fewer tokens")
    drawn = np.zeros_like(a)
    for expert in range(a.shape[-1]):
        here = a[..., expert]
        left = left - here
        drawn[..., expert] = rng.hypergeometric(here, left, wanted)
        wanted -= drawn[..., expert]
    return drawn


def random_partners(items: int, number: int, seed: int) -> np.ndarray:
    """int64 [r, items]: r derangements, which give every item r others; r is ``number``, or fewer with few items.

    The items are put into a random circle. The partners are the next r of each.
    """
    if items < 2:
        raise AnalysisError("a floor needs two items or more: unrelated sentences are compared")
    circle = np.random.default_rng(seed).permutation(items)
    partners = np.empty((max(1, min(number, (items - 1) // 2)), items), dtype=np.int64)
    for row in range(len(partners)):
        partners[row, circle] = np.roll(circle, -row - 1)
    return partners


def _checked(counts: Any) -> np.ndarray:
    a = np.asarray(counts, dtype=np.float64)
    if not a.ndim or (a < 0).any() or not (a == np.rint(a)).all() or np.isinf(a).any():
        raise AnalysisError("counts must be whole numbers from 0, [..., expert]: pass selections, not shares")
    return a


def _entropies_without_one(a: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
    """Entropy of the counts without one selection of expert e, for each e: [..., E]; undefined where e has none.

    With ``other``, that of the mean of these counts and of another distribution.
    """
    from scipy.special import entr

    left = np.maximum(a.sum(-1, keepdims=True) - 1, 1)
    p, less = a / left, np.maximum(a - 1, 0) / left
    if other is not None:
        p, less = (p + other) / 2, (less + other) / 2
    terms = entr(p)
    without: np.ndarray = terms.sum(-1, keepdims=True) - terms + entr(less)
    return without


def _normalized(middle: np.ndarray, mean: np.ndarray, most: np.ndarray | None) -> np.ndarray:
    """The divergence from H(m) and the mean entropy; divided by its bound if ``most`` = log E is given."""
    if most is None:
        return middle - mean
    bound = most - mean
    return ratio(middle - mean, np.where(bound > 1e-13, bound, 0.0))

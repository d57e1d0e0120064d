"""Kept sequences as arrays, in bounded memory; statistics of items drawn with replacement; stability of a rule.

An item that several groups have, such as a sentence and its translations, is drawn for all of them together, also when
the groups are in different recordings.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moe_route.analysis.inputs import NOT_KEPT, AnalysisError, Statistics, normalized, selection
from moe_route.analysis.measures import ratio
from moe_route.analysis.result import Result
from moe_route.analysis.stats import draw_items
from moe_route.base.table import Table
from moe_route.recording.store import SequenceStore, is_unnamed
from moe_route.steering import ExpertSelection

_ARRAYS = {"full": "full", "topk": "topk", "count": "counts", "hidden": "hidden"}
_BATCH_BYTES = 512 << 20  # groups are read together up to this size, one at least
_BLOCK = 1 << 15  # elements that are compared at once: temporaries then stay in the processor's cache


@dataclass(frozen=True)
class GroupSequences:
    """The routing of n sequences of one group.

    Attributes:
        group: name of the group.
        values: the stored distributions, float32 [n, L, E]; counts, int32 (kind "count"); or hidden states, float32
            [n, L, H] (kind "hidden").
        tokens: number of tokens, int64 [n, L].
        token_entropy: mean of H(p_t) over tokens in nats, float64 [n, L]; NaN where it was not kept.
    """

    group: str
    values: np.ndarray
    tokens: np.ndarray
    token_entropy: np.ndarray
    kind: str = "full"

    def vectors(self) -> np.ndarray:
        """Hidden states as they are, or distributions, float64 [n, L, H or E]."""
        return self.values.astype(np.float64) if self.kind == "hidden" else self.distributions()

    def distributions(self) -> np.ndarray:
        """q_i, float64 [n, L, E]; rows without tokens are NaN."""
        return normalized(self.values.astype(np.float64))

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens per sequence, in the layer that counted most."""
        return float(self.tokens.max(1).mean())


def groups_of(
    statistics: Statistics, groups: Sequence[str], items: Sequence[Any] | Mapping[str, Sequence[Any]], kind: str
) -> Iterator[GroupSequences]:
    """Yield the sequences of these groups, one group at a time.

    They have a row per item, in the order of ``items``: the same for all groups, or those of each.
    """
    wanted = items if isinstance(items, Mapping) else dict.fromkeys(groups, items)
    for batch in batches(statistics, groups, max(len(wanted[group]) for group in groups)):
        yield from read_sequences(statistics.store, {group: wanted[group] for group in batch}, kind)


def batches(statistics: Statistics, groups: Sequence[str], items: int) -> list[Sequence[str]]:
    """Divide groups into portions whose sequences are read together."""
    one = items * len(statistics.layers) * max(statistics.num_experts) * 8  # as float64
    number = max(1, _BATCH_BYTES // max(one, 1))
    return [groups[start : start + number] for start in range(0, len(groups), number)]


def read_sequences(store: SequenceStore, items: Mapping[str, Sequence[Any]], kind: str) -> list[GroupSequences]:
    """The sequences of these items of each group, read in one pass over the store.

    Raises ``ValueError`` for a ``kind`` that does not exist or was not recorded.
    """
    if kind not in _ARRAYS:
        raise ValueError(f"no distribution kind {kind!r}: full, topk or count")
    group, wanted = next(iter(items.items()))
    shard = next(store.shards({(wanted[0], group)}))  # not by its key: the store would keep the shard in memory
    width = shard.array(_ARRAYS[kind]).shape[-1]
    layers = len(store.layers)
    dtype = np.int32 if kind == "count" else np.float32
    place = {(item, group): row for group, wanted in items.items() for row, item in enumerate(wanted)}
    by_group = {
        group: GroupSequences(
            group,
            np.zeros((len(wanted), layers, width), dtype),
            np.zeros((len(wanted), layers), np.int64),
            np.full((len(wanted), layers), np.nan),
            kind,
        )
        for group, wanted in items.items()
    }
    for shard in store.shards(place):
        rows: dict[str, list[tuple[int, int]]] = {}
        for row, key in enumerate(shard.keys):
            if key in place:
                rows.setdefault(key[1], []).append((row, place[key]))
        for group, pairs in rows.items():
            here, there = (list(part) for part in zip(*pairs, strict=True))
            by_group[group].values[there] = shard.arrays[_ARRAYS[kind]][here]
            by_group[group].tokens[there] = shard.arrays["tokens"][here]
            if "token_entropy" in shard.arrays:  # not in files of earlier recordings
                by_group[group].token_entropy[there] = shard.arrays["token_entropy"][here]
    return list(by_group.values())


def mean_tokens(store: SequenceStore, groups: Sequence[str], items: Sequence[Any]) -> np.ndarray:
    """Mean number of tokens of these items in each group, in the layer that counted most, float64 [G]."""
    wanted, total = set(items), dict.fromkeys(groups, 0)
    for shard in store.shards():
        for (item, group), tokens in zip(shard.keys, shard.arrays["tokens"], strict=True):
            if group in total and item in wanted:
                total[group] += int(tokens.max(initial=0))
    return np.array([total[group] for group in groups]) / len(items)


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the items of an array [item, layer, expert], small enough for the processor's cache."""
    size = max(1, _BLOCK // max(int(np.prod(shape[1:])), 1))
    for start in range(0, shape[0], size):
        yield slice(start, start + size)


def tokens_per_sequence(statistics: Any, groups: Sequence[str]) -> np.ndarray:
    """Mean number of tokens per finished sequence, float64 [G]; NaN where no sequences were counted."""
    count = getattr(statistics, "sequences", None)  # sums over tokens alone have none
    if count is None:
        return np.full(len(groups), np.nan)
    rows = [statistics.groups.index(group) for group in groups]
    tokens = statistics.tokens()[rows].max(1, initial=0)
    numbers = count()[rows]
    return ratio(tokens, numbers)


# ---- items drawn with replacement

FEWEST_ITEMS = 5  # fewer have so few different resamples that their spread says nothing


@dataclass(frozen=True)
class Sequences:
    """The kept sequences of one group.

    Attributes:
        items: id of each sequence; unnamed ones are ``(owner, id)``, so that they differ from those of other groups.
        counts: float64 [item, layer, expert], how many tokens chose each expert.
        tokens: float64 [item, layer], number of tokens.
    """

    items: tuple[Hashable, ...]
    counts: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of_group(cls, statistics: Statistics, group: str, owner: Hashable) -> Sequences:
        """The sequences of a group; raises ``AnalysisError`` if they were not kept, or are too few."""
        store = statistics.store
        if store is None:
            raise AnalysisError(f"resampling needs single sequences: {NOT_KEPT}")
        items = store.items(group)
        if len(items) < FEWEST_ITEMS:
            raise AnalysisError(
                f"{len(items)} kept items of group {group!r} are too few to resample: record {FEWEST_ITEMS} or more "
                "with sequences=True, or leave the group out with statistics.select(groups=...)"
            )
        (read,) = groups_of(statistics, (group,), items, "count")
        names = tuple((owner, item) if is_unnamed(item) else item for item in items)
        return cls(names, read.values.astype(np.float64), read.tokens.astype(np.float64))

    @classmethod
    def of_array(cls, frequencies: np.ndarray, owner: Hashable) -> Sequences:
        """The items of an array [item, layer, expert] of frequencies; NaN and all-zero rows hold no tokens."""
        if len(frequencies) < FEWEST_ITEMS:
            raise AnalysisError(
                f"{len(frequencies)} items of the {owner} are too few to resample: give {FEWEST_ITEMS} or more"
            )
        seen = (np.nan_to_num(frequencies) > 0).any(-1)
        items = tuple((owner, number) for number in range(len(frequencies)))
        return cls(items, np.where(seen[..., None], np.nan_to_num(frequencies), 0.0), seen.astype(np.float64))

    def terms(self, by: str) -> tuple[np.ndarray, np.ndarray]:
        """Terms [item, layer, expert] and weights [item, layer]; their sums divide to the frequency of the group."""
        if by == "token":
            return self.counts, self.tokens
        if by != "sequence":
            raise AnalysisError(f'by must be "sequence" or "token", not {by!r}')
        return self._by_sequence

    @cached_property
    def _by_sequence(self) -> tuple[np.ndarray, np.ndarray]:
        seen = self.tokens > 0
        return self.counts / np.where(seen, self.tokens, 1.0)[..., None], seen.astype(np.float64)


def draw_together(items: Sequence[Sequence[Hashable]], resamples: int, seed: int) -> list[np.ndarray]:
    """How often each item is drawn, float64 [resamples, items] for each group.

    Args:
        items: the item ids of each group.

    An id that several groups have is drawn once for all of them. Ids that the same groups have are drawn among
    themselves, so every group keeps its number of items, and groups without common items are drawn independently. But
    where fewer than `FEWEST_ITEMS` ids have the same groups, these ids are drawn together with others of that kind,
    since few ids that replace one another hardly vary; groups then differ in size from draw to draw, and none is empty.
    """
    owners: dict[Hashable, list[tuple[int, int]]] = {}
    for group, ids in enumerate(items):
        for position, item in enumerate(ids):
            owners.setdefault(item, []).append((group, position))
    strata: dict[tuple[int, ...], list[list[tuple[int, int]]]] = {}
    for places in owners.values():
        strata.setdefault(tuple(group for group, _ in places), []).append(places)
    large = [members for members in strata.values() if len(members) >= FEWEST_ITEMS]
    pool = [places for members in strata.values() if len(members) < FEWEST_ITEMS for places in members]
    weights = [np.zeros((resamples, len(ids))) for ids in items]
    rows = np.arange(resamples)
    for number, members in enumerate(large):
        _put(weights, rows, members, seed + number)
    seed += len(large)
    while pool and len(rows):
        _put(weights, rows, pool, seed)
        rows = np.flatnonzero([any(not of_group[row].any() for of_group in weights) for row in range(resamples)])
        seed += 1
    return weights


def _put(
    weights: Sequence[np.ndarray], rows: np.ndarray, members: Sequence[Sequence[tuple[int, int]]], seed: int
) -> None:
    """Draw ids, each given by its (group, position) in the groups that have it, into some rows of the weights."""
    drawn = draw_items(len(members), len(rows), seed)
    for column, places in enumerate(members):
        for group, position in places:
            weights[group][rows, position] = drawn[:, column]


class ResampledStatistics:
    """Statistics of drawn items, with the accessors that the rules for experts read.

    Sequences join prefill and decode and hold no weights, so ``phase``, ``token_sum("weight")`` and the distributions
    of router scores are refused.
    """

    def __init__(self, source: Statistics, drawn: Mapping[str, tuple[Sequences, np.ndarray]]):
        self.groups = source.groups
        self.layers = source.layers
        self.num_experts = source.num_experts
        self.top_k = source.top_k
        self.metadata = source.metadata
        self.store: Any = None
        self._drawn = [drawn[group] for group in source.groups]

    def tokens(self, phase: Any = None) -> np.ndarray:
        """Number of tokens of the drawn items, int64 [group, layer]."""
        _refuse(phase)
        return np.stack([weights @ sequences.tokens for sequences, weights in self._drawn]).astype(np.int64)

    def frequency(self, phase: Any = None, by: Any = "sequence") -> np.ndarray:
        """As ``RoutingStatistics.frequency``, float64 [group, layer, expert]."""
        _refuse(phase)
        return np.stack([_ratio(*sequences.terms(by), weights) for sequences, weights in self._drawn])

    def mean_distribution(self, kind: Any = "full", phase: Any = None, by: Any = "sequence") -> np.ndarray:
        """As ``RoutingStatistics.mean_distribution``, of selections (``kind="count"``) only."""
        if kind != "count":
            raise AnalysisError(f'a resample has no distribution of kind {kind!r}: use kind="count"')
        frequency = self.frequency(phase, by)
        total = frequency.sum(-1, keepdims=True)
        return ratio(frequency, total)

    def token_sum(self, metric: str, phase: Any = None) -> np.ndarray:
        """Sum over tokens of "counts", float64 [group, layer, expert]."""
        _refuse(phase)
        if metric != "counts":
            raise AnalysisError(f"a resample has no metric {metric!r}: kept sequences hold counts, so use token scores")
        return np.stack([np.tensordot(weights, sequences.counts, 1) for sequences, weights in self._drawn])


def _refuse(phase: Any) -> None:
    if phase is not None:
        raise AnalysisError("kept sequences join prefill and decode: leave phase out of what is resampled")


def _ratio(terms: np.ndarray, weights: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Frequency [layer, expert] of the drawn items; NaN without tokens."""
    total, weight = np.tensordot(drawn, terms, 1), (drawn @ weights)[..., None]
    return ratio(total, weight)


def resampled_statistics(
    statistics: Sequence[Statistics], resamples: int, seed: int
) -> list[tuple[ResampledStatistics, ...]]:
    """Draw the items of all groups of all statistics together, ``resamples`` times.

    Raises ``AnalysisError`` if sequences were not kept or a group has too few.
    """
    if resamples < 2:
        raise AnalysisError(f"resamples must be 2 or more, not {resamples}")
    keys = [(number, group) for number, one in enumerate(statistics) for group in one.groups]
    kept = [Sequences.of_group(statistics[number], group, (number, group)) for number, group in keys]
    weights = draw_together([sequences.items for sequences in kept], resamples, seed)
    resampled = []
    for resample in range(resamples):
        drawn: list[dict[str, tuple[Sequences, np.ndarray]]] = [{} for _ in statistics]
        for (number, group), sequences, of_group in zip(keys, kept, weights, strict=True):
            drawn[number][group] = (sequences, of_group[resample])
        resampled.append(tuple(ResampledStatistics(*pair) for pair in zip(statistics, drawn, strict=True)))
    return resampled


# ---- whether a rule selects the same experts from other items

_SHOWN = 12


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Result):
    """How often a rule selects each expert when the items are drawn anew.

    Attributes:
        share: float64 [layer, expert], share of the resamples in which the expert is selected.
        selection: the experts with a share of ``keep`` or more; their scores are the shares.
        whole: the rule's selection from all items.
        jaccard: mean Jaccard index of the selections of two resamples; two empty ones count as equal.
        sizes: int64 [resample], number of experts selected.
        keep: smallest share that is kept.
    """

    share: np.ndarray
    selection: ExpertSelection
    whole: ExpertSelection
    jaccard: float
    sizes: np.ndarray
    keep: float

    @property
    def resamples(self) -> int:
        """Number of resamples."""
        return len(self.sizes)

    def columns(self) -> dict[str, Any]:
        """A row per expert that any resample or the whole recording selects: ``share``, ``whole``, ``kept``."""
        cells, whole, kept = self._cells(), set(self.whole.pairs), set(self.selection.pairs)
        return {
            "layer": [layer for layer, _ in cells],
            "expert": [expert for _, expert in cells],
            "share": [float(self.share[cell]) for cell in cells],
            "whole": [cell in whole for cell in cells],
            "kept": [cell in kept for cell in cells],
        }

    def _cells(self) -> list[tuple[int, int]]:
        """Experts that are selected at all, from the most often selected to the least."""
        cells = {(int(layer), int(expert)) for layer, expert in np.argwhere(self.share > 0)} | set(self.whole.pairs)
        return sorted(cells, key=lambda cell: (-self.share[cell], cell))

    def tables(self) -> list[Table]:
        cells, whole = self._cells(), set(self.whole.pairs)
        rows = [[*cell, float(self.share[cell]), "yes" if cell in whole else "no"] for cell in cells[:_SHOWN]]
        title = (
            f"{len(self.selection)} experts are selected in {self.keep:.0%} or more of {self.resamples} resamples; "
            f"{len(self.whole)} from all items"
        )
        sizes = f"{self.sizes.min()} to {self.sizes.max()} experts a resample"
        more = f"; and {len(cells) - _SHOWN} more experts" if len(cells) > _SHOWN else ""
        note = f"mean Jaccard index of two resamples {self.jaccard:.3f}; {sizes}{more}"
        return [Table(("layer", "expert", "share", "from all items"), rows, title, note)]


def stability_selection(
    rule: Callable[..., ExpertSelection],
    *statistics: Statistics,
    resamples: int = 100,
    keep: float = 0.8,
    seed: int = 0,
) -> Stability:
    """Select the experts that a rule selects in most resamples of the items, as SAFEx does [arXiv 2506.17368].

    In each resample, the items of all groups are drawn with replacement. An item that several groups have, such as a
    sentence and its translations, is drawn for all of them together, also in different statistics.

    Args:
        rule: takes as many statistics as are given here, and returns a selection; for example
            ``lambda task, general: task_experts(task, general, group="eng_Latn", threshold=0.3)``.
        statistics: recorded with ``record(sequences=True)``; at least five items in each group.
        resamples: number of resamples.
        keep: smallest share of the resamples in which a kept expert is selected, above 0 and at most 1.

    Raises ``AnalysisError`` for sequences that were not kept, too few items, and a rule that gives no selection.
    """
    if not 0 < keep <= 1:
        raise AnalysisError(f"keep must be above 0 and at most 1, not {keep}")
    if not statistics:
        raise AnalysisError("pass the statistics that the rule takes, after the rule")
    if resamples < 2:
        raise AnalysisError(f"resamples must be 2 or more, not {resamples}")
    whole = _selected(rule, statistics)
    shape = (len(statistics[0].num_experts), max(statistics[0].num_experts))
    drawn = np.zeros((resamples, *shape), dtype=bool)
    for chosen, resampled in zip(drawn, resampled_statistics(statistics, resamples, seed), strict=True):
        for cell in _selected(rule, resampled).pairs:
            chosen[cell] = True
    share = drawn.mean(0)
    text = f"in {keep:.0%} of {resamples} resamples: {whole.description or 'a rule'}"
    kept = selection(share >= keep, share, statistics[0], threshold=keep, description=text)
    return Stability(share, kept, whole, _mean_jaccard(drawn), drawn.sum((1, 2)), keep)


def _selected(rule: Callable[..., ExpertSelection], statistics: tuple[Any, ...]) -> ExpertSelection:
    experts = rule(*statistics)
    if not isinstance(experts, ExpertSelection):
        raise AnalysisError(
            f"the rule gave a {type(experts).__name__}, not a selection: take one of its selections, such as "
            "result['swh_Latn'] or result.activate"
        )
    return experts


def _mean_jaccard(drawn: np.ndarray) -> float:
    """Mean over pairs of resamples of |A & B| / |A | B|; 1 for two empty sets."""
    chosen = drawn.reshape(len(drawn), -1).astype(np.float64)
    both = chosen @ chosen.T
    sizes = np.diag(both)
    either = sizes[:, None] + sizes - both
    index = ratio(both, either, empty=1.0)
    return float(index[np.triu_indices(len(drawn), 1)].mean())

"""Statistics of items drawn with replacement, from the sequences that a recording kept.

An item that several groups have, such as a sentence and its translations, is drawn for all of them together, also when
the groups are in different recordings.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moe_route.analysis.bootstrap import draw_items
from moe_route.analysis.inputs import NOT_KEPT, AnalysisError, Statistics
from moe_route.analysis.sequences import groups_of
from moe_route.recording.store import is_unnamed

__all__ = ["FEWEST_ITEMS", "ResampledStatistics", "Sequences", "draw_together", "resampled_statistics"]

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
        return np.divide(frequency, total, out=np.full(frequency.shape, np.nan), where=total > 0)

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
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)


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
    found = []
    for resample in range(resamples):
        drawn: list[dict[str, tuple[Sequences, np.ndarray]]] = [{} for _ in statistics]
        for (number, group), sequences, of_group in zip(keys, kept, weights, strict=True):
            drawn[number][group] = (sequences, of_group[resample])
        found.append(tuple(ResampledStatistics(*pair) for pair in zip(statistics, drawn, strict=True)))
    return found

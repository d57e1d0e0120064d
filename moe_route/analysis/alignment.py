"""Alignment of languages with a pivot, by layer: how well sentences find their translation in it.

The vectors of sentences are pooled hidden states (``recording.sentence_vectors``), as in the published measures, or
routing distributions, their twin. The rules are in ``analysis.translation_rules``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_route.analysis.bootstrap import RESAMPLES, draw_items, interval_of, resampled_means
from moe_route.analysis.expert_masks import in_layers
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.parallel_vectors import VectorSource, parallel_vectors
from moe_route.analysis.result import by_depth, fertility_of, mean_of_seen, plain, token_column
from moe_route.analysis.translation_rules import (
    FEWEST,
    RULE_NAMES,
    Rule,
    Side,
    check_rule,
    cosines,
    judge,
    same_vectors,
)
from moe_route.recording.frames import data_frame
from moe_route.texttable import ShownAsTables, Table, interval

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Alignment", "alignment"]

Summary = Literal["mean", "max"]
_QUANTITIES = {"mexa": "MEXA alignment", "retrieval": "retrieval", "margin": "margin retrieval", "cosine": "cosine"}
_SHOWN = 5  # items named in a note


@dataclass(frozen=True, eq=False, repr=False)
class Alignment(ShownAsTables):
    """Alignment of groups with one reference.

    Attributes:
        values: float64 [G, L]: share of sentences that win under the rule, or their mean cosine.
        chance: float64 [G, L]: the same if each sentence is paired with a random one of the same sentences. For shares
            it is at most 1 / pairs.
        groups: the G groups compared, without the reference.
        reference: the pivot.
        layers: names of the L layers.
        rule: "mexa", "retrieval", "margin" or "cosine".
        pair_values: float64 [G, pairs, L]: 1 or 0 for each sentence, or its cosine; NaN without tokens.
        items: the items compared, in the order of ``pair_values``.
        duplicates: group -> items whose vectors are those of another item in every layer, in the reference or in the
            group. They tie, so they can never win.
        centered: whether the mean of each group was subtracted from its sentences.
        tokens: float64 [G], mean number of tokens per sentence; NaN where it is unknown.
        fertility: float64 [G], the same over that of the reference.
        summarized: indices of the layers that summaries take by default: all, without the embedding for "cosine".
    """

    values: np.ndarray
    chance: np.ndarray
    groups: tuple[str, ...]
    reference: str
    layers: tuple[str, ...]
    rule: str
    pair_values: np.ndarray
    items: tuple[Any, ...]
    duplicates: dict[str, tuple[Any, ...]]
    centered: bool
    tokens: np.ndarray
    fertility: np.ndarray
    summarized: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """Number of items compared, the same items for every group."""
        return len(self.items)

    @property
    def quantity(self) -> str:
        """What the values are, in words that the name of the reference continues."""
        return f"{_QUANTITIES[self.rule]} with"

    def of(self, group: str) -> np.ndarray:
        """Values of one group, float64 [L]."""
        if group not in self.groups:
            raise AnalysisError(f"no group {group!r}: there are {', '.join(self.groups)}")
        row: np.ndarray = self.values[self.groups.index(group)]
        return row

    def summary(self, how: Summary = "mean", layers: Sequence[int] | None = None) -> np.ndarray:
        """float64 [G]: mean or maximum over layers (by default ``summarized``).

        MEXA takes either, the maximum is larger by chance. Language Ranker takes the mean over all layers but the
        embedding.
        """
        return _over_layers(self.values, self._columns_of(layers), how)

    def interval(
        self,
        level: float = 0.95,
        *,
        of: Literal["layers", "mean", "max"] = "layers",
        layers: Sequence[int] | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap interval (low, high) over sentences: of every layer, float64 [G, L], or of a summary, [G].

        Sentences are drawn with replacement, the same ones for all groups and layers. Each keeps the outcome it has
        among all sentences, since a sentence that is drawn twice would tie with itself. Where no sentence wins, or all
        do, resamples do not differ, and the open end is that of the exact binomial interval of so many sentences.
        """
        if of not in ("layers", "mean", "max"):
            raise AnalysisError(f'of must be "layers", "mean" or "max", not {of!r}')
        weights, columns = draw_items(self.pairs, resamples, seed), self._columns_of(layers)
        ends = []
        for values, found in zip(self.pair_values, self.values, strict=True):
            means = resampled_means(weights, values)
            if of != "layers":
                means, found = _over_layers(means, columns, of), _over_layers(found, columns, of)
            ends.append(np.stack(interval_of(means, self.pairs, level)))
            if self.rule != "cosine":
                tail = ((1 - level) / 2) ** (1 / self.pairs)
                ends[-1][1] = np.where(found == 0, 1 - tail, ends[-1][1])
                ends[-1][0] = np.where(found == 1, tail, ends[-1][0])
        low, high = np.stack(ends, axis=1)
        return low, high

    def ranking(self, how: Summary = "mean", layers: Sequence[int] | None = None) -> dict[str, float]:
        """The groups by their summary, the most aligned first [Language Ranker, arXiv 2404.11553]."""
        found = dict(zip(self.groups, self.summary(how, layers).tolist(), strict=True))
        return dict(sorted(found.items(), key=lambda pair: -np.nan_to_num(pair[1], nan=-np.inf)))

    def estimate(self, accuracy: float, how: Summary = "mean", layers: Sequence[int] | None = None) -> dict[str, float]:
        """Estimate the accuracy of each group on a task: that of the reference times the summary [MEXA].

        It is meant for the share "mexa"; other rules have no such estimate.
        """
        if self.rule != "mexa":
            raise AnalysisError(f'the estimate is made of shares by rule="mexa", not {self.rule!r}')
        if not 0 <= accuracy <= 1:
            raise AnalysisError(f"accuracy must lie between 0 and 1, not {accuracy}")
        return {group: accuracy * value for group, value in self.ranking(how, layers).items()}

    def _columns_of(self, layers: Sequence[int] | None) -> np.ndarray:
        chosen = in_layers(len(self.layers), self.summarized if layers is None else layers)
        return np.flatnonzero(chosen[:, 0])

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (group, layer).

        Columns: ``alignment``, ``low`` and ``high`` of the 95 % interval, ``chance``, ``router`` (the layer's name),
        ``tokens`` per sentence of the group, and ``fertility``.
        """
        low, high = self.interval()
        columns: dict[str, Any] = {"router": np.tile(np.asarray(self.layers, dtype=object), len(self.groups))}
        for name, values in (("alignment", self.values), ("low", low), ("high", high), ("chance", self.chance)):
            columns[name] = values.reshape(-1)
        for name, values in (("tokens", self.tokens), ("fertility", self.fertility)):
            columns[name] = np.repeat(values, len(self.layers))
        return data_frame(columns, {"group": self.groups, "layer": range(len(self.layers))})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content with the 95 % intervals (NaN as None)."""
        low, high = self.interval()
        names = ("rule", "reference", "groups", "layers", "pairs", "centered", "values", "chance")
        found = {name: getattr(self, name) for name in names} | {"low": low, "high": high}
        for how in ("mean", "max"):
            ends = np.stack(self.interval(of=how), axis=-1)  # type: ignore[arg-type]
            found[how] = self.summary(how)  # type: ignore[arg-type]
            found[f"{how}_interval"] = ends
        found |= {"tokens": self.tokens, "fertility": self.fertility, "summarized_layers": self.summarized}
        found["duplicates"] = {group: list(items) for group, items in self.duplicates.items()}
        content: dict[str, Any] = plain(found)
        return content

    def tables(self) -> list[Table]:
        """A row per group, the most aligned first, with the mean over layers, its interval and chance."""
        order = [self.groups.index(name) for name in self.ranking()]
        names = [self.groups[i] for i in order]
        low, high = self.interval(of="mean")
        chance = _over_layers(self.chance, self._columns_of(None), "mean")
        ends = [interval(float(low[i]), float(high[i])) for i in order]
        after: dict[str, Sequence[object]] = {
            "mean": self.summary()[order].tolist(),
            "95 % interval": ends,
            "chance": chance[order].tolist(),
            **token_column(self.tokens[order]),
        }
        if not np.isnan(self.fertility).all():
            after["fertility"] = [f"{self.fertility[i]:.2f}" for i in order]
        about = ", each group's mean subtracted" if self.centered else ""
        title = f"{RULE_NAMES[self.rule]}, against {self.reference}{about}, {self.pairs} items"
        shown = by_depth(names, self.values[order], title=title, note=self._note(), after=after)
        return [shown]

    def _note(self) -> str:
        first = self.summarized[0] if self.summarized else 0
        lines = [
            f"mean: over layers {first} to {len(self.layers) - 1}; interval: bootstrap over sentences; chance: random "
            "pairs of the same sentences"
        ]
        named = dict.fromkeys(item for items in self.duplicates.values() for item in items)
        if named:
            some = ", ".join(map(str, list(named)[:_SHOWN]))
            more = ", ..." if len(named) > _SHOWN else ""
            lines.append(f"{len(named)} items occur twice in a language, and can never win: {some}{more}")
        return "\n".join(lines)


def _over_layers(values: np.ndarray, columns: np.ndarray, how: str) -> np.ndarray:
    """Mean or maximum over some of the layers (the last axis); NaN where none was measured."""
    if how not in ("mean", "max"):
        raise AnalysisError(f'a summary is the "mean" or the "max" over layers, not {how!r}')
    kept = values[..., columns]
    if how == "mean":
        return mean_of_seen(kept, -1)[0]
    largest: np.ndarray = np.where(np.isnan(kept).all(-1), np.nan, np.nan_to_num(kept, nan=-np.inf).max(-1))
    return largest


def alignment(
    source: VectorSource,
    reference: str,
    *,
    rule: Rule = "mexa",
    groups: Sequence[str] | None = None,
    kind: str | None = None,
    center: bool | None = None,
    neighbors: int = 4,
    min_common: float = 0.5,
) -> Alignment:
    """Measure how well the sentences of each group find their translation in one reference, by layer.

    Chance is what random pairs of the same sentences give, so it has the hubs of the real vectors. It is at most
    1 / pairs for shares: with few pairs, an interval that reaches down to chance allows no conclusion.

    Args:
        source: ``SentenceVectors``, for the published measures; statistics with kept sequences, and items that pair
            them, for alignment of routing; or vectors, float [item, group, layer, width].
        reference: the pivot, such as "eng_Latn".
        rule: "mexa" [arXiv 2410.05873], "retrieval", "margin", or "cosine" [Language Ranker, arXiv 2404.11553]; see
            ``analysis.translation_rules``.
        groups: groups to compare with the reference, by default all others; of an array, the name of each of its
            groups, with the reference.
        kind: of statistics: the router scores used, "full" (the default), "topk" or "count", or "hidden" for recorded
            router inputs.
        center: subtract the mean of each group from its sentences. By default this is done for routing distributions
            only: without it, what all their sentences share outweighs what tells them apart.
        neighbors: number of nearest neighbors that "margin" divides by.
        min_common: smallest allowed share of common items, as in ``analysis.divergence``.

    Raises ``AnalysisError`` for sentences that do not pair, and for fewer than ten of them.
    """
    if not isinstance(source, np.ndarray):
        known = source.groups if groups is None else (groups,) if isinstance(groups, str) else groups
        groups = (reference, *(name for name in known if name != reference))
    vectors = parallel_vectors(source, groups, kind, center, min_common)
    if reference not in vectors.groups:
        raise AnalysisError(f"no reference {reference!r}: there are {', '.join(vectors.groups)}")
    pairs, layers = len(vectors.items), len(vectors.layers)
    if pairs < FEWEST:
        raise AnalysisError(f"alignment over {pairs} sentences says little: give at least {FEWEST} common items")
    check_rule(rule, pairs, neighbors)
    pivot = vectors.groups.index(reference)
    others = [g for g in range(len(vectors.groups)) if g != pivot]
    values, chance = np.full((len(others), pairs, layers), np.nan), np.full((len(others), layers), np.nan)
    seen: list[list[Side]] = [[] for _ in vectors.groups]
    for layer, sides in enumerate(vectors.sides()):
        for row, g in enumerate(others):
            judged = judge(cosines(sides[pivot], sides[g]), rule, neighbors)
            values[row, :, layer], chance[row, layer] = judged.values, judged.chance
        for of_group, side in zip(seen, sides, strict=True):
            of_group.append(Side(side.rows[:0], side.place))
    same = [same_vectors(of_group) for of_group in seen]
    duplicates = {
        vectors.groups[g]: tuple(np.asarray(vectors.items, dtype=object)[same[g] | same[pivot]].tolist())
        for g in others
        if (same[g] | same[pivot]).any()
    }
    first = 1 if rule == "cosine" and vectors.embedding and layers > 1 else 0
    return Alignment(
        mean_of_seen(values, 1)[0],
        chance,
        tuple(vectors.groups[g] for g in others),
        reference,
        vectors.layers,
        rule,
        values,
        vectors.items,
        duplicates,
        vectors.centered,
        vectors.tokens[others],
        fertility_of(vectors.tokens, vectors.groups, reference)[others],
        tuple(range(first, layers)),
    )

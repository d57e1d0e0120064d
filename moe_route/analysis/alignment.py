"""Alignment of languages with a pivot, by layer: how well sentences find their translation in it.

The vectors of sentences are pooled hidden states (``recording.sentence_vectors``), as in the published measures, or
routing distributions, their twin. A rule judges, from the cosines of sentences and their translations, how well two
languages are aligned. C [n, n] holds the cosine of sentence i of one language with sentence j of the other; C_ii are
translations.

- "mexa": C_ii is above every other entry of row i and of column i [MEXA, arXiv 2410.05873].
- "retrieval": C_ii is above every other entry of row i.
- "margin": the same of ``2 C_ij / (r_i + c_j)``, with r_i the mean of the m largest entries of row i and c_j that of
  column j [ratio margin, arXiv 1811.01136].
- "cosine": C_ii itself [Language Ranker, arXiv 2404.11553; mPLM-Sim, arXiv 2305.13684].

The first three are true or false for each sentence. A tie is lost, so a sentence that occurs twice never wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_route.analysis.inputs import AnalysisError, Statistics, paired_items, pick_groups, refuse_itself
from moe_route.analysis.overlap import in_layers
from moe_route.analysis.resampling import mean_tokens, read_sequences
from moe_route.analysis.result import Result, by_depth, fertility_of, mean_of_seen, plain, token_column
from moe_route.analysis.stats import RESAMPLES, draw_items, interval_of, resampled_means
from moe_route.base.table import Table, interval
from moe_route.recording import SentenceVectors
from moe_route.recording.store import SequenceStore

# ---- vectors of parallel sentences, a layer at a time

VectorSource = SentenceVectors | Statistics | np.ndarray
KINDS = ("full", "topk", "count", "hidden")
_PORTION_BYTES = 512 << 20  # layers are read together up to this size, one at least


@dataclass(frozen=True, eq=False)
class ParallelVectors:
    """Sentences that all of these groups have, with a vector in each layer.

    Attributes:
        groups: names of the groups.
        layers: names of the layers.
        items: the n items, in an order that does not depend on how they were recorded.
        tokens: float64 [G], mean number of tokens per sentence; NaN where it is unknown.
        centered: whether the mean of each group is subtracted.
        embedding: whether layer 0 is the embedding, which comes before the first layer.
    """

    groups: tuple[str, ...]
    layers: tuple[str, ...]
    items: tuple[Any, ...]
    tokens: np.ndarray
    centered: bool
    embedding: bool
    _source: np.ndarray | SequenceStore
    _kind: str

    def sides(self) -> Iterator[list[Side]]:
        """For each layer in turn, the sentences of every group as unit vectors."""
        for portion in self._portions():
            read = self._read(portion)
            for layer in range(len(portion)):
                yield [Side.of(_units(values[:, layer].astype(np.float64), self.centered)) for values in read]

    def _portions(self) -> Iterator[range]:
        """Layers to read together, so that memory stays bounded."""
        number = size = len(self.layers)
        if isinstance(self._source, SequenceStore):
            first = read_sequences(self._source, {self.groups[0]: self.items[:1]}, self._kind)[0].vectors()
            one_layer = len(self.groups) * len(self.items) * first.shape[-1] * 8
            size = max(1, _PORTION_BYTES // max(one_layer, 1))
        for start in range(0, number, size):
            yield range(start, min(start + size, number))

    def _read(self, layers: range) -> list[np.ndarray]:
        """Vectors of every group, [n, layers, D] each."""
        if isinstance(self._source, np.ndarray):
            return [self._source[:, g][:, layers.start : layers.stop] for g in range(len(self.groups))]
        store = self._source if len(layers) == len(self.layers) else self._source.select(layers)
        return [one.vectors() for one in read_sequences(store, dict.fromkeys(self.groups, self.items), self._kind)]


def parallel_vectors(
    source: VectorSource,
    groups: Sequence[str] | None,
    kind: str | None,
    center: bool | None,
    min_common: float,
) -> ParallelVectors:
    """The sentences that these groups have in common.

    Args:
        source: ``SentenceVectors``; statistics with kept sequences; or float [item, group, layer, width].
        groups: names of the groups to take, by default all; of an array, names of all its groups, which it needs.
        kind: of statistics: "full" (the default), "topk" or "count" distributions, or "hidden" states.
        center: subtract the mean of each group from its sentences; by default of routing distributions only, where
            what all sentences share outweighs what tells them apart.
        min_common: smallest allowed share of common items, as in ``analysis.divergence``.

    Raises ``AnalysisError`` for sentences that do not pair, one group, unknown groups, and values that are not finite.
    """
    if isinstance(source, np.ndarray):
        vectors = _of_array(source, groups, kind, bool(center))
    else:
        if kind is not None and isinstance(source, SentenceVectors):
            raise AnalysisError("kind tells which routing distribution is taken, and these are vectors: leave it out")
        kind = "hidden" if isinstance(source, SentenceVectors) else kind or "full"
        if kind not in KINDS:
            raise AnalysisError(f"no kind {kind!r}: use one of {', '.join(KINDS)}")
        names = _vector_groups(source, groups) if isinstance(source, SentenceVectors) else pick_groups(source, groups)
        _check_groups(names)
        items = tuple(sorted(paired_items(source, names, min_common), key=lambda item: (str(type(item)), item)))
        centered = kind != "hidden" if center is None else center
        layers = tuple(source.layers)
        embedding = isinstance(source, SentenceVectors) and layers[0] == "embedding"
        tokens = mean_tokens(source.store, names, items)
        vectors = ParallelVectors(names, layers, items, tokens, centered, embedding, source.store, kind)
    if vectors.centered and len(vectors.items) < 2:
        raise AnalysisError(
            "a single item is its group's mean, and nothing is left of it: record more, or center=False"
        )
    return vectors


def _of_array(source: np.ndarray, groups: Sequence[str] | None, kind: str | None, center: bool) -> ParallelVectors:
    if source.ndim != 4 or groups is None or len(groups) != source.shape[1] or kind is not None:
        raise AnalysisError(
            "an array of vectors is [item, group, layer, width] and needs groups=, the name of each of its groups, and "
            f"no kind; this one has the shape {list(source.shape)}"
        )
    _check_groups(groups)
    if not np.isfinite(source).all():
        raise AnalysisError("vectors must be finite: leave out items that have none")
    layers = tuple(str(layer) for layer in range(source.shape[2]))
    unknown = np.full(len(groups), np.nan)
    return ParallelVectors(tuple(groups), layers, tuple(range(len(source))), unknown, center, False, source, "hidden")


def _vector_groups(vectors: SentenceVectors, groups: Sequence[str] | None) -> tuple[str, ...]:
    names = vectors.groups if groups is None else (groups,) if isinstance(groups, str) else tuple(groups)
    unknown = [name for name in names if name not in vectors.groups]
    if unknown:
        raise AnalysisError(f"no group {unknown[0]!r}: there are {', '.join(vectors.groups)}")
    return tuple(names)


def _check_groups(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise AnalysisError(f"a group is named twice: {', '.join(names)}")
    if len(names) < 2:
        raise AnalysisError("parallel sentences are compared between two groups or more: name another one")


def _units(vectors: np.ndarray, center: bool) -> np.ndarray:
    """Unit vectors [n, D]; NaN for a sentence without tokens, zero for one that is like the mean."""
    moved = vectors - mean_of_seen(vectors)[0] if center else vectors
    length = np.sqrt((moved * moved).sum(-1, keepdims=True))
    return np.divide(moved, length, out=np.zeros(moved.shape), where=~(length <= 1e-12))  # NaN stays


# ---- rules

Rule = Literal["mexa", "retrieval", "margin", "cosine"]
RULES = ("mexa", "retrieval", "margin", "cosine")
RULE_NAMES = {
    "mexa": "share of sentences that are nearest to their translation, in both directions",
    "retrieval": "share of sentences whose nearest neighbor is their translation",
    "margin": "share of sentences whose nearest neighbor by the ratio margin is their translation",
    "cosine": "mean cosine similarity of parallel sentences",
}
FEWEST = 10  # sentences for a share of them


class Side(NamedTuple):
    """Sentences of one language, with each different vector once.

    Sentences with the same vector then have the same cosines to the bit, which a product of matrices does not promise.

    Attributes:
        rows: the different unit vectors, float64 [u, D]; NaN for sentences without a vector.
        place: int64 [n], the row of each sentence.
    """

    rows: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, units: np.ndarray) -> Side:
        """From the unit vectors of all sentences, float64 [n, D]."""
        rows, place = np.unique(units, axis=0, return_inverse=True)
        return cls(rows, place.reshape(-1))


class Judged(NamedTuple):
    """What a rule says of two languages.

    Attributes:
        values: float64 [n], of each sentence; NaN for one without a vector.
        chance: what ``values`` are on average if each sentence is paired with a random one.
    """

    values: np.ndarray
    chance: float


def cosines(first: Side, second: Side) -> np.ndarray:
    """float64 [n, n]: cosine of each sentence of one language with each of the other."""
    of_rows: np.ndarray = first.rows @ second.rows.T
    return of_rows[np.ix_(first.place, second.place)]


def judge(cosine: np.ndarray, rule: Rule, neighbors: int = 4) -> Judged:
    """Apply a rule to cosines, float64 [n, n]; sentences whose own cosine is NaN take no part.

    ``neighbors`` is the m of "margin". Raises ``AnalysisError`` where the neighbors of a sentence have no positive mean
    cosine, which margins divide by.
    """
    seen = np.flatnonzero(~np.isnan(np.diag(cosine)))
    values = np.full(len(cosine), np.nan)
    if not len(seen):
        return Judged(values, float("nan"))
    c = cosine[np.ix_(seen, seen)]
    if rule == "cosine":
        judged = c
    elif rule == "mexa":
        judged = _largest(c) & _largest(c.T).T
    else:
        judged = _largest(c if rule == "retrieval" else _margins(c, neighbors))
    values[seen] = np.diag(judged)
    return Judged(values, float(judged.mean()) if rule == "cosine" else float(judged.sum() / len(seen) ** 2))


def _largest(values: np.ndarray) -> np.ndarray:
    """bool [n, n]: entries above every other entry of their row."""
    top = values == values.max(1, keepdims=True)
    return top & (top.sum(1, keepdims=True) == 1)


def _margins(c: np.ndarray, neighbors: int) -> np.ndarray:
    near = min(neighbors, len(c))
    of_rows = np.partition(c, -near, axis=1)[:, -near:].mean(1)
    of_columns = np.partition(c, -near, axis=0)[-near:].mean(0)
    below = of_rows[:, None] + of_columns
    if (below <= 0).any():
        raise AnalysisError(
            "the nearest neighbors of a sentence have no positive mean cosine, which margins divide by: use "
            'rule="retrieval" (or center=False, where means are subtracted)'
        )
    margins: np.ndarray = 2 * c / below
    return margins


def check_rule(rule: str, sentences: int, neighbors: int) -> None:
    """Refuse an unknown rule, too few sentences for a share, and numbers of neighbors that cannot be."""
    if rule not in RULES:
        raise AnalysisError(f"no rule {rule!r}: use one of {', '.join(RULES)}")
    if rule != "cosine" and sentences < FEWEST:
        raise AnalysisError(f"a share of {sentences} sentences says little: give at least {FEWEST} common items")
    if rule == "margin" and not 1 <= neighbors <= sentences:
        raise AnalysisError(f"neighbors must be 1 to {sentences}, the number of sentences, not {neighbors}")


def same_vectors(sides: list[Side]) -> np.ndarray:
    """bool [n]: sentences that have the vectors of another sentence in every layer, from the sides of one language."""
    codes = np.zeros(len(sides[0].place), np.int64)
    for side in sides:
        codes = np.unique(np.stack([codes, side.place]), axis=1, return_inverse=True)[1].reshape(-1)
    repeated: np.ndarray = np.bincount(codes)[codes] > 1
    return repeated


# ---- the measure

Summary = Literal["mean", "max"]
_QUANTITIES = {"mexa": "MEXA alignment", "retrieval": "retrieval", "margin": "margin retrieval", "cosine": "cosine"}
_SHOWN = 5  # items named in a note


@dataclass(frozen=True, eq=False, repr=False)
class Alignment(Result):
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
        row: np.ndarray = self.values[self.place_of(group)]
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
        for pairs, values in zip(self.pair_values, self.values, strict=True):
            means = resampled_means(weights, pairs)
            if of != "layers":
                means, values = _over_layers(means, columns, of), _over_layers(values, columns, of)
            ends.append(np.stack(interval_of(means, self.pairs, level)))
            if self.rule != "cosine":
                tail = ((1 - level) / 2) ** (1 / self.pairs)
                ends[-1][1] = np.where(values == 0, 1 - tail, ends[-1][1])
                ends[-1][0] = np.where(values == 1, tail, ends[-1][0])
        low, high = np.stack(ends, axis=1)
        return low, high

    def ranking(self, how: Summary = "mean", layers: Sequence[int] | None = None) -> dict[str, float]:
        """The groups by their summary, the most aligned first [Language Ranker, arXiv 2404.11553]."""
        summaries = dict(zip(self.groups, self.summary(how, layers).tolist(), strict=True))
        return dict(sorted(summaries.items(), key=lambda pair: -np.nan_to_num(pair[1], nan=-np.inf)))

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

    def columns(self) -> dict[str, Any]:
        """``alignment``, ``low`` and ``high`` of its 95 % interval, ``chance``, ``tokens`` per item, ``fertility``."""
        low, high = self.interval()
        measured = {"alignment": self.values, "low": low, "high": high, "chance": self.chance}
        beside = {"tokens": self.tokens[:, None], "fertility": self.fertility[:, None]}
        return self.over("group layer", {**measured, **beside})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content with the 95 % intervals (NaN as None)."""
        low, high = self.interval()
        names = ("rule", "reference", "groups", "layers", "pairs", "centered", "values", "chance")
        content = {name: getattr(self, name) for name in names} | {"low": low, "high": high}
        for how in ("mean", "max"):
            ends = np.stack(self.interval(of=how), axis=-1)  # type: ignore[arg-type]
            content[how] = self.summary(how)  # type: ignore[arg-type]
            content[f"{how}_interval"] = ends
        content |= {"tokens": self.tokens, "fertility": self.fertility, "summarized_layers": self.summarized}
        content["duplicates"] = {group: list(items) for group, items in self.duplicates.items()}
        return {name: plain(values) for name, values in content.items()}

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
        return [by_depth(names, self.values[order], title=title, note=self._note(), after=after)]

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
            ``analysis.alignment``.
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
        if groups is None:
            groups = [name for name in source.groups if name != reference]
        names = (groups,) if isinstance(groups, str) else tuple(groups)
        refuse_itself(names, reference)
        groups = (reference, *names)
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

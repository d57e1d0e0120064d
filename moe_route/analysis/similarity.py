"""Similarity of languages, from the vectors of parallel sentences: hidden states, or the routing of a model.

As in mPLM-Sim [arXiv 2305.13684] it is the mean cosine of translations, or the share of sentences that find their
translation (the rules of ``analysis.alignment``). The vector of a sentence is its pooled hidden state, or its mean
routing distribution q_i.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from moe_route.analysis.alignment import (
    FEWEST,
    RULE_NAMES,
    Rule,
    VectorSource,
    check_rule,
    cosines,
    judge,
    parallel_vectors,
)
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.matrices import MatrixComparison, compare_matrices, names_in, read_matrix
from moe_route.analysis.overlap import in_layers
from moe_route.analysis.result import Result, fertility_column, mean_of_seen, token_column
from moe_route.analysis.stats import Linkage, clusters, leaves, linkage
from moe_route.base.table import Table


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(Result, hidden=("by_chance",), derived=("chance",)):
    """Similarity of all pairs of groups.

    Attributes:
        values: float64 [L, G, G], 1 for the same; row: the group whose sentences look for their translation, which
            matters for "retrieval" and "margin" only.
        groups: the G groups.
        layers: names of the L layers.
        rule: "cosine", "mexa", "retrieval" or "margin"; "answers" for the share of items answered alike
            (``answer_similarity``); "given" if the similarities were.
        pairs: number of items compared, the same for all pairs; 0 if similarities were given.
        centered: whether the mean of each group was subtracted from its sentences.
        tokens: float64 [G], mean number of tokens per sentence; NaN where it is unknown.
        by_chance: float64 [L, G, G], what random pairs of the same sentences give; NaN on the diagonal.
    """

    values: Annotated[np.ndarray, "layer group other as similarity"]
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    rule: str = "given"
    pairs: int = 0
    centered: bool = False
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0))
    by_chance: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))

    @classmethod
    def of(cls, values: Any, groups: Sequence[str], layers: Sequence[str] | None = None) -> Similarity:
        """Similarities that are known already, float [G, G] or [L, G, G], such as published ones.

        NaN on the diagonal, which published tables leave empty, becomes 1.
        """
        given = np.array(values, dtype=np.float64)
        given = given[None] if given.ndim == 2 else given
        names = tuple(map(str, range(len(given)))) if layers is None else tuple(layers)
        if given.ndim != 3 or given.shape != (len(names), len(groups), len(groups)) or len(set(groups)) < len(groups):
            raise AnalysisError(
                f"similarities are [layer, group, group] of {len(groups)} different groups, not {list(given.shape)}"
            )
        given[np.isnan(given) & np.eye(len(groups), dtype=bool)] = 1.0
        return cls(given, tuple(groups), names)

    @classmethod
    def read(cls, *paths: str | os.PathLike[str], groups: Sequence[str] | None = None) -> Similarity:
        """Read published similarities, a tab-separated matrix for each layer (``read_matrix``).

        ``groups``: those to read, by default all that every file has.
        """
        if not paths:
            raise AnalysisError("there is no file to read: give one for each layer")
        if groups is None:
            every = [set(names_in(path)) for path in paths]
            groups = [name for name in names_in(paths[0]) if all(name in names for names in every)]
        return cls.of(np.stack([read_matrix(path, groups) for path in paths]), groups, [os.fspath(p) for p in paths])

    @property
    def chance(self) -> float:
        """What random pairs of the same sentences give, mean over pairs of groups and layers; NaN if unknown."""
        seen = self.by_chance[~np.isnan(self.by_chance)]
        return float(seen.mean()) if seen.size else float("nan")

    def mean(self, layers: Sequence[int] | int | None = None) -> np.ndarray:
        """float64 [G, G]: the mean over these layers (by default all)."""
        wanted = [layers] if isinstance(layers, int) else layers
        return mean_of_seen(self.values[in_layers(len(self.values), wanted)[:, 0]])[0]

    def ranking(self, reference: str, layers: Sequence[int] | int | None = None) -> dict[str, float]:
        """The other groups by their similarity with one, the most similar first [arXiv 2404.11553]."""
        row = self.mean(layers)[self.place_of(reference)]
        row_of = {group: float(value) for group, value in zip(self.groups, row, strict=True) if group != reference}
        return dict(sorted(row_of.items(), key=lambda pair: -np.nan_to_num(pair[1], nan=-np.inf)))

    def best_source(
        self, target: str, layers: Sequence[int] | int | None = None, *, among: Sequence[str] | None = None
    ) -> str:
        """The group that is most similar to ``target``: the language to transfer from [mPLM-Sim, arXiv 2305.13684].

        ``among``: the candidates, such as languages with training data; by default all others.
        """
        ranked = self.ranking(target, layers)
        unknown = [name for name in among or () if name not in ranked]
        candidates = [name for name in ranked if among is None or name in among]
        if unknown or not candidates:
            raise AnalysisError(f"name sources other than {target!r}, of {', '.join(self.groups)}; not {among}")
        if np.isnan(ranked[candidates[0]]):
            raise AnalysisError(f"no similarity of {target!r} with these groups is known: choose other layers")
        return candidates[0]

    def tree(self, layers: Sequence[int] | int | None = None, method: Linkage = "complete") -> np.ndarray:
        """The tree of the groups by linkage on 1 - similarity, in the form of ``analysis.linkage`` (and of scipy)."""
        distance = 1 - self.mean(layers)
        return linkage((distance + distance.T) / 2, method)

    def order(self, layers: Sequence[int] | int | None = None, method: Linkage = "complete") -> tuple[str, ...]:
        """The groups in the order of the leaves of their tree, so that similar ones lie side by side."""
        return tuple(self.groups[leaf] for leaf in leaves(self.tree(layers, method)))

    def clusters(
        self, number: int, layers: Sequence[int] | int | None = None, method: Linkage = "complete"
    ) -> tuple[tuple[str, ...], ...]:
        """The groups in this number of clusters, by cutting their tree."""
        cut = clusters(self.tree(layers, method), number)
        return tuple(tuple(self.groups[leaf] for leaf in cluster) for cluster in cut)

    def compare(self, table: Any, *, permutations: int = 10_000, seed: int = 0) -> MatrixComparison:
        """Compare with another matrix of the groups, layer by layer, such as genetic similarity of languages.

        For each group, its row is correlated with the row of the table, over the other groups; Pearson r and Spearman
        rho are means over the groups [mPLM-Sim, arXiv 2305.13684]. Groups with a row that does not vary are left out of
        them, and counted. The p-value is Mantel's, for each layer.

        Args:
            table: a tab-separated file as ``read_matrix`` takes it, a mapping group -> (group -> value), or an array
                [G, G] in the order of ``groups``. Groups that it lacks are left out, and named in the result.
            permutations, seed: of the p-value.

        Raises ``AnalysisError`` for a table with fewer than four of the groups, and for values that are not finite.
        """
        return compare_matrices(self.values, self.groups, self.layers, table, permutations=permutations, seed=seed)

    def tables(self) -> list[Table]:
        values, order = self.mean(), self.order()
        rows = [self.groups.index(name) for name in order]
        tokens = self.tokens[rows] if len(self.tokens) else None
        beside = {**token_column(tokens), **fertility_column(tokens, order)}
        columns = {**dict(zip(order, values[rows][:, rows].T.tolist(), strict=True)), **beside}
        about = "each group's mean subtracted, " if self.centered else ""
        of = "given similarities"
        if self.rule != "given":
            name = "share of items answered alike" if self.rule == "answers" else RULE_NAMES[self.rule]
            of = f"{name}, {about}{self.pairs} items"
        notes = ["" if np.isnan(self.chance) else f"random pairs of items: {self.chance:.3f}"]
        notes += ["tokens: mean number per sentence"] if "tokens" in beside else []
        notes += ["fertility: tokens over those of eng_Latn"] if "fertility" in beside else []
        cells = [list(row) for row in zip(order, *columns.values(), strict=True)]
        title = of if len(self.layers) == 1 else f"{of}, mean over {len(self.layers)} layers"
        return [Table(["", *columns], cells, title, "; ".join(filter(None, notes)))]


def similarity(
    source: VectorSource,
    *,
    groups: Sequence[str] | None = None,
    rule: Rule = "cosine",
    kind: str | None = None,
    center: bool | None = None,
    neighbors: int = 4,
    min_common: float = 0.5,
) -> Similarity:
    """Measure how similar the vectors of parallel sentences are, for all pairs of groups and per layer.

    Args:
        source: ``SentenceVectors``; statistics with kept sequences, and items that pair them, for the similarity of
            routing; or vectors, float [item, group, layer, width]. Similarities that are known already: see
            ``Similarity.of`` and ``Similarity.read``.
        groups: by default all; of an array, the name of each of its groups.
        rule: "cosine" [mPLM-Sim, arXiv 2305.13684], "mexa" [arXiv 2410.05873], "retrieval" or "margin"; see
            ``analysis.alignment``.
        kind: of statistics: the router scores used, "full" (the default), "topk" or "count", or "hidden" for recorded
            router inputs.
        center: subtract the mean of each group from its sentences. By default this is done for routing distributions
            only: without it, what all their sentences share outweighs what tells them apart.
        neighbors: number of nearest neighbors that "margin" divides by.
        min_common: smallest allowed share of common items, as in ``analysis.divergence``.

    Raises ``AnalysisError`` for sentences that do not pair, and for shares of fewer than ten sentences.
    """
    vectors = parallel_vectors(source, groups, kind, center, min_common)
    names = vectors.groups
    check_rule(rule, len(vectors.items), neighbors)
    shape = (len(vectors.layers), len(names), len(names))
    values, chance = np.ones(shape), np.full(shape, np.nan)
    both_ways = rule in ("retrieval", "margin")
    for layer, sides in enumerate(vectors.sides()):
        for i, first in enumerate(sides):
            for j in range(len(sides)) if both_ways else range(i + 1, len(sides)):
                if i == j:
                    continue
                judged = judge(cosines(first, sides[j]), rule, neighbors)
                values[layer, i, j] = mean_of_seen(judged.values)[0]
                chance[layer, i, j] = judged.chance
                if not both_ways:
                    values[layer, j, i], chance[layer, j, i] = values[layer, i, j], chance[layer, i, j]
    return Similarity(values, names, vectors.layers, rule, len(vectors.items), vectors.centered, vectors.tokens, chance)


# ---- by the answers that a model gives


def answer_similarity(answers: Mapping[str, Mapping[Any, Hashable]]) -> Similarity:
    """Measure how often a model answers the same question alike in two languages, for all pairs of them.

    An answer is anything that can be compared: the text or the choice given, or whether it was right. Chance is what
    two languages with these answers share if their questions are shuffled, so two languages that are mostly right are
    alike by chance, too.

    Args:
        answers: group -> item -> answer. Compared are the items that all groups have.

    Returns a ``Similarity`` of one layer, [1, G, G], with its tree, clusters, comparisons and pictures. Raises
    ``AnalysisError`` for fewer than two groups or ten common items.
    """
    groups = tuple(answers)
    if len(groups) < 2:
        raise AnalysisError("two groups or more are compared: give answers by group, and by item in each")
    items = [item for item in answers[groups[0]] if all(item in answers[group] for group in groups)]
    if len(items) < FEWEST:
        raise AnalysisError(f"{len(items)} items are common to all groups: give at least {FEWEST}")
    given = [[answers[group][item] for item in items] for group in groups]
    number, often = len(items), [Counter(row) for row in given]
    values, chance = np.ones((1, len(groups), len(groups))), np.full((1, len(groups), len(groups)), np.nan)
    for i in range(len(groups)):
        for j in range(i):
            same = sum(one == other for one, other in zip(given[i], given[j], strict=True))
            values[0, i, j] = values[0, j, i] = same / number
            expected = sum(times * often[j][answer] for answer, times in often[i].items()) / number**2
            chance[0, i, j] = chance[0, j, i] = expected
    return Similarity(values, groups, ("answers",), "answers", number, by_chance=chance)

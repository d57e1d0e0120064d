"""Similarity of languages, from the routing of parallel sentences.

Published measures of the alignment of languages compare hidden states of sentences. Here the vector of a sentence is
its mean routing distribution q_i: mean cosine similarity of translations as in mPLM-Sim [arXiv 2305.13684] and, with
one pivot, in Language Ranker [arXiv 2404.11553]; and the share of sentences that find their translation, as in MEXA
[arXiv 2410.05873].
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations as all_orders
from math import factorial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_route.analysis.coefficients import pearson, ranks
from moe_route.analysis.expert_masks import in_layers
from moe_route.analysis.inputs import AnalysisError, Statistics, check_draws, pick_groups
from moe_route.analysis.pairing import paired_items
from moe_route.analysis.result import frame_of_pairs, mean_of_seen, plain, token_column
from moe_route.analysis.sequences import groups_of
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "MatrixCorrelation",
    "Similarity",
    "average_linkage",
    "matrix_correlation",
    "read_matrix",
    "similarity",
]

Method = Literal["cosine", "mexa", "retrieval"]
METHODS = ("cosine", "mexa", "retrieval")
_NAMES = {
    "cosine": "mean cosine similarity of parallel sentences",
    "mexa": "share of sentences that are nearest to their translation, in both directions",
    "retrieval": "share of sentences whose nearest neighbor is their translation",
}
_FEWEST = 10  # items for a share of sentences


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(ShownAsTables):
    """Similarity of all pairs of groups.

    Attributes:
        values: float64 [L, G, G], 1 for the same; row: the group whose sentences look for their translation, which
            matters for "retrieval" only.
        groups: the G groups.
        layers: names of the L layers.
        method: "cosine", "mexa" or "retrieval".
        pairs: number of items compared, the same for all pairs.
        centered: whether the mean of each group was subtracted from its sentences.
        tokens: float64 [G], mean number of tokens per sequence.
    """

    values: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    method: str
    pairs: int
    centered: bool
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def chance(self) -> float:
        """What unrelated sentences give: 1 / pairs for shares of sentences, 0 for centered cosines, else NaN."""
        return 1 / self.pairs if self.method != "cosine" else 0.0 if self.centered else float("nan")

    def mean(self, layers: Sequence[int] | None = None) -> np.ndarray:
        """float64 [G, G]: the mean over these layers (by default all)."""
        return mean_of_seen(self.values[in_layers(len(self.values), layers)[:, 0]])[0]

    def ranking(self, reference: str, layers: Sequence[int] | None = None) -> dict[str, float]:
        """The other groups by their similarity with one, the most similar first [arXiv 2404.11553]."""
        if reference not in self.groups:
            raise AnalysisError(f"no group {reference!r}: there are {', '.join(self.groups)}")
        row = self.mean(layers)[self.groups.index(reference)]
        found = {group: float(value) for group, value in zip(self.groups, row, strict=True) if group != reference}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def merges(self, layers: Sequence[int] | None = None) -> np.ndarray:
        """The tree of the groups by average linkage on 1 - similarity, in the form of ``average_linkage``."""
        distance = 1 - self.mean(layers)
        return average_linkage((distance + distance.T) / 2)

    def order(self, layers: Sequence[int] | None = None) -> tuple[str, ...]:
        """The groups in the order of the leaves of their tree, so that similar ones lie side by side."""
        return tuple(self.groups[leaf] for leaf in leaves(self.merges(layers)))

    def clusters(self, number: int, layers: Sequence[int] | None = None) -> tuple[tuple[str, ...], ...]:
        """The groups in this number of clusters, by cutting their tree."""
        if not 1 <= number <= len(self.groups):
            raise AnalysisError(f"there can be 1 to {len(self.groups)} clusters of so many groups, not {number}")
        found = {leaf: [leaf] for leaf in range(len(self.groups))}
        for step, (a, b, _, _) in enumerate(self.merges(layers)[: len(self.groups) - number].tolist()):
            found[len(self.groups) + step] = found.pop(int(a)) + found.pop(int(b))
        return tuple(tuple(self.groups[leaf] for leaf in cluster) for cluster in sorted(map(sorted, found.values())))

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (layer, group, other): ``similarity`` and ``router``."""
        return frame_of_pairs(self.values, self.groups, self.layers, "similarity")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {
            "method": self.method,
            "pairs": self.pairs,
            "centered": self.centered,
            "chance": plain(self.chance),
            "groups": list(self.groups),
            "layers": list(self.layers),
            "values": plain(self.values),
            "tokens": plain(self.tokens),
        }

    def tables(self) -> list[Table]:
        values, order = self.mean(), self.order()
        rows = [self.groups.index(name) for name in order]
        tokens = token_column(self.tokens[rows] if len(self.tokens) else None)
        columns = {**dict(zip(order, values[rows][:, rows].T.tolist(), strict=True)), **tokens}
        about = "each group's mean subtracted, " if self.centered else ""
        title = f"{_NAMES[self.method]}, {about}{self.pairs} items, mean over {len(self.layers)} layers"
        notes = ["" if np.isnan(self.chance) else f"by chance: {self.chance:.3f}"]
        notes += ["tokens: mean number per sequence"] if tokens else []
        cells = [list(row) for row in zip(order, *columns.values(), strict=True)]
        return [Table(["", *columns], cells, title, "; ".join(filter(None, notes)))]


def similarity(
    statistics: Statistics,
    *,
    groups: Sequence[str] | None = None,
    method: Method = "cosine",
    kind: str = "full",
    center: bool = True,
    min_common: float = 0.5,
) -> Similarity:
    """Measure how similar the routing of parallel sentences is, for all pairs of groups and per layer.

    With C_ij the cosine similarity of sentence i in one language and sentence j in the other, ``method`` is

    - "cosine": the mean of C_ii [mPLM-Sim, arXiv 2305.13684].
    - "mexa": the share of i for which C_ii is above every other entry of row i and of column i [arXiv 2410.05873].
    - "retrieval": the share of i for which C_ii is above every other entry of row i.

    Args:
        statistics: with kept sequences, and items that pair sentences.
        groups: by default all.
        kind: the router scores used: "full", "topk" or "count".
        center: subtract the mean distribution of each group from its sentences. Without it, what all sentences share
            outweighs what tells them apart.
        min_common: smallest allowed share of common items, as in ``analysis.divergence``.

    Raises ``AnalysisError`` for sequences that do not pair, and for shares of fewer than ten sentences.
    """
    if method not in METHODS:
        raise AnalysisError(f"no method {method!r}: use one of {', '.join(METHODS)}")
    names = pick_groups(statistics, groups)
    if len(names) < 2:
        raise AnalysisError("similarity needs two groups or more")
    items = paired_items(statistics, names, min_common)
    if center and len(items) < 2:
        raise AnalysisError(
            "a single item is its group's mean, and nothing is left of it: record more, or center=False"
        )
    if method != "cosine" and len(items) < _FEWEST:
        raise AnalysisError(f"a share of {len(items)} sentences says little: record at least {_FEWEST} common items")
    units, tokens = [], np.empty(len(names))
    for number, one in enumerate(groups_of(statistics, names, items, kind)):
        units.append(_directions(one.distributions(), center))
        tokens[number] = one.mean_tokens
    values = np.ones((len(statistics.layers), len(names), len(names)))
    for i, first in enumerate(units):
        for j, second in enumerate(units):
            if j > i or (j < i and method == "retrieval"):
                values[:, i, j] = _similarities(first, second, method)
                if method != "retrieval":
                    values[:, j, i] = values[:, i, j]
    return Similarity(values, names, tuple(statistics.layers), method, len(items), center, tokens)


def _directions(q: np.ndarray, center: bool) -> np.ndarray:
    """Unit vectors [L, n, E]; NaN for a sequence without tokens, zero for one that is like the mean."""
    moved = q - mean_of_seen(q)[0] if center else q
    length = np.sqrt((moved * moved).sum(-1, keepdims=True))
    unit = np.divide(moved, length, out=np.zeros(moved.shape), where=~(length <= 1e-12))
    return np.ascontiguousarray(unit.transpose(1, 0, 2))


def _similarities(first: np.ndarray, second: np.ndarray, method: str) -> np.ndarray:
    """The similarity of two groups in each layer, float64 [L]."""
    if method == "cosine":
        return mean_of_seen((first * second).sum(-1), 1)[0]
    found = np.empty(len(first))
    for layer, (a, b) in enumerate(zip(first, second, strict=True)):
        cosines = a @ b.T
        own = np.diag(cosines).copy()
        seen = ~np.isnan(own)
        np.fill_diagonal(cosines, -np.inf)
        cosines[np.isnan(cosines)] = -np.inf
        nearest = own > cosines.max(1)
        if method == "mexa":
            nearest &= own > cosines.max(0)
        found[layer] = nearest[seen].mean() if seen.any() else np.nan
    return found


def average_linkage(distance: np.ndarray) -> np.ndarray:
    """Merge groups to a tree, always the two nearest clusters, by the mean distance of their members (UPGMA).

    Args:
        distance: float64 [G, G], symmetric, without NaN.

    Returns float64 [G - 1, 4] in the form of ``scipy.cluster.hierarchy``: the two clusters that merge, their distance,
    and the number of groups in the new cluster, which gets the number G + step.
    """
    d = np.array(distance, dtype=np.float64)
    if d.ndim != 2 or d.shape[0] != d.shape[1] or not np.isfinite(d).all() or not np.allclose(d, d.T):
        raise AnalysisError("a tree needs a symmetric matrix of finite distances: choose layers that saw tokens")
    size = len(d)
    np.fill_diagonal(d, np.inf)
    numbers, members = list(range(size)), [1] * size
    merges = np.zeros((max(size - 1, 0), 4))
    for step in range(size - 1):
        a, b = sorted(map(int, np.unravel_index(int(d.argmin()), d.shape)))
        together = members[a] + members[b]
        merges[step] = *sorted((numbers[a], numbers[b])), d[a, b], together
        d[a] = d[:, a] = (members[a] * d[a] + members[b] * d[b]) / together
        d[a, a] = np.inf
        d[b] = d[:, b] = np.inf
        numbers[a], members[a] = size + step, together
    return merges


def leaves(merges: np.ndarray) -> list[int]:
    """The leaves of a tree in the form of ``average_linkage``, in an order in which no branches cross."""
    size = len(merges) + 1
    of = {leaf: [leaf] for leaf in range(size)}
    for step, (a, b, _, _) in enumerate(merges.tolist()):
        of[size + step] = of.pop(int(a)) + of.pop(int(b))
    return next(iter(of.values()))


@dataclass(frozen=True, repr=False)
class MatrixCorrelation:
    """Correlation of two matrices over pairs of groups.

    Attributes:
        value: Pearson or Spearman correlation over all pairs of groups.
        p_value: two-sided, by permuting the groups of one matrix [Mantel 1967].
        by_row: mean over groups of the correlation of the group's row with that in the other matrix, over the other
            groups; rows that do not vary are left out [mPLM-Sim, arXiv 2305.13684].
        rows: number of groups in ``by_row``.
        groups: number of groups.
    """

    value: float
    p_value: float
    by_row: float
    rows: int
    groups: int

    def __str__(self) -> str:
        return (
            f"{self.value:+.3f} over pairs of {self.groups} groups (p = {self.p_value:.4f}), {self.by_row:+.3f} by row"
        )

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return plain(asdict(self))


def matrix_correlation(
    first: Any,
    second: Any,
    *,
    method: Literal["pearson", "spearman"] = "pearson",
    permutations: int = 10_000,
    seed: int = 0,
) -> MatrixCorrelation:
    """Correlate two matrices of the same groups, such as similarity of routing and of language families.

    Entries [i, j] and [j, i] are averaged; the diagonal takes no part. The p-value permutes the groups of one matrix,
    rows and columns together (Mantel's test), since the entries of one group are not independent.

    Args:
        first, second: float [G, G].
        method: "pearson" or "spearman" (of ranks).
        permutations: number of random orders; all orders if there are no more than that.
        seed: seed of the random orders.

    Raises ``AnalysisError`` for matrices of different shapes, fewer than four groups, or values beside the
    diagonal that are not finite.
    """
    if method not in ("pearson", "spearman"):
        raise AnalysisError(f'method must be "pearson" or "spearman", not {method!r}')
    a, b = (np.array(one, dtype=np.float64) for one in (first, second))
    check_draws(permutations, "permutations")
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape != b.shape:
        raise AnalysisError(f"the matrices must have one shape [G, G], not {list(a.shape)} and {list(b.shape)}")
    size = len(a)
    beside = ~np.eye(size, dtype=bool)
    if size < 4 or not (np.isfinite(a[beside]).all() and np.isfinite(b[beside]).all()):
        raise AnalysisError("matrices are correlated over four groups or more, of finite values: leave others out")
    a, b = (a + a.T) / 2, (b + b.T) / 2
    scores = ranks if method == "spearman" else np.asarray
    others = [(scores(a[i, beside[i]]), scores(b[i, beside[i]])) for i in range(size)]
    by_row = np.array([pearson(x, y) for x, y in others])
    rows, columns = np.triu_indices(size, 1)
    x, y = (scores(one[rows, columns]) for one in (a, b))
    value = float(pearson(x, y))
    spread = np.zeros((size, size))
    spread[rows, columns] = spread[columns, rows] = y
    exact = factorial(size) <= permutations
    rng = np.random.default_rng(seed)
    orders = all_orders(range(size)) if exact else (rng.permutation(size) for _ in range(permutations))
    centered = x - x.mean()
    bar = abs(float(centered @ y)) * (1 - 1e-12)
    reached = number = 0
    for order in orders:
        order = np.asarray(order)
        reached += abs(float(centered @ spread[order[rows], order[columns]])) >= bar
        number += 1
    p_value = reached / number if exact else (reached + 1) / (number + 1)
    mean = float(np.nanmean(by_row)) if not np.isnan(by_row).all() else float("nan")
    return MatrixCorrelation(
        value, float("nan") if np.isnan(value) else p_value, mean, int((~np.isnan(by_row)).sum()), size
    )


def read_matrix(path: str | os.PathLike[str], groups: Sequence[str]) -> np.ndarray:
    """Read a tab-separated matrix with group names in its first row and column, float64 [G, G] of these groups.

    Such are the published similarities of mPLM-Sim. Empty cells are NaN. Raises ``AnalysisError`` for groups that the
    file lacks, and for another format.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            lines = [line.rstrip("\n").split("\t") for line in stream if line.strip()]
    except UnicodeDecodeError:
        raise AnalysisError(f"{path} is not text: give a tab-separated file") from None
    head = {name: column for column, name in enumerate(lines[0])} if lines else {}
    rows = {line[0]: line for line in lines[1:]}
    missing = [group for group in groups if group not in head or group not in rows]
    if missing:
        raise AnalysisError(
            f"{path} has no row and column {', '.join(missing)}: leave these groups out, or rename them"
        )
    try:
        return np.array([[float(rows[a][head[b]] or "nan") for b in groups] for a in groups])
    except (ValueError, IndexError) as error:
        raise AnalysisError(f"{path} is not a tab-separated matrix of numbers: {error}") from None

"""Matrices over groups: read them from files, and correlate two of them, with a permutation test."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations as all_orders
from math import factorial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError, check_draws
from moe_route.analysis.result import Result, plain
from moe_route.analysis.stats import pearson, ranks
from moe_route.base.schema import read_text
from moe_route.base.table import Table, number_of

if TYPE_CHECKING:
    pass


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
    check_draws(permutations, "permutations")
    a, b = _symmetric(first, second)
    size = len(a)
    by_row = _row_correlations(a, b, method)
    rows, columns = np.triu_indices(size, 1)
    x, y = (_scores(one[rows, columns], method) for one in (a, b))
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
    return MatrixCorrelation(
        value, float("nan") if np.isnan(value) else p_value, _mean(by_row), int((~np.isnan(by_row)).sum()), size
    )


def _symmetric(first: Any, second: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.array(one, dtype=np.float64) for one in (first, second))
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape != b.shape:
        raise AnalysisError(f"the matrices must have one shape [G, G], not {list(a.shape)} and {list(b.shape)}")
    beside = ~np.eye(len(a), dtype=bool)
    if len(a) < 4 or not (np.isfinite(a[beside]).all() and np.isfinite(b[beside]).all()):
        raise AnalysisError("matrices are correlated over four groups or more, of finite values: leave others out")
    return (a + a.T) / 2, (b + b.T) / 2


def _scores(values: np.ndarray, method: str) -> np.ndarray:
    return ranks(values) if method == "spearman" else values


def _row_correlations(a: np.ndarray, b: np.ndarray, method: str) -> np.ndarray:
    """float64 [G]: correlation of the rows of each group, without itself; NaN where one of them does not vary."""
    beside = ~np.eye(len(a), dtype=bool)
    return np.array([pearson(*(_scores(one[i, beside[i]], method) for one in (a, b))) for i in range(len(a))])


def _mean(values: np.ndarray) -> float:
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


@dataclass(frozen=True, eq=False, repr=False)
class MatrixComparison(Result):
    """Agreement of the similarity of groups in each layer with another matrix of them, as mPLM-Sim reports it.

    Attributes:
        pearson, spearman: float64 [L], mean over groups of the correlation of a group's row with that in the other
            matrix, over the other groups.
        rows: int64 [L], number of groups in these means.
        p_value: float64 [L], two-sided, of the Pearson correlation over all pairs, by permuting the groups of one
            matrix (Mantel's test); for each layer alone.
        groups: the groups compared.
        constant: the groups left out of the means in every layer, because a row of theirs does not vary.
        missing: groups of the similarity that the other matrix lacks.
        layers: names of the layers.
    """

    pearson: Annotated[np.ndarray, "layer"]
    spearman: Annotated[np.ndarray, "layer"]
    rows: Annotated[np.ndarray, "layer"]
    p_value: Annotated[np.ndarray, "layer"]
    groups: tuple[str, ...]
    constant: tuple[str, ...]
    missing: tuple[str, ...]
    layers: tuple[str, ...]

    @property
    def best_layer(self) -> int:
        """Index of the layer with the largest mean Pearson correlation."""
        if np.isnan(self.pearson).all():
            raise AnalysisError("no row varies in both matrices, so there is no best layer: compare another table")
        return int(np.nanargmax(self.pearson))

    def tables(self) -> list[Table]:
        measured = (self.pearson, self.spearman, self.rows, self.p_value)
        columns = zip(*(values.tolist() for values in measured), strict=True)
        rows = [[layer, *values] for layer, values in enumerate(columns)]
        title = f"Agreement of similarity with another matrix over {len(self.groups)} groups"
        notes = ["Pearson r, Spearman rho: means over groups of the correlation of their rows; p: Mantel, by layer"]
        if self.constant:
            notes.append(f"left out, as a row does not vary: {number_of(len(self.constant), 'group')}")
        if self.missing:
            notes.append(f"not in the other matrix: {', '.join(self.missing)}")
        return [Table(("layer", "Pearson r", "Spearman rho", "groups", "p"), rows, title, "\n".join(notes))]


def compare_matrices(
    values: np.ndarray,
    groups: Sequence[str],
    layers: Sequence[str],
    table: Any,
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> MatrixComparison:
    """Compare similarities [L, G, G] with another matrix of these groups; see ``Similarity.compare``."""
    names, other = group_matrix(table, groups)
    places = [list(groups).index(name) for name in names]
    columns_of: dict[str, list[float]] = {"pearson": [], "spearman": [], "p_value": []}
    constant, rows = np.ones(len(names), bool), []
    for of_layer in values[:, places][:, :, places]:
        tested = matrix_correlation(of_layer, other, permutations=permutations, seed=seed)
        by_row = _row_correlations(*_symmetric(of_layer, other), "spearman")
        constant &= np.isnan(by_row)
        rows.append(tested.rows)
        for name, value in zip(columns_of, (tested.by_row, _mean(by_row), tested.p_value), strict=True):
            columns_of[name].append(value)
    columns = {name: np.array(column) for name, column in columns_of.items()}
    return MatrixComparison(
        **columns,
        rows=np.array(rows),
        groups=names,
        constant=tuple(name for name, one in zip(names, constant, strict=True) if one),
        missing=tuple(name for name in groups if name not in names),
        layers=tuple(layers),
    )


def group_matrix(table: Any, groups: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The groups that a table has, and its values for them, float64 [G, G].

    ``table``: a tab-separated file as ``read_matrix`` takes it, a mapping group -> (group -> value), or an array in the
    order of ``groups``. Raises ``AnalysisError`` for a table with fewer than four of the groups.
    """
    if isinstance(table, (str, os.PathLike)):
        has = set(names_in(table))
        names = tuple(name for name in groups if name in has)
        values = read_matrix(table, names)
    elif isinstance(table, Mapping):
        names = tuple(name for name in groups if name in table)
        lacks = [(a, b) for a in names for b in names if a != b and b not in table[a] and a not in table[b]]
        if lacks:
            pair = " and ".join(lacks[0])
            raise AnalysisError(f"the table has no value for {pair}: add it, or leave one of them out")
        both = [[np.nan if a == b else table[a].get(b, table[b].get(a)) for b in names] for a in names]
        values = np.array(both, dtype=np.float64).reshape(len(names), len(names))
    else:
        names, values = tuple(groups), np.asarray(table, dtype=np.float64)
        if values.shape != (len(names), len(names)):
            raise AnalysisError(f"an array must be [{len(names)}, {len(names)}], in the order of the groups")
    if len(names) < 4:
        known = ", ".join(names) or "none"
        raise AnalysisError(f"the table must have four of the groups or more, and has {known}: name groups as it does")
    return names, values


def names_in(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Groups with a row and a column in a tab-separated matrix."""
    rows = _rows(path)
    columns = set(rows[0]) if rows else set()
    return tuple(row[0] for row in rows[1:] if row[0] in columns)


def read_matrix(path: str | os.PathLike[str], groups: Sequence[str]) -> np.ndarray:
    """Read a tab-separated matrix with group names in its first row and column, float64 [G, G] of these groups.

    Such are the published similarities of mPLM-Sim. Empty cells are NaN. Raises ``AnalysisError`` for groups that the
    file lacks and for another format, and ``FileRefusedError`` for a file that cannot be read.
    """
    lines = _rows(path)
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


def _rows(path: str | os.PathLike[str]) -> list[list[str]]:
    return [line.split("\t") for line in read_text(path).splitlines() if line.strip()]

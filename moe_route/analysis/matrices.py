"""Compare what routing says with something else: matrices of groups, effects of experts, hidden states."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations as all_orders
from math import factorial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from moe_route.analysis.divergence import divergence
from moe_route.analysis.inputs import AnalysisError, check_draws, paired_items, pick_groups
from moe_route.analysis.measures import ratio
from moe_route.analysis.result import Result, by_depth, mean_of_seen, plain
from moe_route.analysis.stats import centered, pearson, ranks
from moe_route.base.table import Table, number_of

if TYPE_CHECKING:
    from moe_route.recording import RoutingStatistics, SequenceStore


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
    file lacks, and for another format.
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
    try:
        with open(path, encoding="utf-8") as stream:
            return [line.rstrip("\n").split("\t") for line in stream if line.strip()]
    except UnicodeDecodeError:
        raise AnalysisError(f"{path} is not text: give a tab-separated file") from None


# ---- what is observed of experts, and the effect that they have


@dataclass(frozen=True, eq=False, repr=False)
class RankAgreement(Result):
    """Spearman correlation over the experts of a layer between metrics and effects, averaged over layers.

    Attributes:
        metrics, groups: names of the M metrics and G groups.
        rho: float64 [M, G], in [-1, 1]: mean over layers; NaN where no layer has three experts that differ.
        by_layer: float64 [M, G, L].
        p_value: float64 [M, G], two-sided, by permuting the experts of every layer.
        experts: int64 [G], number of experts with an effect.
    """

    metrics: tuple[str, ...]
    groups: tuple[str, ...]
    rho: Annotated[np.ndarray, "metric group"]
    by_layer: np.ndarray
    p_value: Annotated[np.ndarray, "metric group"]
    experts: Annotated[np.ndarray, "group"]

    def tables(self) -> list[Table]:
        rows = [
            [metric, group, float(self.rho[m, g]), float(self.p_value[m, g]), int(self.experts[g])]
            for m, metric in enumerate(self.metrics)
            for g, group in enumerate(self.groups)
        ]
        title = "Rank agreement of metrics with the effect of experts (Spearman, mean over layers)"
        return [Table(("metric", "group", "rho", "p", "experts"), rows, title)]


def rank_agreement(
    metrics: Mapping[str, np.ndarray],
    effects: np.ndarray,
    *,
    groups: Sequence[str] | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> RankAgreement:
    """Compute how well metrics of experts rank their effects, by Spearman's rho within each layer.

    Layers are not mixed, since both metrics and effects differ in level from layer to layer. arXiv 2606.10703 finds
    that no observational metric predicts the causal importance of experts.

    Args:
        metrics: name -> float [L, E] or [G, L, E], such as a frequency, or a difference of frequencies.
        effects: float [L, E] or [G, L, E], such as ``Knockout.total.mean``; NaN where not measured.
        groups: names of the G groups.
        permutations, seed: of the test.

    Raises ``AnalysisError`` for no metric, shapes that do not fit, or a number of names other than G.
    """
    wide = _three(np.asarray(effects, np.float64), "effects")
    names = tuple(groups) if groups is not None else tuple(f"group {g}" for g in range(len(wide)))
    if len(names) != len(wide):
        raise AnalysisError(f"there are effects of {len(wide)} groups, and {len(names)} names")
    if not metrics:
        raise AnalysisError("there is no metric to compare with: pass {name: array}")
    check_draws(permutations, "permutations")
    rng = np.random.default_rng(seed)
    by_layer, p_value = np.full((len(metrics), *wide.shape[:2]), np.nan), np.full((len(metrics), len(wide)), np.nan)
    for m, (metric, values) in enumerate(metrics.items()):
        observed = _three(np.asarray(values, np.float64), metric)
        if observed.shape[1:] != wide.shape[1:] or len(observed) not in (1, len(wide)):
            raise AnalysisError(
                f"metric {metric!r} has shape {list(np.shape(values))}, the effects are {list(wide.shape)}: give both "
                "for the same layers and experts"
            )
        for g in range(len(wide)):
            of_group = observed[0 if len(observed) == 1 else g]
            by_layer[m, g], p_value[m, g] = _agreement(of_group, wide[g], permutations, rng)
    counted = ~np.isnan(by_layer)
    rho = np.where(counted, by_layer, 0.0).sum(2) / np.where(counted.any(2), counted.sum(2), np.nan)
    return RankAgreement(tuple(metrics), names, rho, by_layer, p_value, (~np.isnan(wide)).sum((1, 2)))


def _three(values: np.ndarray, name: str) -> np.ndarray:
    if values.ndim not in (2, 3):
        raise AnalysisError(f"{name} must be [layer, expert] or [group, layer, expert], not {list(values.shape)}")
    return values[None] if values.ndim == 2 else values


def _agreement(
    metric: np.ndarray, effect: np.ndarray, permutations: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Spearman's rho of each layer [L], and the p-value of their mean."""
    rho, drawn = np.full(len(metric), np.nan), np.zeros(permutations)
    for layer in range(len(metric)):
        seen = ~np.isnan(metric[layer]) & ~np.isnan(effect[layer])
        if seen.sum() < 3:
            continue
        x, y = centered(ranks(metric[layer, seen])), centered(ranks(effect[layer, seen]))
        if not x.any() or not y.any():
            continue
        rho[layer] = x @ y
        drawn += rng.permuted(np.tile(y, (permutations, 1)), axis=1) @ x
    counted = ~np.isnan(rho)
    if not counted.any():
        return rho, float("nan")
    reached = np.abs(drawn) >= abs(rho[counted].sum()) - 1e-12
    return rho, float((reached.sum() + 1) / (permutations + 1))


# ---- hidden states beside routing: is similar routing more than similar hidden states?

_TITLES = {
    "divergence": "divergence of routing (D)",
    "cosine": "cosine of hidden states",
    "row_share": "share of the hidden state that the router sees",
    "row_cosine": "cosine of what the router sees",
    "null_cosine": "cosine of what the router does not see",
}


@dataclass(frozen=True, eq=False, repr=False)
class Geometry(Result):
    """Similarity of hidden states of parallel sequences, beside the divergence of their routing; means over items.

    h is the mean router input of a sequence, P the projector on the row space of the router weight W.

    Attributes:
        groups: the G groups that were compared with ``reference``.
        layers: names of the L layers.
        divergence: float64 [G, L], D (arXiv 2510.04694, eq. 2).
        cosine: float64 [G, L], cos(h, h') of a sequence and its translation.
        row_share: float64 [G, L], |P h|^2 / |h|^2 of the group's sequences; None without weights.
        row_cosine: float64 [G, L], cos(P h, P h'); None without weights.
        null_cosine: float64 [G, L], cos(h - P h, h' - P h'); None without weights.
        pairs: number of items.
    """

    groups: tuple[str, ...]
    layers: tuple[str, ...]
    reference: str
    divergence: Annotated[np.ndarray, "group layer"]
    cosine: Annotated[np.ndarray, "group layer"]
    row_share: Annotated[np.ndarray, "group layer"] | None
    row_cosine: Annotated[np.ndarray, "group layer"] | None
    null_cosine: Annotated[np.ndarray, "group layer"] | None
    pairs: int

    def partial(self, accuracy: Mapping[str, float]) -> np.ndarray:
        """Partial correlation of accuracy with D given the cosine, over groups, float64 [L]; NaN where undefined.

        ``r = (r_AD - r_AC r_DC) / sqrt((1 - r_AC^2) (1 - r_DC^2))``. Near 0, routing tells nothing about accuracy that
        the hidden states do not tell. Needs an accuracy for each of at least 4 groups.
        """
        missing = [group for group in self.groups if group not in accuracy]
        if missing:
            raise AnalysisError(f"no accuracy is given for {', '.join(missing)}: give one per group, or leave it out")
        if len(self.groups) < 4:
            raise AnalysisError(f"a partial correlation needs 4 groups or more, there are {len(self.groups)}")
        score = np.array([accuracy[group] for group in self.groups], dtype=np.float64)
        if not np.isfinite(score).all():
            raise AnalysisError("accuracies must be finite numbers: leave out groups without one")
        with_d, with_c = pearson(score, self.divergence.T), pearson(score, self.cosine.T)
        between = pearson(self.divergence.T, self.cosine.T)
        rest = np.sqrt(np.clip((1 - with_c**2) * (1 - between**2), 0, None))
        return np.divide(with_d - with_c * between, rest, out=np.full(rest.shape, np.nan), where=rest > 1e-9)

    def _present(self) -> list[tuple[str, np.ndarray]]:
        return [(name, getattr(self, name)) for name in _TITLES if getattr(self, name) is not None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None); what needs weights only with them."""
        return {name: value for name, value in super().to_dict().items() if value is not None}

    def tables(self) -> list[Table]:
        shown = [by_depth(self.groups, values, title=_TITLES[name]) for name, values in self._present()]
        note = f"means over {self.pairs} sentences and their translations, against {self.reference}"
        return [*shown[:-1], Table(shown[-1].head, shown[-1].rows, shown[-1].title, note)]


def geometry(
    statistics: RoutingStatistics,
    reference: str,
    *,
    weights: Sequence[np.ndarray] | None = None,
    groups: Sequence[str] | str | None = None,
    min_common: float = 0.5,
) -> Geometry:
    """Compare the hidden states of parallel sequences with the divergence of their routing.

    For each item, h and h' are the mean router inputs of the sequence and of its translation in ``reference``. The
    cosine of the two stands beside D. With the router weights, both are split into the row space of the weight, which
    alone the router sees, and the rest [arXiv 2604.09780, 2604.17837].

    Args:
        weights: the router weight of each layer, [E, H] (``experiments.router_weights(routed)``).
        groups: groups to compare; by default all others.
        min_common: as in ``divergence``.

    It needs ``record(hidden=True, sequences=True)`` with items. Raises ``AnalysisError`` for sequences that do not pair
    and weights of another model, ``ValueError`` if hidden states were not recorded.
    """
    compared = (reference, *pick_groups(statistics, groups, leave_out=reference))
    paired_items(statistics, compared, min_common)  # its message names only what helps here
    routing = divergence(statistics, reference, groups=groups, min_common=min_common)
    store = statistics.store
    assert store is not None  # paired divergence needs it
    items = store.paired_items(reference, *routing.groups)
    bases = _row_spaces(weights, statistics)
    base = _hidden(store, items, reference)
    measures: dict[str, list[np.ndarray]] = {name: [] for name in _TITLES if name != "divergence"}
    for group in routing.groups:
        values = _compare(_hidden(store, items, group), base, bases)
        for name, value in values.items():
            measures[name].append(mean_of_seen(value)[0])
    means = {name: np.array(values) if values else None for name, values in measures.items()}
    cosine = means.pop("cosine")
    assert cosine is not None
    layers = tuple(statistics.layers)
    return Geometry(routing.groups, layers, reference, routing.values, cosine, **means, pairs=len(items))


def _hidden(store: SequenceStore, items: Sequence[Any], group: str) -> np.ndarray:
    """Mean router inputs of these sequences, float64 [items, L, H]."""
    return np.stack([store.hidden(item, group) for item in items]).astype(np.float64)


def _row_spaces(weights: Sequence[np.ndarray] | None, statistics: RoutingStatistics) -> list[np.ndarray] | None:
    """An orthonormal basis [r, H] of the row space of each weight."""
    if weights is None:
        return None
    shapes = [np.shape(weight) for weight in weights]
    if len(weights) != len(statistics.layers) or any(
        len(shape) != 2 or shape[0] != size for shape, size in zip(shapes, statistics.num_experts, strict=False)
    ):
        raise AnalysisError(
            f"weights must be one [experts, hidden] per layer ({len(statistics.layers)} layers of "
            f"{', '.join(map(str, sorted(set(statistics.num_experts))))} experts), not {shapes}"
        )
    bases = []
    for weight in weights:
        if not np.isfinite(weight).all():
            raise AnalysisError("a weight holds values that are not finite: pass the weights of the recorded model")
        _, sizes, rows = np.linalg.svd(np.asarray(weight, dtype=np.float64), full_matrices=False)
        bases.append(rows[sizes > sizes.max(initial=0) * max(np.shape(weight)) * np.finfo(np.float64).eps])
    return bases


def _compare(mine: np.ndarray, base: np.ndarray, bases: Sequence[np.ndarray] | None) -> dict[str, np.ndarray]:
    """Each measure [items, L] of hidden states [items, L, H] against those of the reference."""
    values = {"cosine": _cosine(mine, base)}
    if bases is None:
        return values
    if any(basis.shape[1] != mine.shape[2] for basis in bases):
        raise AnalysisError(
            f"the weights are for hidden states of {bases[0].shape[1]} elements, recorded ones have {mine.shape[2]}: "
            "pass the weights of the recorded model"
        )
    seen, other = _projected(mine, bases), _projected(base, bases)
    size = (mine**2).sum(-1)
    share = ratio((seen**2).sum(-1), size)
    return values | {
        "row_share": share,
        "row_cosine": _cosine(seen, other),
        "null_cosine": _cosine(mine - seen, base - other),
    }


def _projected(hidden: np.ndarray, bases: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([hidden[:, layer] @ basis.T @ basis for layer, basis in enumerate(bases)], axis=1)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine over the last axis; NaN for a zero vector."""
    sizes = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return ratio((a * b).sum(-1), sizes)

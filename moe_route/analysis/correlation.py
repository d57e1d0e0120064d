"""Correlation over languages, per layer, between performance and divergence from English, or alignment with it.

See arXiv 2510.04694, section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations as all_orders
from itertools import product
from math import factorial, prod
from typing import Any, Literal

import numpy as np

from moe_route.analysis.alignment import Alignment
from moe_route.analysis.divergence import Divergence
from moe_route.analysis.inputs import AnalysisError, check_draws
from moe_route.analysis.result import Result
from moe_route.analysis.stats import draw_items, interval_of, ranks, resampled_means, unit_length
from moe_route.base.table import Table

_MEASURED = ("pearson", "spearman", "p_value", "p_corrected", "spearman_p_value", "spearman_p_corrected", "number")
Covariates = Mapping[str, Mapping[str, "float | str"]]


@dataclass(frozen=True, eq=False, repr=False)
class Correlation(Result):
    """Correlation over groups between the score of each group and its divergence or alignment, float64 [L] each.

    Attributes:
        pearson, spearman: in [-1, 1]; NaN where divergence or scores do not vary, or with too few groups. Partial
            correlations if there are covariates.
        p_value: two-sided permutation p-value of ``pearson``, for each layer alone; NaN where ``pearson`` is.
        p_corrected: the same, corrected for testing all layers: how often the largest |r| of any layer reaches that of
            this layer. If divergence is unrelated to the scores, at most 5 of 100 results have a layer below 0.05.
        number: int64 [L], number of groups used.
        groups: their names.
        layers: names of the layers.
        reference: the group from which divergence, or with which alignment was measured.
        spearman_p_value, spearman_p_corrected: the same p-values of ``spearman``.
        covariates: names of the covariates that are held constant.
        exchange: what the permutations exchange: "groups", "within blocks" or "blocks".
        orders: number of orders that the p-values compare with, the observed one included.
        quantity: what is correlated with the scores, such as "divergence from"; the reference's name continues it.
    """

    pearson: np.ndarray
    spearman: np.ndarray
    p_value: np.ndarray
    p_corrected: np.ndarray
    number: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    reference: str
    spearman_p_value: np.ndarray = field(default_factory=lambda: np.zeros(0))
    spearman_p_corrected: np.ndarray = field(default_factory=lambda: np.zeros(0))
    covariates: tuple[str, ...] = ()
    exchange: str = "groups"
    orders: int = 0
    quantity: str = "divergence from"
    _data: _Data | None = None

    def interval(
        self,
        level: float = 0.95,
        *,
        of: Literal["pearson", "spearman"] = "pearson",
        resamples: int = 1000,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap interval (low, high) for other groups and other sentences, float64 [L] each.

        Groups and sentences are drawn with replacement, independently of each other. Draws with too few different
        groups for a correlation are drawn anew. Groups count as independent. Needs paired divergence.
        """
        if of not in ("pearson", "spearman"):
            raise AnalysisError(f'of must be "pearson" or "spearman", not {of!r}')
        if self._data is None or self._data.pairs is None:
            raise AnalysisError(
                "an interval needs paired divergence: record(sequences=True) with items that pair sentences"
            )
        drawn = self._data.resampled(of == "spearman", resamples, seed)
        return interval_of(drawn, len(self.groups), level)

    def columns(self) -> dict[str, Any]:
        """``layer``, ``router``, and the correlations, p-values and ``number`` that were computed."""
        return self.over("layer", self._measured())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None), without the p-values that were not computed."""
        measured = self._measured()
        return {name: value for name, value in super().to_dict().items() if name not in _MEASURED or name in measured}

    def _measured(self) -> dict[str, np.ndarray]:
        return {name: values for name in _MEASURED if len(values := getattr(self, name)) == len(self.layers)}

    def tables(self) -> list[Table]:
        """A row per layer; p-values are not averaged over layers."""
        p_values = ("p (this layer)", "p (all layers)")
        head, columns = ["Pearson r", *p_values, "Spearman rho"], [self.pearson, self.p_value, self.p_corrected]
        columns.append(self.spearman)
        if len(self.spearman_p_corrected) == len(self.layers):
            head += p_values
            columns += [self.spearman_p_value, self.spearman_p_corrected]
        numbers = zip(*(column.tolist() for column in (*columns, self.number)), strict=True)
        rows = [[layer, *row] for layer, row in enumerate(numbers)]
        given = f", given {', '.join(self.covariates)}" if self.covariates else ""
        title = f"Correlation of scores with {self.quantity} {self.reference} over {len(self.groups)} groups{given}"
        note = f"p: two-sided, of the column before, by exchanging {_EXCHANGES[self.exchange]}"
        if self.orders:
            note += f" ({self.orders} orders)"
        return [
            Table(("layer", *head, "groups"), rows, title, f"{note}; all layers: corrected for the number of layers")
        ]


_EXCHANGES = {"groups": "scores", "within blocks": "scores within blocks", "blocks": "the scores of whole blocks"}


@dataclass(frozen=True, eq=False)
class _Data:
    """What a correlation is computed from.

    Attributes:
        x: divergence or alignment, float64 [G, L].
        y: scores, float64 [G].
        numbers: covariates that are numbers, float64 [G, c].
        labels: indicators of covariates that are labels, and the constant, float64 [G, c].
        pairs: values of single sentences, float64 [G, n, L]; None when pooled.
    """

    x: np.ndarray
    y: np.ndarray
    numbers: np.ndarray
    labels: np.ndarray
    pairs: np.ndarray | None

    def design(self, rows: Any, ranked: bool) -> np.ndarray:
        """The covariates of some groups, float64 [groups, c], with the constant."""
        numbers = self.numbers[rows]
        return np.hstack([self.labels[rows], ranks(numbers.T).T if ranked and numbers.size else numbers])

    def free(self, rows: Any) -> int:
        """Different groups that are left after the covariates are fitted; a correlation needs 2 or more."""
        rows = np.unique(rows)
        return int(len(rows) - np.linalg.matrix_rank(_scaled(self.design(rows, False))))

    def r(self, x: np.ndarray, rows: np.ndarray, ranked: bool) -> float:
        """The (partial) correlation over some groups, NaN if undefined; ``x`` [groups] are their values."""
        y = self.y[rows]
        if ranked:
            x, y = ranks(x), ranks(y)
        left = _residual_maker(self.design(rows, ranked))
        a, b = _residuals(left, x), _residuals(left, y)
        return float(np.clip(a @ b, -1.0, 1.0)) if a.any() and b.any() else float("nan")

    def by_layer(self, ranked: bool) -> np.ndarray:
        r = np.full(self.x.shape[1], np.nan)
        for layer, column in enumerate(self.x.T):
            rows = np.flatnonzero(~np.isnan(column))
            if len(rows) and self.free(rows) >= 2:
                r[layer] = self.r(column[rows], rows, ranked)
        return r

    def resampled(self, ranked: bool, resamples: int, seed: int) -> np.ndarray:
        """``by_layer`` of resampled groups and sentences, float64 [resamples, L]."""
        assert self.pairs is not None
        weights = draw_items(self.pairs.shape[1], resamples, seed)
        means = np.stack([resampled_means(weights, values) for values in self.pairs], axis=1)
        rng = np.random.default_rng([seed, 1])
        r = np.full((resamples, self.x.shape[1]), np.nan)
        for one in range(resamples):
            rows = rng.integers(0, len(self.y), len(self.y))
            while self.free(rows) < 2:
                rows = rng.integers(0, len(self.y), len(self.y))
            x, y = means[one][rows], self.y[rows]
            if ranked:
                x, y = ranks(x.T).T, ranks(y)
            left = _residual_maker(self.design(rows, ranked))
            r[one] = np.clip(_residuals(left, x.T) @ _residuals(left, y), -1.0, 1.0)
        r[:, np.isnan(self.x).any(0)] = np.nan
        return r


def correlation(
    measured: Divergence | Alignment,
    scores: Mapping[str, float],
    *,
    groups: Sequence[str] | None = None,
    covariates: Covariates | None = None,
    blocks: Mapping[str, Any] | None = None,
    exchange: Literal["within", "blocks"] = "within",
    permutations: int = 10_000,
    seed: int = 0,
) -> Correlation:
    """Compute Pearson r and Spearman rho over groups between ``scores`` (such as accuracy) and ``measured``, per layer.

    Args:
        measured: divergence of the groups from a reference, or their alignment with it; the reference itself takes no
            part.
        scores: group -> score; must name every group compared. Others are ignored.
        groups: the groups to correlate; by default all of ``measured``.
        covariates: name -> (group -> number or label), such as tokens per sequence, script, or the logarithm of the
            amount of text. The correlations are then partial: between what the covariates leave unexplained by linear
            regression (for Spearman, of ranks). The p-values permute the residuals of the scores [Freedman and Lane
            1983].
        blocks: group -> block, such as its language family. The p-values then hold if groups of one block are alike.
        exchange: "within" permutes scores inside each block, which leaves differences between blocks out of the test.
            "blocks" exchanges the scores of whole blocks of equal size, in any order inside.
        permutations: number of random orders of the scores for the p-values. If there are no more orders than that, all
            are used. All layers share the same orders.
        seed: seed of the random orders.

    Without blocks, the p-values treat groups as exchangeable, which languages of one family or script are only
    approximately.

    Raises ``AnalysisError`` for a group without score, covariate or block, values that are not finite, fewer than three
    groups or too few for the covariates, and blocks that leave nothing to exchange.
    """
    names = tuple(measured.groups if groups is None else groups)
    if len(names) < 3:
        raise AnalysisError(f"a correlation over {len(names)} groups says nothing: compare at least three")
    if len(set(names)) < len(names):
        raise AnalysisError("a group is named twice in groups=: it would count as two: name it once")
    check_draws(permutations, "permutations")
    y = _numbers(scores, names, "score")
    numbers, labels = _designs(covariates or {}, names)
    x = np.stack([measured.of(name) for name in names])
    rows = [measured.groups.index(name) for name in names]
    pairs = None if measured.pair_values is None else measured.pair_values[rows]
    data = _Data(x, y, numbers, labels, pairs)
    if data.free(np.arange(len(names))) < 2:
        raise AnalysisError(f"{len(names)} groups are too few for these covariates: leave some out, or add groups")
    kept = ("within blocks" if exchange == "within" else "blocks") if blocks is not None else "groups"
    orders, exact = _orders(_block_numbers(blocks, names), exchange, permutations, seed)
    tests = [_permutation_p(data, ranked, orders, exact) for ranked in (False, True)]
    return Correlation(
        data.by_layer(False),
        data.by_layer(True),
        *tests[0],
        (~np.isnan(data.x)).sum(0),
        names,
        measured.layers,
        measured.reference,
        *tests[1],
        covariates=tuple(covariates or ()),
        exchange=kept,
        orders=len(orders) + (not exact),
        quantity=measured.quantity,
        _data=data,
    )


def _numbers(values: Mapping[str, Any], names: Sequence[str], what: str) -> np.ndarray:
    missing = [name for name in names if name not in values]
    if missing:
        raise AnalysisError(
            f"no {what} for {', '.join(missing)}: add it, or name the groups to correlate: groups= (--groups)"
        )
    try:
        numbers = np.asarray([float(values[name]) for name in names])
    except (TypeError, ValueError):
        numbers = np.full(1, np.nan)
    if not np.isfinite(numbers).all():
        raise AnalysisError(f"{what}s must be finite numbers: leave out groups without one, by groups=")
    return numbers


def _designs(covariates: Covariates, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Covariates that are numbers, and indicators of labels with the constant, float64 [G, c] each."""
    numbers, labels = [np.zeros((len(names), 0))], [np.ones((len(names), 1))]
    for covariate, values in covariates.items():
        if any(isinstance(values.get(name), str) for name in names):
            missing = [name for name in names if name not in values]
            if missing:
                raise AnalysisError(f"no {covariate} for {', '.join(missing)}: add it, or leave the covariate out")
            if not all(isinstance(values[name], str) for name in names):
                raise AnalysisError(f"{covariate} holds labels and numbers: give a label for each group")
            kinds = sorted({str(values[name]) for name in names})
            labels.append(np.array([[str(values[name]) == kind for kind in kinds[1:]] for name in names], float))
        else:
            numbers.append(_numbers(values, names, covariate)[:, None])
    return np.hstack(numbers), np.hstack(labels)


def _block_numbers(blocks: Mapping[str, Any] | None, names: Sequence[str]) -> np.ndarray:
    """The number of the block of each group, int64 [G]; a single block if none are given."""
    if blocks is None:
        return np.zeros(len(names), np.int64)
    missing = [name for name in names if name not in blocks]
    if missing:
        raise AnalysisError(f"no block for {', '.join(missing)}: add it, such as its language family")
    kinds = list(dict.fromkeys(blocks[name] for name in names))
    return np.array([kinds.index(blocks[name]) for name in names])


def _scaled(values: np.ndarray) -> np.ndarray:
    """Columns of length 1, so that the rank does not depend on units."""
    length = np.sqrt((values * values).sum(0))
    return values / np.where(length > 0, length, 1.0)


def _residual_maker(design: np.ndarray) -> np.ndarray | None:
    """The matrix [G, G] that takes away what ``design`` explains; None for the constant alone."""
    if design.shape[1] == 1:
        return None
    scaled = _scaled(design)
    return np.eye(len(design)) - scaled @ np.linalg.pinv(scaled)


def _residuals(maker: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    """What is left of ``values`` [..., G], at unit length; all zero if that is rounding only."""
    moved = values - values.mean(-1, keepdims=True)
    return unit_length(moved if maker is None else moved @ maker, values)


def _permutation_p(data: _Data, ranked: bool, orders: np.ndarray, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """p-values of the layers' r, float64 [L] each; NaN where r is.

    The first is for each layer alone, the second against the largest |r| of all layers (single-step max-T of Westfall
    and Young 1993). With covariates, the residuals of the scores are permuted [Freedman and Lane 1983].
    """
    y = ranks(data.y) if ranked else data.y
    maker = _residual_maker(data.design(slice(None), ranked))
    rest = y if maker is None else (y - y.mean()) @ maker
    here = np.arange(len(y))[None]
    layers = [layer for layer, r in enumerate(data.by_layer(ranked)) if not np.isnan(r)]
    p_value, p_corrected = np.full((2, data.x.shape[1]), np.nan)
    if not layers:
        return p_value, p_corrected
    drawn, reach = [], []
    for layer in layers:
        rows = np.flatnonzero(~np.isnan(data.x[:, layer]))
        left = _residual_maker(data.design(rows, ranked))
        x = data.x[rows, layer]
        x = _residuals(left, ranks(x) if ranked else x)
        drawn.append(np.abs(_residuals(left, rest[orders][:, rows]) @ x))
        reach.append(np.abs(_residuals(left, rest[here][:, rows]) @ x) - 1e-12)
    for target, values in ((p_value, np.stack(drawn)), (p_corrected, np.stack(drawn).max(0)[None])):
        reached = (values >= np.stack(reach)).sum(1)
        # with random orders, the observed order counts too
        target[layers] = reached / len(orders) if exact else (reached + 1) / (len(orders) + 1)
    return p_value, p_corrected


def _orders(block: np.ndarray, exchange: str, draws: int, seed: int) -> tuple[np.ndarray, bool]:
    """Orders of the groups, int64 [number, G], and whether these are all that the blocks allow.

    ``block`` int64 [G] is the block of each group; groups move within their block, or whole blocks of one size change
    places too (``exchange`` "blocks").
    """
    if exchange not in ("within", "blocks"):
        raise AnalysisError(f'exchange must be "within" or "blocks", not {exchange!r}')
    members = [np.flatnonzero(block == number) for number in range(block.max() + 1)]
    by_size: dict[int, list[int]] = {}
    for number, one in enumerate(members):
        by_size.setdefault(len(one), []).append(number)
    alike = list(by_size.values()) if exchange == "blocks" else [[number] for number in range(len(members))]
    number = prod(factorial(len(one)) for one in members) * prod(factorial(len(one)) for one in alike)
    if number == 1:
        raise AnalysisError("these blocks leave nothing to exchange: name larger families, or blocks of equal size")
    if number <= draws:
        return np.array(list(_all_orders(members, alike))), True
    rng = np.random.default_rng(seed)
    if len(members) == 1:
        return rng.permuted(np.tile(np.arange(len(block)), (draws, 1)), axis=1), False
    orders = np.empty((draws, len(block)), dtype=np.int64)
    for order in orders:
        for numbers in alike:
            for to, source in zip(numbers, rng.permutation(numbers), strict=True):
                order[members[to]] = rng.permutation(members[source])
    return orders, False


def _all_orders(members: Sequence[np.ndarray], alike: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Every order in which blocks that are alike change places, and groups move within them."""
    for places in product(*(all_orders(numbers) for numbers in alike)):
        source = {
            to: of for numbers, order in zip(alike, places, strict=True) for to, of in zip(numbers, order, strict=True)
        }
        for inside in product(*(all_orders(members[source[number]].tolist()) for number in range(len(members)))):
            order = np.empty(sum(map(len, members)), dtype=np.int64)
            for number, groups in enumerate(inside):
                order[members[number]] = groups
            yield order

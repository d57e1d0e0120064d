"""Experts that tokens choose together in a layer, and from one layer to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from moe_route.analysis.inputs import AnalysisError, pick_groups
from moe_route.analysis.measures import entropy_of, ratio
from moe_route.analysis.result import Result, by_depth, plain
from moe_route.base.table import Table, number_of
from moe_route.recording import RoutingStatistics

PairMeasure = Literal["probability", "conditional", "lift", "pmi", "jaccard"]
_SHOWN = 10


class ExpertPair(NamedTuple):
    """Two experts: ``layer``, ``expert``, ``other`` (for transitions, an expert of the next layer), value, tokens."""

    layer: int
    expert: int
    other: int
    value: float
    tokens: int


@dataclass(frozen=True, eq=False, repr=False)
class Coactivation(Result):
    """Experts chosen together by the tokens of some groups, in each layer.

    Attributes:
        pairs: int64 [L, E, E], number of tokens that chose both experts; on the diagonal, tokens that chose the expert.
        tokens: int64 [L], number of tokens.
        groups: the groups whose tokens are counted, together.
        layers, num_experts: names and sizes of the layers.
    """

    pairs: np.ndarray
    tokens: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]

    def values(self, measure: PairMeasure = "jaccard") -> np.ndarray:
        """One measure of all pairs, float64 [L, E, E]; NaN on the diagonal and where it is 0 / 0.

        With N tokens, N_e that chose e, and N_ef that chose both:

        - "probability": ``P(e, f) = N_ef / N``.
        - "conditional": ``P(f | e) = N_ef / N_e``, row e, column f (arXiv 2409.02060, section 5.2).
        - "lift": ``P(e, f) / (P(e) P(f))``, and "pmi", its logarithm (-inf for a pair that no token chose).
        - "jaccard": ``N_ef / (N_e + N_f - N_ef)``, overlap of the two experts' sets of tokens.

        Independent experts have lift 1. But k experts drawn without replacement from E, all alike, have lift
        ``(k - 1) E / (k (E - 1))``, which is below 1.
        """
        if measure not in get_args(PairMeasure):
            raise AnalysisError(f"no measure {measure!r}: one of {', '.join(get_args(PairMeasure))}")
        both = self.pairs.astype(np.float64)
        each = np.diagonal(both, axis1=1, axis2=2)
        rows, columns = each[:, :, None], each[:, None, :]
        below = {
            "probability": np.broadcast_to(self.tokens[:, None, None], both.shape),
            "conditional": np.broadcast_to(rows, both.shape),
            "jaccard": rows + columns - both,
        }.get(measure, rows * columns)
        above = both * self.tokens[:, None, None] if measure in ("lift", "pmi") else both
        values = ratio(above, below)
        if measure == "pmi":
            values = np.log(values, out=np.full(both.shape, -np.inf), where=~(values <= 0))
        values[:, np.arange(both.shape[1]), np.arange(both.shape[1])] = np.nan
        return values

    def strongest(
        self, count: int = _SHOWN, measure: PairMeasure = "jaccard", *, min_tokens: int = 10
    ) -> list[ExpertPair]:
        """The pairs with the largest values in any layer, chosen together by at least ``min_tokens`` tokens.

        Every pair is listed once (for "conditional", in the direction that is larger).
        """
        values = self.values(measure)
        if measure == "conditional":
            mirrored = values.transpose(0, 2, 1)
            lower, upper = np.tri(values.shape[1], k=-1, dtype=bool), ~np.tri(values.shape[1], dtype=bool)
            kept = (upper & (values >= mirrored)) | (lower & (values > mirrored))
        else:
            kept = np.broadcast_to(~np.tri(values.shape[1], dtype=bool), values.shape)
        return _strongest(np.where(kept, values, np.nan), self.pairs, count, min_tokens)

    def columns(self) -> dict[str, Any]:
        """``layer``, ``expert``, ``other``, ``tokens`` and every measure; no padding, and no expert with itself."""
        measures = {name: self.values(name) for name in get_args(PairMeasure)}
        apart = ~np.eye(self.pairs.shape[1], dtype=bool)
        return _pair_columns({"tokens": self.pairs, **measures}, self.num_experts, self.num_experts, apart)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content: means by layer, and the strongest pairs."""
        means = {name: plain(values) for name, values in self._by_layer().items()}
        strongest = [pair._asdict() for pair in self.strongest(100)]
        return _axes(self) | {"tokens": self.tokens.tolist()} | means | {"strongest": strongest}

    def _by_layer(self) -> dict[str, np.ndarray]:
        """float64 [L] each: the mean over chosen experts of the largest P(f | e), and of the Jaccard index."""
        chosen = np.diagonal(self.pairs, axis1=1, axis2=2) > 0
        largest = np.nan_to_num(self.values("conditional")).max(-1, initial=0.0)
        jaccard = self.values("jaccard")
        mean = ratio(largest.sum(-1), chosen.sum(-1))
        both = chosen[:, :, None] & chosen[:, None, :] & ~np.isnan(jaccard)
        total = np.where(both, jaccard, 0.0).sum((1, 2))
        count = both.sum((1, 2))
        return {
            "largest_conditional": mean,
            "mean_jaccard": ratio(total, count),
        }

    def tables(self) -> list[Table]:
        means = self._by_layer()
        title = f"Experts chosen together, {_of(self.groups)}"
        rows = ["largest P(f | e), mean over e", "Jaccard index, mean over pairs"]
        shown = by_depth(rows, np.stack(list(means.values())), title=title)
        return [shown, _pairs_table(self.strongest(), "Jaccard", "strongest pairs")]


@dataclass(frozen=True, eq=False, repr=False)
class Transitions(Result):
    """How the expert of a layer determines the expert of the next one, over the tokens of some groups.

    A token counts once for each pair of an expert of layer l and an expert of layer l + 1 that it chose. Entropies are
    those of a pair drawn from all of these.

    Attributes:
        counts: int64 [L-1, E, E], number of tokens that chose expert e in layer l and f in layer l + 1.
        chosen: int64 [L-1, E], number of tokens that chose expert e in layer l.
        tokens: int64 [L-1], number of tokens of layer l.
        groups: the groups whose tokens are counted, together.
        layers, num_experts: names and sizes of the L layers.
    """

    counts: np.ndarray
    chosen: np.ndarray
    tokens: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]

    @property
    def conditional(self) -> np.ndarray:
        """``P(f | e)``, float64 [L-1, E, E]: share of the tokens of e that chose f in the next layer.

        Rows sum to the number of experts that a token chooses; NaN for an expert that no token chose.
        """
        total = self.chosen[..., None]
        return ratio(self.counts, total)

    @property
    def lift(self) -> np.ndarray:
        """``P(e, f) / (P(e) P(f))``, float64 [L-1, E, E]: 1 if the layers are independent, NaN where it is 0 / 0."""
        joint = self._joint
        expected = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
        return ratio(joint, expected)

    @property
    def _joint(self) -> np.ndarray:
        total = self.counts.sum((1, 2), keepdims=True)
        return ratio(self.counts, total)

    @property
    def entropy(self) -> np.ndarray:
        """``H(next)``, float64 [L-1]: entropy of the experts of layer l + 1, in nats."""
        return entropy_of(self._joint.sum(1))

    @property
    def next_entropy(self) -> np.ndarray:
        """``H(next | expert)``, float64 [L-1], in nats: entropy of the next expert where the expert is known."""
        joint = self._joint
        return entropy_of(joint.reshape(len(joint), -1)) - entropy_of(joint.sum(2))

    @property
    def mutual_information(self) -> np.ndarray:
        """``I = H(next) - H(next | expert)``, float64 [L-1], in nats; 0 if the layers are independent."""
        return np.maximum(self.entropy - self.next_entropy, 0.0)

    @property
    def chance(self) -> np.ndarray:
        """Mutual information that independent layers would show by chance, float64 [L-1]: ``(a - 1) (b - 1) / (2 N)``.

        a and b are the numbers of experts chosen in the two layers, N the number of tokens (Miller and Madow's bias).
        It is exact to first order for one expert per token, and a guide otherwise.
        """
        a, b = (self.counts.any(2).sum(1), self.counts.any(1).sum(1))
        above = (a - 1.0) * (b - 1.0)
        return ratio(above, 2.0 * self.tokens)

    def strongest(self, count: int = _SHOWN, *, min_tokens: int = 10) -> list[ExpertPair]:
        """The transitions with the largest ``P(f | e)``, made by at least ``min_tokens`` tokens."""
        return _strongest(self.conditional, self.counts, count, min_tokens)

    def columns(self) -> dict[str, Any]:
        """``layer``, ``expert``, ``other`` (in the next layer), ``tokens``, ``conditional``, ``lift``; no padding."""
        measures = {"tokens": self.counts, "conditional": self.conditional, "lift": self.lift}
        return _pair_columns(measures, self.num_experts[:-1], self.num_experts[1:], True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content: information by layer, and the strongest transitions."""
        names = ("entropy", "next_entropy", "mutual_information", "chance")
        values = {name: plain(getattr(self, name)) for name in names}
        strongest = [pair._asdict() for pair in self.strongest(100)]
        return _axes(self) | {"tokens": self.tokens.tolist()} | values | {"strongest": strongest}

    def tables(self) -> list[Table]:
        rows = {
            "H(next)": self.entropy,
            "H(next | expert)": self.next_entropy,
            "mutual information": self.mutual_information,
            "  of that by chance": self.chance,
        }
        title = f"From layer l to layer l + 1 (nats), {_of(self.groups)}"
        shown = by_depth(rows, title=title)
        return [shown, _pairs_table(self.strongest(), "P(next | expert)", "most certain transitions")]


def coactivation(
    statistics: RoutingStatistics, *, group: str | None = None, groups: Sequence[str] | None = None
) -> Coactivation:
    """Measure which experts of a layer tokens choose together.

    Needs ``record(pairs=True)``. Prefill and decode are counted together.

    Args:
        group: one group; by default the tokens of all groups together.
        groups: several groups, together.

    Raises ``AnalysisError`` for unknown or empty groups, ``ValueError`` if pairs were not recorded.
    """
    names, rows = _groups(statistics, group, groups)
    pairs = _summed(statistics.co_selection, rows)
    return Coactivation(
        pairs, statistics.tokens()[rows].sum(0), names, tuple(statistics.layers), tuple(statistics.num_experts)
    )


def transitions(
    statistics: RoutingStatistics, *, group: str | None = None, groups: Sequence[str] | None = None
) -> Transitions:
    """Measure how the experts of a layer determine those of the next layer.

    Takes the arguments of ``coactivation`` and raises its errors; needs two layers or more.
    """
    names, rows = _groups(statistics, group, groups)
    if len(statistics.layers) < 2:
        raise AnalysisError("transitions need two layers or more: leave layers out of select()")
    counts = _summed(statistics.transitions, rows)
    chosen = np.diagonal(statistics.co_selection, axis1=2, axis2=3)[rows, :-1].sum(0)
    tokens = statistics.tokens()[rows].sum(0)[:-1]
    return Transitions(counts, chosen, tokens, names, tuple(statistics.layers), tuple(statistics.num_experts))


def _groups(
    statistics: RoutingStatistics, group: str | None, groups: Sequence[str] | None
) -> tuple[tuple[str, ...], list[int]]:
    if group is not None and groups is not None:
        raise AnalysisError("give group= or groups=, not both")
    names = pick_groups(statistics, groups if group is None else [group])
    return names, [statistics.groups.index(name) for name in names]


def _summed(table: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """The sum of some groups of [G, ...], without a copy of them all."""
    total = np.array(table[rows[0]], dtype=np.int64)
    for row in rows[1:]:
        total += table[row]
    return total


def _strongest(values: np.ndarray, tokens: np.ndarray, count: int, min_tokens: int) -> list[ExpertPair]:
    """The largest values, in decreasing order; ties go to the lower layer and experts."""
    if count < 1 or min_tokens < 1:
        raise AnalysisError("count and min_tokens must be 1 or more")
    ranked = np.where((tokens >= min_tokens) & ~np.isnan(values), values, -np.inf).reshape(-1)
    order = np.argsort(-ranked, kind="stable")[:count]
    places = zip(*np.unravel_index(order[np.isfinite(ranked[order])], values.shape), strict=True)
    return [
        ExpertPair(int(layer), int(e), int(f), float(values[layer, e, f]), int(tokens[layer, e, f]))
        for layer, e, f in places
    ]


def _pairs_table(pairs: Sequence[ExpertPair], name: str, title: str) -> Table:
    note = "" if pairs else "no pair has enough tokens"
    return Table(["layer", "expert", "other", name, "tokens"], [list(pair) for pair in pairs], title, note)


def _pair_columns(
    values: dict[str, np.ndarray], sizes: Sequence[int], others: Sequence[int], kept: np.ndarray | bool
) -> dict[str, np.ndarray]:
    """Columns of values [L, E, E] where ``kept``, without padding experts."""
    number = np.arange(values["tokens"].shape[1])
    rows, columns = (number < np.asarray(of_layer)[:, None] for of_layer in (sizes, others))
    real = rows[:, :, None] & columns[:, None] & kept
    places = dict(zip(("layer", "expert", "other"), np.nonzero(real), strict=True))
    return places | {name: of_pairs[real] for name, of_pairs in values.items()}


def _axes(pairs: Coactivation | Transitions) -> dict[str, Any]:
    return {"groups": list(pairs.groups), "layers": list(pairs.layers), "num_experts": list(pairs.num_experts)}


def _of(groups: Sequence[str]) -> str:
    return groups[0] if len(groups) == 1 else number_of(len(groups), "group")

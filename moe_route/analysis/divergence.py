"""Routing divergence between groups, layer by layer [arXiv 2510.04694, eq. 2 and appendix A.4].

Paired, as in the paper: D of each sentence and its translation, then the mean over sentences. Pooled: D of the groups'
mean distributions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_route.analysis.inputs import (
    AnalysisError,
    Frequencies,
    Statistics,
    as_array,
    group_index,
    normalized,
    pick_groups,
    shape_of,
)
from moe_route.analysis.measures import cosine_distance, jaccard_distance, jensen_shannon, normalized_jensen_shannon
from moe_route.analysis.result import by_depth, data_frame, plain
from moe_route.texttable import table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MEASURES", "Divergence", "DivergenceMatrix", "UShape", "divergence", "divergence_matrix", "u_shape"]

_log = logging.getLogger(__name__)

Measure = Literal["normalized_jsd", "jsd", "cosine", "jaccard"]
Pairing = Literal["auto", "paired", "pooled"]
MEASURES = ("normalized_jsd", "jsd", "cosine", "jaccard")
_MEASURE_NAMES = {
    "normalized_jsd": "entropy-normalized Jensen-Shannon divergence",
    "jsd": "Jensen-Shannon divergence (nats)",
    "cosine": "cosine distance",
    "jaccard": "Jaccard distance of the top experts",
}


@dataclass(frozen=True, eq=False)
class Divergence:
    """Divergence of groups from one reference.

    Attributes:
        values: float64 [G, L]; 0 = routed alike. NaN where it is undefined (both uniform, or a layer that saw nothing).
        groups: the G groups compared, without the reference.
        reference: the group they are compared with.
        layers: names of the L layers.
        measure: "normalized_jsd" (in [0, 1]), "jsd" (nats), "cosine" or "jaccard" (in [0, 1]).
        pairing: "paired" (mean over parallel sequences) or "pooled" (of mean distributions).
        pairs: for each group the number of parallel sequences; empty when pooled.
        undefined: int64 [G, L], pairs (or 1 when pooled) left out of ``values`` because the measure is undefined.
        pair_values: for each group float64 [pairs, L], what ``values`` averages; empty when pooled.
    """

    values: np.ndarray
    groups: tuple[str, ...]
    reference: str
    layers: tuple[str, ...]
    measure: str = "normalized_jsd"
    pairing: str = "pooled"
    pairs: tuple[int, ...] = ()
    undefined: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    pair_values: tuple[np.ndarray, ...] = ()

    def of(self, group: str) -> np.ndarray:
        """float64 [L]: the divergence of one group."""
        if group not in self.groups:
            raise AnalysisError(f"no group {group!r}: there are {', '.join(self.groups)} (reference {self.reference})")
        return self.values[self.groups.index(group)]

    def interval(self, level: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Percentile bootstrap interval (low, high) of the mean over pairs, each float64 [G, L].

        Parallel sequences are drawn with replacement; all layers of a sequence together. Seeded. Needs paired
        divergence.
        """
        if not self.pair_values:
            raise AnalysisError(
                "an interval needs paired divergence: record(sequences=True) with items that pair sentences"
            )
        if not 0 < level < 1:
            raise AnalysisError(f"level must lie between 0 and 1, not {level}")
        tails = [(1 - level) / 2, (1 + level) / 2]
        ends = np.full((2, *self.values.shape), np.nan)
        for g, pairs in enumerate(self.pair_values):
            rng = np.random.default_rng(seed)  # one seed: groups with the same items are resampled alike
            means = _bootstrap_means(pairs, resamples, rng)
            seen = ~np.isnan(means).any(0)
            ends[:, g, seen] = np.quantile(means[:, seen], tails, axis=0)
        return ends[0], ends[1]

    def to_pandas(self) -> pd.DataFrame:
        """Tidy: a row per (group, layer) with ``divergence``, ``undefined``, ``router`` (the layer's name) and
        ``reference``.
        """
        groups, layers = self.values.shape
        return data_frame(
            {
                "group": np.repeat(np.asarray(self.groups, dtype=object), layers),
                "reference": self.reference,
                "layer": np.tile(np.arange(layers), groups),
                "router": np.tile(np.asarray(self.layers, dtype=object), groups),
                "divergence": self.values.reshape(-1),
                "undefined": self.undefined.reshape(-1),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None), without the values of single pairs."""
        return {
            "measure": self.measure,
            "pairing": self.pairing,
            "reference": self.reference,
            "groups": list(self.groups),
            "layers": list(self.layers),
            "pairs": list(self.pairs),
            "values": plain(self.values),
            "undefined": plain(self.undefined),
        }

    def __repr__(self) -> str:
        pairs = ""
        if self.pairs:
            few, many = min(self.pairs), max(self.pairs)
            pairs = f" over {few if few == many else f'{few} to {many}'} parallel sequences"
        missing = int(self.undefined.sum())
        note = f"\n{missing} undefined (both uniform, or nothing seen), left out" if missing else ""
        title = f"{_MEASURE_NAMES[self.measure]} from {self.reference}, {self.pairing}{pairs}"
        return f"{title}\n{by_depth(self.groups, self.values)}{note}"


@dataclass(frozen=True, eq=False)
class DivergenceMatrix:
    """Divergence of all pairs of groups: ``values`` float64 [L, G, G], symmetric, 0 on the diagonal."""

    values: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    measure: str = "normalized_jsd"
    pairing: str = "pooled"

    def mean(self, layers: Sequence[int] | None = None) -> np.ndarray:
        """float64 [G, G]: the mean over these layers (all by default), NaN where no layer is defined."""
        return _mean_of_seen(self.values if layers is None else self.values[list(layers)])[0]

    def to_pandas(self) -> pd.DataFrame:
        """Tidy: a row per (layer, group, other) with ``divergence``."""
        layers, size, _ = self.values.shape
        names = np.asarray(self.groups, dtype=object)
        return data_frame(
            {
                "layer": np.repeat(np.arange(layers), size * size),
                "group": np.tile(np.repeat(names, size), layers),
                "other": np.tile(names, layers * size),
                "divergence": self.values.reshape(-1),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {
            "measure": self.measure,
            "pairing": self.pairing,
            "groups": list(self.groups),
            "layers": list(self.layers),
            "values": plain(self.values),
        }

    def __repr__(self) -> str:
        body = [[name, *map(float, row)] for name, row in zip(self.groups, self.mean(), strict=True)]
        title = f"{_MEASURE_NAMES[self.measure]} of all pairs, {self.pairing}, mean over {len(self.layers)} layers"
        return f"{title}\n{table(['', *self.groups], body)}"


@dataclass(frozen=True, eq=False)
class UShape:
    """Mean divergence in the first, middle and last layers, float64 [G] each: the U of multilingual routing.

    ``depth`` [G] is (first + last) / 2 - middle: above 0 for a U, below for a cap.
    """

    groups: tuple[str, ...]
    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray
    first_layers: tuple[int, ...]
    middle_layers: tuple[int, ...]
    last_layers: tuple[int, ...]

    @property
    def depth(self) -> np.ndarray:
        return (self.first + self.last) / 2 - self.middle

    def to_pandas(self) -> pd.DataFrame:
        """A row per group with ``first``, ``middle``, ``last``, ``depth``."""
        return data_frame({"group": self.groups, **self._columns()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        layers = {name: list(getattr(self, f"{name}_layers")) for name in ("first", "middle", "last")}
        return {"groups": list(self.groups), "layers": layers, **plain(self._columns())}

    def _columns(self) -> dict[str, np.ndarray]:
        return {"first": self.first, "middle": self.middle, "last": self.last, "depth": self.depth}

    def __repr__(self) -> str:
        head = [
            "group",
            *(f"{n} {p[0]}-{p[-1]}" for n, p in zip(("first", "middle", "last"), self._parts, strict=True)),
            "depth",
        ]
        columns = [column.tolist() for column in self._columns().values()]
        return table(head, [list(row) for row in zip(self.groups, *columns, strict=True)])

    @property
    def _parts(self) -> tuple[tuple[int, ...], ...]:
        return self.first_layers, self.middle_layers, self.last_layers


def divergence(
    statistics: Frequencies,
    reference: str | Frequencies,
    *,
    groups: Sequence[str] | str | None = None,
    pairing: Pairing = "auto",
    measure: Measure = "normalized_jsd",
    kind: str = "full",
    phase: str | None = None,
    by: str = "sequence",
    top: int | None = None,
    num_experts: int | Sequence[int] | None = None,
) -> Divergence:
    """Divergence of groups from a reference, layer by layer [arXiv 2510.04694, eq. 2].

    Args:
        statistics: ``RoutingStatistics``; or an array [layer, expert] of router mass, or [item, layer, expert] whose
            items pair with those of ``reference`` (rows need not be normalized).
        reference: the name of the reference group; or an array of the same shape.
        groups: groups to compare; all others by default.
        pairing: "paired": D of every parallel sequence, then the mean (needs ``record(sequences=True)``); "pooled": D
            of the mean distributions; "auto": paired where every group has sequences parallel to the reference's, no
            phase is named and ``by`` is "sequence".
        measure: "normalized_jsd" (the paper's, in [0, 1]), "jsd" (nats), "cosine" (1 - cos), "jaccard" (of the ``top``
            experts).
        kind: which router scores: "full", "topk", "topk_renorm" or "count".
        phase, by: of the pooled distributions: "prefill", "decode" or both; mean over "sequence" or "token".
        top: experts a side for "jaccard"; the layer's top-k by default.
        num_experts: for arrays, experts of each layer where layers are zero-padded.

    Raises ``AnalysisError`` for unknown or empty groups, sequences that do not pair, and values that are no
    distribution.
    """
    if measure not in MEASURES:
        raise AnalysisError(f"no measure {measure!r}: use one of {', '.join(MEASURES)}")
    if isinstance(statistics, Statistics):
        if not isinstance(reference, str):
            raise AnalysisError("name the reference group of the statistics, or pass two arrays")
        group_index(statistics, reference, "reference group")
        names = pick_groups(statistics, groups, leave_out=reference)
        how = _how_paired(statistics, (reference, *names), pairing, phase, by)
        compare = _comparison(measure, np.asarray(statistics.num_experts), top, statistics.top_k)
        if how == "paired":
            return _paired(statistics, reference, names, measure, kind, compare)
        return _pooled(statistics, reference, names, measure, kind, phase, by, compare)
    return _of_arrays(statistics, reference, measure, top, num_experts)


Comparison = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _comparison(measure: str, sizes: np.ndarray, top: int | None, top_k: Sequence[int] | None) -> Comparison:
    """The measure as a function of two arrays of distributions [..., L, E]."""
    if measure == "normalized_jsd":
        return lambda q1, q2: normalized_jensen_shannon(q1, q2, sizes)
    if measure == "jaccard":
        if top is None and top_k is None:
            raise AnalysisError('measure="jaccard" needs top, the number of experts to compare')
        count = np.minimum(np.asarray(top_k if top is None else top), sizes)
        if (count < 1).any():
            raise AnalysisError(f"top must be 1 or more, not {top}")
        return lambda q1, q2: jaccard_distance(q1, q2, count)
    return jensen_shannon if measure == "jsd" else cosine_distance


def _how_paired(statistics: Statistics, groups: Sequence[str], pairing: str, phase: str | None, by: str) -> str:
    if pairing not in ("auto", "paired", "pooled"):
        raise AnalysisError(f'pairing must be "auto", "paired" or "pooled", not {pairing!r}')
    if pairing == "pooled":
        return pairing
    reason = _why_not_paired(statistics, groups, phase, by)
    if not reason:
        return "paired"
    if pairing == "paired":
        raise AnalysisError(f"no paired divergence: {reason}; or use pairing='pooled'")
    _log.info("pooled divergence: %s", reason)
    return "pooled"


def _why_not_paired(statistics: Statistics, groups: Sequence[str], phase: str | None, by: str) -> str:
    """What stands in the way of pairing, "" for nothing."""
    if statistics.store is None:
        return "sequences were not kept: record(sequences=True)"
    if phase is not None:
        return "kept sequences join prefill and decode: leave phase out"
    if by != "sequence":
        return 'pairs weigh sequences alike: leave by at "sequence"'
    for group in groups[1:]:
        if not statistics.store.paired_items(groups[0], group):
            return (
                f"no item of {group!r} pairs with {groups[0]!r}: "
                "give labels(items=...) one id for a sentence and its translations"
            )
    return ""


def _paired(
    statistics: Statistics, reference: str, groups: tuple[str, ...], measure: str, kind: str, compare: Comparison
) -> Divergence:
    pair_values = []
    for group in groups:
        items = statistics.store.paired_items(reference, group)
        values = np.empty((len(items), len(statistics.layers)))
        for i, item in enumerate(items):
            q1, q2 = (normalized(statistics.store.distributions(item, name, kind)) for name in (reference, group))
            values[i] = compare(q1, q2)
        pair_values.append(values)
    means = [_mean_of_seen(values) for values in pair_values]
    return Divergence(
        values=np.stack([mean for mean, _ in means]),
        groups=groups,
        reference=reference,
        layers=tuple(statistics.layers),
        measure=measure,
        pairing="paired",
        pairs=tuple(len(values) for values in pair_values),
        undefined=np.stack([undefined for _, undefined in means]),
        pair_values=tuple(pair_values),
    )


def _pooled(
    statistics: Statistics,
    reference: str,
    groups: tuple[str, ...],
    measure: str,
    kind: str,
    phase: str | None,
    by: str,
    compare: Comparison,
) -> Divergence:
    q = normalized(statistics.mean_distribution(kind, phase, by))
    rows = [statistics.groups.index(group) for group in groups]
    values = compare(q[statistics.groups.index(reference)][None], q[rows])
    undefined = np.isnan(values).astype(np.int64)
    return Divergence(values, groups, reference, tuple(statistics.layers), measure, "pooled", (), undefined)


def _of_arrays(
    first: Any, second: Any, measure: str, top: int | None, num_experts: int | Sequence[int] | None
) -> Divergence:
    if isinstance(second, (str, Statistics)):
        raise AnalysisError("pass statistics and the name of a group, or two arrays")
    q1, q2 = as_array(first, "the first array"), as_array(second, "the second array")
    if q1.shape != q2.shape:
        raise AnalysisError(f"the arrays must have one shape, not {list(q1.shape)} and {list(q2.shape)}")
    sizes = shape_of(q1, num_experts)
    shape_of(q2, num_experts)
    values = _comparison(measure, sizes, top, None)(normalized(q1), normalized(q2))
    layers = tuple(map(str, range(q1.shape[-2])))
    if q1.ndim == 2:
        undefined = np.isnan(values)[None].astype(np.int64)
        return Divergence(values[None], ("first",), "second", layers, measure, "pooled", (), undefined)
    mean, undefined = _mean_of_seen(values)
    return Divergence(
        mean[None], ("first",), "second", layers, measure, "paired", (len(values),), undefined[None], (values,)
    )


def _mean_of_seen(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over axis 0 of what is not NaN (NaN where nothing is), and how many were NaN."""
    seen = ~np.isnan(values)
    count = seen.sum(0)
    total = np.where(seen, values, 0.0).sum(0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0), len(values) - count


def _bootstrap_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [resamples, L]: means over items drawn with replacement, NaN left out."""
    drawn = rng.integers(0, len(values), (resamples, len(values)))
    weights = np.zeros((resamples, len(values)))
    np.add.at(weights, (np.arange(resamples)[:, None], drawn), 1.0)
    seen = ~np.isnan(values)
    total, count = weights @ np.where(seen, values, 0.0), weights @ seen
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def divergence_matrix(
    statistics: Statistics,
    *,
    groups: Sequence[str] | None = None,
    pairing: Pairing = "auto",
    measure: Measure = "normalized_jsd",
    **options: Any,
) -> DivergenceMatrix:
    """Divergence of all pairs of groups, with the options of ``divergence``; "auto": paired where every pair can be."""
    names = pick_groups(statistics, groups)
    if len(names) < 2:
        raise AnalysisError("a matrix needs two groups or more")
    if pairing == "auto":
        phase, by = options.get("phase"), options.get("by", "sequence")
        whys = [_why_not_paired(statistics, names[i:], phase, by) for i in range(len(names))]
        pairing = "pooled" if any(whys) else "paired"
    values = np.zeros((len(statistics.layers), len(names), len(names)))
    for i, reference in enumerate(names[:-1]):
        rest = names[i + 1 :]
        found = divergence(statistics, reference, groups=rest, pairing=pairing, measure=measure, **options)
        values[:, i, i + 1 :] = values[:, i + 1 :, i] = found.values.T
    return DivergenceMatrix(values, names, tuple(statistics.layers), measure, pairing)


def u_shape(found: Divergence, *, edge: int | None = None, middle: Sequence[int] | range | None = None) -> UShape:
    """Mean divergence of the first ``edge``, the ``middle`` and the last ``edge`` layers.

    By default ``edge`` is a twelfth of the layers (at least one) and ``middle`` the middle third: 0-3, 16-31 and 44-47
    of 48.
    """
    layers = found.values.shape[1]
    size = max(1, layers // 12) if edge is None else edge
    inner = range(layers // 3, max(2 * layers // 3, layers // 3 + 1)) if middle is None else middle
    parts = [tuple(range(size)), tuple(inner), tuple(range(layers - size, layers))]
    if not 1 <= size <= layers or not parts[1] or min(parts[1]) < 0 or max(parts[1]) >= layers:
        raise AnalysisError(f"edge and middle must name some of the {layers} layers (0-{layers - 1})")
    means = [_mean_of_seen(found.values[:, list(part)].T)[0] for part in parts]
    return UShape(found.groups, means[0], means[1], means[2], parts[0], parts[1], parts[2])

"""Routing divergence of all pairs of groups, per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.bootstrap import draw_items, interval_of, resampled_means
from moe_route.analysis.divergence_estimators import (
    MEASURE_NAMES,
    Correct,
    Measure,
    PlainEstimator,
    check_choices,
    compare_distributions,
    described,
    estimator,
    floor_of,
    pooled_values,
    refuse_corrections,
)
from moe_route.analysis.expert_masks import in_layers
from moe_route.analysis.inputs import AnalysisError, Statistics, pick_groups
from moe_route.analysis.pairing import Pairing, common_items
from moe_route.analysis.result import frame_of_pairs, mean_of_seen, plain, token_column
from moe_route.analysis.sequences import batches, groups_of, tokens_per_sequence
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

    from moe_route.recording import Trace

__all__ = ["DivergenceMatrix", "divergence_matrix"]

_MATRIX_BYTES = 1 << 30  # the values of single pairs are kept for a matrix up to this size


@dataclass(frozen=True, eq=False, repr=False)
class DivergenceMatrix(ShownAsTables):
    """Divergence of all pairs of groups.

    ``values`` is float64 [L, G, G], symmetric, 0 on the diagonal. ``pairs`` is the number of items compared, the same
    items for all pairs; 0 when pooled. ``kind``, ``correct``, ``floor`` [G, L] and ``tokens`` [G] are those of
    ``Divergence``. ``pair_values`` is float64 [G (G - 1) / 2, pairs, L], of the pairs of groups in the order of
    ``itertools.combinations``; None when pooled, or if it were larger than 1 GiB.
    """

    values: np.ndarray
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    measure: str = "normalized_jsd"
    pairing: str = "pooled"
    pairs: int = 0
    kind: str = "full"
    correct: str | None = None
    floor: np.ndarray | None = None
    tokens: np.ndarray | None = None
    pair_values: np.ndarray | None = None

    def mean(self, layers: Sequence[int] | None = None) -> np.ndarray:
        """float64 [G, G]: the mean over these layers (by default all), NaN where no layer is defined."""
        return mean_of_seen(self.values[in_layers(len(self.values), layers)[:, 0]])[0]

    def interval(
        self, level: float = 0.95, *, layers: Sequence[int] | None = None, resamples: int = 1000, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap interval (low, high) of ``mean(layers)`` for other sentences, float64 [G, G] each.

        Items are drawn with replacement, with all groups and layers of an item together. Needs paired divergence.
        """
        if self.pair_values is None:
            raise AnalysisError(
                "the values of single sentences are not here: measure paired divergence, of fewer groups or layers "
                "(statistics.select(layers=)) if it is a large matrix"
            )
        columns = np.flatnonzero(in_layers(len(self.layers), layers))
        means = np.stack([mean_of_seen(values[:, columns], 1)[0] for values in self.pair_values], axis=1)
        ends = np.zeros((2, len(self.groups), len(self.groups)))
        found = interval_of(resampled_means(draw_items(self.pairs, resamples, seed), means), self.pairs, level)
        rows, others = np.triu_indices(len(self.groups), 1)
        ends[:, rows, others] = ends[:, others, rows] = np.stack(found)
        return ends[0], ends[1]

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (layer, group, other): ``divergence`` and ``router`` (layer name)."""
        return frame_of_pairs(self.values, self.groups, self.layers, "divergence")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {
            "measure": self.measure,
            "pairing": self.pairing,
            "pairs": self.pairs,
            "groups": list(self.groups),
            "layers": list(self.layers),
            "values": plain(self.values),
            "kind": self.kind,
            "correct": self.correct,
            "floor": plain(self.floor),
            "tokens": plain(self.tokens),
        }

    def tables(self) -> list[Table]:
        how = described(self.pairing, self.pairs, self.kind, self.correct)
        title = f"{MEASURE_NAMES[self.measure]} of all pairs, {how}, mean over {len(self.layers)} layers"
        tokens = token_column(self.tokens)
        columns: dict[str, list[Any]] = {**dict(zip(self.groups, self.mean().tolist(), strict=True)), **tokens}
        notes = ["tokens: mean number per sequence"] if tokens else []
        if self.floor is not None:
            columns["floor"] = mean_of_seen(self.floor, 1)[0].tolist()
            notes.append("floor: between unrelated sentences of one language")
        rows = [list(row) for row in zip(self.groups, *columns.values(), strict=True)]
        return [Table(["", *columns], rows, title, "; ".join(notes))]


def divergence_matrix(
    statistics: Statistics,
    *,
    groups: Sequence[str] | None = None,
    pairing: Pairing = "paired",
    min_common: float = 0.5,
    measure: Measure = "normalized_jsd",
    kind: str = "full",
    phase: str | None = None,
    by: str = "sequence",
    top: int | None = None,
    correct: Correct | None = None,
    trace: Trace | None = None,
    seed: int = 0,
) -> DivergenceMatrix:
    """Measure the divergence of all pairs of groups, with the arguments and errors of ``divergence``.

    Paired divergence uses the items that all groups have.
    """
    check_choices(measure, correct)
    names = pick_groups(statistics, groups, phase=phase)
    if len(names) < 2:
        raise AnalysisError("a matrix needs two groups or more")
    items = common_items(statistics, names, pairing, min_common, phase, by)
    if items is None:
        refuse_corrections(correct, trace)
        return _pooled_matrix(statistics, names, measure, kind, phase, by, top)
    how = estimator(
        statistics, names, items, measure=measure, kind=kind, top=top, correct=correct, trace=trace, seed=seed
    )
    return _paired_matrix(statistics, names, items, how, kind, correct, seed)


def _pooled_matrix(
    statistics: Statistics,
    names: tuple[str, ...],
    measure: str,
    kind: str,
    phase: str | None,
    by: str,
    top: int | None,
) -> DivergenceMatrix:
    how = compare_distributions(measure, np.asarray(statistics.num_experts), top, statistics.top_k)
    values = np.zeros((len(statistics.layers), len(names), len(names)))
    for i, reference in enumerate(names[:-1]):
        found = pooled_values(statistics, reference, names[i + 1 :], how, kind, phase, by)
        values[:, i, i + 1 :] = values[:, i + 1 :, i] = found.T
    tokens = tokens_per_sequence(statistics, names)
    return DivergenceMatrix(values, names, tuple(statistics.layers), measure, "pooled", kind=kind, tokens=tokens)


def _paired_matrix(
    statistics: Statistics,
    names: tuple[str, ...],
    items: Sequence[Any],
    how: PlainEstimator,
    kind: str,
    correct: str | None,
    seed: int,
) -> DivergenceMatrix:
    shape = len(items), len(statistics.layers)
    values = np.zeros((shape[1], len(names), len(names)))
    floors, tokens = np.empty((len(names), *shape)), np.empty(len(names))
    number = len(names) * (len(names) - 1) // 2
    pairs = np.empty((number, *shape)) if number * shape[0] * shape[1] * 8 <= _MATRIX_BYTES else None
    places = {(names[i], names[j]): place for place, (i, j) in enumerate(combinations(range(len(names)), 2))}

    def read(portion: Sequence[str]) -> list[tuple[str, Any]]:
        found = []
        for one in groups_of(statistics, portion, items, kind):
            prepared, g = how.prepare(one), names.index(one.group)
            floors[g], tokens[g] = floor_of(how, prepared, seed), one.mean_tokens
            found.append((one.group, prepared))
        return found

    portions = batches(statistics, names, len(items))
    for number, portion in enumerate(portions):
        here = read(portion)
        for later in portions[number:]:
            others = here if later is portion else read(later)
            for (name, first), (other, second) in product(here, others):
                if (name, other) in places:
                    found = how.compare(first, second)
                    i, j = names.index(name), names.index(other)
                    if correct is not None and "floor" in correct:
                        found -= (floors[i] + floors[j]) / 2
                    values[:, i, j] = values[:, j, i] = mean_of_seen(found)[0]
                    if pairs is not None:
                        pairs[places[name, other]] = found
    return DivergenceMatrix(
        values,
        names,
        tuple(statistics.layers),
        how.measure,
        "paired",
        len(items),
        kind=kind,
        correct=correct,
        floor=mean_of_seen(floors, 1)[0],
        tokens=tokens,
        pair_values=pairs,
    )

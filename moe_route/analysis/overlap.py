"""Sets of experts: choose them by scores, and how far they overlap, against sets drawn at random."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.measures import places, ratio
from moe_route.analysis.result import Result, plain
from moe_route.base.table import Table
from moe_route.steering import ExpertSelection, PlanModel
from moe_route.steering.layers import as_layers

# ---- choose experts by scores [layer, expert]: bool arrays of that shape; ties go to the lower layer and expert


def above(values: np.ndarray, threshold: float, top: int | None = None) -> np.ndarray:
    """Experts whose score is above the threshold and, with ``top``, among the largest of the layer."""
    if not np.isfinite(threshold):
        raise AnalysisError(f"threshold must be a number, not {threshold}")
    chosen = np.nan_to_num(values, nan=-np.inf) > threshold
    return chosen if top is None else chosen & largest(values, top)


def largest(values: np.ndarray, top: int) -> np.ndarray:
    """The ``top`` experts of each layer with the largest scores."""
    if top < 1:
        raise AnalysisError(f"top must be 1 or more, not {top}")
    return places(np.nan_to_num(values, nan=-np.inf)) < top


def first(values: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` experts of all layers together with the largest positive scores."""
    order = np.argsort(-np.nan_to_num(values), axis=None, kind="stable")[:count]
    chosen = np.zeros(values.size, dtype=bool)
    chosen[order] = True
    return chosen.reshape(values.shape) & (values > 0)


def in_layers(layers_in_all: int, layers: Iterable[int] | None) -> np.ndarray:
    """bool [layer, 1]: the layers named; all if None."""
    kept = np.ones((layers_in_all, 1), dtype=bool)
    if layers is not None:
        numbers = as_layers(layers)
        if not numbers or numbers[-1] >= layers_in_all:
            raise AnalysisError(f"layers must name some of the {layers_in_all} layers (0-{layers_in_all - 1})")
        kept[:] = False
        kept[list(numbers)] = True
    return kept


@dataclass(frozen=True, eq=False, repr=False)
class Overlap(Result):
    """Overlap of every pair of selections.

    Attributes:
        names: the selections.
        sizes: int64 [name, layer], experts of a selection.
        shared: int64 [name, name, layer], experts that both selections have.
        num_experts: int64 [layer], experts of the model; 0 in layers that were left out.
        expected: float64 [name, name], mean number of shared experts of random selections with as many experts in each
            layer.
        p_more: float64 [name, name], probability that such random selections share as many experts, or more.
        p_fewer: float64 [name, name], probability that they share as few, or fewer.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    shared: np.ndarray
    num_experts: np.ndarray
    expected: np.ndarray
    p_more: np.ndarray
    p_fewer: np.ndarray

    def jaccard(self, *, by_layer: bool = False) -> np.ndarray:
        """|A & B| / |A | B|, float64 [name, name], or [name, name, layer]; NaN for two empty selections."""
        shared, sizes = self._counts(by_layer)
        return ratio(shared, sizes[:, None] + sizes - shared)

    def containment(self, *, by_layer: bool = False) -> np.ndarray:
        """|A & B| / |A|, the share of A (the first axis) that B has too; NaN for an empty A."""
        shared, sizes = self._counts(by_layer)
        return ratio(shared, np.broadcast_to(sizes[:, None], shared.shape))

    def _counts(self, by_layer: bool) -> tuple[np.ndarray, np.ndarray]:
        return (self.shared, self.sizes) if by_layer else (self.shared.sum(-1), self.sizes.sum(-1))

    def _pairs(self) -> list[tuple[int, int]]:
        count = len(self.names)
        return [(first, second) for first in range(count) for second in range(first + 1, count)]

    def columns(self) -> dict[str, Any]:
        """A row per pair of selections and layer: names and sizes, ``shared`` experts, ``jaccard``."""
        jaccard = self.jaccard(by_layer=True)
        rows = [(a, b, layer) for a, b in self._pairs() for layer in np.flatnonzero(self.num_experts).tolist()]
        return {
            "first": [self.names[a] for a, _, _ in rows],
            "second": [self.names[b] for _, b, _ in rows],
            "layer": [layer for _, _, layer in rows],
            "first_size": [int(self.sizes[a, layer]) for a, _, layer in rows],
            "second_size": [int(self.sizes[b, layer]) for _, b, layer in rows],
            "shared": [int(self.shared[row]) for row in rows],
            "jaccard": [float(jaccard[row]) for row in rows],
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {**super().to_dict(), **plain({"jaccard": self.jaccard(), "containment": self.containment()})}

    def tables(self) -> list[Table]:
        jaccard, shared, sizes = self.jaccard(), self.shared.sum(-1), self.sizes.sum(-1)
        rows = [
            [
                self.names[a],
                int(sizes[a]),
                self.names[b],
                int(sizes[b]),
                int(shared[a, b]),
                *(float(values[a, b]) for values in (self.expected, jaccard, self.p_more, self.p_fewer)),
            ]
            for a, b in self._pairs()
        ]
        head = ("first", "experts", "second", "experts", "shared", "by chance", "Jaccard", "p (more)", "p (fewer)")
        title = f"Overlap of {len(self.names)} selections in {np.count_nonzero(self.num_experts)} layers"
        note = "by chance: selections with as many experts in each layer, drawn at random"
        return [Table(head, rows, title, note)]


def overlap(
    selections: Mapping[str, ExpertSelection],
    *,
    layers: Iterable[int] | None = None,
    num_experts: int | Sequence[int] | None = None,
) -> Overlap:
    """Compare sets of experts: how many experts each pair shares, by layer and overall, and against chance.

    By chance, each selection holds any experts of a layer with equal probability, as many as it has there. The number
    of shared experts of a layer is then hypergeometric, and layers are independent; the distribution of their sum is
    computed exactly.

    Args:
        selections: name -> selection.
        layers: compare these layers only, such as those that a plan steers.
        num_experts: experts per layer of the model, for selections that do not hold it.

    Raises ``AnalysisError`` for fewer than two selections, selections of different models, and a number of experts that
    is unknown or another than that of the model.
    """
    if not isinstance(selections, Mapping) or isinstance(selections, ExpertSelection) or len(selections) < 2:
        raise AnalysisError("an overlap needs two selections or more: pass {name: selection, ...}")
    width = _experts_of(selections, num_experts)
    kept = in_layers(len(width), layers)[:, 0]
    masks = np.stack([_mask(chance, width, name) for name, chance in selections.items()]) & kept[:, None]
    shared = (masks[:, None] & masks[None]).sum(-1)
    sizes = masks.sum(-1)
    count = len(selections)
    expected, p_more, p_fewer = np.zeros((3, count, count))
    for a in range(count):
        for b in range(a, count):
            chance = chance_of_overlap(width, sizes[a], sizes[b], int(shared[a, b].sum()))
            expected[[a, b], [b, a]], p_more[[a, b], [b, a]], p_fewer[[a, b], [b, a]] = chance
    return Overlap(tuple(selections), sizes, shared, np.where(kept, width, 0), expected, p_more, p_fewer)


def _experts_of(selections: Mapping[str, ExpertSelection], given: int | Sequence[int] | None) -> np.ndarray:
    """int64 [layer]: experts of each layer of the model that all selections are of."""
    model = PlanModel()
    for name, experts in selections.items():
        if not isinstance(experts, ExpertSelection):
            raise AnalysisError(
                f"{name!r} is a {type(experts).__name__}, not a selection: make an ExpertSelection of it"
            )
        try:
            # checkpoints of one configuration may be compared
            model = model.merged(replace(experts.model, router_hash=None, weights_hash=None))
        except ValueError as error:
            raise AnalysisError(f"selection {name!r} is of another model: {error}") from None
    if given is None:
        given = model.num_experts
    elif model.num_experts is not None:
        asked = np.asarray(given).tolist()
        if (asked if isinstance(asked, list) else [asked] * len(model.num_experts)) != list(model.num_experts):
            raise AnalysisError(f"the selections are of a model with other experts than {given}: leave num_experts out")
    if given is None:
        known = {experts.num_experts for experts in selections.values() if experts.num_experts is not None}
        if len(known) != 1:
            said = "is not known" if not known else f"differs ({', '.join(sorted(map(str, known)))})"
            raise AnalysisError(f"how many experts the layers have {said}: pass num_experts")
        given = known.pop()
    if isinstance(given, (int, np.integer)):
        last = max((experts.layers[-1] for experts in selections.values() if experts), default=0)
        return np.full(last + 1, given, dtype=np.int64)
    sizes = np.asarray(given)
    if sizes.ndim != 1 or not np.issubdtype(sizes.dtype, np.integer):
        raise AnalysisError("num_experts must be a whole number, or one for each layer")
    return sizes.astype(np.int64)


def _mask(experts: ExpertSelection, width: np.ndarray, name: str) -> np.ndarray:
    """bool [layer, expert]."""
    mask = np.zeros((len(width), int(width.max(initial=1))), dtype=bool)
    for layer, expert in experts.pairs:
        if layer >= len(width) or expert >= width[layer]:
            raise AnalysisError(f"selection {name!r} has expert {expert} of layer {layer}, which num_experts rules out")
        mask[layer, expert] = True
    return mask


def chance_of_overlap(
    num_experts: np.ndarray, first: np.ndarray, second: np.ndarray, shared: int
) -> tuple[float, float, float]:
    """Expected number of shared experts of two random selections, P(shared or more) and P(shared or fewer).

    Args:
        num_experts, first, second: int64 [layer], experts of the model and of each selection.
        shared: number of experts that were found in both, over all layers.
    """
    probability = np.ones(1)
    for width, a, b in zip(num_experts.tolist(), first.tolist(), second.tolist(), strict=True):
        if a and b:
            ways = [comb(a, n) * comb(width - a, b - n) / comb(width, b) for n in range(min(a, b) + 1)]
            probability = np.convolve(probability, ways)
    expected = float(ratio(first * second, num_experts, empty=0.0).sum())
    at_most = float(probability[: shared + 1].sum())
    return expected, min(float(probability[shared:].sum()), 1.0), min(at_most, 1.0)

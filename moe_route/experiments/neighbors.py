"""Scores from solved neighbors: route a new item like similar items that the model got right (C3PO)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moe_route.analysis import AnalysisError
from moe_route.analysis.inputs import check_one_model
from moe_route.analysis.result import plain
from moe_route.base.table import ShownAsTables, Table
from moe_route.recording import RoutingStatistics
from moe_route.recording.store import Item, SequenceStore
from moe_route.steering import Plan, PlanModel

_SHOWN = 12


@dataclass(frozen=True, eq=False, repr=False)
class NeighborScores(ShownAsTables):
    """Scores of N new items, each from its nearest solved items.

    Attributes:
        items: the new items.
        neighbors: N rows of n solved items that each was given, nearest first.
        distances: float64 [N, n].
        weights: float64 [N, n], the kernel's weights; rows sum to 1.
        scores: float64 [N, L, E], the scores to route by; NaN rows in layers without tokens.
        num_experts: experts of each layer.
        model: the model that was recorded.
    """

    items: tuple[Item, ...]
    neighbors: tuple[tuple[Item, ...], ...]
    distances: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    num_experts: tuple[int, ...]
    model: PlanModel

    def plan(self, layers: Iterable[int] | None = None) -> Plan:
        """``Plan.replace_scores`` with one row of scores per item; steer with ``labels(items=...)``.

        C3PO changes the last five layers only. Layers are indices from 0; all by default.
        """
        plan = Plan.replace_scores(self.scores, items=self.items, per="sequence")
        plan = plan.for_model(**(self.model.to_dict() | {"num_experts": self.num_experts}))
        return plan if layers is None else plan.only(layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content, without the scores."""
        return plain(
            {
                "items": self.items,
                "neighbors": self.neighbors,
                "distances": self.distances,
                "weights": self.weights,
            }
        )

    def tables(self) -> list[Table]:
        rows = [
            (item, ", ".join(map(str, names)), float(distance[0]), ", ".join(f"{weight:.2f}" for weight in weights))
            for item, names, distance, weights in zip(
                self.items[:_SHOWN], self.neighbors, self.distances, self.weights, strict=False
            )
        ]
        more = len(self.items) - len(rows)
        title = f"Scores of {len(self.items)} items from their solved neighbors"
        head = ("item", "neighbors", "nearest", "weights")
        return [Table(head, rows, title, f"and {more} more items" if more > 0 else "")]


def neighbor_scores(
    solved: RoutingStatistics,
    new: RoutingStatistics,
    *,
    successful: Iterable[Item] | None = None,
    group: str | None = None,
    new_group: str | None = None,
    space: Literal["routing", "hidden"] = "routing",
    neighbors: int = 3,
    bandwidth: float | None = None,
    share: float = 1.0,
) -> NeighborScores:
    """Average the routing of similar solved items, by kernel regression [C3PO, arXiv 2504.07964].

    ``w_hat(x) = sum_i K(x_i, x) w_i / sum_i K(x_i, x)`` over the nearest solved items i, with the Gaussian kernel
    ``K = exp(-d^2 / (2 h^2))``; the scores are ``share * w_hat + (1 - share) * w(x)``. The pathway w is the item's mean
    score distribution q_i in each layer. The paper chooses ``share`` by the loss; here it is given.

    Args:
        solved: recorded reference items, with their sequences (``record(sequences=True)`` and items).
        new: recorded items to be answered, from a first pass without steering.
        successful: the reference items that the model answered correctly; all by default.
        group, new_group: the group to take from each, if it holds several. ``new_group`` is ``group`` by default, if it
            was recorded.
        space: the space of the distance d: "routing", the q_i of all layers, or "hidden", the mean hidden states of all
            layers (``record(hidden=True)``). Euclidean.
        neighbors: number of nearest items.
        bandwidth: h of the kernel; by default, for each new item, the mean distance of its neighbors.
        share: how much of the neighbors' routing to take, in (0, 1].

    An item that is in both is never its own neighbor. Raises ``AnalysisError`` for recordings without sequences or of
    different models, too few successful items, and values out of range.
    """
    if not 0 < share <= 1 or (bandwidth is not None and not bandwidth > 0) or neighbors < 1:
        raise AnalysisError("share must be in (0, 1], bandwidth above 0, and neighbors 1 or more")
    if (solved.num_experts, solved.layers) != (new.num_experts, new.layers):
        raise AnalysisError("the two recordings are of models with other layers or experts: record both with one model")
    check_one_model(solved, new)
    reference, source = _group(solved, group, "solved")
    asked, target = _group(new, new_group if new_group is not None else group, "new")
    known = _successful(reference, source, successful)
    items = asked.items(target)
    if any(str(item).startswith("#") for item in (*known, *items)):
        raise AnalysisError("some items have no name: record with labels(items=[...])")
    paths, own = _pathways(reference, source, known), _pathways(asked, target, items)
    if space == "routing":
        features, wanted = paths, own
    elif space == "hidden":
        features, wanted = _hidden(reference, source, known), _hidden(asked, target, items)
    else:
        raise AnalysisError(f'space must be "routing" or "hidden", not {space!r}')
    nearest = [
        _nearest(features, wanted[row], [name != item for name in known], neighbors, bandwidth, item)
        for row, item in enumerate(items)
    ]
    scores = np.stack(
        [
            share * np.tensordot(weights, paths[places], 1) + (1 - share) * own[row]
            for row, (places, _, weights) in enumerate(nearest)
        ]
    )
    return NeighborScores(
        tuple(items),
        tuple(tuple(known[place] for place in places) for places, _, _ in nearest),
        np.stack([distances for _, distances, _ in nearest]),
        np.stack([weights for _, _, weights in nearest]),
        scores,
        tuple(new.num_experts),
        PlanModel.of_recording(new.metadata, tuple(new.num_experts)),
    )


def _group(statistics: RoutingStatistics, group: str | None, what: str) -> tuple[SequenceStore, str]:
    store = statistics.store
    if store is None or not len(store):
        raise AnalysisError(f"the {what} recording has no sequences: record(sequences=True), with items")
    if group is None:
        if len(store.groups()) != 1:
            raise AnalysisError(f"name the group: the {what} recording holds {', '.join(map(repr, store.groups()))}")
        group = store.groups()[0]
    if group not in store.groups():
        raise AnalysisError(
            f"no group {group!r} is in the {what} recording: it holds {', '.join(map(repr, store.groups()))}"
        )
    return store, group


def _successful(store: SequenceStore, group: str, successful: Iterable[Item] | None) -> list[Item]:
    recorded = store.items(group)
    if successful is None:
        return recorded
    wanted = set(successful)
    unknown = sorted(map(str, wanted - set(recorded)))
    if unknown:
        raise AnalysisError(f"successful item {unknown[0]!r} was not recorded in group {group!r}: record it first")
    return [item for item in recorded if item in wanted]


def _pathways(store: SequenceStore, group: str, items: Sequence[Item]) -> np.ndarray:
    """float64 [items, L, E]: mean score distribution of each item."""
    shape = (0, len(store.layers), max(store.num_experts, default=0))
    return np.stack([store.distributions(item, group) for item in items]) if items else np.zeros(shape)


def _hidden(store: Any, group: str, items: Sequence[Item]) -> np.ndarray:
    """float64 [items, L, H]: mean hidden state of each item at the routers."""
    if not hasattr(store, "hidden"):
        raise AnalysisError('the sequences have no hidden states: record(hidden=True), or use space="routing"')
    return np.stack([store.hidden(item, group) for item in items])


def _nearest(
    features: np.ndarray, wanted: np.ndarray, usable: Sequence[bool], count: int, bandwidth: float | None, item: Item
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, distances and kernel weights of the nearest usable rows; ties go to the earlier row."""
    places = np.flatnonzero(usable)
    if len(places) < count:
        raise AnalysisError(
            f"there are {len(places)} successful items beside {item!r}, {count} neighbors are asked for: record more "
            "of them, or take fewer neighbors"
        )
    difference = np.nan_to_num(features[places] - wanted).reshape(len(places), -1)
    distance = np.sqrt((difference**2).sum(1))
    nearest = np.argsort(distance, kind="stable")[:count]
    distances = distance[nearest]
    width = float(distances.mean()) if bandwidth is None else bandwidth
    exponent = -(distances**2) / (2 * width**2) if width > 0 else np.zeros(count)
    kernel = np.exp(exponent - exponent.max())  # the largest term is 1, so that no sum is 0
    return places[nearest], distances, kernel / kernel.sum()

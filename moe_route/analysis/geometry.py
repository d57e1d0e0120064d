"""Geometry: hidden states of parallel sentences beside their routing. Is similar routing more than similar states?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from moe_route.analysis.divergence import divergence
from moe_route.analysis.inputs import AnalysisError, paired_items, pick_groups
from moe_route.analysis.measures import ratio
from moe_route.analysis.result import Result, by_depth, mean_of_seen
from moe_route.analysis.stats import pearson
from moe_route.base.table import Table
from moe_route.recording import RoutingStatistics, SequenceStore

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

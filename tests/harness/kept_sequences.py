"""Statistics with kept sequences, made from the counts of each sequence, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moe_route.contract.tables import FIXED_POINT, SCALARS
from moe_route.recording import RoutingStatistics
from moe_route.recording.statistics import SEQUENCE_SCALARS
from moe_route.recording.store import SequenceStore

Counts = Mapping[tuple[str, str], np.ndarray]


def statistics_of(counts: Counts, top_k: int, sizes: Sequence[int], weights: Counts | None = None) -> RoutingStatistics:
    """Statistics in which sequence (item, group) chose experts ``counts[item, group]`` int [L, E] times.

    ``weights``: sums of weight of each sequence, float [L, E].
    """
    groups = tuple(dict.fromkeys(group for _, group in counts))
    layers, width = next(iter(counts.values())).shape
    shape = (len(groups), layers, width)
    scalars = np.zeros((2, *shape[:2], len(SCALARS)), np.int64)
    metrics = {name: np.zeros((2, *shape), np.int64) for name in ("counts", *(("weight",) if weights else ()))}
    frequency = np.zeros((3, *shape), np.int64)
    number = np.zeros((3, *shape[:2], len(SEQUENCE_SCALARS)), np.int64)
    for (item, group), chosen in counts.items():
        row = groups.index(group)
        tokens = chosen.sum(-1) // top_k
        scalars[0, row, :, SCALARS.index("tokens")] += tokens
        scalars[0, row, :, SCALARS.index("slots")] += tokens * top_k
        scalars[0, row, :, SCALARS.index("unscored")] += tokens
        metrics["counts"][0, row] += chosen
        if weights:
            metrics["weight"][0, row] += np.rint(weights[item, group] / FIXED_POINT).astype(np.int64)
        share = chosen / np.where(tokens > 0, tokens, 1)[:, None]
        frequency[[0, 2], row] += np.rint(share / FIXED_POINT).astype(np.int64)
        number[[0, 2], row, :, SEQUENCE_SCALARS.index("sequences")] += tokens > 0
        number[[0, 2], row, :, SEQUENCE_SCALARS.index("count")] += tokens > 0
    names = [str(layer) for layer in range(layers)]
    store = SequenceStore(names, sizes)
    arrays = {
        "tokens": np.stack([chosen.sum(-1) // top_k for chosen in counts.values()]),
        "counts": np.stack(list(counts.values())).astype(np.int32),
    }
    store.append(list(counts), arrays)
    return RoutingStatistics(
        groups=groups,
        layers=names,
        num_experts=sizes,
        top_k=[top_k] * layers,
        scalars=scalars,
        metrics=metrics,
        sequence_scalars=number,
        sequence_sums={"frequency": frequency, "count": frequency},
        entropy=False,
        metadata={"model": {"name": "made up", "config_hash": "abc"}},
        store=store,
    )


def random_counts(
    items: Sequence[str], group: str, taste: np.ndarray, *, top_k: int = 2, tokens: int = 20, seed: int = 0
) -> dict[tuple[str, str], np.ndarray]:
    """Counts of sequences whose tokens choose ``top_k`` experts by the weights ``taste`` [L, E]; 0 for no expert."""
    rng = np.random.default_rng(seed)
    found = {}
    for item in items:
        counts = np.zeros(taste.shape, np.int64)
        for layer, weights in enumerate(taste):
            keys = np.log(np.where(weights > 0, weights, 1e-300)) + rng.gumbel(
                size=(rng.integers(5, tokens), len(weights))
            )
            np.add.at(counts[layer], np.argsort(-keys, axis=1)[:, :top_k].reshape(-1), 1)
        found[item, group] = counts
    return found

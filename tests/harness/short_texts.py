"""Statistics of short texts whose tokens all follow one law, so that groups differ by chance and length alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_route.recording import RoutingStatistics
from moe_route.recording.store import SequenceStore

E, LAYERS = 16, 2
LAW = np.random.default_rng(3).dirichlet(np.ones(E) * 0.6, LAYERS)  # [layer, expert]


def kept(lengths: Mapping[str, int], items: int = 120, seed: int = 0) -> RoutingStatistics:
    """Statistics of sequences whose tokens all follow one law, group -> tokens of each sequence."""
    rng = np.random.default_rng(seed)
    store = SequenceStore([str(layer) for layer in range(LAYERS)], [E] * LAYERS)
    totals = []
    for group, tokens in lengths.items():
        counts = np.stack([rng.multinomial(tokens, one, items) for one in LAW], axis=1)
        arrays = {
            "tokens": np.full((items, LAYERS), tokens),
            "counts": counts.astype(np.int32),
            "full": (counts / tokens).astype(np.float32),
        }
        store.append([(f"s{item}", group) for item in range(items)], arrays)
        totals.append(counts.sum(0))
    found = RoutingStatistics.from_token_sums(
        tuple(lengths),
        counts=np.stack(totals),
        tokens=np.array([[tokens * items] * LAYERS for tokens in lengths.values()]),
        top_k=1,
        num_experts=E,
    )
    found.store = store
    return found

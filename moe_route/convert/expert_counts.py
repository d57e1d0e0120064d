"""Selections by layer and expert, as published for OLMoE and Mixtral.

github.com/allenai/OLMoE, ``scripts/routing_output``: {layer: {expert: selections}}, as JSON or as pickles of counters,
one file per domain. Some layers only. ``expert_counts_top1`` counts first choices, so its ``top_k`` is 1.
"""

from __future__ import annotations

import numpy as np

from moe_route.convert.source import Source
from moe_route.convert.tables import counted, number_table, whole_numbers
from moe_route.recording import RoutingStatistics

__all__ = ["read", "recognizes"]


def recognizes(source: Source) -> bool:
    content = source.content
    return (
        source.form in ("json", "objects")
        and isinstance(content, dict)
        and bool(content)
        and all(
            isinstance(of, dict) and of and all(isinstance(n, (int, float)) for n in of.values())
            for of in content.values()
        )
    )


def read(
    source: Source, *, top_k: int | None = None, num_experts: int | None = None, group: str | None = None
) -> RoutingStatistics:
    """Statistics of one group, named after the file. An expert that is absent was never chosen.

    ``num_experts`` is needed if the last experts were never chosen.
    """
    tables = {int(layer): of for layer, of in zip(whole_numbers(source, source.content), _sorted(source), strict=True)}
    experts = [whole_numbers(source, of) for of in tables.values()]
    width = num_experts or max(ids[-1] for ids in experts) + 1
    if max(ids[-1] for ids in experts) >= width:
        raise ValueError(f"{source.path} counts expert {max(ids[-1] for ids in experts)}: check num_experts {width}")
    rows = np.zeros((len(tables), width))
    for row, of in enumerate(tables.values()):
        for expert, count in of.items():
            rows[row, int(expert)] = count
    counts = number_table(source, rows, "layer, expert")
    return counted(
        source, counts, top_k=top_k, format="expert-counts", group=group, layers=[str(layer) for layer in tables]
    )


def _sorted(source: Source) -> list[dict[str, float]]:
    return [source.content[key] for key in sorted(source.content, key=int)]

"""Counts and sums of gate weights by layer and expert, as published for Qwen3-30B-A3B on MGSM.

github.com/conctsai/Multilingualism-in-Mixture-of-Experts-LLMs, ``routing/mgsm_result/mgsm_<language>.json``: {layer:
{expert: {"activation_tokens": n, "gate_values_sum": w}, "total_tokens": n}}, one file per language. The weights of a
token's experts add up to 1. That recorder summed in bfloat16, so counts miss top_k * tokens by up to 0.03 %.
"""

from __future__ import annotations

import numpy as np

from moe_route.convert.source import Source
from moe_route.convert.tables import number_table, whole_numbers
from moe_route.recording import RoutingStatistics

__all__ = ["read", "recognizes"]


def recognizes(source: Source) -> bool:
    content = source.content
    return (
        source.form == "json"
        and isinstance(content, dict)
        and bool(content)
        and all(isinstance(of, dict) and "total_tokens" in of for of in content.values())
    )


def read(
    source: Source, *, group: str | None = None, top_k: int | None = None, tolerance: float = 1e-3
) -> RoutingStatistics:
    """Statistics of one group, named after the file (``mgsm_de.json`` is "de"), with counts and weight_share."""
    layers = whole_numbers(source, source.content)
    experts = whole_numbers(source, {key for key in source.content[str(layers[0])] if key != "total_tokens"})
    tokens = np.zeros((1, len(layers)), np.int64)
    counts, share = np.zeros((2, 1, len(layers), len(experts)))
    for row, layer in enumerate(layers):
        of_layer = source.content[str(layer)]
        if len(of_layer) != len(experts) + 1:
            raise source.refused(
                f"layer {layer} has {len(of_layer) - 1} experts, layer {layers[0]} has {len(experts)}",
                "it is not whole; get it again",
            )
        tokens[0, row] = of_layer["total_tokens"]
        entries = [of_layer[str(expert)] for expert in experts]
        counts[0, row] = number_table(source, [entry["activation_tokens"] for entry in entries], "expert")
        share[0, row] = number_table(source, [entry["gate_values_sum"] for entry in entries], "expert")
    if tokens.min(initial=0) < 0:
        raise source.refused("it has negative numbers of tokens", "record again")
    if top_k is None:
        top_k = round(counts.sum() / max(int(tokens.sum()), 1))
    return RoutingStatistics.from_token_sums(
        [group or source.name.removeprefix("mgsm_")],
        counts=counts,
        tokens=tokens,
        top_k=top_k,
        layers=[str(layer) for layer in layers],
        num_experts=len(experts),
        tolerance=tolerance,
        weight_share=share,
        metadata={"format": "gate-sums"},
    )

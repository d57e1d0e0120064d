"""Routing of gpt-oss as published by github.com/AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting.

``*_examples.json`` is one generation: ``router_data`` [{"token_<position>": {"layer_<l>": {"selected_experts",
"selected_probs"}}}, ...]. ``<split>.json`` has means over generations, in ``think_expert_analytics`` and
``answer_expert_analytics``: {"layer_<l>": {expert: {"prob_density", "count_frequency"}}}, without the experts that were
never chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_route.contract.tables import FIXED_POINT, SCALARS
from moe_route.convert.source import Source, as_array
from moe_route.convert.tables import number_table
from moe_route.convert.traces import RoutedSequence, trace_of
from moe_route.recording import RoutingStatistics, Trace
from moe_route.recording.statistics import IMPORTED, SEQUENCE_SCALARS, VIEWS

__all__ = ["is_analytics", "is_example", "read_analytics", "read_example"]

EXPERTS, TOP_K = 32, 4
_PARTS = ("think", "answer")


def is_example(source: Source) -> bool:
    return any("router_data" in one for one in _documents(source))


def is_analytics(source: Source) -> bool:
    return source.form == "json" and isinstance(source.content, dict) and "think_expert_analytics" in source.content


def _documents(source: Source) -> list[dict[str, Any]]:
    listed = source.content if isinstance(source.content, list) else [source.content]
    return [one for one in listed if isinstance(one, dict)] if source.form in ("json", "lines") else []


def read_example(source: Source, *, group: str | None = None) -> Trace:
    """A trace of the generated tokens: groups are the datasets, items the row indices; all tokens are decode."""
    sequences, layers = [], 0
    for one in _documents(source):
        tokens = {int(key.removeprefix("token_")): of for row in one["router_data"] for key, of in row.items()}
        positions = sorted(tokens)
        if not positions or positions != list(range(positions[0], positions[0] + len(positions))):
            raise source.refused("some generated tokens are missing", "get it again")
        layers = len(tokens[positions[0]])
        chosen = [[tokens[p][f"layer_{layer}"] for layer in range(layers)] for p in positions]
        ids = as_array([[of["selected_experts"] for of in token] for token in chosen])
        weights = as_array([[of["selected_probs"] for of in token] for token in chosen])
        if ids.ndim != 3 or ids.dtype.kind != "i" or weights.shape != ids.shape or not (np.abs(weights) <= 1).all():
            raise source.refused("its experts and probabilities are not [tokens, layers, k]", "get it again")
        name = group or str(one.get("category") or source.name)
        sequences.append(RoutedSequence(ids, one.get("row_index"), name, weights, prompt=0, first=positions[0]))
    return trace_of(sequences, [str(layer) for layer in range(layers)])


def read_analytics(source: Source, *, group: str | None = None) -> RoutingStatistics:
    """Statistics with the groups "<name> think" and "<name> answer", of sequences only.

    The published means over generations are the sequence sums of arXiv 2510.04694, eq. 1 and 3, so they are read with
    ``by="sequence"`` and kind "topk". There are no token sums; tokens are the published means times the generations.
    """
    content = source.content
    samples = int(content["sample_count"])
    tables = [content[f"{part}_expert_analytics"] for part in _PARTS]
    tokens = [round(samples * float(content[f"num_{part}_tokens"])) for part in _PARTS]
    layers = len(tables[0])
    density, frequency = (
        np.stack([[_row(source, table[f"layer_{layer}"], key) for layer in range(layers)] for table in tables])
        for key in ("prob_density", "count_frequency")
    )
    if samples < 1 or min(tokens) < 0 or max(density.max(initial=0), frequency.max(initial=0)) > TOP_K:
        raise source.refused("its numbers of generations or its means are not possible", "get it again")
    name = group or source.name
    cells = (len(_PARTS), layers)
    scalars = np.zeros((2, *cells, len(SCALARS)), np.int64)
    scalars[1, ..., SCALARS.index("tokens")] = np.array(tokens)[:, None]
    scalars[1, ..., SCALARS.index("slots")] = np.array(tokens)[:, None] * TOP_K
    scalars[1, ..., SCALARS.index("unscored")] = np.array(tokens)[:, None]
    sequences = np.zeros((len(VIEWS), *cells, len(SEQUENCE_SCALARS)), np.int64)
    sequences[1:, ..., [SEQUENCE_SCALARS.index("sequences"), SEQUENCE_SCALARS.index("topk")]] = samples
    sums = {}
    for kind, mean in (("topk", density), ("frequency", frequency)):
        sums[kind] = np.zeros((len(VIEWS), *cells, EXPERTS), np.int64)
        sums[kind][1:] = np.rint(mean * samples / FIXED_POINT)
    return RoutingStatistics(
        groups=[f"{name} {part}" for part in _PARTS],
        layers=[str(layer) for layer in range(layers)],
        num_experts=[EXPERTS] * layers,
        top_k=[TOP_K] * layers,
        scalars=scalars,
        metrics={},
        sequence_scalars=sequences,
        sequence_sums=sums,
        entropy=False,
        metadata={"source": IMPORTED, "format": "gpt-oss-analytics"},
    )


def _row(source: Source, table: dict[str, dict[str, float]], key: str) -> np.ndarray:
    row = np.zeros(EXPERTS)
    for expert, of in table.items():
        row[int(expert)] = of[key]
    return number_table(source, row, "expert")

"""What the recorded routing of Qwen3-30B-A3B on MGSM prompts tells about the findings, from pooled sums alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from published_routing import read

from moe_route import RoutingStatistics, analysis

PIVOT = "en"
TOP = 8  # experts per token of Qwen3-30B-A3B
TAUS = (0.2, 0.3, 0.4, 0.5)
SPECIFIC = 50  # low-entropy experts per language


def recorded_routing(data: Path) -> dict[str, Any]:
    """Divergence, experts, load and similarity of the five languages, for JSON."""
    statistics = read(data)
    found = analysis.divergence(statistics, PIVOT, kind="topk", by="token", pairing="pooled")
    shape = analysis.u_shape(found)
    parts = {"first": shape.first_layers, "middle": shape.middle_layers, "last": shape.last_layers}
    return {
        "languages": list(statistics.groups),
        "layers": len(statistics.layers),
        "experts": max(statistics.num_experts),
        "tokens": dict(zip(statistics.groups, statistics.tokens()[:, 0].tolist(), strict=True)),
        "parts": {name: list(layers) for name, layers in parts.items()},
        "shape": shape.to_dict(),
        "by_layer": found.values.tolist(),
        "order": order_of(found),
        "experts_shared": shared_experts(statistics, parts),
        "multilingual": multilingual(statistics, parts),
        "specific": specific(statistics, parts),
        "load": load(statistics, parts),
        "matrix": similarity_of(statistics, parts),
    }


def order_of(found: analysis.Divergence) -> dict[str, Any]:
    """In how many layers each language is the closest, the second, ... to English."""
    places = np.argsort(np.argsort(found.values, axis=0), axis=0)
    counts = [[int((row == place).sum()) for place in range(len(found.groups))] for row in places]
    return {"groups": list(found.groups), "counts": counts}


def shared_experts(statistics: RoutingStatistics, parts: dict[str, Any]) -> dict[str, Any]:
    """Jaccard index of the eight most used experts with those of English, and the experts that all languages share."""
    distance = analysis.divergence(
        statistics, PIVOT, measure="jaccard", kind="count", by="token", pairing="pooled", top=TOP
    )
    common = analysis.committee(statistics, top=TOP)
    return {
        "groups": list(distance.groups),
        "jaccard": {name: (1 - distance.values[:, list(layers)].mean(1)).tolist() for name, layers in parts.items()},
        "common": {name: len(common.experts.restrict(layers)) / len(layers) for name, layers in parts.items()},
    }


def multilingual(statistics: RoutingStatistics, parts: dict[str, Any]) -> dict[str, Any]:
    """Multilingual experts per layer by threshold: more used in some other language than in English."""
    rows = {}
    for tau in TAUS:
        experts = analysis.multilingual_experts(statistics, PIVOT, threshold=tau, by="token")
        rows[f"{tau:g}"] = {name: len(experts.restrict(layers)) / len(layers) for name, layers in parts.items()}
    return rows


def specific(statistics: RoutingStatistics, parts: dict[str, Any]) -> dict[str, Any]:
    """Where the experts lie that few languages use, and in how many of these two languages agree."""
    found = analysis.entropy_experts(statistics, top_n=SPECIFIC)
    places = {name: {part: len(found[name].restrict(layers)) for part, layers in parts.items()} for name in found}
    shared = analysis.overlap({name: found[name] for name in found})
    return {"number": SPECIFIC, "places": places, "shared": shared.shared.sum(-1).tolist(), "groups": list(found)}


def load(statistics: RoutingStatistics, parts: dict[str, Any]) -> dict[str, Any]:
    """Entropy of the load over log E, and the share of experts that are hardly used."""
    found = analysis.load_balance(statistics)
    return {
        "groups": list(found.groups),
        "entropy": {name: found.entropy[:, list(layers)].mean(1).tolist() for name, layers in parts.items()},
        "rare": {name: found.rare[:, list(layers)].mean(1).tolist() for name, layers in parts.items()},
    }


def similarity_of(statistics: RoutingStatistics, parts: dict[str, Any]) -> dict[str, Any]:
    """Divergence of all pairs in the middle layers, and the order in which languages join by average linkage."""
    found = analysis.divergence_matrix(statistics, kind="topk", by="token", pairing="pooled")
    middle = found.mean(list(parts["middle"]))
    names = list(found.groups)
    clusters = {i: [name] for i, name in enumerate(names)}
    joined = []
    for step, (a, b, distance, _) in enumerate(analysis.linkage(middle, "average").tolist()):
        clusters[len(names) + step] = clusters[int(a)] + clusters[int(b)]
        joined.append({"groups": clusters[len(names) + step], "distance": distance})
    return {"groups": names, "middle": middle.tolist(), "joined": joined}

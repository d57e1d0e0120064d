"""What was counted, and how often each expert was chosen: the part of a report that every recording has."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_route.recording import RoutingStatistics
from moe_route.recording.metadata import config_hash_of
from moe_route.report.packing import packed_numbers

__all__ = ["facts_of", "frequencies_of", "weighting"]


def facts_of(statistics: RoutingStatistics) -> dict[str, Any]:
    """Model, versions, groups with tokens and sequences, what was left out, and the conservation of slots."""
    metadata = statistics.metadata
    tokens, sequences = statistics.tokens(), statistics.sequences()
    held = statistics.conservation() if "counts" in statistics.metrics else None
    return {
        "model": {**(metadata.get("model") or {}), "config_hash": config_hash_of(metadata)},
        "source": metadata.get("source", "moe-route"),
        "versions": metadata.get("versions", {}),
        "engines": metadata.get("engines", []),
        "layers": len(statistics.layers),
        "routers": list(statistics.layers),
        "experts": list(statistics.num_experts),
        "topK": list(statistics.top_k),
        "metrics": list(statistics.metrics),
        "groups": [
            {"name": name, "tokens": int(of.max(initial=0)), "sequences": int(number)}
            for name, of, number in zip(statistics.groups, tokens, sequences, strict=True)
        ],
        "masked": metadata.get("masked", []),
        "specialTokens": len(metadata.get("special_tokens", [])),
        "cutTexts": metadata.get("cut_texts", 0),
        "cutTo": metadata.get("cut_to_tokens", []),
        "plans": metadata.get("plans", []),
        "abandoned": metadata.get("abandoned_sequences", 0),
        "keptSequences": statistics.store is not None,
        "conservation": None
        if held is None
        else {"holds": held.holds, "largestGap": _finite(held.largest_gap), "slots": int(held.expected.sum())},
    }


def weighting(statistics: RoutingStatistics) -> str:
    """ "sequence" where sequences were counted, else "token"."""
    return "sequence" if statistics.sequences().any() else "token"


def frequencies_of(statistics: RoutingStatistics) -> dict[str, Any] | None:
    """How often a token chooses each expert, [group, layer, expert], packed; None without counts."""
    if "counts" not in statistics.metrics:
        return None
    by = weighting(statistics)
    values = statistics.frequency(by=by)  # type: ignore[arg-type]
    beyond = np.arange(values.shape[2]) >= np.asarray(statistics.num_experts)[:, None]
    return {"by": by, "values": packed_numbers(np.where(beyond, np.nan, values))}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None

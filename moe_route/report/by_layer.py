"""Measures by layer for the figures of a report: divergence, its correlation with scores, load and entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_route import analysis
from moe_route.analysis import Divergence
from moe_route.recording import RoutingStatistics
from moe_route.report.packing import rounded
from moe_route.report.recordings import weighting

__all__ = ["MIN_GROUPS", "balance_of", "correlation_with", "divergence_from"]

LEVEL = 0.95
MIN_GROUPS = 4  # fewer scores give a correlation of no meaning


def divergence_from(statistics: RoutingStatistics, reference: str) -> tuple[Divergence, dict[str, Any]]:
    """Divergence of all groups from the reference: paired, with floor and intervals, where sequences were kept."""
    found = analysis.divergence(statistics, reference, pairing="auto", by=weighting(statistics))
    paired = found.pair_values is not None and found.pairs > 1
    low, high = found.interval(LEVEL) if paired else (None, None)
    return found, {
        "reference": found.reference,
        "groups": list(found.groups),
        "measure": found.measure,
        "pairing": found.pairing,
        "pairs": found.pairs,
        "level": LEVEL,
        "values": rounded(found.values),
        "low": rounded(low),
        "high": rounded(high),
        "floor": rounded(found.expected_floor) if paired else None,
        "undefined": int(found.undefined.sum()),
    }


def correlation_with(found: Divergence, scores: Mapping[str, float]) -> dict[str, Any] | None:
    """Correlation by layer of divergence with scores over the groups that have one; None with too few groups."""
    groups = [group for group in found.groups if group in scores]
    if len(groups) < MIN_GROUPS:
        return None
    result = analysis.correlation(found, scores, groups=groups)
    low, high = result.interval(LEVEL) if found.pair_values is not None else (None, None)
    return {
        "groups": groups,
        "reference": found.reference,
        "level": LEVEL,
        "orders": result.orders,
        "pearson": rounded(result.pearson),
        "spearman": rounded(result.spearman),
        "p": rounded(result.p_value),
        "pCorrected": rounded(result.p_corrected),
        "low": rounded(low),
        "high": rounded(high),
        "scores": rounded(np.array([scores[group] for group in groups])),
    }


def balance_of(statistics: RoutingStatistics) -> dict[str, Any]:
    """Load over experts and entropy of the router, [group, layer] each; only measures that were recorded."""
    measures: dict[str, dict[str, Any]] = {}
    if "counts" in statistics.metrics:
        load = analysis.load_balance(statistics)
        measures["Entropy of the load / log E"] = {"values": rounded(load.entropy)}
        measures["Largest share of the load"] = {"values": rounded(load.max_share)}
        measures["Effective number of experts"] = {"values": rounded(load.effective)}
        measures["Share of experts never chosen"] = {"values": rounded(load.dead)}
    if statistics.has_entropy:
        token = statistics.entropy("token") / np.log(np.maximum(statistics.num_experts, 2))
        measures["Entropy of the router per token / log E"] = {"values": rounded(token)}
    if statistics.sequences().any():
        sequence = statistics.entropy("sequence") / np.log(np.maximum(statistics.num_experts, 2))
        measures["Entropy of the mean over a sequence / log E"] = {"values": rounded(sequence)}
    return {"groups": list(statistics.groups), "measures": measures}

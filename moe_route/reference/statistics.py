"""Reference for counting: the terms that each routed token adds to the statistics tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_route.contract.tables import FIXED_POINT, SCALARS, StatisticsTables
from moe_route.reference.steering import Tokens


def fixed(value: Tensor) -> Tensor:
    """Convert to int64 in units of 2^-32, rounded to nearest even, clamped to +-2^19; NaN becomes 0."""
    value = torch.where(torch.isnan(value), 0.0, value.double()).clamp(-(2.0**19), 2.0**19)
    return (value / FIXED_POINT).round().to(torch.int64)


@dataclass(frozen=True)
class Choice:
    """The choice of a batch of tokens, ready to be counted."""

    ids: Tensor  # int64 [T, k], -1 = empty
    weights: Tensor  # [T, k]
    slots: Tensor  # int64 [T, 1]
    natural_ids: Tensor | None  # int64 [T, k]


def _on_experts(ids: Tensor, value: Tensor, num_experts: int) -> Tensor:
    """Sum int64 values [T, k] by expert: [T, E]. Empty slots add nothing."""
    rows = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.int64, device=ids.device)
    return rows.scatter_add_(1, torch.where(ids >= 0, ids, num_experts), value.expand_as(ids))[:, :num_experts]


def _per_token(choice: Choice, scores: Tensor, steered: Tensor, statistics: StatisticsTables) -> Tensor:
    """The terms that each token adds to its row of the statistics, int64 [T, 8 + P * E]."""
    ids, weights, num_experts = choice.ids, choice.weights, scores.shape[1]
    ones = torch.ones_like(ids)
    scalars = {name: torch.zeros_like(choice.slots) for name in SCALARS}
    metrics: dict[str, Tensor] = {}
    scalars["tokens"] += 1
    scalars["slots"] = choice.slots
    scalars["empty"] = choice.slots - (ids >= 0).sum(1, keepdim=True)
    scalars["steered"] = steered.to(torch.int64)
    metrics["counts"] = _on_experts(ids, ones, num_experts)
    metrics["weight"] = _on_experts(ids, fixed(weights), num_experts)
    total = weights.sum(1, keepdim=True)
    shared = (total != 0) & torch.isfinite(total)
    share = torch.where(shared, weights / torch.where(shared, total, 1.0), 0.0)
    metrics["weight_share"] = _on_experts(ids, fixed(share), num_experts)
    if "probability" in statistics.metrics or statistics.entropy:
        total = scores.sum(1, keepdim=True)
        scored = (total >= torch.finfo(torch.float32).tiny) & torch.isfinite(total) & (scores >= 0).all(1, keepdim=True)
        p = torch.where(scored, scores / torch.where(scored, total, 1.0), 0.0)
        metrics["probability"] = fixed(p)
        scalars["unscored"] = (~scored).to(torch.int64)
        if statistics.entropy:
            plogp = torch.where(p > 0, p * torch.where(p > 0, p, 1.0).log(), 0.0)
            scalars["entropy"] = fixed(-plogp.sum(1, keepdim=True))
    if choice.natural_ids is not None:
        metrics["natural_counts"] = _on_experts(choice.natural_ids, torch.ones_like(choice.natural_ids), num_experts)
        moved = (ids >= 0) & ~(ids[:, :, None] == choice.natural_ids[:, None, :]).any(2)
        scalars["flipped"] = moved.sum(1, keepdim=True)
        scalars["moved"] = fixed(torch.where(moved, share, 0.0).sum(1, keepdim=True))
    columns = [scalars[name] for name in SCALARS] + [metrics[name] for name in statistics.metrics]
    return torch.cat(columns, 1)


def count(choice: Choice, scores: Tensor, steered: Tensor, tokens: Tokens, statistics: StatisticsTables | None) -> None:
    if statistics is None:
        return
    if statistics.num_experts != scores.shape[1]:
        raise ValueError(f"statistics have {statistics.num_experts} experts, the logits have {scores.shape[1]}")
    additions = _per_token(choice, scores, steered, statistics)
    for table, index in ((statistics.groups, tokens.group), (statistics.segments, tokens.segment)):
        if table is not None:
            counted = tokens.valid & (index >= 0) & (index < table.shape[0])
            if table.shape[0]:  # uncounted rows add 0: leaving them out would wait for a device
                table.index_add_(0, torch.where(counted, index, 0), torch.where(counted[:, None], additions, 0))

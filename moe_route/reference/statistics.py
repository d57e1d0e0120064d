"""Reference for counting: the terms that each routed token adds to the statistics tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_route.contract.tables import FIXED_POINT, SCALARS, StatisticsTables
from moe_route.reference.steering import Tokens


def fixed(value: Tensor) -> Tensor:
    """Convert to int64 in units of 2^-32, rounded to nearest even, clamped to +-2^19; NaN becomes 0.

    Exact in float32 too: a factor of a power of two does not round, and larger numbers are whole.
    """
    return (value.nan_to_num(0.0).clamp(-(2.0**19), 2.0**19) / FIXED_POINT).round().to(torch.int64)


@dataclass(frozen=True)
class Choice:
    """The choice of a batch of tokens, ready to be counted."""

    ids: Tensor  # int64 [T, k], -1 = empty
    weights: Tensor  # [T, k]
    slots: Tensor  # int64 [T, 1]
    natural_ids: Tensor | None  # int64 [T, k]


def _terms(
    choice: Choice, scores: Tensor | None, steered: Tensor, statistics: StatisticsTables
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """What each token adds: int64 [T, 1] by scalar, and by metric the experts [T, n] (-1: none) with their values."""
    ids, weights, one = choice.ids, choice.weights, torch.ones_like(choice.slots)
    scalars = {
        "tokens": one,
        "slots": choice.slots,
        "empty": choice.slots - (ids >= 0).sum(1, keepdim=True),
        "steered": steered.to(torch.int64),
    }
    metrics: dict[str, tuple[Tensor, Tensor]] = {"counts": (ids, one.expand_as(ids))}
    wanted = statistics.metrics
    share = None
    if "weight_share" in wanted or choice.natural_ids is not None:
        total = weights.sum(1, keepdim=True)
        shared = (total != 0) & torch.isfinite(total)
        share = torch.where(shared, weights / torch.where(shared, total, 1.0), 0.0)
        metrics["weight_share"] = ids, fixed(share)
    if "weight" in wanted:
        metrics["weight"] = ids, fixed(weights)
    if scores is not None:
        p, scored = normalized(scores)
        metrics["probability"] = torch.arange(scores.shape[1], device=ids.device).expand_as(p), fixed(p)
        scalars["unscored"] = (~scored).to(torch.int64)
        if statistics.entropy:
            plogp = torch.where(p > 0, p * torch.where(p > 0, p, 1.0).log(), 0.0)
            scalars["entropy"] = fixed(-plogp.sum(1, keepdim=True))
    if choice.natural_ids is not None and share is not None:
        metrics["natural_counts"] = choice.natural_ids, one.expand_as(choice.natural_ids)
        moved = (ids >= 0) & ~(ids[:, :, None] == choice.natural_ids[:, None, :]).any(2)
        scalars["flipped"] = moved.sum(1, keepdim=True)
        scalars["moved"] = fixed(torch.where(moved, share, 0.0).sum(1, keepdim=True))
    return scalars, {name: metrics[name] for name in wanted if name in metrics}


def normalized(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [T, E] divided by their sum, 0 for unscored tokens (gate.h); and bool [T, 1], the scored ones."""
    total = scores.sum(1, keepdim=True)
    scored = (total >= torch.finfo(torch.float32).tiny) & torch.isfinite(total) & (scores >= 0).all(1, keepdim=True)
    return torch.where(scored, scores / torch.where(scored, total, 1.0), 0.0), scored


def needs_scores(statistics: StatisticsTables | None) -> bool:
    """Whether the scores of all experts are counted, and not only the choice."""
    return statistics is not None and (statistics.entropy or "probability" in statistics.metrics)


def count(
    choice: Choice, scores: Tensor | None, steered: Tensor, tokens: Tokens, statistics: StatisticsTables | None
) -> None:
    """Add the choice to the tables, with one sum of integers per metric; scores [T, E] where `needs_scores`."""
    if statistics is None:
        return
    scalars, metrics = _terms(choice, scores, steered, statistics)
    for table, index in ((statistics.groups, tokens.group), (statistics.segments, tokens.segment)):
        if table is None or table.shape[0] == 0:
            continue
        counted = (tokens.valid & (index >= 0) & (index < table.shape[0]))[:, None]
        row = torch.where(counted, index[:, None], 0) * table.shape[1]
        for name, values in scalars.items():
            _add(table, row + SCALARS.index(name), values, counted)
        for position, name in enumerate(statistics.metrics):
            if name in metrics:
                experts, values = metrics[name]
                at = row + len(SCALARS) + position * statistics.num_experts + experts
                _add(table, at, values, counted & (experts >= 0))


def _add(table: Tensor, at: Tensor, values: Tensor, counted: Tensor) -> None:
    """Add values [T, n] at places of the flat table; those that do not count add 0: leaving them out would wait."""
    values = torch.where(counted, values, 0)
    table.view(-1).scatter_add_(0, torch.where(counted, at, 0).reshape(-1), values.reshape(-1))


def count_choice(ids: Tensor, tokens: Tokens | None, statistics: StatisticsTables) -> None:
    """Add chosen experts [T, k], none of them empty, to tables that count nothing else. `tokens` None: one group."""
    rows, k = ids.shape
    if tokens is not None:
        slots = torch.full_like(ids[:, :1], k)
        unsteered = torch.zeros_like(slots, dtype=torch.bool)
        count(Choice(ids, ids, slots, None), None, unsteered, tokens, statistics)
    elif len(flat := statistics.groups.view(-1)):
        flat[SCALARS.index("tokens")].add_(rows)
        flat[SCALARS.index("slots")].add_(rows * k)
        if statistics.metrics:
            flat.scatter_add_(0, ids.reshape(-1) + len(SCALARS), torch.ones_like(ids).reshape(-1))

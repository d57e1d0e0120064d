"""Join the per-token steering of several plans, each in rows and tables of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe_route.contract.tables import NEUTRAL, SteeringTables
from moe_route.steering.token_steering import Part, TokenSteering

__all__ = ["Placed", "join"]

_NONE = {
    "replace_scores": torch.nan,
    "reserve_slot": -1,
    "fix_choice": -1,
    "replay": -1,
    "score_table": -1,
    "gumbel": 0,
    "gumbel_stream": 0,
}
"""What stands in a row without such a rule."""
_NUMBERS = ("replay", "score_table")  # indices of tables of values per token


class Placed(NamedTuple):
    """The steering of one plan in one layer, its first row, and the index of its first table of values per token."""

    steering: TokenSteering
    row: int
    table: int


def join(base: SteeringTables, plans: Sequence[Placed]) -> TokenSteering:
    """One steering for all plans of a layer.

    ``base`` holds what depends on the row alone, at the rows that the plans take. That of each plan is not read.
    Raises ``ValueError`` for a plan with more slots than the router has.
    """
    first = plans[0].steering
    if any(plan.steering.wide for plan in plans):
        raise ValueError(f"a top_k above the router's own (layer {first.layer}) cannot be joined with other plans")
    device = base.device
    parts = [_moved(part, plan, base.rows).to(device) for plan in plans for part in plan.steering.parts]
    recorded, scored = (
        {
            number + plan.table: values.to(device)
            for plan in plans
            for number, values in getattr(plan.steering, name).items()
        }
        for name in ("recorded", "scored")
    )
    anew, by_token_only = (
        _flags([(plan, getattr(plan.steering, name)) for plan in plans], base.rows, device)
        for name in ("anew", "by_token_only")
    )
    return TokenSteering(
        first.layer,
        first.num_experts,
        base,
        parts,
        recorded=recorded,
        scored=scored,
        anew=anew,
        by_token_only=by_token_only,
        wide=0,
    )


def _moved(part: Part, plan: Placed, rows: int) -> Part:
    planes = {name: _in_rows(table, plan, rows, NEUTRAL[name]) for name, table in part.planes.items()}
    named = {name: _in_rows(table, plan, rows, _NONE[name]) for name, table in part.named.items()}
    for name in _NUMBERS:
        if name in named:
            named[name] = torch.where(named[name] >= 0, named[name] + plan.table, -1)
    return replace(part, planes=planes, named=named)


def _flags(of_plans: Sequence[tuple[Placed, Tensor | None]], rows: int, device: torch.device) -> Tensor | None:
    """bool [rows]: the flags of every plan in its rows; None if no plan has any."""
    found = [_in_rows(flags, plan, rows, False) for plan, flags in of_plans if flags is not None]
    return torch.stack(found).any(0).to(device) if found else None


def _in_rows(table: Tensor, plan: Placed, rows: int, value: float) -> Tensor:
    """The rows of a plan's table at their place among ``rows``, and ``value`` in all others."""
    made = torch.full((rows, *table.shape[1:]), value, dtype=table.dtype, device=table.device)
    made[plan.row : plan.row + len(table)] = table
    return made

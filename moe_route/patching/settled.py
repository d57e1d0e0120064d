"""Counting a steered choice that a model changed after its router chose, as one operator: torch.compile does not trace
through the reference, which compares and indexes with values."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_route import reference
from moe_route.ops import PLANES, RouterSpec, StatisticsTables, SteeringTables

_ENTROPY = 16  # bit beside the planes


def observe_settled(
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    spec: RouterSpec,
    *,
    natural_ids: Tensor,
    steering: SteeringTables,
    tokens: Tensor,
    statistics: StatisticsTables,
) -> None:
    """`reference.observe_steered`, without gradients."""
    groups, planes, segments = statistics.arguments
    tables, mask, row_params, remap = (
        value.detach() if isinstance(value, Tensor) else value for value in steering.packed
    )
    given = (logits.detach(), ids, weights.detach(), natural_ids, tokens, tables, row_params, remap, mask)
    _observe_settled(*given, spec.policy, list(spec.numbers), planes, groups, segments)


@torch.library.custom_op("moe_route::observe_settled", mutates_args=("groups", "segments"))
def _observe_settled(
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    natural_ids: Tensor,
    tokens: Tensor,
    tables: Tensor | None,
    row_params: Tensor | None,
    remap: Tensor | None,
    steering_planes: int,
    policy: int,
    numbers: list[float],
    planes: int,
    groups: Tensor,
    segments: Tensor | None,
) -> None:
    experts = logits.shape[1]
    names = [name for bit, name in enumerate(PLANES) if planes >> bit & 1]
    reference.observe_steered(
        logits,
        ids,
        weights,
        RouterSpec.from_packed(policy, *numbers),
        natural_ids=natural_ids,
        steering=SteeringTables.from_packed(tables, steering_planes, row_params, remap, experts),
        tokens=tokens,
        statistics=StatisticsTables(groups, segments, experts, names, bool(planes >> _ENTROPY & 1)),
    )


@_observe_settled.register_fake
def _observe_settled_fake(*_: object) -> None:
    return None

"""Count a steered choice that the model changed after routing (capacity limits, joint normalization).

This is a custom operator so that torch.compile does not trace into the reference, which branches on tensor values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_route import reference
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables


def observe_changed(
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
    """Call `reference.observe_steered` without gradients."""
    groups, metrics, segments = statistics.arguments
    tables, mask, row_params, remap = (
        value.detach() if isinstance(value, Tensor) else value for value in steering.packed
    )
    given = (logits.detach(), ids, weights.detach(), natural_ids, tokens, tables, row_params, remap, mask)
    _observe_changed(*given, spec.policy, list(spec.numbers), metrics, groups, segments)


@torch.library.custom_op("moe_route::observe_changed", mutates_args=("groups", "segments"))
def _observe_changed(
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
    metrics: int,
    groups: Tensor,
    segments: Tensor | None,
) -> None:
    experts = logits.shape[1]
    reference.observe_steered(
        logits,
        ids,
        weights,
        RouterSpec.from_packed(policy, *numbers),
        natural_ids=natural_ids,
        steering=SteeringTables.from_packed(tables, steering_planes, row_params, remap, experts),
        tokens=tokens,
        statistics=StatisticsTables.from_packed(groups, metrics, segments, experts),
    )


@_observe_changed.register_fake
def _observe_changed_fake(*_: object) -> None:
    return None

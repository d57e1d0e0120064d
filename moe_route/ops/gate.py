"""The gate: score, steer, select, weigh and count router logits in one pass (contract: csrc/include/moe_route/gate.h).

On the CPU or a CUDA device, wherever the logits lie. A bad argument raises ValueError naming it; tensors of any other
device raise torch's NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables

__all__ = ["observe", "observe_layers", "route", "route_weights"]

_route = torch.ops.moe_route.route.default
_observe = torch.ops.moe_route.observe.default
_observe_layers = torch.ops.moe_route.observe_layers.default
_route_weights = torch.ops.moe_route.route_weights.default

_CHOICE_MODES = {"natural": 1, "replay": 2}
_NO_STATISTICS = (None, 0, None)
_NO_STEERING = (None, 0, None, None)


def route(
    logits: Tensor,
    k: int,
    spec: RouterSpec,
    *,
    correction_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
    steering: SteeringTables | None = None,
    tokens: Tensor | None = None,
    choice: Tensor | None = None,
    choice_weights: Tensor | None = None,
    choice_mode: Literal["natural", "replay"] = "natural",
    statistics: StatisticsTables | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose k experts per token, and count. No gradient: with gradients take the weights from `route_weights`.

    Order of choice: forced-on experts, then the larger value, then the lower index; NaN ranks below every number.

    Args:
        logits: router logits [T, E], float32, bfloat16, float16 (same bits as ``logits.float()``) or, on the CPU,
            float64; unit stride inside a row, else a copy is made. E <= 4096.
        k: experts per token, 1..min(E, 64).
        spec: how the model routes.
        correction_bias: [E], added for choosing only.
        expert_scale: [E], factor on the final weight of the chosen.
        steering: steering tables; a token's row is in ``tokens``.
        tokens: int32 [T, 4] from `token_table`; None: row -1, group 0, segment -1, valid.
        choice: integer [T, k], a choice that exists already; a row that starts with -1 has none.
        choice_weights: [T, k], its weights; None: recomputed from the logits.
        choice_mode: ``natural``: unsteered rows return the given choice, steered rows are compared with it;
            ``replay``: every row returns the ids of ``choice``, weights are recomputed from the (steered) scores.
        statistics: tables that are added to in place.

    Returns:
        weights float32 [T, k] (float64 for float64 logits), ids int32 [T, k]. An empty slot has id -1 and weight 0;
        ids of a row are unique.

    Raises:
        ValueError: an argument with a wrong shape, dtype, place or range.
    """
    if correction_bias is None and expert_scale is None and steering is None and choice is None:
        if choice_weights is not None:
            raise ValueError("choice_weights need choice")
        if statistics is not None:
            return _route(logits, k, spec.policy, tokens, *statistics.arguments, *spec.unusual)
        if spec.unusual:
            return _route(logits, k, spec.policy, tokens, *_NO_STATISTICS, *spec.unusual)
        return _route(logits, k, spec.policy, tokens)
    mode = 0
    if choice is not None:
        if choice_mode not in _CHOICE_MODES:
            raise ValueError(f"choice_mode = {choice_mode!r} is not one of natural, replay")
        mode = _CHOICE_MODES[choice_mode]
    return _route(
        logits,
        k,
        spec.policy,
        tokens,
        *(_NO_STATISTICS if statistics is None else statistics.arguments),
        *spec.numbers,
        _as_float32(correction_bias),
        _as_float32(expert_scale),
        *(_NO_STEERING if steering is None else steering.packed),
        choice,
        _narrow(choice_weights),
        mode,
    )


def observe(
    logits: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    spec: RouterSpec,
    *,
    expert_scale: Tensor | None = None,
    tokens: Tensor | None = None,
    statistics: StatisticsTables,
) -> None:
    """Count a choice that was already made, exactly as `route` counts its own.

    Args:
        logits: router logits [T, E].
        ids: int32 or int64 [T, k], what was chosen; an id outside 0..E-1 is an empty slot (a dropped token has k).
        weights: [T, k], the weights that the model uses; None: recomputed from the logits.
        spec: how the model routes (its score function makes mass and entropy).
        expert_scale: [E], only for recomputed weights.
        tokens: int32 [T, 4] from `token_table`, or None.
        statistics: tables that are added to in place.

    Raises:
        ValueError: an argument with a wrong shape, dtype, place or range.
    """
    if weights is not None and weights.dtype is torch.float64:
        weights = weights.float()
    if expert_scale is None:
        _observe(logits, ids, weights, spec.policy, tokens, *statistics.arguments, *spec.unusual)
    else:
        scale = _as_float32(expert_scale)
        _observe(logits, ids, weights, spec.policy, tokens, *statistics.arguments, *spec.numbers, scale)


def observe_layers(
    logits: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
    spec: RouterSpec,
    *,
    tokens: Tensor | None = None,
    statistics: Sequence[StatisticsTables],
) -> None:
    """`observe` for several layers that route alike, in one call of the operator.

    At a decode step every operator is called with cold caches, so one call for 16 layers costs little more than one.

    Args:
        logits, ids, weights: as for `observe`, one per layer; the weights are those that the model uses.
        spec: how all of them route.
        tokens: int32 [T, 4] from `token_table`, or None; the same for all.
        statistics: one per layer, all with the same metrics, with segments in all of them or in none.

    Raises:
        ValueError: lists of different lengths, tables that differ, or what `observe` refuses.
    """
    tables = [table.arguments for table in statistics]
    if not tables:
        return
    layout = tables[0][1]
    if any(table[1] != layout for table in tables):
        raise ValueError("the statistics of the layers have different metrics; count those layers with observe()")
    groups = [table[0] for table in tables]
    segments = [table[2] for table in tables if table[2] is not None]
    _observe_layers(logits, ids, weights, spec.policy, tokens, groups, layout, segments, *spec.unusual)


def route_weights(
    logits: Tensor,
    ids: Tensor,
    spec: RouterSpec,
    *,
    expert_scale: Tensor | None = None,
    steering: SteeringTables | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """Weights of a given choice, differentiable in logits, steering tables, temperature and expert_scale.

    Args:
        logits: router logits [T, E].
        ids: int32 or int64 [T, k]; an id outside 0..E-1 is an empty slot of weight 0. Taken as they are: neither
            ``remap`` nor ``top_k`` of the steering tables acts here.
        spec: how the model routes.
        expert_scale: [E].
        steering: steering tables; trained tables (requires_grad) get gradients.
        tokens: int32 [T, 4] from `token_table`, or None.

    Returns:
        float32 [T, k] (float64 for float64 logits).

    Raises:
        ValueError: an argument with a wrong shape, dtype, place or range.
    """
    tables, planes, row_params, _ = _NO_STEERING if steering is None else steering.packed
    scale = _as_float32(expert_scale)
    return _route_weights(logits, ids, spec.policy, tokens, *spec.numbers, scale, tables, planes, row_params)


def _as_float32(table: Tensor | None) -> Tensor | None:
    return table if table is None or table.dtype is torch.float32 else table.float()


def _narrow(weights: Tensor | None) -> Tensor | None:
    return weights.float() if weights is not None and weights.dtype is torch.float64 else weights

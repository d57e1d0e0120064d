"""The operators in plain torch, with the arguments of `schemas`: for devices and installations without kernels.

`moe_route.reference` computes; `contract.checks` refuses what the kernels refuse, in the same words. Choices and counts
are those of the kernels, and weights are within 1e-6 of theirs. Nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor

from moe_route import reference
from moe_route.contract import checks
from moe_route.contract.experts import ACTIVATIONS, PAIRINGS, Activation, Dispatch
from moe_route.contract.spec import ChoiceMode, RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables

_MODES: Sequence[ChoiceMode] = ("natural", *get_args(ChoiceMode))  # by choice_mode; 0: no choice
_below_autograd = torch._C._AutoDispatchBelowAutograd  # autograd passes `route` through to here: it has no gradient
_spec = cache(RouterSpec.from_packed)
_activation = cache(Activation)


def _statistics(groups: Tensor | None, layout: int, segments: Tensor | None, logits: Tensor) -> StatisticsTables | None:
    if groups is None and segments is None:
        return None
    if groups is None and segments is not None:
        groups = segments[:0]
    return StatisticsTables.from_packed(groups, layout, segments, logits.shape[1])  # type: ignore[arg-type]


def _steering(
    tables: Tensor | None, planes: int, row_params: Tensor | None, remap: Tensor | None, logits: Tensor
) -> SteeringTables | None:
    if tables is None and row_params is None and remap is None:
        return None
    return SteeringTables.from_packed(tables, planes, row_params, remap, logits.shape[1])


def _route(
    logits: Tensor,
    k: int,
    policy: int,
    tokens: Tensor | None = None,
    group_statistics: Tensor | None = None,
    statistics: int = 0,
    segment_statistics: Tensor | None = None,
    group_fill: float = 0.0,
    eps: float = 0.0,
    norm_p: float = 1.0,
    scale: float = 1.0,
    jitter: float = 0.0,
    softcap: float = 0.0,
    correction_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
    steering: Tensor | None = None,
    steering_planes: int = 0,
    row_params: Tensor | None = None,
    remap: Tensor | None = None,
    choice_ids: Tensor | None = None,
    choice_weights: Tensor | None = None,
    choice_mode: int = 0,
) -> tuple[Tensor, Tensor]:
    counted = (group_statistics, statistics, segment_statistics)
    numbers = (group_fill, eps, norm_p, scale, jitter, softcap)
    steered = (steering, steering_planes, row_params, remap)
    own = (correction_bias, expert_scale)
    checks.route(logits, k, policy, tokens, counted, own, steered, (choice_ids, choice_weights, choice_mode))
    with _below_autograd():
        return reference.route(
            logits,
            k,
            _spec(policy, *numbers),
            correction_bias=correction_bias,
            expert_scale=expert_scale,
            steering=_steering(*steered, logits),
            tokens=tokens,
            choice=choice_ids,
            choice_weights=choice_weights,
            choice_mode=_MODES[choice_mode],
            statistics=_statistics(*counted, logits),
        )


def _observe(
    logits: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    policy: int,
    tokens: Tensor | None = None,
    group_statistics: Tensor | None = None,
    statistics: int = 0,
    segment_statistics: Tensor | None = None,
    group_fill: float = 0.0,
    eps: float = 0.0,
    norm_p: float = 1.0,
    scale: float = 1.0,
    jitter: float = 0.0,
    softcap: float = 0.0,
    expert_scale: Tensor | None = None,
) -> None:
    counted = (group_statistics, statistics, segment_statistics)
    numbers = (group_fill, eps, norm_p, scale, jitter, softcap)
    checks.observe(logits, ids, weights, policy, tokens, counted, expert_scale)
    tables = _statistics(*counted, logits)
    if tables is not None:
        spec = _spec(policy, *numbers)
        reference.observe(logits, ids, weights, spec, expert_scale=expert_scale, tokens=tokens, statistics=tables)


def _observe_layers(
    logits: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
    policy: int,
    tokens: Tensor | None,
    group_statistics: Sequence[Tensor],
    statistics: int,
    segment_statistics: Sequence[Tensor],
    *numbers: float,
) -> None:
    checks.observe_layers(logits, ids, weights, group_statistics, segment_statistics)
    for layer, of_groups in enumerate(group_statistics):
        of_segments = segment_statistics[layer] if segment_statistics else None
        counted = (of_groups, statistics, of_segments)
        _observe(logits[layer], ids[layer], weights[layer], policy, tokens, *counted, *numbers)  # type: ignore[arg-type]


def _route_weights(
    logits: Tensor,
    ids: Tensor,
    policy: int,
    tokens: Tensor | None = None,
    group_fill: float = 0.0,
    eps: float = 0.0,
    norm_p: float = 1.0,
    scale: float = 1.0,
    jitter: float = 0.0,
    softcap: float = 0.0,
    expert_scale: Tensor | None = None,
    steering: Tensor | None = None,
    steering_planes: int = 0,
    row_params: Tensor | None = None,
) -> Tensor:
    numbers = (group_fill, eps, norm_p, scale, jitter, softcap)
    steered = (steering, steering_planes, row_params)
    checks.route_weights(logits, ids, policy, tokens, expert_scale, (*steered, None))
    return reference.route_weights(
        logits,
        ids,
        _spec(policy, *numbers),
        expert_scale=expert_scale,
        steering=_steering(*steered, None, logits),
        tokens=tokens,
    )


def _dispatch(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, ...]:
    checks.dispatch(ids, num_experts, block)
    return tuple(reference.dispatch(ids, num_experts, block=block))


def _slots(order: Tensor, inverse: Tensor, offsets: Tensor | None = None, counts: Tensor | None = None) -> Dispatch:
    """A dispatch of which the other tensors are not read."""
    return Dispatch(order if offsets is None else offsets, order, order if counts is None else counts, order, inverse)


def _permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    checks.permute(x, order, inverse)
    return reference.permute(x, _slots(order, inverse))


def _combine(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, residual: Tensor | None = None) -> Tensor:
    checks.combine(rows, weights, order, inverse, residual)
    return reference.combine(rows, weights, _slots(order, inverse), residual)


def _expert_rows(
    x: Tensor,
    offsets: Tensor,
    counts: Tensor,
    order: Tensor,
    k: int,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: int,
    pairing: int,
    alpha: float,
    limit: float,
    shift: float,
    up_panels: Tensor | None = None,
    down_panels: Tensor | None = None,
) -> Tensor:
    checks.expert_rows(
        x, (offsets, counts, order), k, (up, up_bias), (down, down_bias), activation, pairing, (up_panels, down_panels)
    )
    inverse = order.new_empty(0, 1).expand(0, k) if x.shape[0] == 0 else order.new_empty(1, 1).expand(x.shape[0], k)
    return reference.expert_rows(
        x,
        _slots(order, inverse, offsets, counts),
        up,
        down,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=_activation(ACTIVATIONS[activation - 1], alpha, limit, shift),
        pairing=PAIRINGS[pairing],
    )


def _expert_activation(
    rows: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    activation: int,
    pairing: int,
    alpha: float,
    limit: float,
    shift: float,
) -> Tensor:
    checks.expert_activation(rows, offsets, bias, activation, pairing)
    return reference.expert_activation(
        rows,
        _slots(offsets, offsets[None], offsets),
        bias=bias,
        activation=_activation(ACTIVATIONS[activation - 1], alpha, limit, shift),
        pairing=PAIRINGS[pairing],
    )


def _pack_expert_weight(weight: Tensor, pairing: int) -> Tensor:
    raise NotImplementedError(
        f"weights are packed for the kernels of a CPU, and torch serves {weight.device} here: run the experts without "
        "a packed copy"
    )


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "route": _route,
    "observe": _observe,
    "observe_layers": _observe_layers,
    "route_weights": _route_weights,
    "dispatch": _dispatch,
    "permute": _permute,
    "combine": _combine,
    "expert_rows": _expert_rows,
    "expert_activation": _expert_activation,
    "pack_expert_weight": _pack_expert_weight,
}
"""Name of an operator -> its function."""

"""The gate: score, steer, select, weigh and count router logits in one pass (see csrc/include/moe_route/gate.h).

It runs wherever the logits are: by kernels on a CPU and a CUDA device, by torch on every other device (`ops.backend`
says which). A bad argument raises ValueError naming it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_route.contract.spec import ChoiceMode, RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.ops import registration  # noqa: F401 (defines the operators)
from moe_route.ops.arguments import FAILURES, refuse_types

_route = torch.ops.moe_route.route.default
_observe = torch.ops.moe_route.observe.default
_observe_layers = torch.ops.moe_route.observe_layers.default
_route_weights = torch.ops.moe_route.route_weights.default

_CHOICE_MODES = {name: code for code, name in enumerate(get_args(ChoiceMode), 1)}
_NO_STATISTICS = (None, 0, None)
_NO_STEERING = (None, 0, None, None)
_OPTIONAL = ("correction_bias", "expert_scale", "steering", "tokens", "choice", "choice_weights", "statistics")


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
    choice_mode: ChoiceMode = "natural",
    statistics: StatisticsTables | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose k experts per token and count the choice. The weights are differentiable, the choice is not.

    Order of choice: forced-on experts first, then the larger value, then the lower index. NaN ranks below every number.

    Gradients reach logits, expert_scale, choice_weights and trained steering tables, if one of them requires grad and
    grad mode is on. The weights then come from `route_weights` for the chosen ids, which costs a second pass. To get
    the choice without that pass, pass ``logits.detach()`` or call inside ``torch.no_grad()``.

    Args:
        logits: router logits [T, E], float32, bfloat16, float16 (same bits as ``logits.float()``) or, on the CPU,
            float64. A copy is made unless the stride inside a row is one. E <= 4096.
        k: experts per token, 1..min(E, 64).
        spec: the routing function of the model.
        correction_bias: [E], added to the scores for the choice only (`e_score_correction_bias`).
        expert_scale: [E], factor on the final weights of the chosen experts.
        steering: steering tables; ``tokens`` gives each token its row.
        tokens: int32 [T, 4] from `token_table`; None: every token is unsteered, in group 0, in no segment, and valid.
        choice: integer [T, k], a choice that was already made; a row that starts with -1 has none.
        choice_weights: floating [T, k], weights of that choice; None: recomputed from the logits.
        choice_mode: ``natural``: unsteered rows return ``choice``, and steered rows are compared with it. ``replay``:
            every row returns the ids of ``choice``, with weights recomputed from the (steered) scores. ``baseline``:
            every row chooses from ``logits``, and ``choice`` is only what natural counts and flips compare with.
        statistics: tables to add to, in place.

    Returns:
        weights float32 [T, k] (float64 for float64 logits), ids int32 [T, k]. An empty slot has id -1 and weight 0. The
        ids of a row are unique.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument with a wrong shape, dtype, device or range, or a tensor without memory.
    """
    try:
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled() and _requires_grad(logits, expert_scale, steering, choice_weights)
        ):
            rest = (tokens, choice, choice_weights, choice_mode, statistics)
            return _route_with_gradient(logits, k, spec, correction_bias, expert_scale, steering, *rest)
        if correction_bias is None and expert_scale is None and steering is None and choice is None:
            if choice_weights is not None:
                raise ValueError("choice_weights need choice")
            if statistics is not None:
                return _route(logits, k, spec.policy, tokens, *statistics.arguments, *spec.unusual)
            if spec.unusual:
                return _route(logits, k, spec.policy, tokens, *_NO_STATISTICS, *spec.unusual)
            return _route(logits, k, spec.policy, tokens)
        rest = (tokens, choice, choice_weights, choice_mode, statistics)
        return _route_with_everything(logits, k, spec, correction_bias, expert_scale, steering, *rest)
    except FAILURES:
        refuse_types(
            _OPTIONAL,
            logits=logits,
            k=k,
            spec=spec,
            correction_bias=correction_bias,
            expert_scale=expert_scale,
            steering=steering,
            tokens=tokens,
            choice=choice,
            choice_weights=choice_weights,
            statistics=statistics,
        )
        raise


def _requires_grad(
    logits: Tensor, expert_scale: Tensor | None, steering: SteeringTables | None, choice_weights: Tensor | None
) -> bool:
    return (
        logits.requires_grad
        or (expert_scale is not None and expert_scale.requires_grad)
        or (steering is not None and steering.requires_grad)
        or (choice_weights is not None and choice_weights.requires_grad)
    )


def _route_with_everything(
    logits: Tensor,
    k: int,
    spec: RouterSpec,
    correction_bias: Tensor | None,
    expert_scale: Tensor | None,
    steering: SteeringTables | None,
    tokens: Tensor | None,
    choice: Tensor | None,
    choice_weights: Tensor | None,
    choice_mode: str,
    statistics: StatisticsTables | None,
) -> tuple[Tensor, Tensor]:
    """Call the operator with every argument, without gradient."""
    mode = 0
    if choice is not None:
        if choice_mode not in _CHOICE_MODES:
            raise ValueError(f"choice_mode = {choice_mode!r} is not one of natural, replay, baseline")
        mode = _CHOICE_MODES[choice_mode]
    elif choice_weights is not None:
        raise ValueError("choice_weights need choice")
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
        choice_weights,
        mode,
    )


def _route_with_gradient(
    logits: Tensor,
    k: int,
    spec: RouterSpec,
    correction_bias: Tensor | None,
    expert_scale: Tensor | None,
    steering: SteeringTables | None,
    tokens: Tensor | None,
    choice: Tensor | None,
    choice_weights: Tensor | None,
    choice_mode: str,
    statistics: StatisticsTables | None,
) -> tuple[Tensor, Tensor]:
    """Make the same choice with differentiable weights.

    Weights that `route` computes are recomputed; weights that it was given are used as they are.
    """
    made = (choice, choice_weights, choice_mode)
    model = (logits, k, spec, correction_bias, expert_scale)
    _, ids = _route_with_everything(*model, steering, tokens, *made, statistics)
    chosen, before, remap = ids, steering, None
    if steering is not None and tokens is not None and (choice is None or choice_mode != "replay"):
        remap = steering.packed[3]
        if remap is not None:
            before = steering.without_remap()
            _, chosen = _route_with_everything(*model, before, tokens, *made, None)
    weights = route_weights(logits, chosen, spec, expert_scale=expert_scale, steering=before, tokens=tokens)
    if choice is not None and choice_weights is not None and choice_mode == "natural":
        own = (choice[:, :1] != -1) & (chosen >= 0)
        if steering is not None and tokens is not None:
            own = own & ~_in_table(tokens, steering.rows)
        weights = torch.where(own, choice_weights.to(weights.dtype), weights)
    if remap is not None and tokens is not None:
        weights = _merged(weights, chosen, ids, remap, tokens)
    return weights, ids


def _in_table(tokens: Tensor, rows: int) -> Tensor:
    """bool [T, 1]: tokens that have a steering row."""
    return (tokens[:, :1] >= 0) & (tokens[:, :1] < rows)


def _merged(weights: Tensor, chosen: Tensor, ids: Tensor, remap: Tensor, tokens: Tensor) -> Tensor:
    """Weights [T, k] of the ids that a remap made of the chosen ids: the weights of duplicates add up."""
    rows = remap.shape[0]
    targets = remap[tokens[:, 0].clamp(0, rows - 1).long()].gather(1, chosen.clamp(min=0).long())
    targets = torch.where(_in_table(tokens, rows), targets, chosen)
    same = (ids[:, :, None] == targets[:, None, :]) & (ids >= 0)[:, :, None] & (chosen >= 0)[:, None, :]
    return torch.where(same, weights[:, None, :], 0.0).sum(2)


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
        ids: int32 or int64 [T, k], the chosen experts; an id outside 0..E-1 is an empty slot.
        weights: floating [T, k], the weights that the model uses; None: recomputed from the logits.
        spec: the routing function of the model; its scores give probability and entropy.
        expert_scale: [E], used for recomputed weights only.
        tokens: int32 [T, 4] from `token_table`, or None.
        statistics: tables to add to, in place.

    A token without any expert (dropped by the model) counts as k empty slots.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument with a wrong shape, dtype, device or range, or a tensor without memory.
    """
    try:
        if expert_scale is None:
            _observe(logits, ids, weights, spec.policy, tokens, *statistics.arguments, *spec.unusual)
        else:
            scale = _as_float32(expert_scale)
            _observe(logits, ids, weights, spec.policy, tokens, *statistics.arguments, *spec.numbers, scale)
    except FAILURES:
        refuse_types(
            ("weights", "expert_scale", "tokens"),
            logits=logits,
            ids=ids,
            weights=weights,
            spec=spec,
            expert_scale=expert_scale,
            tokens=tokens,
            statistics=statistics,
        )
        raise


def observe_layers(
    logits: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
    spec: RouterSpec,
    *,
    tokens: Tensor | None = None,
    statistics: Sequence[StatisticsTables],
) -> None:
    """Count the choices of several layers with the same spec in one operator call, like `observe`.

    In a decode step every operator call meets cold caches, so one call for 16 layers costs little more than one for a
    single layer.

    Args:
        logits, ids, weights: as for `observe`, one per layer. The weights are required.
        spec: the routing function of all these layers.
        tokens: int32 [T, 4] from `token_table`, or None; shared by all layers.
        statistics: one per layer, all with the same metrics, and all with or all without segments.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: lists of different lengths, tables that differ, or an argument that `observe` refuses.
    """
    try:
        tables = [table.arguments for table in statistics]
        if not tables:
            return
        layout = tables[0][1]
        if any(table[1] != layout for table in tables):
            raise ValueError("the statistics of the layers have different metrics; count those layers with observe()")
        groups = [table[0] for table in tables]
        segments = [table[2] for table in tables if table[2] is not None]
        _observe_layers(logits, ids, weights, spec.policy, tokens, groups, layout, segments, *spec.unusual)
    except FAILURES:
        refuse_types(
            ("tokens",),
            layers=True,
            logits=logits,
            ids=ids,
            weights=weights,
            spec=spec,
            tokens=tokens,
            statistics=statistics,
        )
        raise


def route_weights(
    logits: Tensor,
    ids: Tensor,
    spec: RouterSpec,
    *,
    expert_scale: Tensor | None = None,
    steering: SteeringTables | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """Compute the weights of a given choice, differentiable in logits, steering tables, temperature and expert_scale.

    Forward-mode derivatives (``torch.func.jvp``) are computed by `moe_route.reference`.

    Args:
        logits: router logits [T, E].
        ids: int32 or int64 [T, k]; an id outside 0..E-1 is an empty slot of weight 0. The ids are used as given:
            ``remap`` and ``top_k`` of the steering tables have no effect here.
        spec: the routing function of the model.
        expert_scale: [E].
        steering: steering tables; tables that require grad receive gradients.
        tokens: int32 [T, 4] from `token_table`, or None.

    Returns:
        float32 [T, k] (float64 for float64 logits).

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument with a wrong shape, dtype, device or range, or a tensor without memory.
    """
    try:
        if forward_ad._current_level >= 0:  # the operator has no forward-mode derivative
            from moe_route import reference

            return reference.route_weights(
                logits, ids, spec, expert_scale=expert_scale, steering=steering, tokens=tokens
            )
        tables, planes, row_params, _ = _NO_STEERING if steering is None else steering.packed
        scale = _as_float32(expert_scale)
        return _route_weights(logits, ids, spec.policy, tokens, *spec.numbers, scale, tables, planes, row_params)
    except FAILURES:
        refuse_types(
            _OPTIONAL,
            logits=logits,
            ids=ids,
            spec=spec,
            expert_scale=expert_scale,
            steering=steering,
            tokens=tokens,
        )
        raise


def _as_float32(table: Tensor | None) -> Tensor | None:
    return table if table is None or table.dtype is torch.float32 else table.float()

"""Reference for route, observe and route_weights: score, select and weigh. Steering and counting are in other files."""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_route.contract.spec import ChoiceMode, RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.reference.dispatch import in_range
from moe_route.reference.statistics import Choice, count, count_choice, needs_scores, normalized
from moe_route.reference.steering import INF, SteeredRows, read_steering, read_tokens, steer


def _scored(z: Tensor, allowed: Tensor) -> Tensor:
    """Mask of the experts that have a score: allowed, and with a logit that is not NaN."""
    return allowed & ~torch.isnan(z)


def _softmax(z: Tensor, usable: Tensor) -> Tensor:
    """Softmax over the usable entries, 0 elsewhere. Entries of +inf share the row; a row of -inf has score 0."""
    clean = torch.where(usable, z, -INF)
    top = clean.amax(-1, keepdim=True)
    clean = torch.where(top == INF, torch.where(clean == INF, 0.0, -INF), clean)
    dead = top == -INF
    return torch.where(dead | ~usable, 0.0, torch.softmax(torch.where(dead, 0.0, clean), -1))


def _score(z: Tensor, kind: str, allowed: Tensor) -> Tensor:
    """Scores of the allowed entries, 0 for the rest and for NaN logits. Same shape as z."""
    usable = _scored(z, allowed)
    if kind in ("softmax", "sparsemixer"):
        return _softmax(z, usable)
    z = torch.where(usable, z, 0.0)
    if kind == "sigmoid":
        score = torch.sigmoid(z)
    elif kind == "sqrt_softplus":
        soft = F.softplus(z)
        score = torch.where(soft > 0, torch.where(soft > 0, soft, 1.0).sqrt(), 0.0)
    elif kind == "identity":
        score = z
    else:
        raise ValueError(f"unknown score {kind!r}")
    return torch.where(usable, score, 0.0)


def _sparsemixer(z: Tensor, ids: Tensor, allowed: Tensor, jitter: float) -> Tensor:
    """Weights of SparseMixer-v2 at inference [arXiv 2409.12136].

    Each slot takes a softmax over the experts not chosen yet whose distance to the best, relative to the larger of |z|
    and the best, is at most 2 * jitter.
    """
    running = _scored(z, allowed)
    weights = []
    for slot in ids.unbind(1):
        best = torch.where(running, z, -INF).amax(1, keepdim=True).detach()
        far = (best - z) / torch.maximum(z.abs(), best) > 2 * jitter
        slot = slot[:, None]
        weight = _softmax(z, running & ~far).gather(1, slot.clamp(min=0))
        weights.append(torch.where(slot >= 0, weight, 0.0))
        running = running & ~(torch.arange(z.shape[1], device=z.device) == slot)
    return torch.cat(weights, 1)


def _limit_groups(value: Tensor, allowed: Tensor, spec: RouterSpec) -> Tensor:
    """`value`, with the spec's fill value for experts outside the row's best groups."""
    num_tokens, num_experts = value.shape
    number = allowed & ~torch.isnan(value)
    members = torch.where(number, value, -INF).view(num_tokens, spec.groups, num_experts // spec.groups)
    best = members.topk(1 if spec.group_score == "max" else min(2, members.shape[2]), dim=2).values
    group_value = best.sum(-1)
    group_value = torch.where(torch.isnan(group_value), -INF, group_value)  # inf - inf
    keep = torch.zeros_like(group_value, dtype=torch.bool)
    keep = keep.scatter_(1, _best(group_value, spec.top_groups), True)
    keep = keep[..., None].expand(members.shape).reshape(num_tokens, num_experts)
    return torch.where(keep | torch.isnan(value), value, spec.group_fill)


def _best(value: Tensor, k: int, rank: Tensor | None = None) -> Tensor:
    """The first k indices of each row in order of choice: higher rank, numbers before NaN, larger value, lower index.

    Each entry of float32 becomes an integer that no other of its row equals, so that one top-k orders them: rank (2
    bits), the value in the order of csrc/include/moe_route/key.h (32), and the index from behind (12).
    """
    size = value.shape[1]
    if value.dtype == torch.float64:
        return _sorted(value, rank)[:, :k]
    bits = (value.detach() + 0.0).view(torch.int32)  # -0.0 + 0.0 = +0.0
    key = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).masked_fill_(torch.isnan(value), -(2**31))
    order = key.to(torch.int64).bitwise_left_shift_(12)
    order.bitwise_or_(torch.arange(size - 1, -1, -1, device=value.device))
    if rank is not None:
        order.add_(rank << 45)
    return order.topk(k, dim=1).indices


def _sorted(value: Tensor, rank: Tensor | None) -> Tensor:
    """All indices of each row in that order, by stable sorts."""
    nan = torch.isnan(value)
    by_value = torch.argsort(torch.where(nan, -INF, value), dim=1, descending=True, stable=True)
    key = (~nan).to(torch.int64) if rank is None else 2 * rank + ~nan
    return by_value.gather(1, torch.argsort(key.gather(1, by_value), dim=1, descending=True, stable=True))


def _selection_value(z: Tensor, spec: RouterSpec, correction_bias: Tensor | None, steering: SteeredRows) -> Tensor:
    """The value by which experts are compared, NaN where the logit is NaN.

    Where it would be an increasing function of the logit alone, it is the logit itself, so that scores that become
    equal by rounding never decide.
    """
    allowed = ~steering.forbidden
    score_bias = steering.planes.get("score_bias")
    value = z
    if spec.order == "score_then_topk" and (correction_bias is not None or score_bias is not None or spec.groups > 1):
        scores = torch.where(torch.isnan(z), z, _score(z, spec.score, allowed))
        value = scores
        if correction_bias is None and spec.groups == 1 and score_bias is not None:  # without bias: the logits
            value = torch.where((score_bias != 0).any(1, keepdim=True), scores, z)
    if correction_bias is not None:
        value = value + correction_bias.to(value)
    if score_bias is not None:
        value = torch.where(steering.steered, value + score_bias, value)
    if spec.groups > 1:
        value = _limit_groups(value, allowed, spec)
    return value


def _select(
    z: Tensor, k: int, spec: RouterSpec, correction_bias: Tensor | None, steering: SteeredRows
) -> tuple[Tensor, Tensor]:
    """Ids int64 [T, k] (-1 = empty slot), and the number of slots of each token, int64 [T, 1]."""
    rank = None
    if steering.force is not None:
        rank = 2 + (steering.force > 0).to(torch.int64) - (steering.force < 0).to(torch.int64)
        rank = rank.masked_fill(steering.forbidden, 0)
    ids = _best(_selection_value(z, spec, correction_bias, steering), k, rank)
    slots = _slots(ids, steering)
    if rank is None and "top_k" not in steering.params:
        return ids, slots
    filled = torch.arange(k, device=z.device) < slots
    if rank is not None:
        filled = filled & (rank.gather(1, ids) > 0)
    return torch.where(filled, ids, -1), slots


def _slots(ids: Tensor, steering: SteeredRows) -> Tensor:
    """int64 [T, 1]: the number of slots, up to k, that each token fills."""
    slots = torch.full_like(ids[:, :1], ids.shape[1])
    if "top_k" not in steering.params:
        return slots
    asked = steering.params["top_k"].to(torch.int64)
    return torch.where(asked > 0, asked.clamp(max=ids.shape[1]), slots)


def _renormalize(weights: Tensor, spec: RouterSpec) -> Tensor:
    """Renormalize the weights. A divisor of 0 leaves them 0; infinite weights share equally, and the rest get 0."""
    if spec.renormalize == "none":
        return weights
    infinite = (weights == INF).to(weights.dtype) - (weights == -INF).to(weights.dtype)
    weights = torch.where((infinite != 0).any(1, keepdim=True), infinite, weights)
    if spec.renormalize == "sum":
        divisor = weights.sum(1, keepdim=True) + spec.eps
    elif spec.renormalize == "clamp":
        divisor = weights.sum(1, keepdim=True).clamp(min=spec.eps)
    else:
        zero = (weights == 0).all(1, keepdim=True)  # the norm of a zero row has no gradient
        divisor = torch.linalg.vector_norm(torch.where(zero, 1.0, weights), spec.norm_p, dim=1, keepdim=True)
        divisor = torch.where(zero, 0.0, divisor)
    return torch.where(divisor == 0, 0.0, weights / torch.where(divisor == 0, 1.0, divisor))


def _cancels(spec: RouterSpec, steering: SteeredRows | None = None) -> bool:
    """Whether the softmax is followed by renormalization with the plain sum, without a score bias in between.

    The sum over all experts then cancels, so it is never formed and cannot underflow.
    """
    plain = spec.score == "softmax" and spec.renormalize == "sum" and spec.eps == 0
    if steering is None:
        return plain
    return plain and not ("score_bias" in steering.planes and "score_bias_weighs" in steering.params)


def _weighing_bias(steering: SteeredRows, at: Tensor) -> Tensor | float:
    """Score bias of the experts `at` [T, k], in rows where it also changes the weight."""
    if "score_bias" not in steering.planes or "score_bias_weighs" not in steering.params:
        return 0.0
    weighing = torch.where(steering.params["score_bias_weighs"] != 0, steering.planes["score_bias"], 0.0)
    return weighing.gather(1, at)


def _weigh(z: Tensor, ids: Tensor, spec: RouterSpec, expert_scale: Tensor | None, steering: SteeredRows) -> Tensor:
    """Weights [T, k] of the chosen ids int64 [T, k] from the steered logits; 0 for empty slots."""
    allowed = ~steering.forbidden
    filled = ids >= 0
    at = ids.clamp(min=0)
    if spec.score == "sparsemixer":
        weights = _sparsemixer(z, ids, allowed, spec.jitter)
        if spec.order == "score_then_topk":
            weights = weights + _weighing_bias(steering, at)
    elif spec.order == "topk_then_score":
        chosen = z.gather(1, at) + _weighing_bias(steering, at)
        weights = _score(chosen, spec.score, filled & allowed.gather(1, at))
    elif _cancels(spec, steering):
        weights = _score(z.gather(1, at), spec.score, filled & allowed.gather(1, at))
    else:
        weights = _score(z, spec.score, allowed).gather(1, at) + _weighing_bias(steering, at)
    weights = torch.where(filled & _scored(z, allowed).gather(1, at), weights, 0.0)
    planes, params = steering.planes, steering.params
    before: Tensor | float = 1.0
    after: Tensor | float = 1.0
    if "weight_scale" in planes:
        factor = planes["weight_scale"].gather(1, at)
        late = params["weight_scale_after"] != 0 if "weight_scale_after" in params else torch.zeros_like(filled)
        before, after = torch.where(late, 1.0, factor), torch.where(late, factor, 1.0)
    weights = _renormalize(weights * before, spec) * spec.scale * after
    if expert_scale is not None:
        weights = weights * expert_scale.to(weights)[at]
    return torch.where(filled, weights, 0.0)


def _remap(ids: Tensor, weights: Tensor, steering: SteeredRows) -> tuple[Tensor, Tensor]:
    """Replace experts after their weights are final.

    Slots that end up with the same expert merge into the first one, and their weights add up. Freed slots move to the
    end of the row.
    """
    if steering.remap is None:
        return ids, weights
    target = in_range(torch.where(ids >= 0, steering.remap.gather(1, ids.clamp(min=0)), -1), steering.remap.shape[1])
    same = (target[:, :, None] == target[:, None, :]) & (target >= 0)[:, :, None]  # [T, k, k]
    first = ~torch.tril(same, -1).any(2)
    merged = torch.where(same, weights[:, None, :], 0.0).sum(2)
    kept = first & (target >= 0)
    ids, weights = torch.where(kept, target, -1), torch.where(kept, merged, 0.0)
    front = torch.argsort(kept.int(), dim=1, descending=True, stable=True)
    front = torch.where(steering.steered, front, torch.arange(ids.shape[1], device=ids.device))
    return ids.gather(1, front), weights.gather(1, front)


def _check(logits: Tensor, k: int, spec: RouterSpec) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [T, E], got {logits.dtype} {list(logits.shape)}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k must be between 1 and the number of experts {logits.shape[1]}, got {k}")
    if logits.shape[1] % spec.groups:
        raise ValueError(f"{logits.shape[1]} experts do not divide into {spec.groups} groups")


def _compute(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).contiguous()


def capped(logits: Tensor, spec: RouterSpec) -> Tensor:
    """Logits z [T, E] as c tanh(z / c), float32 (float64 for float64), c = `RouterSpec.softcap`; as they are for c = 0.

    float32 has the bits of the kernels.
    """
    if spec.softcap == 0:
        return logits
    z = _compute(logits)
    return _tanh(z / z.new_full((), spec.softcap)) * spec.softcap  # on CUDA a number would become its reciprocal


def _tanh(x: Tensor) -> Tensor:
    """tanh as csrc/include/moe_route/math.h computes it in float32, operation by operation."""
    if x.dtype == torch.float64:
        return torch.tanh(x)
    a = torch.where(x.abs() < 10, x.abs(), 10.0)
    z = a * a
    p = _horner(z, -0.0051386687, 0.0200919788, -0.0535588637, 0.13329111, -0.333331913)
    small = a * (z * p) + a
    n = torch.round((a + a).detach() * 1.44269502)  # e^2a = 2^n e^r
    r = (a + a - n * 0.693145752) - n * 1.42860677e-06
    q = _horner(r, 0.00138145394, 0.00836874545, 0.041668389, 0.166665211, 0.49999994)
    power = (n.to(torch.int32) + 127).bitwise_left_shift(23).view(torch.float32)
    e = ((q * (r * r) + r) + 1) * power
    t = torch.where(a < 0.7, small, 1 - 2 / (e + 1))  # torch's 2 * (1 / x) is exact enough: 2 is a power of two
    return torch.where(x.abs() > 0, torch.where(x < 0, -t, t), x)


def _horner(x: Tensor, first: float, *others: float) -> Tensor:
    value: Tensor | float = first
    for coefficient in others:
        value = value * x + coefficient
    return value  # type: ignore[return-value]


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
    """Score, steer, select, weigh and count; see `moe_route.ops.route`. The weights are differentiable.

    Returns:
        weights float32 (float64 for float64 logits) [T, k] and ids int32 [T, k]; an empty slot is id -1, weight 0.
    """
    _check(logits, k, spec)
    if statistics is not None and statistics.num_experts != logits.shape[1]:
        raise ValueError(f"statistics have {statistics.num_experts} experts, the logits have {logits.shape[1]}")
    given = (correction_bias, expert_scale, steering, choice)
    if all(value is None for value in given) and _is_plain(spec) and _counts_choices_alone(statistics):
        return _route_plainly(logits, k, spec, tokens, statistics)
    token = read_tokens(tokens, logits.shape[0], logits.device)
    raw = torch.where(token.valid[:, None], _compute(capped(logits, spec)), 0.0)  # values in padding reach no result
    row = read_steering(steering, token, raw)
    z = steer(raw, row)
    ids, slots = _select(z, k, spec, correction_bias, row)
    weights = _weigh(z, ids, spec, expert_scale, row)
    ids, weights = _remap(ids, weights, row)
    natural_ids = None
    if statistics is not None and "natural_counts" in statistics.metrics:
        unsteered = read_steering(None, token, raw)
        natural_ids, _ = _select(raw, k, spec, correction_bias, unsteered)
    if choice is not None:
        if choice.shape != ids.shape or choice_mode not in get_args(ChoiceMode):
            raise ValueError(
                f"choice must be {list(ids.shape)}, {', '.join(get_args(ChoiceMode))}, got {list(choice.shape)}, "
                f"{choice_mode}"
            )
        known = in_range(choice, logits.shape[1])
        taken = choice[:, :1] != -1  # rows whose choice is the given one
        kept = _weigh(z, known, spec, expert_scale, row)
        if choice_mode != "replay":
            natural_ids = None if natural_ids is None else torch.where(taken, known, natural_ids)
            taken = taken & ~row.changed & (slots == k) & (choice_mode == "natural")
            if choice_weights is not None:
                kept = torch.where(known >= 0, choice_weights.to(weights), 0.0)
        ids, weights = torch.where(taken, known, ids), torch.where(taken, kept, weights)
        slots = torch.where(taken, k, slots)
    scores = _score(z, spec.score, ~row.forbidden) if needs_scores(statistics) else None
    count(Choice(ids, weights, slots, natural_ids), scores, row.steered, token, statistics)
    ids = torch.where(token.valid[:, None], ids, -1)
    weights = torch.where(token.valid[:, None], weights, 0.0)
    return weights, ids.to(torch.int32)


def _is_plain(spec: RouterSpec) -> bool:
    """Whether the weights are a softmax over the chosen logits, as in most models."""
    chosen = spec.order == "topk_then_score" and spec.score == "softmax" and spec.renormalize == "none"
    return spec.groups == 1 and (chosen or _cancels(spec))


def _counts_choices_alone(statistics: StatisticsTables | None) -> bool:
    return statistics is None or (statistics.metrics in ((), ("counts",)) and not statistics.entropy)


def _route_plainly(
    logits: Tensor, k: int, spec: RouterSpec, tokens: Tensor | None, statistics: StatisticsTables | None
) -> tuple[Tensor, Tensor]:
    """`route` of a plain router without steering, in few operations."""
    token = None if tokens is None else read_tokens(tokens, logits.shape[0], logits.device)
    z = _compute(capped(logits, spec))
    ids = _best(z, k)
    chosen = z.gather(1, ids)
    if token is not None:
        chosen = torch.where(token.valid[:, None], chosen, 0.0)
    weights = _softmax(chosen, ~torch.isnan(chosen))
    if spec.renormalize == "sum":  # the bits of `_renormalize`, so that steering other rows changes none of these
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    if statistics is not None:
        count_choice(ids, token, statistics)
    if token is not None:
        ids, weights = torch.where(token.valid[:, None], ids, -1), torch.where(token.valid[:, None], weights, 0.0)
    return weights, ids.to(torch.int32)


@torch.no_grad()
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
    """Count a choice that was already made: ids [T, k] and the weights the model uses, [T, k] or None to recompute."""
    if ids.dim() != 2 or ids.shape[0] != logits.shape[0]:
        raise ValueError(f"ids must be [{logits.shape[0]}, k], got {list(ids.shape)}")
    route(
        logits,
        ids.shape[1],
        spec,
        expert_scale=expert_scale,
        tokens=tokens,
        choice=torch.where(ids < 0, -2, ids),  # a row that starts with -1 is a choice too: the model dropped its token
        choice_weights=weights,
        statistics=statistics,
    )


@torch.no_grad()
def observe_steered(
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    spec: RouterSpec,
    *,
    natural_ids: Tensor,
    steering: SteeringTables,
    tokens: Tensor | None = None,
    statistics: StatisticsTables,
) -> None:
    """Count a steered choice that the model changed after routing (capacity limits, joint normalization).

    `ids` [T, k] are the experts that the model used; `natural_ids` [T, k] are those it would have used without
    steering. An empty slot (-1) counts as a slot of the token.
    """
    token = read_tokens(tokens, logits.shape[0], logits.device)
    raw = torch.where(token.valid[:, None], _compute(capped(logits, spec)), 0.0)
    row = read_steering(steering, token, raw)
    scores = _score(steer(raw, row), spec.score, ~row.forbidden) if needs_scores(statistics) else None
    known, natural = (in_range(choice.to(torch.int64), logits.shape[1]) for choice in (ids, natural_ids))
    choice = Choice(known, weights.to(raw), _slots(known, row), natural)
    count(choice, scores, row.steered, token, statistics)


def probabilities(logits: Tensor, score: str) -> Tensor:
    """Scores of all experts divided by their sum, [T, E], as the metric "probability" adds them up.

    Args:
        logits: router logits [T, E]; an expert whose logit is NaN gets NaN.
        score: `RouterSpec.score` of the router.

    A token whose scores have no finite positive sum (gate.h, "Unscored") gets NaN.
    """
    z = _compute(logits)
    scores = _score(z, score, torch.ones_like(z, dtype=torch.bool))
    p, scored = normalized(scores)
    return torch.where(scored & ~torch.isnan(z), p, torch.nan)


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
        ids: integer [T, k]; negative or >= E is an empty slot of weight 0.

    Returns:
        float32 (float64 for float64 logits) [T, k].
    """
    _check(logits, ids.shape[1], spec)
    token = read_tokens(tokens, logits.shape[0], logits.device)
    raw = torch.where(token.valid[:, None], _compute(capped(logits, spec)), 0.0)
    row = read_steering(steering, token, raw)
    known = torch.where(token.valid[:, None], in_range(ids, logits.shape[1]), -1)
    return _weigh(steer(raw, row), known, spec, expert_scale, row)

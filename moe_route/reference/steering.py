"""Reference for steering: each token's row of the token table and of the steering tables, and the steered logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_route.contract.tables import NEUTRAL, ROW_PARAMETERS, STEERING_PLANES, Force, SteeringTables

INF = float("inf")


@dataclass(frozen=True)
class Tokens:
    """Columns of the token table, int64 [T]; an index outside its table becomes -1."""

    row: Tensor
    group: Tensor
    segment: Tensor
    valid: Tensor  # bool [T]


def read_tokens(tokens: Tensor | None, num_tokens: int, device: torch.device) -> Tokens:
    if tokens is None:
        column = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        return Tokens(column - 1, column, column - 1, column == 0)
    if tokens.shape != (num_tokens, 4):
        raise ValueError(
            f"tokens must have shape [{num_tokens}, 4], got {list(tokens.shape)}; build it with token_table"
        )
    row, group, segment, valid = tokens.to(torch.int64).unbind(1)
    return Tokens(row, group, segment, valid != 0)


@dataclass(frozen=True)
class SteeredRows:
    """The steering row of each token: planes [T, E] (omitted = neutral), row parameters [T, 1]."""

    steered: Tensor  # bool [T, 1]: the token has a steering row
    changed: Tensor  # bool [T, 1]: that row is not neutral (except for top_k, which depends on the model's k)
    forbidden: Tensor  # bool [T, E]
    planes: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=dict)
    remap: Tensor | None = None

    @property
    def force(self) -> Tensor | None:
        return self.planes.get("force")


def read_steering(steering: SteeringTables | None, tokens: Tokens, logits: Tensor) -> SteeredRows:
    """Gather each token's row; tokens without a row get neutral values. Differentiable in the tables."""
    rows = 0 if steering is None else steering.rows
    steered = ((tokens.row >= 0) & (tokens.row < rows) & tokens.valid)[:, None]
    forbidden = torch.zeros_like(logits, dtype=torch.bool)
    if steering is None or rows == 0:
        return SteeredRows(steered, torch.zeros_like(steered), forbidden)
    if steering.num_experts != logits.shape[1]:
        raise ValueError(f"steering has {steering.num_experts} experts, the logits have {logits.shape[1]}")
    tables, mask, row_params, remap = steering.packed
    at = tokens.row.clamp(0, rows - 1)
    planes = {}
    if tables is not None:
        present = [name for bit, name in enumerate(STEERING_PLANES) if mask >> bit & 1]
        for name, table in zip(present, tables.to(logits).unbind(1), strict=True):
            planes[name] = torch.where(steered, table[at], NEUTRAL[name])
    params = {}
    if row_params is not None:
        for column, name in enumerate(ROW_PARAMETERS):
            params[name] = torch.where(steered, row_params.to(logits)[at, column, None], NEUTRAL[name])
    if "force" in planes:
        planes["force"] = _force_codes(planes["force"])
        forbidden = planes["force"] == Force.FORBID
    if remap is not None:
        identity = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        remap = torch.where(steered, remap.to(logits.device, torch.int64)[at], identity)
    changed = torch.zeros_like(steered)
    for name, values in planes.items():
        changed = changed | (values != NEUTRAL[name]).any(1, keepdim=True)
    if "temperature" in params:
        changed = changed | (params["temperature"] != NEUTRAL["temperature"])
    if remap is not None:
        changed = changed | (remap != identity).any(1, keepdim=True)
    return SteeredRows(steered, changed, forbidden, planes, params, remap)


def _force_codes(values: Tensor) -> Tensor:
    """`Force` codes as int64; unknown values become neutral."""
    is_code = (values == values.round()) & (values >= min(Force)) & (values <= max(Force))
    return torch.where(is_code, values.detach(), 0.0).to(torch.int64)


def _times(coefficient: Tensor, factor: Tensor) -> Tensor:
    """coefficient * factor; a coefficient of exactly 0 gives 0 even for an infinite or NaN factor."""
    idle = (coefficient == 0) & ~torch.isfinite(factor)
    return coefficient * torch.where(idle, torch.zeros_like(factor), factor)


def _std(logits: Tensor, allowed: Tensor, correction: Tensor | float) -> Tensor:
    """Standard deviation [T, 1] over the allowed experts with a finite logit; 0 if there are too few of them."""
    used = allowed & torch.isfinite(logits)
    count = used.sum(1, keepdim=True)
    scale = _shrink(torch.where(used, logits, 0.0))
    scaled = logits * scale
    # Centered on one of the row's own values, so that a constant row has a deviation of exactly 0.
    center = scaled.masked_fill(~used, -INF).amax(1, keepdim=True).detach()
    shifted = torch.where(used, scaled - torch.where(count > 0, center, 0.0), 0.0)
    mean = shifted.sum(1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(used, (shifted - mean) ** 2, 0.0).sum(1, keepdim=True)
    divisor = count - correction
    variance = squares / torch.where(divisor > 0, divisor, 1.0)
    positive = (variance > 0) & (divisor > 0)
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0) / scale


def _shrink(values: Tensor) -> Tensor:
    """A power of two [T, 1] that keeps the squares of the values [T, E] from overflowing; 1 for all but huge values."""
    large, factor = (500, -600) if values.dtype is torch.float64 else (60, -96)
    huge = values.detach().abs().amax(1, keepdim=True) > 2.0**large
    return torch.where(huge, values.new_full((), 2.0**factor), values.new_ones(()))


def steer(logits: Tensor, steering: SteeredRows) -> Tensor:
    """Steered logits [T, E]: z * scale / temperature + bias + std * std(z) + magnitude * |z|, then forced values."""
    allowed, planes, params = ~steering.forbidden, steering.planes, steering.params
    z = logits
    if "scale" in planes:
        z = z * planes["scale"]
    if "temperature" in params:
        z = z / params["temperature"]
    if "bias" in planes:
        z = z + planes["bias"]
    if "std" in planes:
        z = z + _times(planes["std"], _std(logits, allowed, params.get("std_correction", 0.0)))
    if "magnitude" in planes:
        z = z + _times(planes["magnitude"], logits.abs())
    if steering.force is not None:
        z = _force(z, logits, steering.force, allowed)
    return torch.where(steering.steered, z, logits)


def _force(z: Tensor, logits: Tensor, force: Tensor, allowed: Tensor) -> Tensor:
    """Give forced experts their value, computed from the row's raw logits.

    A row with a SteerMoE code becomes a log-softmax. A row in which every logit is NaN stays as it is.
    """
    known = allowed & ~torch.isnan(logits)
    force = torch.where(known.any(1, keepdim=True), force, Force.NONE)
    natural = torch.where(known, logits, -INF)
    top = natural.amax(1, keepdim=True)
    bottom = torch.where(known, logits, INF).amin(1, keepdim=True)
    z = torch.where(force == Force.ON_PAPER, top, z)
    z = torch.where(force == Force.OFF_PAPER, bottom, z)
    on, off = force == Force.ON_STEERMOE, force == Force.OFF_STEERMOE
    total = torch.logsumexp(torch.where(known.any(1, keepdim=True), natural, 0.0), 1, keepdim=True)
    total = torch.where(torch.isfinite(total), total, 0.0)
    scaled = torch.where(on, top - total + 0.01, torch.where(off, bottom - total - 0.01, z - total))
    return torch.where((on | off).any(1, keepdim=True), scaled, z)

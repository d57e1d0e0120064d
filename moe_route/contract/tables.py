"""Tables that the gate reads (steering rows, tokens) and tables that it adds to (statistics)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from functools import cache
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from moe_route.base.devices import upload

METRICS = ("counts", "probability", "weight", "weight_share", "natural_counts")
"""Metrics of a statistics table; the index of a name is its bit of ``StatPlane`` in gate.h."""
SCALARS = ("tokens", "slots", "empty", "unscored", "entropy", "steered", "flipped", "moved")
"""Scalars at the start of every statistics row, in order."""
ENTROPY_BIT = 16
"""Bit, beside those of the metrics, that turns on the sum of entropies (``kEntropyBit`` in operators.cpp)."""
FIXED_POINT = 2.0**-32
"""Unit of the metrics probability, weight, weight_share and the scalars entropy (nats) and moved."""

STEERING_PLANES = ("scale", "bias", "std", "magnitude", "score_bias", "weight_scale", "force")
ROW_PARAMETERS = ("temperature", "top_k", "std_correction", "score_bias_weighs", "weight_scale_after")
NEUTRAL: Mapping[str, float] = MappingProxyType(
    dict.fromkeys(STEERING_PLANES + ROW_PARAMETERS, 0.0) | {"scale": 1.0, "weight_scale": 1.0, "temperature": 1.0}
)

PackedSteering = tuple[Tensor | None, int, Tensor | None, Tensor | None]


class Force(IntEnum):
    """Codes of the ``force`` table: an expert is chosen first (ON), last (OFF) or never (FORBID).

    The suffix says which logit a forced expert is weighed by. PAPER: the row's natural maximum or minimum over allowed
    experts, set before scoring (arXiv 2510.04694 eq. 5). STEERMOE: maximum + 0.01 or minimum - 0.01 of the row's
    log-softmax (arXiv 2509.09660). NATURAL: the expert's own logit. FORBID also leaves the expert out of maximum,
    minimum, standard deviation and scores.
    """

    NONE = 0
    ON_PAPER = 1
    ON_STEERMOE = 2
    ON_NATURAL = 3
    OFF_PAPER = -1
    OFF_STEERMOE = -2
    OFF_NATURAL = -3
    FORBID = -4


class SteeringTables:
    """Changes to the logits, choice and weights of a router, one set per row.

    The token table gives each token its row (-1: not steered). The steered logits are
    ``z' = z * scale / temperature + bias + std * std(z) + magnitude * |z|``, with std and |z| of the raw logits over
    allowed experts (arXiv 2510.04694 eq. 4; arXiv 2601.14050). An omitted table is neutral.

    Args:
        rows: number of steering rows.
        num_experts: E.
        scale, bias, std, magnitude: coefficients of the formula above, float [rows, E].
        score_bias: added to the scores, float [rows, E].
        weight_scale: factor on the weights of the chosen experts, float [rows, E].
        force: `Force` codes [rows, E].
        temperature: float [rows] or a number, > 0.
        top_k: experts per token, [rows] or a number; 0 = the model's own k. More than that k counts as k.
        std_correction: 0 = population standard deviation, 1 = sample standard deviation, [rows] or a number.
        score_bias_weighs: 0 = ``score_bias`` affects the choice only, 1 = also the weights, [rows] or a number.
        weight_scale_after: 0 = ``weight_scale`` acts before renormalization, 1 = after it, [rows] or a number.
        remap: integer [rows, E]: a chosen expert e is replaced by remap[e] (-1: dropped). Duplicates merge.
        device: device of the packed tables; by default that of the first table given, else the CPU.

    Tables that need no gradient are copied: later changes to them have no effect. Tables that require grad are packed
    again in each call, so they can be trained through ``route_weights``.

    Raises:
        ValueError: a wrong shape, or a value outside its range.
    """

    def __init__(
        self,
        rows: int,
        num_experts: int,
        *,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        std: Tensor | None = None,
        magnitude: Tensor | None = None,
        score_bias: Tensor | None = None,
        weight_scale: Tensor | None = None,
        force: Tensor | None = None,
        temperature: Tensor | float | None = None,
        top_k: Tensor | int | None = None,
        std_correction: Tensor | int | None = None,
        score_bias_weighs: Tensor | int | None = None,
        weight_scale_after: Tensor | int | None = None,
        remap: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if rows < 1 or num_experts < 1:
            raise ValueError(f"SteeringTables need at least one row and one expert, got {rows} and {num_experts}")
        planes = dict(zip(STEERING_PLANES, (scale, bias, std, magnitude, score_bias, weight_scale, force), strict=True))
        params = dict(
            zip(
                ROW_PARAMETERS,
                (temperature, top_k, std_correction, score_bias_weighs, weight_scale_after),
                strict=True,
            )
        )
        tensors = [value for value in (*planes.values(), *params.values(), remap) if isinstance(value, Tensor)]
        self.rows, self.num_experts = rows, num_experts
        self.device = _place(device, tensors)
        self._planes = {name: self._plane(name, table) for name, table in planes.items() if table is not None}
        self._params = {name: self._parameter(name, value) for name, value in params.items() if value is not None}
        self._remap = None if remap is None else self._remap_table(remap)
        self._check_values()
        trained = any(table.requires_grad for table in (*self._planes.values(), *self._params.values()))
        self._packed: PackedSteering | None = None if trained else self._pack()

    @classmethod
    def from_packed(
        cls, tables: Tensor | None, planes: int, row_params: Tensor | None, remap: Tensor | None, num_experts: int
    ) -> SteeringTables:
        """Wrap tables that are packed already, without a copy, so that gradients flow into them."""
        made = cls.__new__(cls)
        parts = [part for part in (tables, row_params, remap) if part is not None]
        made.rows = parts[0].shape[0] if parts else 1
        made.num_experts = num_experts
        made.device = parts[0].device if parts else torch.device("cpu")
        names = [name for bit, name in enumerate(STEERING_PLANES) if planes >> bit & 1]
        made._planes = {} if tables is None else {name: tables[:, p] for p, name in enumerate(names)}
        made._params = {} if row_params is None else dict(zip(ROW_PARAMETERS, row_params.unbind(1), strict=True))
        made._remap = remap
        made._packed = (tables, planes, row_params, remap)
        return made

    @property
    def packed(self) -> PackedSteering:
        """(tables float32 [rows, P, E] or None, plane bits, row_params float32 [rows, 5] or None, remap int32 or None).

        Differentiable in the tables that require grad.
        """
        return self._pack() if self._packed is None else self._packed

    @property
    def requires_grad(self) -> bool:
        """Whether some table receives a gradient."""
        if self._packed is None:
            return True
        return any(part is not None and part.requires_grad for part in (self._packed[0], self._packed[2]))

    @property
    def trained(self) -> bool:
        """Whether some table requires grad; such tables are packed again in each call."""
        return self._packed is None

    def without_remap(self) -> SteeringTables | None:
        """The same tables without ``remap``, sharing memory; None if nothing else is set."""
        tables, planes, row_params, _ = self.packed
        if tables is None and row_params is None:
            return None
        return SteeringTables.from_packed(tables, planes, row_params, None, self.num_experts)

    @property
    def tables(self) -> Mapping[str, Tensor]:
        """The tables that were given, by name: float32 [rows, E], row parameters [rows], ``remap`` int32 [rows, E]."""
        remap = {} if self._remap is None else {"remap": self._remap}
        return MappingProxyType({**self._planes, **self._params, **remap})

    @property
    def is_null(self) -> bool:
        """Whether every value is neutral. Reads the tables, which waits for a device."""
        for name, table in (*self._planes.items(), *self._params.items()):
            if name in ("std_correction", "score_bias_weighs", "weight_scale_after"):
                continue  # this parameter only modifies the effect of another table
            if not bool((table == NEUTRAL[name]).all()):
                return False
        if self._remap is None:
            return True
        return bool((self._remap == torch.arange(self.num_experts, device=self.device)).all())

    def to(self, device: torch.device | str) -> SteeringTables:
        """Copy the tables to another device. The host does not wait for it, unless the tables are trained."""
        device = torch.device(device)
        if device == self.device:
            return self
        if self._packed is None:
            planes = {name: table.to(device) for name, table in self._planes.items()}
            params = {name: table.to(device) for name, table in self._params.items()}
            remap = None if self._remap is None else self._remap.to(device)
            return SteeringTables(self.rows, self.num_experts, **planes, **params, remap=remap, device=device)
        tables, bits, row_params, targets = self._packed
        there = [None if part is None else upload(part, device) for part in (tables, row_params, targets)]
        moved = SteeringTables.from_packed(there[0], bits, there[1], there[2], self.num_experts)
        moved.rows = self.rows
        return moved

    def __repr__(self) -> str:
        names = ", ".join(self.tables) or "nothing"
        return f"SteeringTables({self.rows} rows, {self.num_experts} experts: {names})"

    def _plane(self, name: str, table: Tensor) -> Tensor:
        self._check_shape(name, table, (self.rows, self.num_experts))
        return self._kept(table)

    def _parameter(self, name: str, value: Tensor | float) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.full((self.rows,), float(value), device=self.device)
        if value.dim() == 0:
            value = value.expand(self.rows)
        self._check_shape(name, value, (self.rows,))
        return self._kept(value)

    def _kept(self, table: Tensor) -> Tensor:
        """`table` as float32 on the device: a copy, or the table itself if it is trained."""
        return table.to(device=self.device, dtype=torch.float32, copy=not table.requires_grad)

    def _remap_table(self, remap: Tensor) -> Tensor:
        self._check_shape("remap", remap, (self.rows, self.num_experts))
        if remap.is_floating_point():
            raise ValueError(f"steering table remap must be integer, got {remap.dtype}")
        return remap.to(device=self.device, dtype=torch.int32, copy=True).contiguous()

    @staticmethod
    def _check_shape(name: str, table: Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(table, Tensor):
            raise TypeError(
                f"steering table {name} must be a torch.Tensor, not {type(table).__name__}: torch.as_tensor(...)"
            )
        if tuple(table.shape) != shape:
            raise ValueError(f"steering table {name} must have shape {list(shape)}, got {list(table.shape)}")

    def _check_values(self) -> None:
        codes = [int(code) for code in Force]
        bounds = {
            "force": (min(codes), max(codes)),
            "top_k": (0, None),
            "std_correction": (0, 1),
            "score_bias_weighs": (0, 1),
            "weight_scale_after": (0, 1),
        }
        for name, table in {**self._planes, **self._params}.items():
            if name in bounds:
                low, high = bounds[name]
                whole = table.detach() == table.detach().round()
                if not bool((whole & (table >= low) & (True if high is None else table <= high)).all()):
                    limit = f"{low} or more" if high is None else f"{low}..{high}"
                    raise ValueError(f"steering table {name} holds a value that is not a whole number {limit}")
        if "temperature" in self._params and not bool((self._params["temperature"] > 0).all()):
            raise ValueError("steering temperature must be positive in every row")
        if self._remap is not None and not bool(((self._remap >= -1) & (self._remap < self.num_experts)).all()):
            raise ValueError(f"steering table remap holds an expert outside -1..{self.num_experts - 1}")

    def _pack(self) -> PackedSteering:
        bits = sum(1 << bit for bit, name in enumerate(STEERING_PLANES) if name in self._planes)
        tables = torch.stack([self._planes[n] for n in STEERING_PLANES if n in self._planes], 1) if bits else None
        params = None
        if self._params:
            neutral = {name: torch.full((self.rows,), NEUTRAL[name], device=self.device) for name in ROW_PARAMETERS}
            params = torch.stack([{**neutral, **self._params}[name] for name in ROW_PARAMETERS], 1)
        return tables, bits, params, self._remap


def _place(device: torch.device | str | None, tensors: Iterable[Tensor]) -> torch.device:
    """`device` if given, else that of the first tensor, else the CPU."""
    if device is not None:
        return torch.device(device)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def token_table(
    num_tokens: int,
    *,
    steering_row: Tensor | int | None = None,
    group: Tensor | int | None = None,
    segment: Tensor | int | None = None,
    valid: Tensor | bool | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Build the token table, int32 [T, 4], with columns steering row, group, segment, valid.

    A segment is the part of one sequence that lies in one group. Each argument is a number, or a tensor of T elements
    of any shape, read in row-major order.

    Args:
        num_tokens: T.
        steering_row: row of the steering tables; -1 (default) = not steered.
        group: row of the group statistics; default 0, -1 = not counted.
        segment: row of the segment statistics; default -1 = not counted.
        valid: False for padding (default True). Padding gets ids -1 and weights 0, and its logits are never read.
        device: by default that of the first tensor given, else the CPU.

    Raises:
        ValueError: a tensor that does not have T elements.
    """
    columns = {"steering_row": steering_row, "group": group, "segment": segment, "valid": valid}
    device = _place(device, (value for value in columns.values() if isinstance(value, Tensor)))
    made = []
    for (name, value), default in zip(columns.items(), (-1, 0, -1, 1), strict=True):
        if isinstance(value, Tensor):
            if value.numel() not in (1, num_tokens):
                raise ValueError(f"{name} has {value.numel()} elements for {num_tokens} tokens")
            made.append(value.to(device=device, dtype=torch.int32).reshape(-1).expand(num_tokens))
        else:
            try:
                number = default if value is None else int(value)
            except TypeError:
                kind = type(value).__name__
                raise TypeError(
                    f"{name} must be a number or a torch.Tensor, not {kind}: torch.as_tensor(...)"
                ) from None
            made.append(torch.full((num_tokens,), number, dtype=torch.int32, device=device))
    return torch.stack(made, 1)


@cache
def _metrics_of(layout: int) -> tuple[tuple[str, ...], bool]:
    """Names of the metrics, and whether entropy is accumulated."""
    return tuple(name for bit, name in enumerate(METRICS) if layout >> bit & 1), bool(layout >> ENTROPY_BIT & 1)


class StatisticsTables:
    """int64 tables that `route` and `observe` add to: one row per group and, optionally, one per segment.

    A segment is the part of one sequence that lies in one group. A row holds the `SCALARS`, then E values for each name
    in ``metrics``. All sums are of integers; fractions are in fixed point with the unit `FIXED_POINT`, and each token's
    term is rounded once. So sums do not depend on threads or batch splits, and the tables of two runs add up exactly.

    Args:
        groups: int64 [G, 8 + P * E], contiguous; P is the number of metrics.
        segments: int64 [S, 8 + P * E], contiguous, or None.
        num_experts: E.
        metrics: names from `METRICS`.
        entropy: whether the scalar ``entropy`` is accumulated.

    Raises:
        ValueError: an unknown metric, or a wrong shape or dtype.
    """

    __slots__ = ("arguments", "entropy", "num_experts", "metrics")

    def __init__(
        self,
        groups: Tensor,
        segments: Tensor | None,
        num_experts: int,
        metrics: Iterable[str] = ("counts", "probability", "weight"),
        entropy: bool = True,
    ) -> None:
        wanted = tuple(metrics)
        unknown = [name for name in wanted if name not in METRICS]
        if unknown:
            raise ValueError(f"no statistics metric {unknown[0]!r}; there are {', '.join(METRICS)}")
        self.metrics = tuple(name for name in METRICS if name in wanted)
        self.num_experts, self.entropy = num_experts, bool(entropy)
        width = len(SCALARS) + len(self.metrics) * num_experts
        for name, table in (("groups", groups), ("segments", segments)):
            if table is None:
                continue
            if not isinstance(table, Tensor):
                raise TypeError(f"statistics {name} must be a torch.Tensor, not {type(table).__name__}: use zeros()")
            if table.dim() != 2 or table.shape[1] != width or table.dtype != torch.int64 or not table.is_contiguous():
                raise ValueError(f"statistics {name} must be contiguous int64 [rows, {width}], got {list(table.shape)}")
        bits = sum(1 << bit for bit, name in enumerate(METRICS) if name in self.metrics)
        # The operators' arguments, packed once: packing them in every decode step would cost more than the counting.
        self.arguments = (groups, bits | self.entropy << ENTROPY_BIT, segments)

    @classmethod
    def from_packed(cls, groups: Tensor, layout: int, segments: Tensor | None, num_experts: int) -> StatisticsTables:
        """Wrap tables whose ``arguments`` are these, without a copy and without a check."""
        made = cls.__new__(cls)
        made.metrics, made.entropy = _metrics_of(layout)
        made.num_experts, made.arguments = num_experts, (groups, layout, segments)
        return made

    @classmethod
    def zeros(
        cls,
        num_experts: int,
        *,
        groups: int,
        segments: int = 0,
        metrics: Iterable[str] = ("counts", "probability", "weight"),
        entropy: bool = True,
        device: torch.device | str | None = None,
    ) -> StatisticsTables:
        """Allocate zeroed tables for ``groups`` groups and ``segments`` segments."""
        if num_experts < 1 or groups < 0 or segments < 0:
            raise ValueError(f"cannot make statistics of {num_experts} experts, {groups} groups, {segments} segments")
        names = tuple(metrics)
        width = len(SCALARS) + len({name for name in names if name in METRICS}) * num_experts
        made = [torch.zeros(rows, width, dtype=torch.int64, device=device) for rows in (groups, segments)]
        return cls(made[0], made[1] if segments else None, num_experts, names, entropy)

    @property
    def groups(self) -> Tensor:
        """int64 [G, 8 + P * E]."""
        return self.arguments[0]

    @property
    def segments(self) -> Tensor | None:
        """int64 [S, 8 + P * E], or None."""
        return self.arguments[2]

    @property
    def device(self) -> torch.device:
        return self.groups.device

    def metric(self, name: str, of: Literal["groups", "segments"] = "groups") -> Tensor:
        """One metric as a view, int64 [rows, E]."""
        if name not in self.metrics:
            raise ValueError(f"these statistics have no metric {name!r}; they have {', '.join(self.metrics) or 'none'}")
        start = len(SCALARS) + self.metrics.index(name) * self.num_experts
        return self._table(of)[:, start : start + self.num_experts]

    def scalar(self, name: str, of: Literal["groups", "segments"] = "groups") -> Tensor:
        """One scalar as a view, int64 [rows]."""
        if name not in SCALARS:
            raise ValueError(f"no scalar {name!r}; there are {', '.join(SCALARS)}")
        return self._table(of)[:, SCALARS.index(name)]

    def zero_(self) -> StatisticsTables:
        """Set all values to zero, in place."""
        self.groups.zero_()
        if self.segments is not None:
            self.segments.zero_()
        return self

    def _table(self, of: str) -> Tensor:
        table = self.groups if of == "groups" else self.segments
        if of not in ("groups", "segments") or table is None:
            raise ValueError(f"these statistics have no {of}")
        return table

    def __repr__(self) -> str:
        segments = 0 if self.segments is None else self.segments.shape[0]
        return (
            f"StatisticsTables({self.groups.shape[0]} groups, {segments} segments, {self.num_experts} experts, "
            f"metrics {', '.join(self.metrics) or 'none'}, entropy {self.entropy})"
        )

"""The integer tables that the gate adds to while a recorder is active, one per layer, and how they are read.

A table has rows ``phase * capacity + index``, for groups and for segments. A segment is the part of one sequence that
lies in one group; the segments are those of the running label block. Capacities double when more rows are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moe_route.base.devices import finish
from moe_route.calls.call import PHASES
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import METRICS, SCALARS, StatisticsTables
from moe_route.recording.statistics import RecordingError

_FIRST_SEGMENTS = 8


class RecordedRouter(Protocol):
    """The part of a router's description that the recorder uses (`routers.RouterInfo` has it)."""

    name: str
    num_experts: int
    top_k: int
    role: str

    @property
    def spec(self) -> RouterSpec: ...
    @property
    def device(self) -> torch.device: ...


class TableSums:
    """Sums read from tables: ``scalars`` int64 ``[2, n, L, 8]``, and ``metrics`` name -> int64 ``[2, n, L, E]``.

    E is the size of the widest layer.
    """

    def __init__(self, rows: int, layers: int, widest: int, metrics: Sequence[str]):
        self.scalars = np.zeros((len(PHASES), rows, layers, len(SCALARS)), np.int64)
        self.metrics: Mapping[str, np.ndarray] = {
            name: np.zeros((len(PHASES), rows, layers, widest), np.int64) for name in metrics
        }

    def scalar(self, name: str) -> np.ndarray:
        """One scalar, int64 ``[2, n, L]``."""
        return self.scalars[..., SCALARS.index(name)]

    def at(self, rows: Sequence[int]) -> TableSums:
        """The sums of these rows."""
        chosen = TableSums(0, 0, 0, ())
        chosen.scalars = self.scalars[:, rows]
        chosen.metrics = {name: table[:, rows] for name, table in self.metrics.items()}
        return chosen


class TableSet:
    """One ``StatisticsTables`` per layer, on the device of its router."""

    def __init__(self, routers: Sequence[RecordedRouter], *, groups: int, metrics: Sequence[str], entropy: bool):
        self.routers = tuple(routers)
        self.metrics = tuple(name for name in METRICS if name in metrics)
        self.entropy = entropy
        self.group_capacity = max(groups, 1)
        self.segment_capacity = _FIRST_SEGMENTS
        self.fixed = False  # a CUDA graph adds to these very tables, so they may not be replaced
        self.layers = [self._new(router, router.device) for router in self.routers]

    @torch.inference_mode(False)  # the tables outlive the inference mode in which a model may be called
    def _new(self, router: RecordedRouter, device: torch.device) -> StatisticsTables:
        return StatisticsTables.zeros(
            router.num_experts,
            groups=len(PHASES) * self.group_capacity,
            segments=len(PHASES) * self.segment_capacity,
            metrics=self.metrics,
            entropy=self.entropy,
            device=device,
        )

    def follow(self) -> bool:
        """Move the tables to the present devices of the routers; True if one moved."""
        moved = False
        for layer, (router, table) in enumerate(zip(self.routers, self.layers, strict=True)):
            device = router.device
            if table.device != device:
                self._refuse_if_fixed("moving to another device")
                self.layers[layer] = wide = self._new(router, device)
                wide.groups.copy_(table.groups)
                _segments(wide).copy_(_segments(table))
                moved = True
        return moved

    def _refuse_if_fixed(self, what: str) -> None:
        if self.fixed:
            raise RecordingError(
                f"the tables need {what}, but a captured CUDA graph adds to them where they are: name all groups "
                "(record(groups=[...])), run the largest batch and every plan once before the capture, or begin a new "
                "recording and capture again"
            )

    def reserve(self, *, groups: int, segments: int) -> bool:
        """Make room for more rows, keeping all sums; True if the tables were replaced."""
        if groups <= self.group_capacity and segments <= self.segment_capacity:
            return False
        self._refuse_if_fixed("growing")
        before = self.group_capacity, self.segment_capacity
        self.group_capacity = _doubled(self.group_capacity, groups)
        self.segment_capacity = _doubled(self.segment_capacity, segments)
        old, self.layers = self.layers, []
        for router, table in zip(self.routers, old, strict=True):
            wide = self._new(router, table.device)
            _by_phase(wide.groups)[:, : before[0]] = _by_phase(table.groups)
            _by_phase(_segments(wide))[:, : before[1]] = _by_phase(_segments(table))
            self.layers.append(wide)
        return True

    def hand_over(self, first: int, groups: Tensor, segments: Tensor, count: int) -> None:
        """Move ``count`` group rows from ``first`` on into the rows ``groups`` and ``segments`` (-1: nowhere).

        Then set all ``len(groups)`` rows from ``first`` on to zero.
        """
        for table in self.layers:
            held = table.groups[first : first + len(groups)]
            for target, rows in ((table.groups, groups), (_segments(table), segments)):
                rows = rows[:count].to(table.device)
                target.index_add_(0, rows.clamp(min=0), held[:count] * (rows >= 0)[:, None])
            held.zero_()

    def add_natural_counts(self) -> bool:
        """Begin to count the natural choice beside the steered one; True if the tables were replaced.

        Nothing was steered before, so both counts start out equal.
        """
        if "natural_counts" in self.metrics or "counts" not in self.metrics:
            return False
        self._refuse_if_fixed("counting the natural choice too")
        kept = self.metrics
        self.metrics = tuple(name for name in METRICS if name in {*kept, "natural_counts"})
        old, self.layers = self.layers, []
        for router, table in zip(self.routers, old, strict=True):
            wide = self._new(router, table.device)
            for of in ("groups", "segments"):
                getattr(wide, of)[:, : len(SCALARS)] = getattr(table, of)[:, : len(SCALARS)]
                for name in kept:
                    wide.metric(name, of=of).copy_(table.metric(name, of=of))
                wide.metric("natural_counts", of=of).copy_(table.metric("counts", of=of))
            self.layers.append(wide)
        return True

    def read_groups(self, count: int) -> TableSums:
        """Read the sums of the first ``count`` groups. Waits for the device."""
        return self._read([_by_phase(table.groups)[:, :count] for table in self.layers], count)

    def take_segments(self, rows: int | Sequence[int]) -> TableSums:
        """Read the sums of the first ``rows`` segments, or of the segments of these numbers, and set them to zero.

        Waits for the device, with one copy per device and table width.
        """
        tables = [_by_phase(_segments(table)) for table in self.layers]
        chosen = slice(0, rows) if isinstance(rows, int) else torch.tensor(rows)
        sums = self._read([table[:, chosen] for table in tables], rows if isinstance(rows, int) else len(rows))
        for table in tables:
            table[:, chosen] = 0
        for device in {table.device for table in tables}:
            finish(device)
        return sums

    def _read(self, views: Sequence[Tensor], rows: int) -> TableSums:
        widest = max((router.num_experts for router in self.routers), default=0)
        sums = TableSums(rows, len(self.routers), widest, self.metrics)
        alike: dict[tuple[torch.device, int], list[int]] = {}
        for layer, view in enumerate(views):
            alike.setdefault((view.device, self.routers[layer].num_experts), []).append(layer)
        for (device, experts), layers in alike.items():
            finish(device)  # the calls may have run on other streams
            table = torch.stack([views[layer] for layer in layers], dim=2).cpu().numpy()
            sums.scalars[:, :, layers] = table[..., : len(SCALARS)]
            for position, name in enumerate(self.metrics):
                start = len(SCALARS) + position * experts
                sums.metrics[name][:, :, layers, :experts] = table[..., start : start + experts]
        return sums


def _by_phase(table: Tensor) -> Tensor:
    return table.view(len(PHASES), -1, table.shape[1])


def _segments(table: StatisticsTables) -> Tensor:
    assert table.segments is not None  # `_new` makes tables with segments
    return table.segments


def _doubled(capacity: int, needed: int) -> int:
    while capacity < needed:
        capacity *= 2
    return capacity

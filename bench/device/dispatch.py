"""Dispatch, permute and combine on a device against torch's sort, index_select and gather-multiply-sum."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cpu.dispatch import Shape
from bench.device import floors
from bench.device.place import GRAPH, Place
from moe_route import ops
from moe_route.bench.timing import Contender, Race, race

DISPATCH, PERMUTE, COMBINE = "dispatch", "permute", "combine"
PEERS = {
    DISPATCH: "torch sort + counts + inverse",
    PERMUTE: "torch index_select",
    COMBINE: "torch gather, multiply, sum",
}
PLANS = 8  # different choices of experts for permute and combine, whose time is in the rows


def moved_bytes(operator: str, shape: Shape) -> int:
    """What has to be read and written, each once."""
    slots, row = shape.tokens * shape.k, shape.hidden * shape.dtype.itemsize
    if operator == DISPATCH:  # int32 ids read; order and inverse written, int64
        return slots * (4 + 8 + 8)
    if operator == PERMUTE:  # rows of the tokens read, rows of the slots written, int64 places of the slots read
        return shape.tokens * row + slots * (row + 8)
    return slots * (row + 8 + 4) + shape.tokens * row  # rows, places and weights read, sums written


class RoutedModel:
    """Choices of experts, and what `ops.dispatch` and torch make of them."""

    def __init__(self, shape: Shape, place: Place, number: int):
        self.shape = shape
        generator = torch.Generator(place.device).manual_seed(2)
        scores = (shape.tokens, shape.experts)
        self.wide = [
            torch.randn(scores, generator=generator, device=place.device).topk(shape.k).indices for _ in range(number)
        ]
        self.ids = [ids.to(torch.int32) for ids in self.wide]

    def sorted(self, index: int, wait: bool) -> tuple[torch.Tensor, ...]:
        """Offsets, counts, order and inverse with operations of torch; `wait`: `bincount` may wait for the device."""
        ids = self.wide[index % len(self.wide)].flatten()
        order = torch.sort(ids, stable=True).indices
        if wait:
            counts = torch.bincount(ids, minlength=self.shape.experts)
        else:
            counts = ids.new_zeros(self.shape.experts).scatter_add_(0, ids, torch.ones_like(ids))
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=ids.device))
        return torch.cumsum(counts, 0), counts, order, inverse

    def dispatched(self, index: int) -> ops.Dispatch:
        return ops.dispatch(self.ids[index % len(self.ids)], self.shape.experts)


def dispatching(shape: Shape, place: Place, mode: str) -> tuple[dict[str, Contender], int]:
    """Contenders, and how many inputs they take turns on."""
    routed = RoutedModel(shape, place, place.number(shape.tokens * shape.k * 4))
    return {
        floors.LAUNCH: floors.launching(place),
        floors.COPY: floors.copying(moved_bytes(DISPATCH, shape), place),
        PEERS[DISPATCH]: lambda index: routed.sorted(index, wait=mode != GRAPH),
        DISPATCH: routed.dispatched,
    }, len(routed.ids)


def permuting(shape: Shape, place: Place, mode: str) -> tuple[dict[str, Contender], int]:
    hidden = place.inputs((shape.tokens, shape.hidden), shape.dtype)
    routed = RoutedModel(shape, place, PLANS)
    plans = [routed.dispatched(index) for index in range(PLANS)]
    sources = [plan.order // shape.k for plan in plans]
    return {
        floors.COPY: floors.copying(moved_bytes(PERMUTE, shape), place),
        PEERS[PERMUTE]: lambda index: hidden[index].index_select(0, sources[index % PLANS]),
        PERMUTE: lambda index: ops.permute(hidden[index], plans[index % PLANS]),
    }, len(hidden)


def combining(shape: Shape, place: Place, mode: str) -> tuple[dict[str, Contender], int]:
    rows = place.inputs((shape.tokens * shape.k, shape.hidden), shape.dtype)
    routed = RoutedModel(shape, place, PLANS)
    plans = [routed.dispatched(index) for index in range(PLANS)]
    weights = torch.softmax(torch.randn(shape.tokens, shape.k, device=place.device), dim=-1)
    factors = weights.to(shape.dtype).unsqueeze(-1)

    def torch_combine(index: int) -> torch.Tensor:
        gathered = rows[index].index_select(0, plans[index % PLANS].inverse.flatten())
        return (gathered.view(shape.tokens, shape.k, shape.hidden) * factors).sum(1)

    return {
        floors.COPY: floors.copying(moved_bytes(COMBINE, shape), place),
        PEERS[COMBINE]: torch_combine,
        COMBINE: lambda index: ops.combine(rows[index], weights, plans[index % PLANS]),
    }, len(rows)


MAKERS: dict[str, Callable[[Shape, Place, str], tuple[dict[str, Contender], int]]] = {
    DISPATCH: dispatching,
    PERMUTE: permuting,
    COMBINE: combining,
}


def measure(operator: str, shape: Shape, place: Place, mode: str, rounds: int) -> Race:
    contenders, inputs = MAKERS[operator](shape, place, mode)
    return race(contenders, rounds=rounds, warmup=2, burst=place.calls(mode, inputs), clock=place.clocks[mode])

"""The launches between hidden states and experts in a row, with and without launches that overlap (the tunable pdl).

One after the other, `route` with counts, `dispatch`, `permute` and `combine` work on few tokens, as in a decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bench.cpu.dispatch import Shape
from bench.device import floors
from bench.device.place import Place
from moe_route import _C, ops
from moe_route.bench.timing import Contender, Race, race

APART, OVERLAPPED = "route, dispatch, permute, combine", "the same, launches overlap"
TUNABLE = "pdl"
_SPEC = ops.RouterSpec(renormalize="sum")


@contextmanager
def overlapping(wanted: int) -> Iterator[None]:
    """Launch, or capture, with this value of the tunable."""
    before = int(_C.tunables()[TUNABLE]["now"])
    _C.tune(TUNABLE, wanted)
    try:
        yield
    finally:
        _C.tune(TUNABLE, before)


def chained(shape: Shape, place: Place) -> tuple[Callable[[int], torch.Tensor], int]:
    """A call for each input, and how many inputs there are."""
    logits = place.inputs((shape.tokens, shape.experts), torch.float32)
    hidden = place.inputs((shape.tokens, shape.hidden), shape.dtype)
    statistics = ops.StatisticsTables.zeros(
        shape.experts, groups=1, metrics=("counts",), entropy=False, device=place.device
    )

    def chain(index: int) -> torch.Tensor:
        weights, ids = ops.route(logits[index], shape.k, _SPEC, statistics=statistics)
        slots = ops.dispatch(ids, shape.experts)
        return ops.combine(ops.permute(hidden[index], slots), weights, slots)

    return chain, min(len(logits), len(hidden))


def measure(shape: Shape, place: Place, mode: str, rounds: int) -> Race:
    """Without CUDA kernels there is one contender: nothing can overlap."""
    chain, inputs = chained(shape, place)

    def with_value(wanted: int) -> Contender:
        def contender(index: int) -> torch.Tensor:
            with overlapping(wanted):
                return chain(index)

        return contender

    contenders: dict[str, Contender] = {floors.LAUNCH: floors.launching(place), APART: chain}
    if TUNABLE in _C.tunables():
        contenders |= {APART: with_value(0), OVERLAPPED: with_value(1)}
    return race(contenders, rounds=rounds, warmup=2, burst=place.calls(mode, inputs), clock=place.clocks[mode])

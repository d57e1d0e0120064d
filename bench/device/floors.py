"""What no kernel of a case can beat: moving its bytes once, and being launched at all."""

from __future__ import annotations

import torch

from bench.device.place import LAUNCHED, REHEARSED, Place
from moe_route.bench.timing import Contender, race

COPY, LAUNCH = "copy as many bytes", "kernel of one element"


def copying(moved_bytes: int, place: Place) -> Contender:
    """A copy on the device that reads and writes `moved_bytes` together, from and to a new place each time."""
    elements = max(1, moved_bytes // 8)  # float32, read and written
    sources = place.inputs((elements,), torch.float32, seed=1)
    targets = [torch.empty_like(sources[index]) for index in range(len(sources))]

    def contender(index: int) -> torch.Tensor:
        return targets[index % len(targets)].copy_(sources[index])

    return contender


def launching(place: Place) -> Contender:
    """The smallest kernel there is."""
    one = torch.empty(1, device=place.device)

    def contender(index: int) -> torch.Tensor:
        return one.fill_(1.0)

    return contender


def bandwidth(place: Place, rounds: int) -> float:
    """Bytes a second, read and written together, of a copy much larger than the cache."""
    moved = min(4 << 30, place.memory_bytes // 16)
    elements = moved // 8
    source = torch.randn(elements, device=place.device)
    target = torch.empty_like(source)
    clock = place.clocks[LAUNCHED if LAUNCHED in place.clocks else REHEARSED]
    run = race({COPY: lambda _: target.copy_(source)}, rounds=rounds, warmup=2, burst=4, clock=clock)
    return elements * 8 / run.timing(COPY).median

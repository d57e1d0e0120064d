"""Timing contenders against each other in one run: interleaved, each call on an input of its own, medians.

Time is processor time of the calling thread (contenders use one thread), so that a neighbour who takes the core away
is not counted; on an idle machine it is the time on the wall.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

# A contender takes the number of the input to work on and returns whatever it computed.
Contender = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles over `calls` calls."""

    median: float
    low: float
    high: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4)
        return cls(median, low, high, len(seconds))


@dataclass(frozen=True)
class Race:
    """What `race` measured. `seconds[name][round]` are single calls; calls of one round are neighbours in time."""

    seconds: Mapping[str, Sequence[float]]

    def timing(self, name: str) -> Timing:
        return Timing.of(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long `slow` takes as `fast`: the median over rounds of the ratio inside a round.

        Neighbours in time share the machine's mood, so their ratio is steadier than the ratio of two medians.
        """
        return statistics.median(a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True))


def race(
    contenders: Mapping[str, Contender],
    *,
    rounds: int,
    warmup: int = 3,
    burst: int = 1,
    around: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> Race:
    """Time every contender once a round, in an order drawn anew each round; no two calls in a row share an input.

    `burst` calls make one measurement, for calls too short for the clock (which takes 0.6 us to read).
    `around[name]()` is entered before and left after each call of that contender, outside the time that is taken.

    A repeated input would be learnt by the branch predictor and kept by the cache, which makes a gate look four to
    eight times as fast as it is inside a model.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    turn, order = 0, random.Random(0)
    for number in range(-warmup, rounds):
        # who goes before leaves its mark on caches and on the allocator's heap: that must not always be the same one
        for name in order.sample(names, len(names)):
            contender = contenders[name]
            turns = range(turn, turn + burst)
            turn += burst
            with around[name]() if around and name in around else nullcontext():
                start = time.thread_time()
                for each in turns:
                    contender(each)
                took = time.thread_time() - start
            if number >= 0:
                seconds[name].append(took / burst)
    return Race(seconds)


class Pool:
    """Distinct normal inputs that are handed out in turn: `pool[i]` is input `i` modulo their number. Never zeros."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, *, total_bytes: int = 48 << 20, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        one = torch.Size(shape).numel() * dtype.itemsize
        self.inputs = [torch.randn(*shape, generator=generator).to(dtype) for _ in range(self.count(one, total_bytes))]

    @staticmethod
    def count(one: int, total: int) -> int:
        """As many inputs as make up `total` bytes, within 8 and 4096."""
        return max(8, min(4096, total // one))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.inputs[index % len(self.inputs)]

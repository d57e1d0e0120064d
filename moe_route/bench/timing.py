"""Timing contenders against each other in one run: interleaved, each call on an input of its own, medians.

A clock says what a call costs. With one thread it is processor time of that thread, so that a neighbor who takes the
core away is not counted; on an idle machine it is the time on the wall. The clocks of a device are in
`bench/device/place.py` of the source tree.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import inf
from typing import Literal, Protocol

import torch

# A contender takes the number of the input to work on and returns whatever it computed.
Contender = Callable[[int], object]


class Clock(Protocol):
    def timer(self, contender: Contender) -> Callable[[range], float]:
        """A function that calls `contender` on the inputs of a range and returns the seconds they took together."""


class ThreadTime:
    """Processor time of the calling thread."""

    name = "processor time of the thread"

    def timer(self, contender: Contender) -> Callable[[range], float]:
        def timed(turns: range) -> float:
            start = time.thread_time()
            for each in turns:
                contender(each)
            return time.thread_time() - start

        return timed


class WallTime:
    """Time on the wall."""

    name = "time on the wall"

    def timer(self, contender: Contender) -> Callable[[range], float]:
        def timed(turns: range) -> float:
            start = time.perf_counter()
            for each in turns:
                contender(each)
            return time.perf_counter() - start

        return timed


def clock_of_threads() -> ThreadTime | WallTime:
    """The clock for as many threads as torch uses. A thread that waits for others takes no processor time, so with more
    than one its own clock would leave out what the others still do."""
    return ThreadTime() if torch.get_num_threads() == 1 else WallTime()


@dataclass(frozen=True)
class Shape:
    """One gate: `tokens` rows of logits over `experts` experts, of which `k` are chosen, and how its router chooses.

    `biased`: a correction bias takes part in the choice.
    """

    experts: int = 128
    k: int = 8
    dtype: torch.dtype = torch.float32
    tokens: int = 4096
    score: Literal["softmax", "sigmoid"] = "softmax"
    biased: bool = False

    @property
    def title(self) -> str:
        kind = "" if self.score == "softmax" else f" {self.score}"
        bias = " with bias" if self.biased else ""
        return f"E={self.experts} k={self.k} T={self.tokens} {str(self.dtype).removeprefix('torch.')}{kind}{bias}"


@dataclass(frozen=True)
class Effort:
    """How much is measured: calls of each contender, and whether large cases are left out to end within minutes.

    With `shape` the gate is measured in that one shape alone, within `within` seconds.
    """

    rounds: int = 60
    quick: bool = False
    shape: Shape | None = None
    within: float = inf


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `number` values: seconds a call, or ratios."""

    median: float
    low: float
    high: float
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4)
        return cls(median, low, high, len(values))


@dataclass(frozen=True)
class Race:
    """What `race` measured. `seconds[name][round]` are single calls; calls of one round are neighbors in time."""

    seconds: Mapping[str, Sequence[float]]

    def timing(self, name: str) -> Spread:
        """Seconds a call of one contender."""
        return Spread.of(self.seconds[name])

    def ratios(self, slow: str, fast: str) -> Spread:
        """How many times as long `slow` takes as `fast`, over the ratios inside a round.

        Neighbors in time share the machine's mood, so their ratio is steadier than the ratio of two medians.
        """
        return Spread.of([a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)])

    def ratio(self, slow: str, fast: str) -> float:
        """The median of `ratios`."""
        return self.ratios(slow, fast).median


def race(
    contenders: Mapping[str, Contender],
    *,
    rounds: int,
    warmup: int = 3,
    burst: int = 1,
    around: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
    clock: Clock | None = None,
    within: float = inf,
) -> Race:
    """Time every contender once a round, in an order drawn anew each round; no two calls in a row share an input.

    `burst` calls make one measurement, for calls too short for the clock (which takes 0.6 us to read).
    No round begins `within` seconds after the first, but for the two that quartiles need.
    `around[name]()` is entered before and left after each call of that contender, outside the time that is taken.

    A repeated input would be learnt by the branch predictor and kept by the cache, which makes a gate look four to
    eight times as fast as it is inside a model.
    """
    clock = clock_of_threads() if clock is None else clock
    names = list(contenders)
    timers = {name: clock.timer(contender) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    turn, order, started = 0, random.Random(0), time.monotonic()
    for number in range(-warmup, rounds):
        if number >= 2 and time.monotonic() - started > within:
            break
        # who goes before leaves its mark on caches and on the allocator's heap: that must not always be the same one
        for name in order.sample(names, len(names)):
            turns = range(turn, turn + burst)
            turn += burst
            with around[name]() if around and name in around else nullcontext():
                took = timers[name](turns)
            if number >= 0:
                seconds[name].append(took / burst)
    return Race(seconds)


class Pool:
    """Distinct normal inputs that are handed out in turn: `pool[i]` is input `i` modulo their number. Never zeros."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        total_bytes: int = 48 << 20,
        seed: int = 0,
        most: int = 4096,
        device: torch.device | str = "cpu",
    ):
        generator = torch.Generator(device).manual_seed(seed)
        number = self.count(torch.Size(shape).numel() * dtype.itemsize, total_bytes, most)
        self.inputs = [torch.randn(*shape, generator=generator, device=device).to(dtype) for _ in range(number)]

    @staticmethod
    def count(one: int, total: int, most: int = 4096) -> int:
        """As many inputs as make up `total` bytes, within 8 and `most`."""
        return max(8, min(most, -(-total // one)))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.inputs[index % len(self.inputs)]

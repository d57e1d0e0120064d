"""Where benchmarks run and by which clocks: a CUDA device by its events, or the CPU as a rehearsal of the same code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moe_route.bench.timing import Clock, Contender, Pool, ThreadTime

# Inputs of a case are this many times the cache together, so that none is still there when its turn comes again.
TIMES_THE_CACHE = 4
# Bounds of the calls that make one measurement: a replay should take a millisecond, and inputs have to fit somewhere.
FEWEST_CALLS, MOST_CALLS = 32, 512


class LaunchTime:
    """Calls launched one by one, between two events: what a program pays that does not use graphs.

    The device waits for the host where the host takes longer to launch than the device to run.
    """

    def timer(self, contender: Contender) -> Callable[[range], float]:
        def timed(turns: range) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for each in turns:
                contender(each)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return timed


class GraphTime:
    """Calls captured once, each on its own input, into one CUDA graph, which is replayed between two events.

    Nothing of the host is in the time but one launch of the whole graph, so kernels of a microsecond can be told apart.
    A contender must not wait for the device: what waits cannot be captured.
    """

    def timer(self, contender: Contender) -> Callable[[range], float]:
        captured: torch.cuda.CUDAGraph | None = None

        def timed(turns: range) -> float:
            nonlocal captured
            if captured is None:
                captured = capture(contender, range(len(turns)))
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            captured.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return timed


def capture(contender: Contender, turns: range) -> torch.cuda.CUDAGraph:
    """A graph of these calls. They are made once before, so that nothing is loaded or set up while capturing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for each in turns[:3]:
            contender(each)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for each in turns:
            contender(each)
    return graph


GRAPH, LAUNCHED, REHEARSED = "in a graph", "launched", "rehearsed on the CPU"


@dataclass(frozen=True)
class Place:
    """A device, its clocks by the name of what they time, and how large its cache is."""

    name: str
    device: torch.device
    clocks: Mapping[str, Clock]
    cache_bytes: int
    memory_bytes: int
    most_calls: int = MOST_CALLS
    fewest_calls: int = FEWEST_CALLS

    def number(self, bytes_of_one: int) -> int:
        """Inputs that are several times the cache together, as far as `most_calls` of them go."""
        return Pool.count(bytes_of_one, TIMES_THE_CACHE * self.cache_bytes, self.most_calls)

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Pool:
        """That many different inputs, none of them zeros."""
        total = TIMES_THE_CACHE * self.cache_bytes
        return Pool(shape, dtype, total_bytes=total, seed=seed, most=self.most_calls, device=self.device)

    def calls(self, mode: str, inputs: int) -> int:
        """Calls of one measurement. A graph holds all the inputs, since a replay begins with the first one again."""
        return max(self.fewest_calls, min(self.most_calls, inputs)) if mode == GRAPH else self.fewest_calls

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def cuda(index: int = 0) -> Place:
    """The CUDA device with this index. Raises RuntimeError where there is none."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            "there is no CUDA device here, or this torch was built without CUDA; "
            "`--device cpu` rehearses the same code on the CPU"
        )
    torch.cuda.set_device(index)
    about = torch.cuda.get_device_properties(index)
    name = "cuda-" + slug(about.name)
    clocks: dict[str, Clock] = {GRAPH: GraphTime(), LAUNCHED: LaunchTime()}
    return Place(name, torch.device("cuda", index), clocks, about.L2_cache_size, about.total_memory)


def rehearsal() -> Place:
    """The CPU in the place of a device: few calls on few inputs, for the code and not for the figures."""
    clocks: dict[str, Clock] = {REHEARSED: ThreadTime()}
    return Place("rehearsal-cpu", torch.device("cpu"), clocks, 1 << 10, 1 << 30, most_calls=8, fewest_calls=2)


def named(name: str) -> Place:
    """`cuda`, `cuda:1` or `cpu`. Raises ValueError for other names, RuntimeError where the device is missing."""
    device = torch.device(name) if re.fullmatch(r"cpu|cuda(:\d+)?", name) else None
    if device is None:
        raise ValueError(f"no device {name!r}; there are cuda, cuda:<number> and cpu")
    return rehearsal() if device.type == "cpu" else cuda(device.index or 0)


def slug(name: str) -> str:
    """'NVIDIA H200' -> 'h200'."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return re.sub(r"^(nvidia-)?(geforce-|tesla-)?", "", words)

"""`torch.cuda` that is not there, over `standin_device`: events, streams, and graphs that replay what they captured.

What is real: whatever runs inside `torch.cuda.graph` is recorded operation by operation and done again by `replay`,
into the very tensors that were captured; operations that would wait for the device cannot be captured. What is not:
times (events count operations) and any work at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.standin_device import OnDevice, StandInDevices
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROPERTIES = SimpleNamespace(
    name="NVIDIA Stand-In 9", major=9, minor=0, multi_processor_count=4, L2_cache_size=1 << 12, total_memory=1 << 24
)
# Milliseconds that an event finds between itself and the one before, for every operation in between and one more.
MILLISECONDS = 1.0


class Counting(StandInDevices):
    """Counts operations, so that events have something to tell, and refuses to wait where CUDA would."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.capturing = False
        self.refusing = False  # torch.cuda.set_sync_debug_mode("error")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _wait(self, what: str) -> None:
        if self.capturing or self.refusing:
            raise RuntimeError(f"operation not permitted: {what} waits for the device")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.refusing = mode == "error"


class Capture(TorchDispatchMode):
    """Records operations while it is on."""

    def __init__(self, graph: Graph, devices: Counting):
        super().__init__()
        self.graph, self.devices = graph, devices

    def __enter__(self) -> Capture:
        self.devices.capturing = True
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self.devices.capturing = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and id(old) not in given:
                    _values(old).copy_(_values(new))


def _values(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, OnDevice) else tensor


@contextmanager
def standin_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """While on, `torch.cuda` has one device; its tensors are computed on the CPU."""
    devices = Counting()

    class Event:
        def __init__(self, enable_timing: bool = False):
            self.at = 0

        def record(self) -> None:
            self.at = devices.operations

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at + 1) * MILLISECONDS  # never nothing

    class Stream:
        cuda_stream = 0

        def wait_stream(self, other: Stream) -> None: ...

    class Generator(torch.Generator):
        def __new__(cls, device: object = "cpu") -> Generator:
            return super().__new__(cls)

    made = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "set_device": lambda index: None,
        "get_device_properties": lambda index=0: PROPERTIES,
        "mem_get_info": lambda device=None: (1 << 40, 1 << 40),
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph, stream=None: Capture(graph, devices),
        "set_sync_debug_mode": devices.set_sync_debug_mode,
        "_sleep": lambda cycles: None,
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
    }
    with monkeypatch.context() as patch:
        for name, value in made.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(OnDevice, "cpu", lambda self: self.inner, raising=False)
        patch.setattr(OnDevice, "data_ptr", lambda self: self.inner.data_ptr(), raising=False)
        with devices:
            yield devices

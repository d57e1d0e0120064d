"""Transfers between host and device that do not make the host wait, and `with` blocks that warn if unused.

A host that waits in every layer, or in every call, leaves the device idle meanwhile. So uploads come from pinned
memory, and results are requested early and read later. Nothing is uploaded while a CUDA graph is captured, because
replays would copy from host memory that is no longer valid.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

_UNKNOWN = 2  # neither 0 nor 1: not arrived yet


class CaptureRefusedError(RuntimeError):
    """Raised if a CUDA graph is being captured and something that it needs was not prepared before."""


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str) -> None:
    """Raise `CaptureRefusedError` while a CUDA graph is captured, because `what` has to be done before."""
    if capturing(device):
        raise CaptureRefusedError(
            f"a CUDA graph is being captured, and {what} cannot be part of it: run the same step once before the "
            "capture, inside the same record, steer and labels blocks"
        )


@cache
def widest(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device: float64, and float32 where it has none (MPS, some XPUs)."""
    if device.type in ("cpu", "cuda", "meta"):
        return torch.float64
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError, NotImplementedError):
        return torch.float32
    return torch.float64


def accelerator() -> str | None:
    """Type of the accelerator that torch sees ("cuda", "mps", "xpu", ...), or None."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else device.type


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the host, or of another device, to `device`, without making the host wait.

    float64 becomes the `widest` dtype of the device. Raises `CaptureRefusedError` if the tensor is on the host and a
    CUDA graph is being captured.
    """
    if values.device == device:
        return values
    if values.dtype == torch.float64:
        values = values.to(widest(device))
    if values.device.type != "cpu" or device.type != "cuda":
        return values.to(device)
    refuse_capture(device, "the upload of a table")
    return values.pin_memory().to(device, non_blocking=True)


def finish(device: torch.device) -> None:
    """Wait until a device has finished all its work on all streams. Call this before reading results."""
    if device.type == "cuda":
        if torch.cuda.is_initialized():
            torch.cuda.synchronize(device)
    elif device.type != "cpu" and device.type == accelerator():
        torch.accelerator.synchronize(device)


class Answers:
    """n bool values computed by a device, requested now and read once they have arrived."""

    def __init__(self, values: Tensor) -> None:
        pinned = values.device.type == "cuda"
        self._host = torch.full(values.shape, _UNKNOWN, dtype=torch.uint8, pin_memory=pinned)
        self._host.copy_(values.to(torch.uint8), non_blocking=pinned)

    def read(self) -> list[bool] | None:
        """The values, or None if some have not arrived. Does not wait for a CUDA device."""
        arrived = self._host.tolist()
        return None if _UNKNOWN in arrived else [value == 1 for value in arrived]


# ---- context managers that warn if they were never entered

T = TypeVar("T")


class Block(AbstractContextManager[T]):
    """A `with` block around `manager` that warns if it is deleted without having been entered.

    Python warns in the same way of a coroutine that was never awaited. `call` is the user's code that made the block,
    such as "routed.steer(plan)".
    """

    _entered = True  # until it is made

    def __init__(self, call: str, manager: AbstractContextManager[T]) -> None:
        self._call, self._manager, self._entered = call, manager, False

    def __enter__(self) -> T:
        self._entered = True
        return self._manager.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._manager.__exit__(kind, error, trace)

    def __del__(self) -> None:
        if not self._entered:
            warn_never_entered(self._call)


def warn_never_entered(call: str, *, _ends: Callable[[], bool] = sys.is_finalizing) -> None:
    """Warn, from a `__del__`, that the result of `call` was never entered. It never raises.

    Where warnings are errors, the line goes to standard error, since nobody could catch it. At the end of the process,
    when names of modules may be gone, nothing is said.
    """
    if _ends():
        return
    said = f"{call} was never entered and does nothing: write `with {call}:` and call the model inside"
    try:
        warnings.warn(said, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        if sys.stderr is not None:
            sys.stderr.write(f"moe-route: {said}\n")

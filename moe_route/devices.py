"""Small things that go between the host and a device without making the host wait for it.

A host that waits in every layer, or in every call, leaves the device idle in between. So what goes up goes from pinned
memory, what comes back is asked for and looked at later, and nothing is uploaded while a CUDA graph is captured: the
graph would copy from host memory that is long gone when it is replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Answers", "CaptureRefusedError", "capturing", "finish", "refuse_capture", "upload"]

_UNKNOWN = 2  # neither 0 nor 1: not arrived yet


class CaptureRefusedError(RuntimeError):
    """A CUDA graph is being captured, and what is needed for it was not prepared before."""


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str) -> None:
    """Raise `CaptureRefusedError` while a CUDA graph is captured; `what` has to be done before."""
    if capturing(device):
        raise CaptureRefusedError(
            f"a CUDA graph is being captured, and {what} cannot be part of it: run the same step once before the "
            "capture, inside the same record, steer and labels blocks"
        )


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A small table of the host on `device`; a tensor of another device is copied over. The host waits for neither.

    Raises `CaptureRefusedError` where a table of the host is needed while a CUDA graph is captured.
    """
    if values.device == device:
        return values
    if values.device.type != "cpu" or device.type != "cuda":
        return values.to(device)
    refuse_capture(device, "the upload of a table")
    return values.pin_memory().to(device, non_blocking=True)


def finish(device: torch.device) -> None:
    """Wait until everything a CUDA device was given is done, on whatever stream: before results are read."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.synchronize(device)


class Answers:
    """Yes or no, [n] times, that a device works out: asked for now, read when they have arrived."""

    def __init__(self, values: Tensor) -> None:
        pinned = values.device.type == "cuda"
        self._host = torch.full(values.shape, _UNKNOWN, dtype=torch.uint8, pin_memory=pinned)
        self._host.copy_(values.to(torch.uint8), non_blocking=pinned)

    def read(self) -> list[bool] | None:
        """The answers, or None where they have not all arrived. Does not wait for a device of CUDA."""
        arrived = self._host.tolist()
        return None if _UNKNOWN in arrived else [value == 1 for value in arrived]

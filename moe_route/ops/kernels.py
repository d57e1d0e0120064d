"""Ask whether this build has kernels for a device, and load CUDA kernels before they are needed."""

from __future__ import annotations

from functools import cache

import torch

from moe_route import _C


def has_kernels(device: torch.device) -> bool:
    """Whether the operators of this build run on ``device``; tensors without data (meta) need no kernel."""
    return device.type in ("cpu", "meta") or (device.type == "cuda" and bool(_C.build_info()["cuda"]))


def load_kernels(num_experts: int, device: torch.device | str) -> None:
    """Load every CUDA kernel that a later call with this many experts may launch.

    Its first call can then be captured into a CUDA graph. Otherwise the first launch loads a kernel, which may wait for
    the device or be refused during a capture, and which kernels a call launches depends on what it steers and counts.
    Recording and steering an attached model call this function themselves. It takes milliseconds the first time for a
    device, and nothing afterwards.

    Args:
        num_experts: E, 1..4096.
        device: a CUDA device. For other devices, and in a build without CUDA kernels, this does nothing.

    Raises:
        ValueError: num_experts is out of range.
        RuntimeError: the device cannot be used.
    """
    if not 1 <= num_experts <= _C.MAX_EXPERTS:
        raise ValueError(f"num_experts = {num_experts} is outside 1..{_C.MAX_EXPERTS}")
    place = torch.device(device)
    if place.type != "cuda" or not _C.build_info()["cuda"] or not torch.cuda.is_initialized():
        return
    _load(torch.cuda.current_device() if place.index is None else place.index, num_experts)


@cache
def _load(index: int, num_experts: int) -> None:
    _C.load_kernels(index, num_experts)

"""Load CUDA kernels, and have them checked, before they are needed."""

from __future__ import annotations

import torch

from moe_route.contract.limits import MAX_EXPERTS
from moe_route.ops import library
from moe_route.ops.self_check import CUDA


def load_kernels(num_experts: int, device: torch.device | str) -> None:
    """Load every CUDA kernel that a later call with this many experts may launch, and check them on the device.

    Its first call can then be captured into a CUDA graph. Otherwise the first launch loads a kernel, which may wait for
    the device or be refused during a capture, and which kernels a call launches depends on what it steers and counts.
    Attaching, recording and steering call this function themselves. It takes a part of a second the first time for a
    device (`self_check` says what is compared), and nothing afterwards.

    Args:
        num_experts: E, 1..4096.
        device: a CUDA device. For other devices, and where torch serves CUDA, this does nothing.

    Raises:
        ValueError: num_experts is out of range.
        RuntimeError: the device cannot be used.
    """
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts = {num_experts} is outside 1..{MAX_EXPERTS}")
    place = torch.device(device)
    if place.type != "cuda" or library.serves_cuda() or not torch.cuda.is_initialized():
        return
    index = torch.cuda.current_device() if place.index is None else place.index
    for experts in (0, num_experts):
        CUDA.check(index, experts)

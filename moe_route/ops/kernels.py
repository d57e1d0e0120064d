"""Loading CUDA kernels before they are needed."""

from __future__ import annotations

from functools import cache

import torch

from moe_route import _C

__all__ = ["load_kernels"]


def load_kernels(num_experts: int, device: torch.device | str) -> None:
    """Load every CUDA kernel that a later call with this many experts may launch, so that its first call can be
    captured into a CUDA graph.

    A kernel is otherwise loaded by its first launch, which may wait for the device or be refused during a capture, and
    which of them a call launches depends on what it steers and counts. Recording and steering an attached model do
    this by themselves. Takes milliseconds the first time, and nothing where it was done for this device before.

    Args:
        num_experts: E, 1..4096.
        device: a CUDA device; for any other, and in a build without CUDA kernels, there is nothing to load.

    Raises:
        ValueError: num_experts out of its range.
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

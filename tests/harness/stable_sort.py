"""The order of choice by stable sorts, one key after the other: what the reference's top-k is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def best(value: Tensor, k: int, rank: Tensor | None = None) -> Tensor:
    """The first k indices of each row: higher rank, numbers before NaN, larger value, lower index."""
    nan = torch.isnan(value)
    order = torch.argsort(torch.where(nan, -torch.inf, value), dim=1, descending=True, stable=True)
    for key in (~nan, torch.zeros_like(nan, dtype=torch.int64) if rank is None else rank):
        order = order.gather(1, torch.argsort(key.gather(1, order).long(), dim=1, descending=True, stable=True))
    return order[:, :k]

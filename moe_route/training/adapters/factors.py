"""The factors A and B of the adapters of one linear layer: its own, or gathered from pools of shards."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moe_route.training.adapters.config import AdapterError, ShardPool

__all__ = ["OwnFactors", "PooledFactors", "Pools"]


class OwnFactors(nn.Module):
    """Factors of n adapters of rank r: `a` [n, r, d_in] and `b` [n, r, d_out]; the update of adapter i is `b_i^T a_i`.

    A starts as in LoRA (arXiv 2106.09685 section 4.1; Kaiming uniform with a = sqrt 5), B at zero.
    """

    def __init__(
        self, experts: int, rank: int, sizes: tuple[int, int], generator: torch.Generator, **place: Any
    ) -> None:
        super().__init__()
        inner, outer = sizes
        self.a = nn.Parameter(_drawn((experts, rank, inner), inner, generator, **place))
        self.b = nn.Parameter(torch.zeros(experts, rank, outer, **place))

    def forward(self) -> tuple[Tensor, Tensor]:
        """A [n, r, d_in] and B [n, r, d_out]."""
        return self.a, self.b


class Pools(nn.Module):
    """The pools of one kind of linear layer: shards of A [e L l, d_in / l] and of B [e L l, d_out / l].

    L is the number of adapters that draw from them. A is drawn with the fan-in of a whole row, d_in.
    """

    def __init__(
        self,
        pool: ShardPool,
        rank: int,
        users: int,
        sizes: tuple[int, int],
        generator: torch.Generator,
        **place: Any,
    ) -> None:
        super().__init__()
        if any(size % pool.shards for size in sizes):
            raise AdapterError(f"shards={pool.shards} must divide both sizes of a layer, and {list(sizes)} are not")
        if rank - pool.private > (pool.rank - pool.private) * users:
            raise AdapterError(
                f"rank={rank} needs {rank - pool.private} public ranks, and {users} layers share "
                f"{(pool.rank - pool.private) * users}: lower rank= or raise ShardPool(rank=)"
            )
        self.pool, self.rank, self.users = pool, rank, users
        inner, outer = (size // pool.shards for size in sizes)
        rows = pool.rank * users * pool.shards
        self.a = nn.Parameter(_drawn((rows, inner), sizes[0], generator, **place))
        self.b = nn.Parameter(torch.zeros(rows, outer, **place))

    def draw(self, user: int, generator: torch.Generator) -> Tensor:
        """Rows of the shards of one user, int64 [r l]: public ones at random, then its private ones."""
        pool = self.pool
        public = (pool.rank - pool.private) * self.users * pool.shards
        chosen = torch.randperm(public, generator=generator)[: (self.rank - pool.private) * pool.shards]
        own = pool.private * pool.shards
        return torch.cat([chosen, torch.arange(own) + public + user * own])


class PooledFactors(nn.Module):
    """Factors of n adapters whose rows are laid together from shards, as the buffers `shards_a`, `shards_b` say.

    Outside training, the rows are gathered once and kept until the pool changes.
    """

    shards_a: Tensor
    shards_b: Tensor

    def __init__(self, pools: Pools, experts: int, first_user: int, generator: torch.Generator) -> None:
        super().__init__()
        self._pools = (pools,)  # in a tuple, so that its parameters are registered in one place only
        self.experts = experts
        device = pools.a.device
        for name in ("shards_a", "shards_b"):  # drawn apart, so that pairs of rows differ from layer to layer
            rows = torch.cat([pools.draw(first_user + expert, generator) for expert in range(experts)])
            self.register_buffer(name, rows.to(device))
        self._kept: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    def forward(self) -> tuple[Tensor, Tensor]:
        """A [n, r, d_in] and B [n, r, d_out]."""
        (pools,) = self._pools
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or pools.a.is_inference():
            self._kept = None
            return self._gathered(pools.a, self.shards_a), self._gathered(pools.b, self.shards_b)
        state = (pools.a.data_ptr(), pools.a._version, pools.b.data_ptr(), pools.b._version)
        if self._kept is None or self._kept[0] != state:
            kept = self._gathered(pools.a, self.shards_a), self._gathered(pools.b, self.shards_b)
            self._kept = (state, *kept)
        return self._kept[1:]

    def _gathered(self, pool: Tensor, rows: Tensor) -> Tensor:
        (pools,) = self._pools
        return pool.index_select(0, rows).reshape(self.experts, pools.rank, -1)


def _drawn(shape: tuple[int, ...], fan_in: int, generator: torch.Generator, **place: Any) -> Tensor:
    """Kaiming uniform with a = sqrt 5 for this fan-in: uniform in +-1 / sqrt(fan-in)."""
    if torch.device(place.get("device") or "cpu").type == "meta":
        return torch.empty(shape, **place)
    bound = 1 / math.sqrt(fan_in)
    return (torch.rand(shape, generator=generator) * (2 * bound) - bound).to(**place)

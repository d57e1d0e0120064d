"""Dispatch, permute and combine against torch's argsort, index_select and index_add."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_route import ops
from moe_route.bench.results import Measured, rows
from moe_route.bench.timing import Contender, Effort, Pool, race


@dataclass(frozen=True)
class Shape:
    """`tokens` hidden states of `hidden` numbers, each sent to `k` of `experts` experts."""

    tokens: int
    hidden: int
    experts: int = 128
    k: int = 8
    dtype: torch.dtype = torch.float32

    @property
    def title(self) -> str:
        return f"T={self.tokens} H={self.hidden} E={self.experts} k={self.k} {str(self.dtype).removeprefix('torch.')}"


SHAPES = (
    Shape(512, 1024),
    Shape(512, 2048, dtype=torch.bfloat16),
    Shape(2048, 1024),
)
PEERS = {
    "dispatch": "torch argsort + bincount + inverse",
    "permute": "torch index_select",
    "combine": "torch multiply + index_add",
}
FLOORS = {"permute": "write T * k rows", "combine": "read T * k rows"}


class Dispatching:
    """The contenders over one shape. Every one takes the number of an input."""

    def __init__(self, shape: Shape):
        self.shape = shape
        scores = Pool((shape.tokens, shape.experts), torch.float32, total_bytes=8 << 20)
        self.ids = [scores[i].topk(shape.k).indices.to(torch.int32) for i in range(len(scores))]
        self.hidden = Pool((shape.tokens, shape.hidden), shape.dtype)
        self.weights = torch.softmax(torch.randn(shape.tokens, shape.k), dim=-1)
        self.plans = [ops.dispatch(ids, shape.experts) for ids in self.ids]
        self.orders = [self.torch_order(ids) for ids in self.ids]
        self.rows = Pool((shape.tokens * shape.k, shape.hidden), shape.dtype)

    @staticmethod
    def torch_order(ids: torch.Tensor) -> torch.Tensor:
        return torch.argsort(ids.flatten(), stable=True)

    def torch_dispatch(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slot order, counts, and row of each slot: what `ops.dispatch` returns."""
        ids = self.ids[index % len(self.ids)]
        order = self.torch_order(ids)
        counts = torch.bincount(ids.flatten(), minlength=self.shape.experts)
        inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel()))
        return order, counts, inverse

    def dispatch(self, index: int) -> ops.Dispatch:
        return ops.dispatch(self.ids[index % len(self.ids)], self.shape.experts)

    def torch_permute(self, index: int) -> torch.Tensor:
        order = self.orders[index % len(self.orders)]
        return self.hidden[index].index_select(0, order // self.shape.k)

    def permute(self, index: int) -> torch.Tensor:
        return ops.permute(self.hidden[index], self.plans[index % len(self.plans)])

    def torch_combine(self, index: int) -> torch.Tensor:
        order = self.orders[index % len(self.orders)]
        rows = self.rows[index] * self.weights.flatten()[order].unsqueeze(1).to(self.shape.dtype)
        out = torch.zeros(self.shape.tokens, self.shape.hidden, dtype=self.shape.dtype)
        return out.index_add_(0, order // self.shape.k, rows)

    def combine(self, index: int) -> torch.Tensor:
        return ops.combine(self.rows[index], self.weights, self.plans[index % len(self.plans)])

    def read_rows(self, index: int) -> torch.Tensor:
        """The floor of combine: reading T * k rows."""
        return torch.sum(self.rows[index])

    def write_rows(self, index: int) -> torch.Tensor:
        """The floor of permute: writing T * k rows."""
        return torch.empty_like(self.rows[0]).fill_(float(index))

    def contenders(self) -> dict[str, Contender]:
        return {
            "torch argsort + bincount + inverse": self.torch_dispatch,
            "dispatch": self.dispatch,
            "torch index_select": self.torch_permute,
            "permute": self.permute,
            "write T * k rows": self.write_rows,
            "torch multiply + index_add": self.torch_combine,
            "combine": self.combine,
            "read T * k rows": self.read_rows,
        }


def measure(effort: Effort) -> Measured:
    measured = Measured()
    for shape in SHAPES:
        run = race(Dispatching(shape).contenders(), rounds=effort.rounds)
        measured.rows += rows("Dispatch, permute, combine", shape.title, run, peers=PEERS, floors=FLOORS)
    return measured

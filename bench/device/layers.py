"""The gates of public models: one `route` with counts against what the model's own code does in torch."""

from __future__ import annotations

import torch

from bench.device import floors
from bench.device.place import Place
from bench.device.shapes import ModelShape, route_in_torch
from moe_route import ops
from moe_route.bench.timing import Contender, Race, race

ROUTE, PEER = "route + counts", "torch, as the model does, without counts"


class Layer:
    """The contenders over one layer. Every one takes the number of an input and returns (weights, ids)."""

    def __init__(self, shape: ModelShape, tokens: int, place: Place):
        self.shape, self.place, self.tokens = shape, place, tokens
        self.logits = place.inputs((tokens, shape.experts), shape.logits)
        generator = torch.Generator(place.device).manual_seed(4)
        noise = torch.randn(shape.experts, generator=generator, device=place.device)
        self.bias = 0.1 * noise if shape.biased else None
        self.statistics = ops.StatisticsTables.zeros(
            shape.experts, groups=1, metrics=("counts",), entropy=False, device=place.device
        )

    def torch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return route_in_torch(self.logits[index], self.shape.k, self.shape.spec, self.bias)

    def route(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.shape
        return ops.route(self.logits[index], shape.k, shape.spec, correction_bias=self.bias, statistics=self.statistics)

    def contenders(self) -> dict[str, Contender]:
        moved = self.tokens * (self.shape.experts * self.shape.logits.itemsize + self.shape.k * 8)
        out: dict[str, Contender] = {
            floors.LAUNCH: floors.launching(self.place),
            floors.COPY: floors.copying(moved, self.place),
            ROUTE: self.route,
        }
        if self.shape.spec.score != "sparsemixer":  # its code in torch is a loop with random draws
            out[PEER] = self.torch
        return out


def measure(shape: ModelShape, tokens: int, place: Place, mode: str, rounds: int) -> Race:
    layer = Layer(shape, tokens, place)
    burst = place.calls(mode, len(layer.logits))
    return race(layer.contenders(), rounds=rounds, warmup=2, burst=burst, clock=place.clocks[mode])

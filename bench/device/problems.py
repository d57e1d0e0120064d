"""Whole routing problems for the checks of a device, and what it means that two results are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_route import ops


@dataclass(frozen=True)
class Problem:
    """Arguments of one `route` call, on the CPU; `on` moves them."""

    title: str
    logits: Tensor
    k: int
    spec: ops.RouterSpec
    steering: ops.SteeringTables | None = None
    tokens: Tensor | None = None
    bias: Tensor | None = None

    def on(self, device: torch.device) -> Problem:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        steering = None if self.steering is None else self.steering.to(device)
        tokens, bias = moved(self.tokens), moved(self.bias)
        return Problem(self.title, self.logits.to(device), self.k, self.spec, steering, tokens, bias)

    def statistics(self) -> ops.StatisticsTables:
        experts = self.logits.shape[1]
        return ops.StatisticsTables.zeros(experts, groups=3, segments=4, metrics=ops.METRICS, device=self.logits.device)

    def route(self, statistics: ops.StatisticsTables) -> tuple[Tensor, Tensor]:
        return ops.route(
            self.logits,
            self.k,
            self.spec,
            correction_bias=self.bias,
            steering=self.steering,
            tokens=self.tokens,
            statistics=statistics,
        )

    def results(self) -> tuple[Tensor, ...]:
        """Weights, ids and both tables of one call on empty tables."""
        statistics = self.statistics()
        weights, ids = self.route(statistics)
        assert statistics.segments is not None
        return weights, ids, statistics.groups, statistics.segments


NAMES = ("weights", "ids", "group statistics", "segment statistics")


def tables(experts: int, generator: torch.Generator) -> ops.SteeringTables:
    """Three rows: soft steering, forced experts with a temperature, and one that leaves everything alone."""
    std, bias = torch.zeros(3, experts), torch.zeros(3, experts)
    std[0], bias[0] = torch.randn(experts, generator=generator), torch.randn(experts, generator=generator)
    force = torch.zeros(3, experts)
    force[1, : min(3, experts)] = torch.tensor([float(code) for code in (1, -1, -4)])[: min(3, experts)]
    return ops.SteeringTables(3, experts, std=std, bias=bias, force=force, temperature=torch.tensor([1.0, 1.5, 1.0]))


def token_table(tokens: int, generator: torch.Generator) -> Tensor:
    """Some tokens without steering, group or sequence, and some that are padding."""

    def column(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (tokens,), generator=generator)

    return ops.token_table(
        tokens, steering_row=column(-1, 3), group=column(-1, 3), segment=column(-1, 4), valid=column(0, 10) > 0
    )


SPECS = (
    ops.RouterSpec(renormalize="sum"),
    ops.RouterSpec(),
    ops.RouterSpec(order="topk_then_score"),
    ops.RouterSpec(score="sigmoid", renormalize="sum", eps=1e-20, scale=2.5),
    ops.RouterSpec(score="sqrt_softplus", renormalize="sum", eps=1e-20),
    ops.RouterSpec(score="identity", renormalize="norm", norm_p=2.0),
    ops.RouterSpec(score="sigmoid", renormalize="sum", softcap=2.0),
)
GROUPED = ops.RouterSpec(score="sigmoid", renormalize="sum", eps=1e-20, groups=8, top_groups=4)
# Experts and k: powers of two or not, one register a lane or many, and the widest there are.
SIZES = (
    (1, 1),
    (8, 2),
    (60, 4),
    (64, 8),
    (67, 33),
    (128, 8),
    (160, 6),
    (256, 8),
    (384, 8),
    (512, 10),
    (896, 16),
    (4096, 64),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problems(tokens: int) -> Iterator[Problem]:
    """Every size with every kind of router, steered and not, in each dtype by turns; ties and NaN among the logits."""
    turn = 0
    for experts, k in SIZES:
        grouped = (GROUPED,) if experts % 8 == 0 and experts // 8 >= 2 and k <= experts // 2 else ()
        mixer = (ops.RouterSpec(score="sparsemixer", jitter=0.01),) if k <= 2 else ()
        for spec in (*SPECS, *grouped, *mixer):
            generator = torch.Generator().manual_seed(turn)
            dtype, steered = DTYPES[turn % 3], turn % 2 == 0
            logits = 3 * torch.randn(tokens, experts, generator=generator)
            logits[::7] = logits[::7].round()
            logits[3::11, experts // 2] = float("nan")
            title = f"E={experts} k={k} {dtype} {spec.score} {spec.order} groups={spec.groups} steered={steered}"
            bias = torch.randn(experts, generator=generator) if spec.score == "sigmoid" else None
            yield Problem(
                title,
                logits.to(dtype),
                k,
                spec,
                tables(experts, generator) if steered else None,
                token_table(tokens, generator),
                bias,
            )
            turn += 1


def same(left: Sequence[Tensor], right: Sequence[Tensor], title: str, names: Sequence[str] = NAMES) -> None:
    """Bit for bit, NaN included."""
    for name, one, other in zip(names, left, right, strict=True):
        one, other = one.cpu(), other.cpu()
        if one.dtype.is_floating_point:
            whole = {4: torch.int32, 2: torch.int16}[one.element_size()]
            one, other = one.contiguous().view(whole), other.contiguous().view(whole)
        if not torch.equal(one, other):
            where = (one != other).nonzero()
            raise AssertionError(f"{title}: {name} differ in {len(where)} places, first at {where[:5].tolist()}")

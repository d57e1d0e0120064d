"""The launches that are counted: calls of the operators, with the sizes at which their kernels are to be fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from moe_route import ops
from moe_route.ops import RouterSpec, StatisticsTables, SteeringTables, token_table

SEED = 0
# Of many rows, a warp works on one where they are fewer than 12288, and a thread where they are more and suit that.
DECODE, ROWS_OF_WARPS, PREFILL, MOST_LOGITS = 1, 8192, 65536, 2**23
_SOFTMAX = RouterSpec(renormalize="sum")
STATISTICS = {"nothing": None, "counts": ("counts",), "all": ("counts", "probability", "weight")}


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: without the number of tokens.
        rows: what the figures a row refer to: tokens; of dispatch and experts, slots.
        prepare: draws the inputs and gives the call.
        whole: kernels of which every block is run, because a later launch reads what they write.
    """

    name: str
    rows: int
    prepare: Callable[[], Callable[[], object]]
    whole: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name}, {self.rows} row{'s' if self.rows > 1 else ''}"


@dataclass(frozen=True)
class Gate:
    """A gate of E experts.

    Attributes:
        statistics: a key of `STATISTICS`; ``all`` also sums entropy.
        steered: whether every token is steered by multiples of the row's standard deviation.
        corrected: whether choosing adds a correction bias.
    """

    experts: int = 128
    k: int = 8
    statistics: str = "counts"
    steered: bool = False
    dtype: torch.dtype = torch.float32
    spec: RouterSpec = _SOFTMAX
    corrected: bool = False

    @property
    def name(self) -> str:
        parts = [f"gate E={self.experts} k={self.k} {str(self.dtype).removeprefix('torch.')}"]
        if self.spec.score != "softmax":
            parts.append(self.spec.score)
        if self.corrected:
            parts.append("correction bias")
        if self.spec.groups > 1:
            parts.append(f"{self.spec.top_groups} of {self.spec.groups} groups")
        if self.steered:
            parts.append("steered")
        return ", ".join([*parts, f"counts {self.statistics}".replace("counts counts", "counts")])

    def case(self, tokens: int) -> Case:
        return Case(self.name, tokens, partial(self.prepare, tokens))

    def prepare(self, tokens: int) -> Callable[[], object]:
        make = torch.Generator().manual_seed(SEED)
        logits = (torch.randn(tokens, self.experts, generator=make) * 1.5).to(self.dtype)
        metrics = STATISTICS[self.statistics]
        statistics = (
            None
            if metrics is None
            else StatisticsTables.zeros(self.experts, groups=1, metrics=metrics, entropy=self.statistics == "all")
        )
        steering, table = None, None
        if self.steered:
            std = torch.zeros(1, self.experts)
            std[0, : min(4, self.experts)] = 0.5
            steering, table = SteeringTables(1, self.experts, std=std), token_table(tokens, steering_row=0)
        bias = torch.randn(self.experts, generator=make) * 0.1 if self.corrected else None
        return lambda: ops.route(
            logits, self.k, self.spec, statistics=statistics, steering=steering, tokens=table, correction_bias=bias
        )


def _gates() -> Iterator[tuple[Gate, tuple[int, ...]]]:
    """Gates, and the numbers of tokens they are called with."""
    plain = Gate()
    levels = (plain, replace(plain, statistics="all"), replace(plain, statistics="all", steered=True))
    ends = (DECODE, PREFILL)
    yield replace(plain, statistics="nothing"), ends
    for level in levels:
        yield level, (DECODE, 64, ROWS_OF_WARPS, PREFILL)
    for level in levels:
        yield replace(level, dtype=torch.bfloat16), ends
    sigmoid = RouterSpec(score="sigmoid", renormalize="sum")
    yield replace(plain, spec=sigmoid, corrected=True), ends
    yield replace(plain, spec=replace(sigmoid, groups=8, top_groups=4), corrected=True), ends
    for experts, k in ((8, 2), (32, 4), (64, 6), (256, 8), (512, 8)):
        for level in levels:
            yield replace(level, experts=experts, k=k), ends
    for experts in (384, 1024):
        yield replace(plain, experts=experts), ends
    yield replace(plain, experts=896, k=16, spec=sigmoid, corrected=True), ends  # Kimi K3


def _dispatch(tokens: int, experts: int = 128, k: int = 8) -> Case:
    def prepare() -> Callable[[], object]:
        ids = _routed(tokens, experts, k)
        return lambda: ops.dispatch(ids, experts)

    return Case(f"dispatch E={experts} k={k}", tokens * k, prepare, whole=("count_spans",))


def _routed(tokens: int, experts: int, k: int) -> Tensor:
    make = torch.Generator().manual_seed(SEED)
    return torch.rand(tokens, experts, generator=make).argsort(1)[:, :k].to(torch.int32)


def _rows(tokens: int, hidden: int, dtype: torch.dtype, combines: bool, experts: int = 16, k: int = 8) -> Case:
    def prepare() -> Callable[[], object]:
        make = torch.Generator().manual_seed(SEED)
        slots = ops.dispatch(_routed(tokens, experts, k), experts)
        x = torch.randn(tokens, hidden, generator=make).to(dtype)
        if not combines:
            return lambda: ops.permute(x, slots)
        rows, weights = ops.permute(x, slots), torch.rand(tokens, k, generator=make)
        return lambda: ops.combine(rows, weights, slots)

    name = "combine" if combines else "permute"
    return Case(f"{name} k={k} hidden={hidden} {str(dtype).removeprefix('torch.')}", tokens, prepare)


def _experts(tokens: int, transposed: bool, experts: int = 8, k: int = 8, hidden: int = 2048, width: int = 768) -> Case:
    """Of its two launches, the second reads what the first has written in one block alone: no count depends on that."""

    def prepare() -> Callable[[], object]:
        make = torch.Generator().manual_seed(SEED)

        def weights(rows: int, columns: int) -> Tensor:
            one = (torch.randn(1, rows, columns, generator=make) * columns**-0.5).bfloat16()
            return (one.mT if transposed else one).repeat(experts, 1, 1).contiguous()

        up, down = weights(2 * width, hidden), weights(hidden, width)
        if transposed:
            up, down = up.mT, down.mT
        x = torch.randn(tokens, hidden, generator=make).bfloat16()
        slots = ops.dispatch(_routed(tokens, experts, k), experts)
        return lambda: ops.expert_rows(x, slots, up, down)

    layout = "columns" if transposed else "rows"
    name = f"experts E={experts} k={k} {hidden} x {width} bfloat16, weights in {layout}"
    return Case(name, tokens * k, prepare)


def _activation(rows: int, experts: int = 128, width: int = 768) -> Case:
    """Between the products of rows that are all in use."""

    def prepare() -> Callable[[], object]:
        make = torch.Generator().manual_seed(SEED)
        slots = ops.dispatch(_routed(rows // 8, experts, 8), experts)
        product = torch.randn(rows, 2 * width, generator=make).bfloat16()
        return lambda: ops.expert_activation(product, slots)

    return Case(f"expert_activation E={experts} 2 x {width} bfloat16, silu", rows, prepare)


def cases() -> list[Case]:
    """Every case, decode before prefill."""
    found = []
    for gate, sizes in _gates():
        found += [gate.case(min(tokens, MOST_LOGITS // gate.experts)) for tokens in sizes]
    found += [_dispatch(tokens) for tokens in (1, 64, 512, 4096, 16384)]
    found += [_dispatch(512, experts=512)]
    for combines in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            found += [_rows(1, 2048, dtype, combines), _rows(512, 2048, dtype, combines)]
    found += [_experts(1, transposed=False), _experts(8, transposed=False), _experts(1, transposed=True)]
    found += [_activation(8), _activation(512)]
    return found

"""What only a device can settle: every tunable of csrc/cuda/tunables.cu over its values, in one process, by graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.cpu.dispatch import Shape as DispatchShape
from bench.device import dispatch, gate
from bench.device.place import Place
from moe_route import _C, ops
from moe_route.bench.results import Fact
from moe_route.bench.timing import Contender, race
from moe_route.bench.timing import Shape as GateShape

SECTION = "Sweep of tunables"
BF16, F32 = torch.bfloat16, torch.float32
ALWAYS, NEVER = 0, 1 << 62


@dataclass(frozen=True)
class Sweep:
    """Values of one tunable, and the cases to time with each."""

    tunable: str
    values: Sequence[int]
    cases: Sequence[str]


@dataclass(frozen=True)
class Work:
    """Sizes of the cases, and the sweeps over them."""

    gate_tokens: Sequence[int] = (1, 64, 1024, 4096, 8192, 12288, 16384, 32768, 65536)
    experts: int = 128
    k: int = 8
    hidden: int = 2048
    move_tokens: Sequence[int] = (64, 512, 4096, 16384)
    rounds: int = 4
    sweeps: Sequence[Sweep] = field(
        default=(
            Sweep("gate.tiles_from", (ALWAYS, NEVER), ("gate",)),
            Sweep("gate.blocks", (8, 16, 24, 32, 48, 64), ("gate",)),
            Sweep("dispatch.one_launch", (0, 2048, 4096, 8192, 16384), ("dispatch",)),
            Sweep("dispatch.tile", (256, 512, 1024, 2048), ("dispatch",)),
            Sweep("dispatch.long_tile", (2048, 4096, 8192, 16384), ("dispatch",)),
            Sweep("dispatch.spans", (128, 256, 512, 1024), ("dispatch",)),
            Sweep("rows.blocks", (8, 16, 32, 64, 128), ("permute", "combine")),
            Sweep("experts.columns", (1, 2, 4, 8, 16, 32), ("experts",)),
        )
    )


SMALL = Work(gate_tokens=(4,), experts=8, k=2, hidden=32, move_tokens=(4,), rounds=2)


@contextmanager
def tuned(name: str, value: int | None) -> Iterator[None]:
    """A tunable at a value; None leaves it alone."""
    if value is None:
        yield
        return
    before = int(_C.tunables()[name]["now"])
    _C.tune(name, value)
    try:
        yield
    finally:
        _C.tune(name, before)


def cases(kind: str, work: Work, where: Place, mode: str) -> Iterator[tuple[str, Contender, int]]:
    """Title, contender and number of inputs of the cases of a kind."""
    if kind == "gate":
        for tokens in work.gate_tokens:
            shape = GateShape(work.experts, work.k, F32, tokens)
            made = gate.DeviceGate(shape, where, mode)
            yield shape.title, made.routed(metrics=("counts",)), len(made.logits)
        return
    for tokens in work.move_tokens:
        if kind == "experts" and tokens * work.k > 256 and where.device.type == "cuda":
            tokens = 256 // work.k
        if kind == "experts":
            yield f"experts T={tokens}", streamed(tokens, work, where), 1
        else:
            moved = DispatchShape(tokens, work.hidden, experts=work.experts, k=work.k, dtype=BF16)
            contenders, inputs = dispatch.MAKERS[kind](moved, where, mode)
            yield f"{kind}: {moved.title}", contenders[kind], inputs


def streamed(tokens: int, work: Work, where: Place) -> Contender:
    """`expert_rows` of a layer with narrow experts."""
    width = work.hidden // 4
    up, down = (
        torch.randn(work.experts, *size, dtype=BF16, device=where.device)
        for size in ((2 * width, work.hidden), (work.hidden, width))
    )
    x = torch.randn(tokens, work.hidden, dtype=BF16, device=where.device)
    scores = torch.randn(tokens, work.experts, device=where.device)
    slots = ops.dispatch(scores.topk(work.k).indices, work.experts)
    return lambda index: ops.expert_rows(x, slots, up, down)


def between_products(tokens: int, work: Work, where: Place, size: int) -> tuple[Contender, Contender]:
    """Two large products with the gate between them, whose code is then in no cache, and the products alone."""
    left = torch.randn(size, size, dtype=BF16, device=where.device)
    logits = where.inputs((tokens, work.experts), BF16)

    def with_gate(index: int) -> torch.Tensor:
        product = left @ left
        ops.route(logits[index], work.k, gate.SPEC)
        return product @ left

    return with_gate, lambda index: left @ left @ left


def measure(where: Place, work: Work, mode: str, known: Mapping[str, object] | None = None) -> Iterator[Fact]:
    """Times by value. A tunable that this build lacks is left alone: its cases are timed once, as they are."""
    known = _C.tunables() if known is None else known
    for sweep in work.sweeps:
        values: Sequence[int | None] = sweep.values if sweep.tunable in known else (None,)
        for kind in sweep.cases:
            for title, contender, inputs in cases(kind, work, where, mode):
                for value in values:
                    with tuned(sweep.tunable, value):
                        seconds = timed(contender, where, mode, work.rounds, inputs)
                    said = "untouched" if value is None else "never" if value == NEVER else str(value)
                    yield Fact(f"{SECTION}, {mode}", title, f"{sweep.tunable} = {said}", seconds * 1e6, "us")


def timed(contender: Contender, where: Place, mode: str, rounds: int, inputs: int) -> float:
    """Median seconds of a call. Every call captures anew, since a graph keeps the values it was captured with."""
    run = race({"it": contender}, rounds=rounds, warmup=1, burst=where.calls(mode, inputs), clock=where.clocks[mode])
    return run.timing("it").median


def decode(where: Place, work: Work, mode: str) -> Iterator[Fact]:
    """The gate of other numbers of experts, and the gate with cold code."""
    section = f"Decode, {mode}"
    for tokens in (tokens for tokens in (1, 16, 64, 256) if where.device.type == "cuda" or tokens < 4):
        for experts in (8, 64, 256, 512):
            made = gate.DeviceGate(GateShape(experts, min(work.k, experts), BF16, tokens), where, mode)
            seconds = timed(made.routed(metrics=("counts",)), where, mode, work.rounds, len(made.logits))
            yield Fact(section, f"E={experts} bfloat16 T={tokens}", gate.COUNTED, seconds * 1e6, "us")
        size = 4096 if where.device.type == "cuda" else 16
        cold, alone = (timed(each, where, mode, work.rounds, 1) for each in between_products(tokens, work, where, size))
        yield Fact(section, f"T={tokens}", f"route between products of {size}", (cold - alone) * 1e6, "us")

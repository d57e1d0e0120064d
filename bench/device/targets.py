"""The figures that the project set itself on a device (an H200), and what the races say about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bench.cpu.dispatch import Shape as DispatchShape
from bench.device import dispatch, gate
from moe_route.bench.results import Target
from moe_route.bench.timing import Race
from moe_route.bench.timing import Shape as GateShape

FEW_TOKENS, MANY_TOKENS = 1024, 65536
Gates = Mapping[tuple[str, GateShape], Race]


def gate_targets(gates: Gates, kernels: str, bandwidth: float) -> list[Target]:
    """`kernels`: the mode whose times are those of the kernels alone (a graph)."""
    out = []
    for dtype in dict.fromkeys(shape.dtype for _, shape in gates):
        alone = {shape: run for (mode, shape), run in gates.items() if mode == kernels and shape.dtype == dtype}
        out += _few_tokens(alone, kernels) + _many_tokens(alone, kernels, bandwidth)
    for mode in dict.fromkeys(mode for mode, _ in gates):
        for dtype in dict.fromkeys(shape.dtype for _, shape in gates):
            out.append(_against_torch({s: r for (m, s), r in gates.items() if m == mode and s.dtype == dtype}, mode))
    return out


def _few_tokens(races: Mapping[GateShape, Race], mode: str) -> list[Target]:
    """A launch is the limit: all that is counted and steered must fit into it."""
    chosen = {shape: run for shape, run in races.items() if shape.tokens <= FEW_TOKENS}
    if not chosen:
        return []
    took = {shape: run.timing(gate.ALL_SOFT).median for shape, run in chosen.items()}
    worst = max(took, key=lambda shape: took[shape])
    what = f"gate {_case(worst)} T <= {FEW_TOKENS}, {mode}: {gate.ALL_SOFT}"
    return [_at_most(what, took[worst] * 1e6, 2.5, "us", worst.tokens)]


def _many_tokens(races: Mapping[GateShape, Race], mode: str, bandwidth: float) -> list[Target]:
    out = []
    for shape, run in races.items():
        if shape.tokens < MANY_TOKENS:
            continue
        name = f"gate {shape.title}, {mode}"
        if shape.dtype == torch.float32:
            share = gate.moved_bytes(shape) / run.timing(gate.COUNTED).median / bandwidth
            what = f"{name}: {gate.COUNTED}, share of the measured copy bandwidth"
            out.append(Target(what, ">= 50 %", f"{share:.1%}", share >= 0.5))
        for what, more, less in (
            ("soft steering adds", gate.SOFT, gate.COUNTED),
            ("all statistics add", gate.ALL, gate.ROUTE),
        ):
            extra = run.ratio(more, less) - 1
            out.append(Target(f"{name}: {what}", "<= 10 %", f"{extra:.1%}", extra <= 0.10))
    return out


def _against_torch(races: Mapping[GateShape, Race], mode: str) -> Target:
    """The worst of all numbers of tokens."""
    ratios = {shape: run.ratio("torch", gate.COUNTED) for shape, run in races.items()}
    worst = min(ratios, key=lambda shape: ratios[shape])
    what = f"gate {_case(worst)}, every T, {mode}: {gate.COUNTED} against torch"
    return Target(what, ">= 5 times", f"{ratios[worst]:.2f} (T={worst.tokens})", ratios[worst] >= 5)


def _case(shape: GateShape) -> str:
    return f"E={shape.experts} k={shape.k} {str(shape.dtype).removeprefix('torch.')}"


def _at_most(what: str, value: float, limit: float, unit: str, tokens: int | None = None) -> Target:
    where = "" if tokens is None else f" (T={tokens})"
    return Target(what, f"<= {limit:g} {unit}", f"{value:.3g} {unit}{where}", value <= limit)


# The share of the copy bandwidth that moving rows should reach; dispatch has a time instead.
SHARES = {dispatch.PERMUTE: 0.70, dispatch.COMBINE: 0.80}
DISPATCH_LIMIT_US = 6.0


def moving_targets(
    moves: Mapping[tuple[str, str, DispatchShape], Race], kernels: str, bandwidth: float
) -> list[Target]:
    """`moves[mode, operator, shape]`."""
    out = []
    for (mode, operator, shape), run in moves.items():
        if mode != kernels:
            continue
        took = run.timing(operator).median
        name = f"{operator} {shape.title}, {mode}"
        if operator == dispatch.DISPATCH:
            out.append(_at_most(name, took * 1e6, DISPATCH_LIMIT_US, "us"))
        else:
            share, wanted = dispatch.moved_bytes(operator, shape) / took / bandwidth, SHARES[operator]
            what = f"{name}: share of the measured copy bandwidth"
            out.append(Target(what, f">= {wanted:.0%}", f"{share:.1%}", share >= wanted))
    return out


def summary(targets: Sequence[Target]) -> str:
    """One line a target, for the end of a log."""
    lines = [f"{'met   ' if t.met else 'MISSED'}  {t.what}: {t.measured} (wanted {t.wanted})" for t in targets]
    met = sum(t.met for t in targets)
    return "\n".join([*lines, f"{met} of {len(targets)} targets met"])

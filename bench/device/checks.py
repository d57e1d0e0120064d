"""What must hold on a device: `python -m bench.device.checks`. Needs torch and the module, neither pytest nor data.

Each check raises AssertionError where it does not hold, and returns what it looked at. On the CPU those that speak of
streams and graphs are refused by name; the others run, as a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.device import stages
from bench.device.problems import NAMES, SPECS, Problem, problems, same, tables, token_table
from moe_route import nn, ops

Facts = dict[str, int | float | str]


class NeedsDeviceError(RuntimeError):
    """This check speaks of something that only a CUDA device has."""


# ---- the checks ---------------------------------------------------------------------------------------------------


def same_bits_as_cpu(device: torch.device, small: bool) -> Facts:
    """`route` with everything on, then dispatch, permute and combine of its choice, against the CPU's bits."""
    count = 0
    for problem in problems(17 if small else 257):
        here, there = problem.results(), problem.on(device).results()
        same(there, here, problem.title)
        for columns, dtype, block in ROWS:
            title = f"{problem.title}, rows of {columns} {dtype} in blocks of {block}"
            hidden = torch.randn(len(here[1]), columns, generator=torch.Generator().manual_seed(7)).to(dtype)
            wanted = moved(hidden, here[1], here[0], block)
            same(moved(hidden.to(device), there[1], there[0], block), wanted, title, MOVED)
        count += 1
    return {"problems": count}


# Columns, dtype and block: rows that vectors of 16 bytes divide, and rows that they do not.
ROWS = ((129, torch.bfloat16, 1), (256, torch.bfloat16, 16), (64, torch.float32, 1), (20, torch.float16, 8))
MOVED = (*ops.Dispatch._fields, "rows", "combined")


def moved(hidden: Tensor, ids: Tensor, weights: Tensor, block: int) -> tuple[Tensor, ...]:
    """All that dispatch, permute and combine make of a choice among 4096 experts at most."""
    plan = ops.dispatch(ids, 4096, block=block)
    rows = ops.permute(hidden, plan)
    return *plan, rows, ops.combine(rows, weights, plan)


def determinism(device: torch.device, small: bool) -> Facts:
    """100 runs of everything give the same bits."""
    runs, tokens = (3, 64) if small else (100, 4096)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, 128, generator=generator).round(decimals=1)  # with ties
    steering, table = tables(128, generator), token_table(tokens, generator)
    problem = Problem("determinism", logits, 8, SPECS[0], steering, table).on(device)
    hidden = torch.randn(tokens, 256, generator=generator).to(torch.bfloat16).to(device)

    def run() -> tuple[Tensor, ...]:
        weights, ids, *statistics = problem.results()
        plan = ops.dispatch(ids, 128)
        rows = ops.permute(hidden, plan)
        return weights, ids, *statistics, *plan, rows, ops.combine(rows, weights, plan)

    first = [tensor.cpu() for tensor in run()]
    for number in range(1, runs):
        same(run(), first, f"run {number}", (*NAMES, *MOVED))
    return {"runs": runs, "tokens": tokens}


def graph_replay(device: torch.device, small: bool) -> Facts:
    """A captured layer follows changed logits, steering tables, token table and hidden states; counters go on."""
    require_cuda(device, "CUDA graphs")
    tokens, experts, replays = 512, 128, 10
    generator = torch.Generator().manual_seed(0)
    steering, table = tables(experts, generator), token_table(tokens, generator)
    logits = torch.randn(tokens, experts, generator=generator)
    problem = Problem("graph", logits, 8, SPECS[0], steering, table).on(device)
    hidden = torch.randn(tokens, 64, device=device)
    statistics = problem.statistics()

    def layer() -> tuple[Tensor, ...]:
        weights, ids = problem.route(statistics)
        plan = ops.dispatch(ids, experts)
        return weights, ids, ops.combine(ops.permute(hidden, plan), weights, plan)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    assert problem.steering is not None
    assert problem.tokens is not None
    packed = problem.steering.packed[0]
    assert packed is not None
    for number in range(replays):
        problem.logits.copy_(torch.randn(tokens, experts, generator=generator))
        hidden.copy_(torch.randn(tokens, 64, generator=generator))
        problem.tokens.copy_(token_table(tokens, generator))
        packed[0] *= -1.0 if number % 2 else 0.5
        statistics.zero_()
        graph.replay()
        replayed = [tensor.clone() for tensor in captured] + [statistics.groups.clone()]
        statistics.zero_()
        same(replayed, (*layer(), statistics.groups), f"replay {number}", (*NAMES[:2], "combined", NAMES[2]))
        before = statistics.groups.clone()
        graph.replay()
        same((statistics.groups,), (2 * before,), f"replay {number}, counters that go on", NAMES[2:3])
    return {"replays": 2 * replays}


def capture_at_once(device: torch.device, small: bool) -> Facts:
    """After `load_kernels`, the first call of everything is captured: in a process of its own no kernel was launched
    before. Experts too, in a dtype that torch has no grouped product for."""
    require_cuda(device, "CUDA graphs")
    tokens, experts, hidden_size = 64, 128, 64
    generator = torch.Generator().manual_seed(0)
    steering, table = tables(experts, generator), token_table(tokens, generator)
    logits = torch.randn(tokens, experts, generator=generator)
    here = Problem("capture", logits, 8, SPECS[0], steering, table)
    there, hidden = here.on(device), torch.randn(tokens, hidden_size, generator=generator).half()
    sizes = {"num_experts": experts, "hidden_size": hidden_size, "intermediate_size": 32}
    block, on_device = (nn.Experts(**sizes, dtype=torch.float16, device=place) for place in ("cpu", device))
    with torch.no_grad():
        for parameter, value in zip(on_device.parameters(), block.parameters(), strict=True):
            parameter.copy_(value)
    moved_there = hidden.to(device)
    statistics = [there.statistics(), here.statistics()]
    torch.zeros(1, 1, device=device).half() @ torch.zeros(1, 1, device=device).half()  # torch's own library is loaded
    ops.load_kernels(experts, device)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        weights, ids = there.route(statistics[0])
        out = on_device(moved_there, ids, weights)
    statistics[0].zero_()
    graph.replay()
    with torch.no_grad():
        wanted = here.route(statistics[1])
        expected = block(hidden, wanted[1], wanted[0])
    counted = (statistics[0].groups, statistics[1].groups)
    same((weights, ids, counted[0]), (*wanted, counted[1]), "captured at once", NAMES[:3])
    error = float((out.cpu().double() - expected.double()).norm() / expected.double().norm())
    assert error < 0.005, f"experts are off by {error:.2%} in the norm"  # float16 rounds to 0.05 %
    return {"replays": 1}


def two_streams(device: torch.device, small: bool) -> Facts:
    """Work follows the current stream, and two streams at once, counting into one table, get what one gets alone."""
    require_cuda(device, "streams")
    tokens, rounds = 4096, 20
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(2):
        logits, table = torch.randn(tokens, 128, generator=generator), token_table(tokens, generator)
        parts.append(Problem("streams", logits, 8, SPECS[0], tables(128, generator), table).on(device))
    alone = parts[0].statistics()
    expected = [part.route(alone) for part in parts]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in parts]
    for number in range(rounds):
        shared = parts[0].statistics()
        late = [torch.full_like(part.logits, float("nan")) for part in parts]
        torch.cuda.synchronize()
        found = []
        for part, stream, logits in zip(parts, streams, late, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)  # about half a millisecond, in which a launch elsewhere would see NaN
                logits.copy_(part.logits)
                found.append(Problem(part.title, logits, 8, SPECS[0], part.steering, part.tokens).route(shared))
        torch.cuda.synchronize()
        for pair, wanted in zip(found, expected, strict=True):
            same(pair, wanted, f"round {number}", NAMES[:2])
        same((shared.groups,), (alone.groups,), f"round {number}, one table for both", NAMES[2:3])
    return {"rounds": rounds}


def past_2_31(device: torch.device, small: bool) -> Facts:
    """Logits, and rows of slots, with more than 2^31 elements: rows around the boundary as the CPU has them."""
    limit, hidden_size, k = (1 << 12, 64, 2) if small else (1 << 31, 7168, 8)
    experts = 128
    tokens = limit // experts + 1001
    check_memory(device, tokens * (experts * 2 + k * 8) + (limit // hidden_size + 1000) * hidden_size * 3)
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(tokens, experts, dtype=torch.bfloat16, generator=generator, device=device)
    statistics = ops.StatisticsTables.zeros(experts, groups=1, metrics=("counts",), entropy=False, device=device)
    weights, ids = ops.route(logits, k, SPECS[0], statistics=statistics)
    assert int(statistics.metric("counts").sum()) == tokens * k, "counts of all rows do not add up"
    for begin in (0, limit // experts - 500, tokens - 500):
        part = slice(max(0, begin), max(0, begin) + 500)
        same((weights[part], ids[part]), ops.route(logits[part].cpu(), k, SPECS[0]), f"rows from {begin}", NAMES[:2])
    del logits, weights, ids
    return {"logits": tokens * experts, "elements of rows": rows_past_limit(device, limit, hidden_size, k)}


def rows_past_limit(device: torch.device, limit: int, hidden_size: int, k: int) -> int:
    tokens, experts = limit // (hidden_size * k) + 101, 64
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(tokens, hidden_size, dtype=torch.bfloat16, generator=generator, device=device)
    scores = torch.randn(tokens, experts, generator=generator, device=device)
    plan = ops.dispatch(scores.topk(k).indices.to(torch.int32), experts)
    rows = ops.permute(hidden, plan)
    assert rows.numel() > limit
    places = torch.tensor([0, limit // hidden_size - 1, limit // hidden_size, rows.shape[0] - 1], device=device)
    same((rows[places],), (hidden[plan.order[places] // k],), "permuted rows", ("rows",))
    weights = torch.rand(tokens, k, generator=generator, device=device)
    combined = ops.combine(rows, weights, plan)
    some = torch.tensor([0, tokens // 2, tokens - 1], device=device)
    slots = rows[plan.inverse[some].flatten()].view(3, k, hidden_size)
    wanted = (slots.double() * weights[some].double().unsqueeze(-1)).sum(1)
    error = float((combined[some].double() - wanted).abs().max())
    assert error < 0.05, f"combined rows are {error} off"  # bfloat16, values of a few units
    return rows.numel()


def experts(device: torch.device, small: bool) -> Facts:
    """`nn.Experts` in bfloat16, on a device through grouped products: values and gradients near those in float64."""
    tokens, count, k, hidden_size, width = (24, 4, 2, 16, 24) if small else (512, 32, 4, 256, 384)
    generator = torch.Generator().manual_seed(0)
    exact = nn.Experts(num_experts=count, hidden_size=hidden_size, intermediate_size=width, dtype=torch.float64)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(torch.bfloat16) / 16)
    rough = nn.Experts(
        num_experts=count, hidden_size=hidden_size, intermediate_size=width, dtype=torch.bfloat16, device=device
    )
    rough.load_state_dict(exact.state_dict())
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(torch.bfloat16)
    ids = torch.randn(tokens, count - 1, generator=generator).topk(k).indices  # the last expert gets no token
    ids[::5, -1] = -1  # and some slots no expert
    weights = torch.softmax(torch.randn(tokens, k, generator=generator), dim=1)
    errors = {}
    found = with_gradients(rough, hidden.to(device), ids.to(device), weights.to(device))
    for name, wanted in with_gradients(exact, hidden.double(), ids, weights.double()).items():
        errors[name] = float((found[name].cpu().double() - wanted).norm() / wanted.norm())
        assert errors[name] < 0.02, f"{name} is off by {errors[name]:.1%} in the norm"  # bfloat16 rounds to 0.4 %
    return {"tokens": tokens, "largest error": max(errors.values())}


def with_gradients(block: nn.Experts, hidden: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    hidden = hidden.detach().clone().requires_grad_()
    out = block(hidden, ids, weights)
    out.backward(torch.ones_like(out))
    assert hidden.grad is not None
    gradients = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    return {"output": out.detach(), "gradient of hidden": hidden.grad, **gradients}


def no_waiting(device: torch.device, small: bool) -> Facts:
    """No operator makes the host wait for the device, nor do experts of any dtype."""
    require_cuda(device, "waiting for a device")
    generator = torch.Generator().manual_seed(0)
    steering, table = tables(128, generator), token_table(64, generator)
    problem = Problem("waiting", torch.randn(64, 128, generator=generator), 8, SPECS[0], steering, table).on(device)
    hidden, statistics = torch.randn(64, 32, device=device), problem.statistics()
    sizes = {"num_experts": 128, "hidden_size": 32, "intermediate_size": 32}
    blocks = [nn.Experts(**sizes, dtype=t, device=device) for t in (torch.bfloat16, torch.float16, torch.float32)]

    def all_operators() -> None:
        weights, ids = problem.route(statistics)
        ops.observe(problem.logits, ids, weights, problem.spec, tokens=problem.tokens, statistics=statistics)
        lists = [[tensor] * 4 for tensor in (problem.logits, ids, weights)]
        ops.observe_layers(*lists, problem.spec, tokens=problem.tokens, statistics=[statistics] * 4)
        ops.route_weights(problem.logits, ids, problem.spec, steering=problem.steering, tokens=problem.tokens)
        plan = ops.dispatch(ids, 128)
        ops.combine(ops.permute(hidden, plan), weights, plan)
        with torch.no_grad():
            for block in blocks:
                block(hidden.to(block.down_proj.dtype), ids, weights)

    all_operators()  # what is loaded at the first call may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_operators()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return {"operators": 7, "dtypes of experts": len(blocks)}


def require_cuda(device: torch.device, what: str) -> None:
    if device.type != "cuda":
        raise NeedsDeviceError(f"{what}: there are none on the {device.type.upper()}")


def check_memory(device: torch.device, needed: int) -> None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if free < 1.5 * needed:
            raise NeedsDeviceError(f"a device with {1.5 * needed / 1e9:.0f} GB free; this one has {free / 1e9:.0f}")


CHECKS: dict[str, Callable[[torch.device, bool], Facts]] = {
    "same-bits-as-cpu": same_bits_as_cpu,
    "determinism": determinism,
    "graph-replay": graph_replay,
    "capture-at-once": capture_at_once,
    "two-streams": two_streams,
    "past-2-31": past_2_31,
    "no-waiting": no_waiting,
    "experts": experts,
}


def run(name: str, device: torch.device, small: bool) -> dict[str, object]:
    """What came out of one check, as JSON has it."""
    start = time.perf_counter()
    try:
        outcome: dict[str, object] = {"status": "ok", **CHECKS[name](device, small)}
    except NeedsDeviceError as reason:
        outcome = {"status": "needs a device", "reason": str(reason)}
    except Exception as problem:
        traceback.print_exc()
        outcome = {"status": "failed", "reason": f"{type(problem).__name__}: {problem}"}
    return {"name": name, **outcome, "seconds": round(time.perf_counter() - start, 2), "device": str(device)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.device.checks", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, ..., or cpu: a rehearsal, small")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="which checks")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, help="JSON file; what it holds of other checks stays")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("there is no CUDA device here, or this torch was built without CUDA")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    outcomes = []
    for name in options.only:
        outcomes.append(run(name, device, options.small or device.type == "cpu"))
        print(json.dumps(outcomes[-1]), flush=True)
        if options.out is not None:
            held = stages.read(options.out) if options.out.is_file() else {}
            stages.write(options.out, held | {name: outcomes[-1]})
    if any(outcome["status"] == "failed" for outcome in outcomes):
        return 1
    return stages.NOT_HERE if all(outcome["status"] == "needs a device" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())

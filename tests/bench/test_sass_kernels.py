"""The machine code that nvcc makes of every kernel, run on numpy: the bits of the CPU operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness.backends import BACKENDS, emulated_tuning
from harness.problems import Problem, assert_same_bits, problems
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("bench.sass", reason="needs the source tree")

from bench.sass import build, launches
from bench.sass.cases import cases
from bench.sass.launches import Interpreter, interpreted
from bench.sass.report import grown, load, measure
from moe_route import ops
from moe_route.contract.experts import ACTIVATIONS, PAIRINGS
from moe_route.ops import METRICS, RouterSpec, StatisticsTables, token_table

CPU = next(backend for backend in BACKENDS if backend.name == "operators")
WHY_NOT = build.missing() or launches.missing()
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(9000),
    pytest.mark.xdist_group("nvcc"),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]
TOKENS = 4


@pytest.fixture(scope="module")
def code() -> build.Code:
    return build.code()


@pytest.fixture
def interpreter(code: build.Code) -> Interpreter:
    return Interpreter(code)


def gate_problems(experts: int, tokens: int) -> dict[str, Problem]:
    """One problem for each kernel that a width has: four levels, and apart from the last, the common router and any."""
    make = torch.Generator().manual_seed(experts)
    at, k = torch.arange(tokens), min(8, experts // 2)
    scores = ("counts", "probability", "weight")
    sigmoid = RouterSpec(score="sigmoid", renormalize="sum")
    std = torch.randn(2, experts, generator=make)
    steering = {"std": std, "bias": std / 4}
    force = (torch.rand(2, experts, generator=make) < 0.1).float()
    table = token_table(tokens, steering_row=at % 3 - 1, group=at // (tokens - 2))
    logits = torch.randn(tokens, experts, generator=make)
    common = Problem(logits, k, RouterSpec(renormalize="sum"), metrics=("counts",))
    bias = torch.randn(experts, generator=make) * 0.1
    found = {
        "common": replace(common, logits=logits.round().bfloat16()),  # ties
        "common, scored": replace(common, metrics=scores),
        "common, soft": replace(common, metrics=scores, steering=steering, tokens=table),
        "any": replace(common, spec=sigmoid, correction_bias=bias),
        "any, soft": replace(common, k=min(24, experts), spec=sigmoid, steering=steering, tokens=table),
        "full": replace(common, steering={"std": std, "force": force}, tokens=table, metrics=METRICS),
    }
    if experts % 4 == 0:
        found["any, scored"] = replace(found["any"], spec=replace(sigmoid, groups=4, top_groups=2), metrics=scores)
    return found


def tile_problems(experts: int) -> dict[str, Problem]:
    """Two tiles, the second of one row; some rows are handed on to the warp."""
    found = {}
    for name, problem in gate_problems(experts, 33).items():
        if name.startswith("common"):
            logits = problem.logits.clone()
            logits[3, 1], logits[5], logits[7, 2] = float("nan"), 1.0, float("inf")
            found[name] = replace(problem, logits=logits)
    return found


def statistics(problem: Problem) -> StatisticsTables:
    """Counts alone without entropy, which would need the scores of all experts."""
    entropy = problem.metrics != ("counts",)
    return StatisticsTables.zeros(problem.num_experts, groups=3, segments=4, metrics=problem.metrics, entropy=entropy)


def run_gates(interpreter: Interpreter, problems: dict[str, Problem], which: str) -> set[str]:
    """The names of the kernels that ran. which: tiles, or a warp a row."""
    ran: set[str] = set()
    for name, problem in problems.items():
        expected = problem.run(CPU, statistics(problem))
        tuning = {"gate.tiles_from": 0 if which == "tile" else 2**62}
        with emulated_tuning(tuning), interpreted(interpreter, multiprocessors=1):
            got = problem.run(CPU, statistics(problem))
        assert_same_bits(got, expected, f"{problem.num_experts} experts, {name}: {interpreter.runs[0].name}")
        ran |= {run.name for run in interpreter.runs}
    return ran


def run_dispatch(interpreter: Interpreter, experts: int, slots: int, dtype: torch.dtype, block: int) -> set[str]:
    make = torch.Generator().manual_seed(slots)
    ids = torch.randint(-1, experts + 1, (slots // 2, 2), generator=make).to(dtype)
    expected = ops.dispatch(ids, experts, block=block)
    with interpreted(interpreter, multiprocessors=1):
        got = ops.dispatch(ids, experts, block=block)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)), (experts, slots, dtype)
    return {run.name for run in interpreter.runs}


def run_rows(interpreter: Interpreter, dtype: torch.dtype, hidden: int, k: int) -> set[str]:
    make = torch.Generator().manual_seed(hidden)
    slots = ops.dispatch(torch.randint(-1, 6, (5, k), generator=make), 6)
    x = (torch.randn(5, hidden, generator=make) * 5).to(dtype)
    rows = ops.permute(x, slots)
    with interpreted(interpreter, multiprocessors=1):
        assert torch.equal(ops.permute(x, slots), rows)
    ran = {run.name for run in interpreter.runs}
    weights = torch.rand(5, k, generator=make, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for residual in (None, x):
        expected = ops.combine(rows, weights, slots, residual)
        with interpreted(interpreter, multiprocessors=1):
            assert torch.equal(ops.combine(rows, weights, slots, residual), expected)
        ran |= {run.name for run in interpreter.runs}
    return ran


def run_experts(
    interpreter: Interpreter, dtype: torch.dtype, aligned: bool, pairing: str, transposed: bool
) -> set[str]:
    make = torch.Generator().manual_seed(1)
    hidden, width = (32, 16) if aligned else (33, 21)

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=make) * size[-1] ** -0.5).to(dtype)

    up, down = normal(3, width if pairing == "none" else 2 * width, hidden), normal(3, hidden, width)
    if transposed:
        up, down = (weight.mT.contiguous().mT for weight in (up, down))
    slots = ops.dispatch(torch.tensor([[0, 2], [2, -1], [2, 0]]), 3)
    x, served = normal(3, hidden), slots.order >= 0
    expected = ops.expert_rows(x, slots, up, down, pairing=pairing)
    with interpreted(interpreter, multiprocessors=1):
        got = ops.expert_rows(x, slots, up, down, pairing=pairing)
    assert torch.equal(got[served], expected[served]), [run.name for run in interpreter.runs]
    return {run.name for run in interpreter.runs}


def run_activation(interpreter: Interpreter, dtype: torch.dtype, width: int, pairing: str) -> set[str]:
    make = torch.Generator().manual_seed(2)
    slots, columns = ops.dispatch(torch.tensor([[0, 2], [2, -1], [2, 0]]), 3), width if pairing == "none" else 2 * width
    rows, bias = (torch.randn(size, columns, generator=make).to(dtype) for size in (slots.order.shape[0], 3))
    given, used = {"bias": bias, "pairing": pairing}, int(slots.offsets[-1])
    ran: set[str] = set()
    for kind in ACTIVATIONS:
        expected = ops.expert_activation(rows, slots, activation=ops.Activation(kind), **given)
        with interpreted(interpreter, multiprocessors=1):
            got = ops.expert_activation(rows, slots, activation=ops.Activation(kind), **given)
        assert torch.equal(got[:used], expected[:used]), (kind, [run.name for run in interpreter.runs])
        ran |= {run.name for run in interpreter.runs}
    return ran


OF_GATES, OF_DISPATCH, OF_ROWS = ("gate_", "tile_"), ("count_spans", "place_slots"), ("permute_", "combine_")
OF_EXPERTS, OF_ACTIVATION = ("experts::",), ("activate_rows",)
# Instructions that access global memory, or end a thread.
BEYOND_A_BLOCK = ("LDG", "LD", "STG", "ST", "ATOM", "ATOMG", "RED", "LDGSTS", "UBLKCP", "EXIT")


def test_every_gate_kernel_gives_the_bits_of_the_cpu(code: build.Code, interpreter: Interpreter) -> None:
    ran: set[str] = set()
    for experts in (8, 32, 60, 64, 128, 256, 384, 512, 700):
        ran |= run_gates(interpreter, gate_problems(experts, TOKENS), "row")
    for experts in (32, 64, 128, 256):
        ran |= run_gates(interpreter, tile_problems(experts), "tile")
    assert sorted(name for name in code.names() if name.startswith(OF_GATES) and name not in ran) == []


@pytest.mark.parametrize("experts", [32, 512])
def test_blocks_of_several_rows(interpreter: Interpreter, experts: int) -> None:
    """They add up in shared memory what belongs to one row of the statistics."""
    run_gates(interpreter, gate_problems(experts, 34), "row")
    assert interpreter.runs[0].launch.blocks == 17


def test_every_dispatch_kernel_gives_the_bits_of_the_cpu(code: build.Code, interpreter: Interpreter) -> None:
    ran: set[str] = set()
    for experts in (6, 300):
        for dtype in (torch.int32, torch.int64):
            ran |= run_dispatch(interpreter, experts, 500, dtype, block=1)
            ran |= run_dispatch(interpreter, experts, 600, dtype, block=16)
            ran |= run_dispatch(interpreter, experts, 4400, dtype, block=1)
    assert sorted(name for name in code.names() if name.startswith(OF_DISPATCH) and name not in ran) == []


def test_every_row_kernel_gives_the_bits_of_the_cpu(code: build.Code, interpreter: Interpreter) -> None:
    ran: set[str] = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for hidden in (1, 2, 4, 40):
            ran |= run_rows(interpreter, dtype, hidden, 3)
        ran |= run_rows(interpreter, dtype, 40, 2) | run_rows(interpreter, dtype, 40, 9)
    assert sorted(name for name in code.names() if name.startswith(OF_ROWS) and name not in ran) == []


def test_every_expert_kernel_gives_the_bits_of_the_cpu(code: build.Code, interpreter: Interpreter) -> None:
    ran: set[str] = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for aligned in (False, True):
            ran |= run_experts(interpreter, dtype, aligned, "halves", transposed=False)
            ran |= run_experts(interpreter, dtype, aligned, "alternating", transposed=True)
    ran |= run_experts(interpreter, torch.bfloat16, True, "none", transposed=False)
    assert sorted(name for name in code.names() if name.startswith(OF_EXPERTS) and name not in ran) == []


def test_every_activation_kernel_gives_the_bits_of_the_cpu(code: build.Code, interpreter: Interpreter) -> None:
    ran: set[str] = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (16, 21):
            for pairing in PAIRINGS:
                ran |= run_activation(interpreter, dtype, width, pairing)
    assert sorted(name for name in code.names() if name.startswith(OF_ACTIVATION) and name not in ran) == []


def test_every_kernel_has_its_test(code: build.Code) -> None:
    tested = OF_GATES + OF_DISPATCH + OF_ROWS + OF_EXPERTS + OF_ACTIVATION
    assert [name for name in code.names() if not name.startswith(tested)] == []


def test_every_kernel_waits_for_the_kernels_before_it(code: build.Code) -> None:
    """Before it touches global memory: with the tunable pdl it may start while they run."""
    for name in code.names():
        opcodes = [instruction.opcode for instruction in code.kernel(name).kernel.instructions]
        assert opcodes.count("ACQBULK") == 1, name
        assert not set(opcodes[: opcodes.index("ACQBULK")]) & set(BEYOND_A_BLOCK), name
        assert opcodes.count("PREEXIT") == 1, name


@pytest.mark.parametrize("seed_ulps", [-1, 1])
def test_divisions_do_not_depend_on_the_approximation_they_start_from(code: build.Code, seed_ulps: int) -> None:
    """The bits of the hardware's reciprocal are not documented; within its error no result changes."""
    run_gates(Interpreter(code, seed_ulps=seed_ulps), gate_problems(60, TOKENS), "row")


@settings(max_examples=12)
@given(problem=problems())
def test_drawn_problems(code: build.Code, problem: Problem) -> None:
    """NaN, infinities, ties, every steering plane, given choices, strided rows."""
    if problem.logits.shape[0] > 17:
        problem = problem.rows(0, 17)
    expected = problem.run(CPU)
    with interpreted(_SHARED.setdefault("interpreter", Interpreter(code, keeps=False)), multiprocessors=2):
        got = problem.run(CPU)
    assert_same_bits(got, expected)


_SHARED: dict[str, Interpreter] = {}  # one for all examples: kernels are made executable once


@settings(max_examples=6)
@given(seed=st.integers(0, 2**31), experts=st.sampled_from([1, 60, 300]), slots=st.integers(0, 900))
def test_drawn_dispatches(code: build.Code, seed: int, experts: int, slots: int) -> None:
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 1, (slots, 1), generator=make)
    expected = ops.dispatch(ids, experts)
    with interpreted(_SHARED.setdefault("interpreter", Interpreter(code, keeps=False)), multiprocessors=2):
        got = ops.dispatch(ids, experts)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_no_kernel_takes_more_instructions_than_the_committed_table_says(code: build.Code) -> None:
    """`python -m bench.sass --check`."""
    wrong = grown(dict(measure(code, cases())), load())
    assert not wrong, "\n".join([*wrong, "if that is meant: python -m bench.sass"])

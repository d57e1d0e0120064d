"""The CUDA kernels on the emulated device: in whatever order its threads run, the bits are those of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness.backends import BACKENDS, Backend, emulated_tunables, emulated_tuning
from harness.exhaustive import exhaustive_but
from harness.problems import Problem, assert_same_bits, problems
from hypothesis import given
from hypothesis import strategies as st

from moe_route import ops

EMULATED = next(backend for backend in BACKENDS if backend.emulated)
CPU = next(backend for backend in BACKENDS if backend.name == "operators")
pytestmark = pytest.mark.skipif(EMULATED.missing is not None, reason=str(EMULATED.missing))

# Threads first to last, last to first, or shuffled by a seed; multiprocessors decide the grid.
DEVICES = st.fixed_dictionaries(
    {
        "MOE_ROUTE_EMULATOR_ORDER": st.sampled_from(["reverse"]) | st.integers(0, 2**31).map(str),
        "MOE_ROUTE_EMULATOR_MULTIPROCESSORS": st.integers(1, 9).map(str),
        "MOE_ROUTE_EMULATOR_THREADS": st.sampled_from(["1", "2"]),
    }
)


def device(settings: dict[str, str]) -> mock._patch_dict:
    return mock.patch.dict(os.environ, settings)


def test_the_emulated_kernels_are_what_runs() -> None:
    logits = torch.randn(3, 8)
    with device({"MOE_ROUTE_EMULATOR_ORDER": "sideways"}):
        with pytest.raises(ValueError, match="MOE_ROUTE_EMULATOR_ORDER is 'sideways'"):
            EMULATED.route(logits, 2, ops.RouterSpec())
        ops.route(logits, 2, ops.RouterSpec())  # and the operators are themselves again


@given(problem=problems(), settings=DEVICES)
def test_route_in_every_order(problem: Problem, settings: dict[str, str]) -> None:
    expected = problem.run(CPU)
    with device(settings):
        assert_same_bits(problem.run(EMULATED), expected, str(settings))


@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(0, 200),
    k=st.integers(1, 9),
    num_experts=st.sampled_from([1, 5, 60, 300, 4096]),
    hidden=st.sampled_from([1, 8, 40, 257]),
    block=st.sampled_from([1, 16]),
    settings=DEVICES,
)
def test_dispatch_and_combine_in_every_order(
    seed: int, num_tokens: int, k: int, num_experts: int, hidden: int, block: int, settings: dict[str, str]
) -> None:
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_experts + 1, (num_tokens, k), generator=make)
    x, weights = torch.randn(num_tokens, hidden, generator=make), torch.rand(num_tokens, k, generator=make)

    def run(backend: Backend) -> list[torch.Tensor]:
        slots = backend.dispatch(ids, num_experts, block=block)
        rows = backend.permute(x, slots)
        return [*slots, rows, backend.combine(rows, weights, slots, x)]

    expected = run(CPU)
    with device(settings):
        assert all(torch.equal(one, other) for one, other in zip(run(EMULATED), expected, strict=True))


def test_many_tokens_and_experts() -> None:
    """Several rounds of a whole grid, and rows too long for registers."""
    for num_tokens, num_experts, k in ((1500, 128, 8), (60, 1537, 33), (9, 4096, 64)):
        tokens = ops.token_table(num_tokens, group=torch.arange(num_tokens) % 3, segment=torch.arange(num_tokens) % 4)
        problem = Problem(torch.randn(num_tokens, num_experts), k, ops.RouterSpec(renormalize="sum"), tokens=tokens)
        assert_same_bits(problem.run(EMULATED), problem.run(CPU))


def test_a_launch_whose_kernel_was_not_loaded_is_seen() -> None:
    """What `load_kernels` is for: a capture can refuse it (emulated_device_test.loaded_only runs with it)."""
    with device({"MOE_ROUTE_EMULATOR_LOADED_ONLY": "1"}), pytest.raises(RuntimeError, match="the CUDA gate failed"):
        EMULATED.route(torch.randn(3, 8), 2, ops.RouterSpec())


COMMON_SPECS = (
    ops.RouterSpec(renormalize="sum"),
    ops.RouterSpec(order="topk_then_score"),
)
TILE_METRICS = (("counts",), ("counts", "probability", "weight"))


@st.composite
def common_problems(draw: st.DrawFn) -> Problem:
    """What the kernel for many rows takes: a common router in rows of whole lanes, with rows that it hands on."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_experts = draw(st.sampled_from([32, 64, 128, 256]))
    num_tokens = draw(st.sampled_from([1, 31, 64, 100]))
    k = draw(st.sampled_from([1, 2, 5, 8]))
    logits = torch.randn(num_tokens, num_experts, generator=make) * draw(st.sampled_from([0.1, 2.0, 40.0]))
    kind = torch.rand(num_tokens, generator=make)
    logits[kind < 0.1] = logits[kind < 0.1].round()  # ties
    logits[kind > 0.97] = 1.0
    for value in draw(st.sets(st.sampled_from([float("nan"), float("inf"), float("-inf"), 3e38]))):
        strange = torch.rand(num_tokens, generator=make) < 0.1
        logits[strange, torch.randint(num_experts, (1,), generator=make)] = value
    steering: dict[str, torch.Tensor] | None = None
    if draw(st.booleans()):
        names = draw(st.sets(st.sampled_from(["scale", "bias", "std", "magnitude"]), min_size=1))
        steering = {name: torch.randn(3, num_experts, generator=make) for name in sorted(names)}
        if draw(st.booleans()):
            steering["temperature"] = torch.rand(3, generator=make) + 0.5
            steering["std_correction"] = torch.randint(2, (3,), generator=make).float()
            steering["top_k"] = torch.randint(0, k + 1, (3,), generator=make).float()
    tokens = None
    if steering or draw(st.booleans()):
        runs = torch.arange(num_tokens) // draw(st.sampled_from([1, 40, 1000]))
        tokens = ops.token_table(
            num_tokens,
            steering_row=torch.randint(-1, 4, (num_tokens,), generator=make),
            group=runs % 4 - 1,
            segment=runs % 3,
            valid=torch.rand(num_tokens, generator=make) < 0.9,
        )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    metrics = draw(st.sampled_from(TILE_METRICS))
    spec = draw(st.sampled_from(COMMON_SPECS))
    return Problem(logits.to(dtype), k, spec, steering, tokens, metrics=metrics)


TILES_FROM = {"tile": 0, "row": 2**62}


@pytest.mark.parametrize("gate", TILES_FROM)
@given(problem=common_problems(), entropy=st.booleans(), settings=DEVICES)
def test_both_gates_of_the_common_router(gate: str, problem: Problem, entropy: bool, settings: dict[str, str]) -> None:
    """A thread a row, and a warp a row."""

    def statistics() -> ops.StatisticsTables:
        return ops.StatisticsTables.zeros(
            problem.num_experts, groups=3, segments=4, metrics=problem.metrics, entropy=entropy
        )

    expected = problem.run(CPU, statistics())
    with device(settings), emulated_tuning({"gate.tiles_from": TILES_FROM[gate]}):
        assert_same_bits(problem.run(EMULATED, statistics()), expected, f"{gate} {settings}")


SMALL = {
    "dispatch.one_launch": [0, 3, 60],
    "dispatch.tile": [1, 7],
    "dispatch.alone": [40],
    "dispatch.long_tile": [1],
    "gate.blocks": [1],
}


@st.composite
def tunings(draw: st.DrawFn) -> dict[str, int]:
    """Some tunables at their ends, and where those are far away, at values that small problems reach."""
    names = draw(st.lists(st.sampled_from(sorted(emulated_tunables())), unique=True, min_size=1))
    table = emulated_tunables()
    return {name: draw(st.sampled_from([*table[name][1:], *SMALL.get(name, [])])) for name in names}


@given(problem=problems(), tuning=tunings(), settings=DEVICES)
def test_no_tunable_changes_what_the_gate_gives(
    problem: Problem, tuning: dict[str, int], settings: dict[str, str]
) -> None:
    expected = problem.run(CPU)
    with device(settings), emulated_tuning(tuning):
        assert_same_bits(problem.run(EMULATED), expected, f"{tuning} {settings}")


@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(0, 200),
    num_experts=st.sampled_from([1, 60, 300]),
    tuning=tunings(),
    settings=DEVICES,
)
def test_no_tunable_changes_where_rows_go(
    seed: int, num_tokens: int, num_experts: int, tuning: dict[str, int], settings: dict[str, str]
) -> None:
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_experts, (num_tokens, 4), generator=make)
    x = torch.randn(num_tokens, 24, generator=make)
    weights = torch.rand(num_tokens, 4, generator=make)
    results = []
    for backend in (CPU, EMULATED):
        with device(settings), emulated_tuning(tuning):
            slots = backend.dispatch(ids, num_experts)
            rows = backend.permute(x, slots)
            results.append([*slots, rows, backend.combine(rows, weights, slots)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True)), f"{tuning} {settings}"


def test_a_tunable_that_is_not_there_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"no tunable 'gate.speed'; there are gate\.tiles_from"),
        emulated_tuning({"gate.speed": 1}),
    ):
        pass
    with pytest.raises(ValueError, match=r"gate.level is 9; it takes 0 to 3"), emulated_tuning({"gate.level": 9}):
        pass


UNREADABLE = ("gate.level=9", "gate.level", "gate.level=", "gate.level=1x", "=3")  # a process each


@pytest.mark.parametrize("said", exhaustive_but(UNREADABLE[:1], UNREADABLE))
def test_tunables_of_the_environment_that_cannot_be_read_are_refused(said: str) -> None:
    program = (
        "import torch; from harness.backends import BACKENDS; from moe_route import ops\n"
        "backend = next(one for one in BACKENDS if one.emulated)\n"
        "backend.route(torch.randn(3, 32), 2, ops.RouterSpec())"
    )
    environment = {**os.environ, "MOE_ROUTE_TUNING": said, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MOE_ROUTE_TUNING holds" in done.stderr or "it takes 0 to 3" in done.stderr or "no tunable" in done.stderr

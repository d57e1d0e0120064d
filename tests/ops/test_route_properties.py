"""Properties of whole random problems: same bits on every native backend, agreement with the float64 oracle, and the
laws that hold whatever is asked for. `pytest --hypothesis-profile=search` looks further."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness.backends import Backend, available
from harness.expectations import Oracle
from harness.problems import Problem, assert_same_bits, check_conservation, check_ids, problems
from hypothesis import given
from hypothesis import strategies as st

from moe_route import reference
from moe_route.contract.tables import StatisticsTables

NATIVE = available(lambda backend: backend.native)
# They run on a CUDA device too, where there is one.
pytestmark = [pytest.mark.cuda for backend in NATIVE if backend.name == "cuda"]
CHOSEN = [backend for backend in NATIVE if backend.instruction_set is None]


@pytest.mark.native
@given(problem=problems())
def test_native_backends_have_the_same_bits(problem: Problem) -> None:
    first = problem.run(NATIVE[0])
    for backend in NATIVE[1:]:
        assert_same_bits(problem.run(backend), first, backend.name)


@given(problem=problems(wild=False))
def test_oracle(problem: Problem) -> None:
    """Ids exact but for near ties, weights within float32's bounds, counts exact, masses within 1e-6."""
    oracle = Oracle(problem)
    for backend in available():
        routed = problem.run(backend)
        same = oracle.check_ids(routed)
        oracle.check_weights(routed, same)
        oracle.check_statistics(routed, same)


@given(problem=problems())
def test_oracle_with_nan_and_infinities(problem: Problem) -> None:
    oracle = Oracle(problem)
    for backend in available():
        routed = problem.run(backend)
        same = oracle.check_ids(routed)
        oracle.check_weights(routed, same)


@given(problem=problems(), cap=st.sampled_from([0.5, 3.0, 30.0]))
def test_everything_sees_the_capped_logits(problem: Problem, cap: float) -> None:
    """Steering, force, the natural choice, scores and statistics: the bits of capped logits without a cap."""
    spec = replace(problem.spec, softcap=cap)
    capped = replace(problem, logits=reference.capped(problem.logits, spec))
    for backend in available():
        assert_same_bits(replace(problem, spec=spec).run(backend), capped.run(backend), backend.name)


@given(problem=problems())
def test_ids_are_unique_and_counts_conserved(problem: Problem) -> None:
    for backend in available():
        routed = problem.run(backend)
        check_ids(routed, problem.num_experts)
        check_conservation(routed)


@given(problem=problems())
def test_null_steering_changes_no_bit(problem: Problem) -> None:
    plain = replace(problem, steering=None)
    rows, experts = 3, problem.num_experts
    names = ("bias", "std", "magnitude", "score_bias", "force")
    null = {name: torch.zeros(rows, experts) for name in names}
    null |= {name: torch.ones(rows, experts) for name in ("scale", "weight_scale")}
    null |= {"temperature": torch.ones(rows), "top_k": torch.zeros(rows), "score_bias_weighs": torch.ones(rows)}
    null["remap"] = torch.arange(experts, dtype=torch.int32).repeat(rows, 1)
    for backend in available():
        weights, ids = backend.route(plain.logits, plain.k, plain.spec, **plain.arguments())
        steered = replace(plain, steering=null)
        if plain.choice is not None and plain.choice_mode == "natural":
            continue  # a steered row chooses anew, an unsteered one returns what was given
        null_weights, null_ids = backend.route(plain.logits, plain.k, plain.spec, **steered.arguments())
        assert torch.equal(ids, null_ids)
        if backend.native:
            assert torch.equal(weights.view(torch.int32), null_weights.view(torch.int32))
        else:
            torch.testing.assert_close(weights, null_weights, rtol=1e-6, atol=1e-30, equal_nan=True)


@given(problem=problems(), cut=st.floats(0, 1), threads=st.sampled_from([1, 2, 5]))
def test_batch_splits_and_threads_change_no_bit(problem: Problem, cut: float, threads: int) -> None:
    for backend in CHOSEN:
        torch.set_num_threads(1)
        whole = problem.run(backend)
        torch.set_num_threads(threads)
        assert_same_bits(problem.run(backend), whole)
        at = round(cut * problem.logits.shape[0])
        statistics = problem.statistics()
        parts = [
            problem.rows(0, at).run(backend, statistics),
            problem.rows(at, problem.logits.shape[0]).run(backend, statistics),
        ]
        joined = replace(
            whole,
            weights=torch.cat([part.weights for part in parts]),
            ids=torch.cat([part.ids for part in parts]),
            statistics=statistics,
        )
        assert_same_bits(joined, whole)


@given(problem=problems())
def test_observe_counts_what_route_counts(problem: Problem) -> None:
    problem = replace(problem, steering=None, choice=None, choice_weights=None)
    for backend in available():
        routed = problem.run(backend)
        table = problem.statistics()
        backend.observe(
            problem.logits, routed.ids, routed.weights, problem.spec, tokens=problem.tokens, statistics=table
        )
        expected = routed.statistics
        assert torch.equal(table.groups, expected.groups)
        assert torch.equal(table.segments, expected.segments)


@given(problem=problems())
def test_route_weights_are_the_weights_of_route(problem: Problem) -> None:
    if problem.steering is not None:
        problem = replace(problem, steering={k: v for k, v in problem.steering.items() if k != "remap"} or None)
    problem = replace(problem, choice_weights=None)
    for backend in available():
        weights, ids = backend.route(problem.logits, problem.k, problem.spec, **problem.arguments())
        again = backend.route_weights(
            problem.logits,
            ids,
            problem.spec,
            expert_scale=problem.expert_scale,
            steering=problem.steering_tables(),
            tokens=problem.tokens,
        )
        # A row whose first slot is empty has no choice to route_weights.
        kept = ids[:, 0] >= 0
        assert torch.equal(weights[kept].view(torch.int32), again[kept].view(torch.int32))
        assert (again[~kept] == 0).all()


@given(problem=problems())
def test_routing_without_statistics_is_the_same(problem: Problem) -> None:
    for backend in NATIVE:
        routed = problem.run(backend)
        weights, ids = backend.route(problem.logits, problem.k, problem.spec, **problem.arguments())
        assert torch.equal(ids, routed.ids)
        assert torch.equal(weights.view(torch.int32), routed.weights.view(torch.int32))


@pytest.mark.native
@given(problem=problems())
def test_float64_logits_match_the_reference(problem: Problem) -> None:
    """float64 is computed in float64 by one instruction set; the reference is the oracle to its last bits."""
    problem = replace(problem, logits=problem.logits.double())
    oracle, routed = Oracle(problem), problem.run(NATIVE[0])
    assert routed.weights.dtype == torch.float64
    same = oracle.check_ids(routed)
    oracle.check_weights(routed, same)


@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(0, 60),
    k=st.integers(1, 9),
    num_experts=st.sampled_from([1, 5, 16, 200]),
    hidden=st.integers(1, 40),
    block=st.sampled_from([1, 2, 16]),
)
def test_dispatch_permute_combine(
    seed: int, num_tokens: int, k: int, num_experts: int, hidden: int, block: int
) -> None:
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, num_experts + 2, (num_tokens, k), generator=make)
    x = torch.randn(num_tokens, hidden, generator=make)
    weights = torch.rand(num_tokens, k, generator=make)
    residual = torch.randn(num_tokens, hidden, generator=make)
    expected = reference.dispatch(ids, num_experts, block=block)
    rows = reference.permute(x, expected)
    out = reference.combine(rows, weights, expected, residual)
    served = (ids >= 0) & (ids < num_experts)
    assert torch.equal(expected.inverse >= 0, served)
    torch.testing.assert_close(out, residual + x * (weights * served).sum(1, keepdim=True))
    for backend in NATIVE:
        table = backend.dispatch(ids, num_experts, block=block)
        assert all(torch.equal(one, other) for one, other in zip(table, expected, strict=True))
        assert torch.equal(backend.permute(x, table), rows)
        torch.testing.assert_close(backend.combine(rows, weights, table, residual), out, rtol=1e-6, atol=1e-6)
        assert torch.equal(
            backend.combine(rows, weights, table, residual), NATIVE[0].combine(rows, weights, table, residual)
        )


def test_statistics_tables_may_be_absent(backend: Backend) -> None:
    """Groups or segments alone."""
    logits = torch.randn(5, 8)
    tokens = torch.tensor([[-1, 0, 0, 1]] * 5, dtype=torch.int32)
    both = StatisticsTables.zeros(8, groups=1, segments=1)
    groups = StatisticsTables.zeros(8, groups=1)
    spec = Problem(logits, 2).spec
    for table in (both, groups):
        backend.route(logits, 2, spec, tokens=tokens, statistics=table)
    assert torch.equal(groups.groups, both.groups)
    assert torch.equal(both.segments, both.groups)

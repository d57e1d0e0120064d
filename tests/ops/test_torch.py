"""The operators as torch sees them: schemas, fake tensors, torch.compile, autograd, autocast, inference mode, threads,
and the Python objects they take."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from harness.backends import Backend
from harness.claimed_cuda import claimed_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from moe_route import ops, reference
from moe_route.contract.limits import MAX_CHOSEN, MAX_EXPERTS
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import Force, StatisticsTables, SteeringTables, token_table
from moe_route.ops import library

E, K, T = 12, 3, 10
SPECS = {
    "softmax": RouterSpec(renormalize="sum"),
    "deepseek": RouterSpec("sigmoid", groups=4, top_groups=2, renormalize="sum", eps=1e-20, scale=2.5),
    "gpt-oss": RouterSpec(order="topk_then_score"),
    "norm": RouterSpec("sqrt_softplus", renormalize="norm", norm_p=2.0),
    "capped": RouterSpec("sigmoid", renormalize="sum", softcap=1.5),
    "clamp": RouterSpec("identity", renormalize="clamp", eps=1e-3),
}


def steering_tables(**kwargs: Any) -> SteeringTables:
    force = torch.zeros(2, E)
    force[0, 3], force[1, 5], force[1, 0] = Force.ON_PAPER, Force.OFF_NATURAL, Force.FORBID
    arguments = {
        "bias": torch.randn(2, E),
        "std": torch.rand(2, E),
        "force": force,
        "temperature": torch.tensor([0.5, 2.0]),
    }
    return SteeringTables(2, E, **{**arguments, **kwargs})


def tokens_of_all_kinds() -> Tensor:
    row = torch.arange(T) % 3 - 1
    return token_table(T, steering_row=row, group=torch.arange(T) % 2, segment=torch.arange(T) // 4, valid=row < 5)


# ---- schemas, fake tensors, compile ---------------------------------------------------------------------------


def layer_lists() -> tuple[list[Tensor], int, list[Tensor]]:
    """Statistics arguments of two layers."""
    layers = [StatisticsTables.zeros(E, groups=2, segments=3, metrics=ops.METRICS) for _ in range(2)]
    return [table.groups for table in layers], layers[0].arguments[1], [table.segments for table in layers]


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    op, spec = torch.ops.moe_route, SPECS["softmax"]
    logits, tokens = torch.randn(T, E), tokens_of_all_kinds()
    tables, scale = StatisticsTables.zeros(E, groups=2, segments=3, metrics=ops.METRICS), torch.rand(E)
    packed = steering_tables(remap=torch.arange(E).expand(2, E)).packed
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    slots = ops.dispatch(ids, E, block=2)
    x, rows = torch.randn(T, 8, requires_grad=True), torch.randn(slots.order.numel(), 8, requires_grad=True)
    weights, policy, numbers = torch.rand(T, K, requires_grad=True), spec.policy, spec.numbers
    full = (logits, K, policy, tokens, *tables.arguments, *numbers, scale, scale, *packed, ids, weights.detach(), 1)
    trained = (logits.clone().requires_grad_(), ids, policy, tokens, *numbers, scale.clone().requires_grad_())
    params = (packed[0].clone().requires_grad_(), packed[1], packed[2].clone().requires_grad_())
    return {
        "route": (op.route.default, (logits, K, policy)),
        "route with everything": (op.route.default, full),
        "observe": (
            op.observe.default,
            (logits, ids, weights.detach(), policy, tokens, *tables.arguments, *numbers, scale),
        ),
        "observe groups": (op.observe.default, (logits, ids, None, policy, None, tables.groups, 31)),
        "observe_layers": (
            op.observe_layers.default,
            ([logits, logits + 1], [ids, ids], [weights.detach()] * 2, policy, tokens, *layer_lists()),
        ),
        "route_weights": (op.route_weights.default, trained[:4]),
        "route_weights with everything": (op.route_weights.default, (*trained, *params)),
        "dispatch": (op.dispatch.default, (ids.int(), E, 4)),
        "permute": (op.permute.default, (x, slots.order, slots.inverse)),
        "combine": (op.combine.default, (rows, weights, slots.order, slots.inverse, x)),
        "combine without residual": (op.combine.default, (rows, weights, slots.order, slots.inverse)),
    }


@pytest.mark.parametrize("name", list(operator_calls()))
def test_27_opcheck(name: str) -> None:
    operator, arguments = operator_calls()[name]
    opcheck(operator, arguments)


def block(
    x: Tensor, spec: RouterSpec, tokens: Tensor, steering: SteeringTables, statistics: StatisticsTables
) -> Tensor:
    logits = x @ torch.ones(x.shape[1], E) + x[:, :1] * torch.arange(E)
    weights, ids = ops.route(logits, K, spec, steering=steering, tokens=tokens, statistics=statistics)
    ops.observe(logits, ids, weights, spec, tokens=tokens, statistics=statistics)
    slots = ops.dispatch(ids, E)
    return ops.combine(torch.relu(ops.permute(x, slots)), weights, slots, x)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_27_compile_with_counting(compiler: str, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=compiler, dynamic=dynamic)
    x, tokens, steering = torch.randn(T, 6), tokens_of_all_kinds(), steering_tables()
    tables = [StatisticsTables.zeros(E, groups=2, segments=3, metrics=ops.METRICS) for _ in range(2)]
    for length in (T, T, T - 3):
        part = x[:length], SPECS["deepseek"], tokens[:length], steering
        torch.testing.assert_close(compiled(*part, tables[0]), block(*part, tables[1]))
        assert torch.equal(tables[0].groups, tables[1].groups)
        assert torch.equal(tables[0].segments, tables[1].segments)
    assert int(tables[0].scalar("tokens").sum()) == 2 * (3 * T - 3)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_27_compile_a_training_step(compiler: str) -> None:
    torch.compiler.reset()
    bias, x = torch.randn(2, E, requires_grad=True), torch.randn(T, E, requires_grad=True)
    ids = ops.route(x, K, SPECS["softmax"])[1]

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        steering = SteeringTables.from_packed(bias[:, None, :], 2, None, None, E)
        weights = ops.route_weights(x, ids, SPECS["softmax"], steering=steering, tokens=tokens_of_all_kinds())
        slots = ops.dispatch(ids, E)
        return ops.combine(ops.permute(x, slots), weights, slots, x).square().sum()

    want = torch.autograd.grad(loss(x, bias), (x, bias))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(x, bias), (x, bias))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert float(want[1].abs().max()) > 0


def test_27_fake_and_meta_tensors_have_the_real_shapes() -> None:
    spec = SPECS["softmax"]

    def run(logits: Tensor, x: Tensor) -> list[Tensor]:
        weights, ids = ops.route(logits, K, spec)
        slots = ops.dispatch(ids, E, block=4)
        rows = ops.permute(x, slots)
        again = ops.route_weights(logits, ids, spec)
        return [weights, ids, *slots, rows, again, ops.combine(rows, weights, slots, x)]

    for dtype in (torch.float32, torch.bfloat16):
        arguments = torch.randn(T, E), torch.randn(T, 6).to(dtype)
        real = run(*arguments)
        with FakeTensorMode():
            fake = run(torch.empty(T, E), torch.empty(T, 6, dtype=dtype))
        meta = run(*(argument.to("meta") for argument in arguments))
        for other in (fake, meta):
            for a, b in zip(real, other, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    ops.observe(
        arguments[0].to("meta"), meta[1], None, spec, statistics=StatisticsTables.zeros(E, groups=1, device="meta")
    )


# ---- autograd -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("steered", [False, True])
def test_26_gradients_of_route_weights_equal_those_of_the_reference(name: str, steered: bool) -> None:
    spec, scale = SPECS[name], torch.rand(E) + 0.5
    logits = torch.randn(T, E).abs() + 0.1
    tables = {"bias": torch.randn(2, E), "weight_scale": torch.rand(2, E), "temperature": torch.tensor([0.5, 2.0])}
    ids = ops.route(logits, K, spec, correction_bias=torch.randn(E))[1]
    upstream, found = torch.randn(T, K), []
    for module in (ops, reference):
        leaves = [logits.clone().requires_grad_(), scale.clone().requires_grad_()]
        steering = None
        if steered:
            trained = {key: value.clone().requires_grad_() for key, value in tables.items()}
            steering = SteeringTables(2, E, **trained)
            leaves += trained.values()
        weights = module.route_weights(
            leaves[0], ids, spec, expert_scale=leaves[1], steering=steering, tokens=tokens_of_all_kinds()
        )
        found.append((weights, *torch.autograd.grad(weights, leaves, upstream)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
        assert float(want.detach().abs().max()) > 0


@pytest.mark.parametrize("name", list(SPECS))
def test_26_gradcheck_in_float64(name: str) -> None:
    spec = SPECS[name]
    logits = (torch.randn(4, E, dtype=torch.float64).abs() + 0.1).requires_grad_()
    ids = ops.route(logits, K, spec)[1]
    assert torch.autograd.gradcheck(lambda z: ops.route_weights(z, ids, spec), (logits,))


def test_26_weights_of_route_and_route_weights_are_the_same_bits() -> None:
    logits, steering, tokens = torch.randn(T, E), steering_tables(), tokens_of_all_kinds()
    for spec in SPECS.values():
        weights, ids = ops.route(logits, K, spec, steering=steering, tokens=tokens)
        assert torch.equal(ops.route_weights(logits, ids, spec, steering=steering, tokens=tokens), weights)


def test_26_slots_without_an_expert_weigh_nothing() -> None:
    ids = torch.tensor([[-1, -1], [2, -1], [7, 1]])
    for dtype in (torch.int32, torch.int64):
        for logits in (torch.randn(3, 6), torch.randn(3, 6, dtype=torch.float64)):
            weights = ops.route_weights(logits, ids.to(dtype), SPECS["softmax"])
            assert (weights != 0).tolist() == [[False, False], [True, False], [False, True]]


def given_choices() -> dict[str, dict[str, Any]]:
    """Ways to call `route` under which its weights are made differently."""
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    none = ids.clone()
    none[::2, 0] = -1
    remap = torch.randint(-1, E, (2, E))
    return {
        "own choice": {},
        "steered": {"steering": steering_tables()},
        "remapped": {"steering": steering_tables(remap=remap, top_k=torch.tensor([2, 0]))},
        "only remapped": {"steering": SteeringTables(2, E, remap=remap)},
        "natural choice": {"steering": steering_tables(), "choice": none},
        "natural choice with weights": {"steering": steering_tables(), "choice": none, "choice_weights": True},
        "given without steering": {"choice": none, "choice_weights": True},
        "replay": {"steering": steering_tables(remap=remap), "choice": ids, "choice_mode": "replay"},
    }


@pytest.mark.parametrize("name", list(given_choices()))
def test_26_the_weights_of_route_have_the_gradients_of_the_reference(name: str) -> None:
    """Through everything that requires grad, with the bits that there are without gradients."""
    logits, scale, choice_weights = torch.randn(T, E), torch.rand(E) + 0.5, torch.rand(T, K)
    choices, bias = given_choices()[name], torch.randn(2, E)
    upstream, found = torch.randn(T, K), []
    for module in (ops, reference):
        leaves, options = [logits.clone().requires_grad_(), scale.clone().requires_grad_()], dict(choices)
        if options.get("choice_weights") is not None:
            leaves.append(choice_weights.clone().requires_grad_())
            options["choice_weights"] = leaves[-1]
        if "steering" in options:
            trained = {**options["steering"].tables, "bias": bias.clone().requires_grad_()}
            options["steering"] = SteeringTables(2, E, **trained)
            leaves.append(trained["bias"])
        call = partial(module.route, k=K, spec=SPECS["softmax"], tokens=tokens_of_all_kinds(), **options)
        tables = [StatisticsTables.zeros(E, groups=2, metrics=ops.METRICS) for _ in range(2)]
        weights, ids = call(leaves[0], expert_scale=leaves[1], statistics=tables[0])
        with torch.no_grad():
            quiet, quiet_ids = call(leaves[0], expert_scale=leaves[1], statistics=tables[1])
        assert torch.equal(ids, quiet_ids)
        assert not ids.requires_grad
        torch.testing.assert_close(weights, quiet, rtol=1e-6, atol=1e-7)
        if module is ops and name in ("own choice", "steered", "replay"):
            assert torch.equal(weights, quiet)
        assert torch.equal(tables[0].groups, tables[1].groups)  # counted once
        grads = torch.autograd.grad(weights, leaves, upstream, allow_unused=True, materialize_grads=True)
        found.append((weights, ids, *grads))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    assert float(found[0][2].abs().max()) > 0


def test_26_route_has_a_gradient_only_where_one_is_asked_for() -> None:
    logits, spec = torch.randn(T, E, requires_grad=True), SPECS["softmax"]
    assert ops.route(logits, K, spec)[0].requires_grad
    assert ops.route(logits.detach(), K, spec, expert_scale=torch.ones(E, requires_grad=True))[0].requires_grad
    trained = SteeringTables(2, E, bias=torch.zeros(2, E, requires_grad=True))
    assert ops.route(logits.detach(), K, spec, steering=trained, tokens=tokens_of_all_kinds())[0].requires_grad
    packed = SteeringTables.from_packed(torch.zeros(2, 1, E, requires_grad=True), 2, None, None, E)
    assert ops.route(logits.detach(), K, spec, steering=packed, tokens=tokens_of_all_kinds())[0].requires_grad
    assert not ops.route(logits.detach(), K, spec)[0].requires_grad
    with torch.no_grad():
        assert not ops.route(logits, K, spec)[0].requires_grad


def test_26_a_router_of_its_own_learns() -> None:
    """Weights of `route` in a loss: the router's matrix gets a gradient, compiled and not."""
    x, matrix = torch.randn(T, 6), torch.randn(6, E, requires_grad=True)

    def loss(matrix: Tensor) -> Tensor:
        weights, ids = ops.route(x @ matrix, K, SPECS["gpt-oss"])
        slots = ops.dispatch(ids, E)
        return ops.combine(ops.permute(x, slots) * slots.order[:, None], weights, slots).square().sum()

    (want,) = torch.autograd.grad(loss(matrix), matrix)
    torch.compiler.reset()
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(matrix), matrix)
    torch.testing.assert_close(got, want)
    assert float(want.abs().max()) > 0


def test_26_forward_mode_is_right_too() -> None:
    """torch.func.jvp through every operator with a gradient: the directional derivative, not silent zeros."""
    spec = SPECS["deepseek"]
    logits, x = torch.randn(T, E, dtype=torch.float64), torch.randn(T, 5, dtype=torch.float64)

    def run(logits: Tensor, x: Tensor) -> Tensor:
        weights, ids = ops.route(logits, K, spec)
        slots = ops.dispatch(ids, E)
        return ops.combine(ops.permute(x, slots).tanh(), ops.route_weights(logits, ids, spec) + weights, slots, x)

    directions = torch.randn_like(logits), torch.randn_like(x)
    _, tangent = torch.func.jvp(run, (logits, x), directions)
    step = 1e-6
    ahead, behind = (run(logits + sign * step * directions[0], x + sign * step * directions[1]) for sign in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-8)
    leaves = [logits.clone().requires_grad_(), x.clone().requires_grad_()]
    backward = torch.autograd.grad(run(*leaves).sum(), leaves)
    torch.testing.assert_close(
        tangent.sum(), sum((one * other).sum() for one, other in zip(backward, directions, strict=True))
    )


def test_trained_tables_are_packed_anew() -> None:
    """An optimizer's step is seen by the next call, and each backward has a graph of its own."""
    bias = torch.zeros(1, E, requires_grad=True)
    steering = SteeringTables(1, E, bias=bias)
    logits, tokens = torch.randn(T, E), token_table(T, steering_row=0)
    ids = ops.route(logits, K, RouterSpec())[1]
    before = ops.route_weights(logits, ids, RouterSpec(), steering=steering, tokens=tokens)
    before[:, 0].sum().backward()
    with torch.no_grad():
        bias -= bias.grad
    after = ops.route_weights(logits, ids, RouterSpec(), steering=steering, tokens=tokens)
    after[:, 0].sum().backward()
    assert not torch.equal(before, after)


# ---- modes of execution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_27_autocast(dtype: torch.dtype) -> None:
    x, matrix = torch.randn(T, 6), torch.randn(6, E)
    with torch.autocast("cpu", dtype=dtype):
        logits = x @ matrix
        weights, ids = ops.route(logits, K, SPECS["softmax"])
        again = ops.route_weights(logits, ids, SPECS["softmax"])
        slots = ops.dispatch(ids, E)
        out = ops.combine(ops.permute(logits, slots), weights.to(dtype), slots)
    assert logits.dtype == out.dtype == dtype
    assert weights.dtype == torch.float32
    assert torch.equal(again, weights)
    assert all(
        torch.equal(a, b) for a, b in zip(ops.route(logits.float(), K, SPECS["softmax"]), (weights, ids), strict=True)
    )


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_27_inference_mode(mode: Callable[[], Any]) -> None:
    logits, spec = torch.randn(T, E), SPECS["softmax"]
    tables = [StatisticsTables.zeros(E, groups=1) for _ in range(2)]
    expected = ops.route(logits, K, spec, statistics=tables[0])
    with mode():
        inside = logits.clone()
        found = ops.route(inside, K, spec, statistics=tables[1])
        slots = ops.dispatch(found[1], E)
        out = ops.combine(ops.permute(inside, slots), found[0], slots)
        assert torch.equal(ops.route_weights(inside, found[1], spec), found[0])
    torch.testing.assert_close(out, logits * found[0].sum(1, keepdim=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(tables[0].groups, tables[1].groups)


@pytest.mark.parametrize("segments", [0, 40])
@pytest.mark.parametrize("tokens", [1, 700, 3001])
def test_23_the_same_bits_for_any_number_of_threads(tokens: int, segments: int) -> None:
    logits, spec = torch.randn(tokens, 128), SPECS["softmax"]
    table = token_table(
        tokens,
        group=torch.randint(-1, 4, (tokens,)),
        segment=torch.randint(-1, segments + 2, (tokens,)),  # the last two lie outside: not counted
        valid=torch.rand(tokens) < 0.9,
    )
    found = []
    for threads in (1, 2, 3, 7, 1):
        torch.set_num_threads(threads)
        tables = StatisticsTables.zeros(128, groups=3, segments=segments, metrics=ops.METRICS)
        weights, ids = ops.route(logits, 8, spec, tokens=table, statistics=tables)
        found.append((weights, ids, tables.groups, *([] if tables.segments is None else [tables.segments])))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
    counted = (table[:, 3] != 0) & (table[:, 1] >= 0) & (table[:, 1] < 3)
    assert int(found[0][2][:, 0].sum()) == int(counted.sum())


def test_calls_from_many_python_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    logits, spec = torch.randn(600, 128), SPECS["softmax"]
    tables = [StatisticsTables.zeros(128, groups=1) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda table: ops.route(logits, 8, spec, statistics=table), tables))
    assert all(torch.equal(pair[1], found[0][1]) for pair in found)
    assert all(torch.equal(table.groups, tables[0].groups) for table in tables)


# ---- what the operators refuse --------------------------------------------------------------------------------


def bad_calls() -> dict[str, tuple[Callable[[], Any], str]]:
    x, spec, op = torch.randn(T, E), RouterSpec(), torch.ops.moe_route
    tables, policy = StatisticsTables.zeros(E, groups=1), spec.policy
    ids = torch.zeros(T, K, dtype=torch.int64)
    wrong = StatisticsTables.zeros(E + 1, groups=1)
    return {
        "k too large": (lambda: ops.route(x, E + 1, spec), "k = 13"),
        "k zero": (lambda: ops.route(x, 0, spec), "k = 0"),
        "k above 64": (lambda: ops.route(torch.randn(2, 200), 65, spec), "k = 65"),
        "too many experts": (lambda: ops.route(torch.randn(2, 4097), 2, spec), "4097 experts"),
        "one dimension": (lambda: ops.route(x[0], 2, spec), "logits have shape"),
        "integer logits": (lambda: ops.route(x.long(), 2, spec), "logits must be"),
        "groups do not divide": (lambda: ops.route(x, 2, RouterSpec(groups=5)), "spec.groups = 5"),
        "tokens short": (lambda: ops.route(x, 2, spec, tokens=token_table(T - 1)), r"tokens has shape \[9, 4\]"),
        "tokens dtype": (lambda: ops.route(x, 2, spec, tokens=token_table(T).long()), "tokens must be int32"),
        "correction bias": (lambda: ops.route(x, 2, spec, correction_bias=torch.zeros(E - 1)), "correction_bias"),
        "expert scale": (lambda: ops.route(x, 2, spec, expert_scale=torch.zeros(E, 1)), "expert_scale"),
        "steering experts": (
            lambda: ops.route(x, 2, spec, steering=SteeringTables(1, 5, bias=torch.zeros(1, 5))),
            "steering",
        ),
        "statistics experts": (lambda: ops.route(x, 2, spec, statistics=wrong), "group_statistics"),
        "given ids shape": (lambda: ops.route(x, 2, spec, choice=ids), "choice ids"),
        "given ids dtype": (lambda: ops.route(x, K, spec, choice=ids.float()), "choice ids"),
        "choice mode": (lambda: ops.route(x, K, spec, choice=ids, choice_mode="once"), "choice_mode"),  # type: ignore[arg-type]
        "choice weights alone": (lambda: ops.route(x, 2, spec, choice_weights=torch.zeros(T, 2)), "choice"),
        "observe weights": (lambda: ops.observe(x, ids, torch.zeros(T, 2), spec, statistics=tables), "choice weights"),
        "observe ids": (lambda: ops.observe(x, ids[0], None, spec, statistics=tables), "ids have shape"),
        "weights ids": (lambda: ops.route_weights(x, ids[:-1], spec), "choice ids"),
        "table not contiguous": (
            lambda: op.route(x, 2, policy, None, torch.zeros(44, 1, dtype=torch.int64).t().expand(2, -1), 7),
            "contiguous",
        ),
        "unknown plane bits": (
            lambda: op.route(x, 2, policy, None, tables.groups, 32),
            "statistics = 32",
        ),
        "planes without tables": (lambda: op.route_weights(x, ids, policy, steering_planes=2), "steering"),
        "forged policy": (lambda: op.route(x, 2, 15), "policy"),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_arguments_are_named(name: str) -> None:
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()


def calls_of_wrong_types() -> dict[str, tuple[Callable[[], Any], str]]:
    x, spec, ids = torch.randn(T, E), RouterSpec(), torch.zeros(T, K, dtype=torch.int64)
    tables, weights, slots = StatisticsTables.zeros(E, groups=1), torch.ones(T, K), ops.dispatch(ids, E)
    untyped: Any = ops
    return {
        "numpy logits": (
            lambda: untyped.route(x.numpy(), 2, spec),
            r"logits must be a torch.Tensor, not numpy.ndarray",
        ),
        "mend": (lambda: untyped.route(x.numpy(), 2, spec), r"torch.as_tensor\(logits\)"),
        "list of logits": (lambda: untyped.route(x.tolist(), 2, spec), "logits must be a torch.Tensor, not list"),
        "name for a spec": (lambda: untyped.route(x, 2, "sigmoid"), r"spec must be a RouterSpec.*score='sigmoid'"),
        "other name": (lambda: untyped.route(x, 2, "topk"), r"spec must be a RouterSpec.*score='softmax'"),
        "fraction": (lambda: untyped.route(x, 2.5, spec), "k must be an integer, not float"),
        "numpy bias": (
            lambda: untyped.route(x, 2, spec, correction_bias=torch.zeros(E).numpy()),
            "correction_bias must be a torch.Tensor",
        ),
        "list of tokens": (
            lambda: untyped.route(x, 2, spec, tokens=[0] * T),
            "tokens must be a torch.Tensor, not list",
        ),
        "tensor for steering": (lambda: untyped.route(x, 2, spec, steering=x), "steering must be SteeringTables"),
        "tensor for statistics": (
            lambda: untyped.route(x, 2, spec, statistics=x),
            "statistics must be StatisticsTables",
        ),
        "no spec": (lambda: untyped.route_weights(x, ids, None), "spec must be a RouterSpec, not NoneType"),
        "numpy ids": (lambda: untyped.route_weights(x, ids.numpy(), spec), "ids must be a torch.Tensor"),
        "no statistics": (lambda: untyped.observe(x, ids, None, spec, statistics=None), "statistics must be"),
        "numpy weights": (
            lambda: untyped.observe(x, ids, weights.numpy(), spec, statistics=tables),
            "weights must be a torch.Tensor",
        ),
        "one layer": (
            lambda: untyped.observe_layers(x.numpy(), [ids], [weights], spec, statistics=[tables]),
            "logits must be a list of torch.Tensor, not numpy.ndarray: one per layer",
        ),
        "one table": (
            lambda: untyped.observe_layers([x], [ids], [weights], spec, statistics=tables),
            "statistics must be a list of StatisticsTables",
        ),
        "dispatch": (lambda: untyped.dispatch(ids.tolist(), E), "ids must be a torch.Tensor, not list"),
        "experts": (lambda: untyped.dispatch(ids, "8"), "num_experts must be an integer, not str"),
        "permute": (lambda: untyped.permute(x.numpy(), slots), "x must be a torch.Tensor"),
        "no dispatch": (lambda: untyped.permute(x, ids), "dispatch must be a Dispatch, not torch.Tensor"),
        "combine": (lambda: untyped.combine(x, weights.numpy(), slots), "weights must be a torch.Tensor"),
        "numpy table": (lambda: SteeringTables(1, E, bias=x[:1].numpy()), "bias must be a torch.Tensor"),  # type: ignore[arg-type]
        "list of groups": (lambda: token_table(2, group=[0, 1]), "group must be a number or a torch.Tensor, not list"),  # type: ignore[arg-type]
        "numpy counts": (lambda: StatisticsTables(x.numpy(), None, E), "groups must be a torch.Tensor"),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("name", list(calls_of_wrong_types()))
def test_arguments_of_a_wrong_type_are_named(name: str) -> None:
    call, message = calls_of_wrong_types()[name]
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert len(str(caught.value)) < 200


def calls_without_memory() -> dict[str, Callable[[], Any]]:
    """Each with one tensor whose storage was freed, as FSDP and offloading do."""
    x, spec, ids = torch.randn(T, E), RouterSpec(), torch.zeros(T, K, dtype=torch.int64)
    slots, weights = ops.dispatch(ids, E), torch.ones(T, K)
    tables = StatisticsTables.zeros(E, groups=1, segments=2)

    def freed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.untyped_storage().resize_(0)
        return tensor

    def part(tensor: Tensor) -> Tensor:
        second = torch.cat([tensor, tensor])[len(tensor) :]
        second.untyped_storage().resize_(0)
        return second

    def counted(**changed: Tensor) -> StatisticsTables:
        parts = {"groups": tables.groups, "segments": tables.segments, **changed}
        return StatisticsTables(parts["groups"], parts["segments"], E)

    return {
        "logits": lambda: ops.route(freed(x), K, spec),
        "tokens": lambda: ops.route(x, K, spec, tokens=freed(token_table(T))),
        "tokens ": lambda: ops.route(x, K, spec, tokens=part(token_table(T))),
        "group_statistics": lambda: ops.route(x, K, spec, statistics=counted(groups=freed(tables.groups))),
        "segment_statistics": lambda: ops.route(
            x, K, spec, statistics=counted(segments=freed(torch.clone(tables.groups)))
        ),
        "correction_bias": lambda: ops.route(x, K, spec, correction_bias=freed(torch.zeros(E))),
        "choice ids": lambda: ops.route_weights(x, freed(ids), spec),
        "choice weights": lambda: ops.observe(x, ids, freed(weights), spec, statistics=tables),
        "ids": lambda: ops.dispatch(freed(ids), E),
        "x": lambda: ops.permute(freed(x), slots),
        "order": lambda: ops.permute(x, slots._replace(order=freed(slots.order))),
        "rows": lambda: ops.combine(freed(ops.permute(x, slots)), weights, slots),
        "residual": lambda: ops.combine(ops.permute(x, slots), weights, slots, freed(x)),
    }


@pytest.mark.parametrize("name", list(calls_without_memory()))
def test_a_tensor_whose_storage_was_freed_is_not_an_absent_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name.strip()} has no memory: its storage was freed"):
        calls_without_memory()[name]()


def test_limits_are_those_of_the_kernels() -> None:
    logits = torch.randn(2, MAX_EXPERTS)
    assert ops.route(logits, MAX_CHOSEN, RouterSpec())[1].shape == (2, MAX_CHOSEN)
    with pytest.raises(ValueError, match=f"k = {MAX_CHOSEN + 1} is outside 1..{MAX_CHOSEN}"):
        ops.route(logits, MAX_CHOSEN + 1, RouterSpec())
    with pytest.raises(ValueError, match=f"outside 1..min.experts, {MAX_CHOSEN}"):
        ops.route(logits.to("meta"), MAX_CHOSEN + 1, RouterSpec())
    with pytest.raises(ValueError, match=f"{MAX_EXPERTS + 1} experts"):
        ops.route(torch.randn(2, MAX_EXPERTS + 1), 2, RouterSpec())


def test_only_dense_tensors_are_taken() -> None:
    with pytest.raises(ValueError, match=r"logits are torch\.sparse_coo.*to_dense"):
        ops.route(torch.randn(T, E).to_sparse(), 2, RouterSpec())


# ---- devices --------------------------------------------------------------------------------------------------

OPERATORS = ("route", "observe", "observe_layers", "route_weights", "dispatch", "permute", "combine")


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_kernels_for_the_cpu_and_torch_for_the_rest_and_casts_nothing(name: str) -> None:
    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_route::{name}", key)

    assert has("CPU") == (library.native() is not None)
    assert has("CUDA") == (not library.serves_cuda())
    assert has("CompositeExplicitAutograd")
    assert not has("AutocastCPU")
    assert not has("AutocastCUDA")


def calls_with_a_tensor_elsewhere() -> dict[str, Callable[[], Any]]:
    """One argument of each kind on cuda:0, the leading tensor on the CPU."""
    x, spec, zeros = torch.randn(T, E), RouterSpec(), torch.zeros
    ids, slots = zeros(T, K, dtype=torch.int64), ops.dispatch(zeros(T, K, dtype=torch.int64), E)
    tables = StatisticsTables(claimed_cuda(zeros(1, 8 + E, dtype=torch.int64)), None, E, ("counts",))
    rows = zeros(T * K, 6)
    return {
        "tokens": lambda: ops.route(x, K, spec, tokens=claimed_cuda(token_table(T))),
        "correction_bias": lambda: ops.route(x, K, spec, correction_bias=claimed_cuda(zeros(E))),
        "expert_scale": lambda: ops.route_weights(x, ids, spec, expert_scale=claimed_cuda(zeros(E))),
        "steering": lambda: torch.ops.moe_route.route(
            x, K, spec.policy, steering=claimed_cuda(zeros(1, 1, E)), steering_planes=2
        ),
        "group_statistics": lambda: ops.observe(x, ids, None, spec, statistics=tables),
        "choice ids": lambda: ops.route_weights(x, claimed_cuda(ids), spec),
        "inverse": lambda: ops.permute(zeros(T, 6), slots._replace(inverse=claimed_cuda(slots.inverse))),
        "weights": lambda: ops.combine(rows, claimed_cuda(zeros(T, K)), slots),
        "residual": lambda: ops.combine(rows, zeros(T, K), slots, claimed_cuda(zeros(T, 6))),
    }


@pytest.mark.parametrize("name", list(calls_with_a_tensor_elsewhere()))
def test_a_tensor_on_another_device_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(on cuda:0\) and \w+ \(on cpu\).*move {name} with \.to\('cpu'\)"):
        calls_with_a_tensor_elsewhere()[name]()


@pytest.mark.native
def test_bare_cuda_launches_without_kernels_say_so() -> None:
    compiled = library.required()
    if compiled.build_info()["cuda"]:
        pytest.skip("this build has CUDA kernels")
    args = compiled.GateArgs(0, 0, 1, 1, 1, 0, 0)
    for call in (lambda: args.run_cuda(0), lambda: compiled.dispatch_workspace_bytes(4, 4)):
        with pytest.raises(RuntimeError, match="no CUDA kernels"):
            call()


def test_kernels_are_loaded_for_cuda_devices_alone() -> None:
    ops.load_kernels(128, "cpu")
    ops.load_kernels(128, torch.device("cuda"))  # a torch that has used no device has none to load them on
    with pytest.raises(ValueError, match=f"num_experts = 0 is outside 1..{MAX_EXPERTS}"):
        ops.load_kernels(0, "cpu")
    compiled = library.native()
    if compiled is not None and not compiled.build_info()["cuda"]:
        with pytest.raises(RuntimeError, match="no CUDA kernels"):
            compiled.load_kernels(0, 128)


# ---- the objects ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
def test_router_spec_copies_and_packs(spec: RouterSpec) -> None:
    twins = [
        copy.deepcopy(spec),
        copy.copy(spec),
        pickle.loads(pickle.dumps(spec)),
        replace(spec),
        RouterSpec(**asdict(spec)),
    ]
    for twin in twins:
        assert twin == spec
        assert (twin.policy, twin.numbers, twin.unusual) == (spec.policy, spec.numbers, spec.unusual)
        assert hash(twin) == hash(spec)
    assert RouterSpec.from_packed(spec.policy, *spec.numbers) == spec
    assert replace(spec, scale=3.0).numbers[3] == 3.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"score": "tanh"},
        {"order": "never"},
        {"group_score": "mean"},
        {"renormalize": "l1"},
        {"groups": 0},
        {"groups": 2, "top_groups": 3},
        {"norm_p": 0.0},
        {"eps": -1.0},
        {"softcap": -1.0},
        {"softcap": float("inf")},
    ],
)
def test_router_spec_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        RouterSpec(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bias": torch.zeros(1, E)},
        {"temperature": torch.zeros(3)},
        {"temperature": 0.0},
        {"force": torch.full((2, E), 4)},
        {"force": torch.full((2, E), 0.5)},
        {"top_k": -1},
        {"std_correction": 2},
        {"remap": torch.full((2, E), E)},
        {"remap": torch.zeros(2, E)},
    ],
    ids=str,
)
def test_steering_tables_refuse(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SteeringTables(2, E, **wrong)


def test_steering_tables_pack_in_the_order_of_the_bits() -> None:
    planes = {name: torch.full((2, E), float(i % 3)) for i, name in enumerate(("force", "bias", "scale"))}
    tables, bits, params, remap = SteeringTables(2, E, **planes, top_k=torch.tensor([1, 2])).packed
    assert tables is not None
    assert params is not None
    assert bits == 1 | 2 | 64
    assert tables[0, :, 0].tolist() == [2.0, 1.0, 0.0]
    assert params.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0, 0.0]]
    assert remap is None
    assert SteeringTables(2, E).packed == (None, 0, None, None)


def test_steering_tables_are_a_snapshot() -> None:
    bias = torch.zeros(1, E)
    steering = SteeringTables(1, E, bias=bias)
    bias += 1
    assert steering.is_null
    assert float(steering.tables["bias"].sum()) == 0.0


def test_is_null() -> None:
    assert SteeringTables(1, E).is_null
    assert SteeringTables(1, E, scale=torch.ones(1, E), temperature=1.0, std_correction=1).is_null
    assert SteeringTables(1, E, remap=torch.arange(E)[None]).is_null
    assert not SteeringTables(1, E, force=torch.full((1, E), Force.FORBID)).is_null
    assert not SteeringTables(1, E, top_k=2).is_null
    assert not SteeringTables(1, E, remap=torch.zeros(1, E, dtype=torch.int64)).is_null


def test_token_table() -> None:
    assert token_table(2).tolist() == [[-1, 0, -1, 1]] * 2
    table = token_table(
        4, steering_row=3, group=torch.tensor([[1, 2], [3, 4]]), valid=torch.tensor([True, False, True, True])
    )
    assert table.dtype == torch.int32
    assert table.tolist() == [[3, 1, -1, 1], [3, 2, -1, 0], [3, 3, -1, 1], [3, 4, -1, 1]]
    assert token_table(0, group=torch.empty(0, dtype=torch.int64)).shape == (0, 4)
    with pytest.raises(ValueError, match="group has 3 elements for 4 tokens"):
        token_table(4, group=torch.zeros(3))


def test_statistics_tables() -> None:
    tables = StatisticsTables.zeros(4, groups=2, segments=1, metrics=("weight", "counts"))
    assert tables.metrics == ("counts", "weight")
    assert tables.groups.shape == (2, 8 + 2 * 4)
    tables.metric("weight")[1, 2] = 5
    tables.scalar("tokens", of="segments")[0] = 7
    assert tables.groups[1, 8 + 4 + 2] == 5
    assert int(tables.zero_().groups.sum()) == 0
    assert tables.segments is not None
    assert int(tables.segments.sum()) == 0
    for call, message in (
        (lambda: StatisticsTables.zeros(4, groups=1, metrics=("votes",)), "votes"),
        (lambda: tables.metric("probability"), "probability"),
        (lambda: tables.scalar("probability"), "probability"),
        (lambda: StatisticsTables.zeros(4, groups=1).scalar("tokens", of="segments"), "segments"),
        (lambda: StatisticsTables(torch.zeros(1, 9, dtype=torch.int64), None, 4), "groups"),
        (lambda: StatisticsTables(torch.zeros(1, 20), None, 4), "groups"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- several layers at once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [0, 3])
def test_observe_layers_is_observe_for_each(native: Backend, segments: int) -> None:
    spec, tokens = SPECS["deepseek"], tokens_of_all_kinds()
    logits = [torch.randn(T, E) for _ in range(3)]
    routed = [ops.route(layer, K, spec) for layer in logits]
    weights, ids = [w.bfloat16() for w, _ in routed], [i.long() for _, i in routed]

    def tables() -> list[StatisticsTables]:
        return [StatisticsTables.zeros(E, groups=2, segments=segments, metrics=ops.METRICS) for _ in logits]

    together, apart = tables(), tables()
    native.observe_layers(logits, ids, weights, spec, tokens=tokens, statistics=together)
    for layer, table in enumerate(apart):
        ops.observe(logits[layer], ids[layer], weights[layer], spec, tokens=tokens, statistics=table)
    for one, other in zip(together, apart, strict=True):
        assert one.scalar("tokens").sum() > 0
        assert torch.equal(one.groups, other.groups)
        assert segments == 0 or torch.equal(one.segments, other.segments)
    native.observe_layers([], [], [], spec, statistics=[])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_dtype_count_alike(wide: Backend, dtype: torch.dtype) -> None:
    """float64 weights of float64 logits are counted with their own bits, one layer or several at a time."""
    logits, spec, metrics = (
        torch.randn(T, E, dtype=torch.float64),
        SPECS["deepseek"],
        ("counts", "weight", "weight_share"),
    )
    tables = [StatisticsTables.zeros(E, groups=1, metrics=metrics) for _ in range(4)]
    weights, ids = wide.route(logits, K, spec, statistics=tables[0])
    given = weights.to(dtype)
    wide.observe(logits, ids, given, spec, statistics=tables[1])
    if wide.native:
        wide.observe_layers([logits], [ids], [given], spec, statistics=[tables[2]])
        assert torch.equal(tables[1].groups, tables[2].groups)
    back, _ = wide.route(logits, K, spec, choice=ids, choice_weights=given, statistics=tables[3])
    assert torch.equal(back, given.double())
    assert torch.equal(tables[3].groups, tables[1].groups)
    if dtype is torch.float64:
        assert torch.equal(tables[1].groups, tables[0].groups)


def test_float64_weights_of_narrow_logits_are_rounded_once(native: Backend) -> None:
    logits, spec = torch.randn(T, E), SPECS["softmax"]
    ids, given = native.route(logits, K, spec)[1], torch.rand(T, K, dtype=torch.float64)
    assert torch.equal(native.route(logits, K, spec, choice=ids, choice_weights=given)[0], given.float())


def test_observe_layers_refuses_layers_that_do_not_go_together() -> None:
    spec, logits = SPECS["softmax"], [torch.randn(T, E)] * 2
    weights, ids = ops.route(logits[0], K, spec)
    tables = [
        StatisticsTables.zeros(E, groups=1, metrics=metrics) for metrics in (("counts",), ("counts", "probability"))
    ]
    with pytest.raises(ValueError, match="different metrics"):
        ops.observe_layers(logits, [ids] * 2, [weights] * 2, spec, statistics=tables)
    with pytest.raises(ValueError, match="2 layers of logits, but a list of 1"):
        ops.observe_layers(logits, [ids], [weights] * 2, spec, statistics=[tables[0]] * 2)
    assert not tables[0].groups.any()

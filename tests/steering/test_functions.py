"""A user's own function of the router logits: what it sees, when it runs, what it changes, and how a plan names it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from harness.backends import Backend
from harness.tiny_models import EVERY, inputs, tiny_model, tokens
from torch import Tensor

import moe_route as mr
from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import FIXED_POINT, StatisticsTables, token_table
from moe_route.contract.token_tables import TokenTables, Where
from moe_route.ops.token_rules import route_tokens
from moe_route.steering import LayerShape, Plan, PlanError

E, K, T = 8, 2, 32


def unchanged(logits: Tensor, where: Where) -> Tensor:
    return logits


def raised(logits: Tensor, where: Where) -> Tensor:
    """What ``Plan.bias({...: {1: 4.0}})`` adds."""
    return logits + torch.eye(logits.shape[1])[1] * 4.0


def doubled(logits: Tensor, where: Where) -> Tensor:
    return logits * 2


def of_model(name: str = "qwen3_moe", **more: Any) -> Any:
    return tiny_model(name, head=True, **more)


def run(routed: mr.RoutedModel, plan: Plan, **given: Any) -> tuple[Tensor, mr.RoutingStatistics]:
    with routed.steer(plan), routed.record() as recorder, torch.no_grad():
        output = routed.model(**given)[0]
    return output, recorder.statistics()


# ---- on models


@pytest.mark.parametrize("name", EVERY)
def test_a_function_does_what_the_rule_for_it_does_and_the_identity_nothing(name: str) -> None:
    model = tiny_model(name)
    given = inputs(name, model)
    with mr.attach(model) as routed:
        layer = next((router.layer for router in routed.routers if router.steerable), None)
        if layer is None or routed.routers[layer].adapter.patches:
            return
        with torch.no_grad():
            plain = model(**given)[0]
        same, kept = run(routed, Plan.apply(unchanged, layer), **given)
        assert torch.equal(same, plain)
        assert kept.scalar("steered")[0, layer] == kept.tokens()[0, layer] > 0
        assert not kept.scalar("flipped").any()
        with routed.steer(Plan.apply(unchanged, layer)):  # with a gradient too
            assert torch.equal(model(**given)[0], plain)
        by_rule, counted = run(routed, Plan.bias({layer: {1: 4.0}}), **given)
        by_function, same_counts = run(routed, Plan.apply(raised, layer), **given)
        torch.testing.assert_close(by_function, by_rule, rtol=1e-4, atol=1e-5)
        assert counted.scalar("flipped")[0, layer] > 0
        for sums in ("counts", "natural_counts"):
            assert (counted.token_sum(sums) == same_counts.token_sum(sums)).all()
        for scalar in ("tokens", "slots", "empty", "steered", "flipped", "unscored"):
            assert (counted.scalar(scalar) == same_counts.scalar(scalar)).all()


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_engines_in_both_precisions(engine: str, dtype: torch.dtype) -> None:
    model = of_model(dtype=dtype)
    with mr.attach(model, engine=engine) as routed:
        given = {"input_ids": tokens(2, 6)}
        plain, _ = run(routed, Plan(), **given)
        assert torch.equal(run(routed, Plan.apply(unchanged), **given)[0], plain)
        by_rule, by_function = (
            run(routed, plan, **given)[1] for plan in (Plan.bias([1], [0, 1, 2], strength=4.0), Plan.apply(raised))
        )
        assert (by_rule.token_sum("counts")[:, 0] == by_function.token_sum("counts")[:, 0]).all()
        assert (by_rule.token_sum("natural_counts")[:, 0] == by_function.token_sum("natural_counts")[:, 0]).all()


def test_it_is_called_once_a_layer_with_the_matching_tokens_that_are_no_padding() -> None:
    seen: list[tuple[Tensor, Where]] = []

    def note(logits: Tensor, where: Where) -> Tensor:
        seen.append((logits.clone(), where))
        logits[:] = 0  # a copy of its own
        return logits

    ids = tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with mr.attach(of_model()) as routed, torch.no_grad():
        with routed.router_logits() as natural, routed.steer(Plan.apply(note, layers=[0, 2], groups="de")):
            with routed.labels(["en", "de"]):
                routed.model(ids, attention_mask=mask)
            assert [where.layer for _, where in seen] == [0, 2]
            assert torch.equal(seen[0][0], natural[0][1])
            where = seen[0][1]
            assert (where.sequence.tolist(), where.position.tolist()) == ([1] * 5, [*range(5)])
            assert where.token.tolist() == ids[1].tolist()
            assert not where.decode.any()
            with routed.labels(["de", "en"]):
                routed.model(ids, attention_mask=mask)
        where = seen[2][1]
        assert (where.sequence.tolist(), where.position.tolist()) == ([0] * 3, [0, 1, 2])
        assert where.token.tolist() == ids[0, 2:].tolist()
        seen.clear()
        with routed.steer(Plan.apply(note, layers=1, phase="decode")):
            routed.model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert [where.position.tolist() for _, where in seen] == [[3, 5], [4, 6]]
        assert all(bool(where.decode.all()) for _, where in seen)
        seen.clear()
        with routed.steer(Plan.apply(note, layers=1).only(positions=2)):
            routed.model(inputs_embeds=routed.model.get_input_embeddings()(ids))
        assert [(where.token.tolist(), where.position.tolist()) for _, where in seen] == [([-1, -1], [2, 2])]


def test_other_tokens_keep_their_bits() -> None:
    with mr.attach(of_model()) as routed, torch.no_grad():
        kept = []
        for plan in (Plan(), Plan.apply(raised, layers=0, groups="x")):
            recorder = routed.record(trace=[0], trace_weights="float32")
            with recorder, routed.steer(plan), recorder.labels(["x", "y"]):
                routed.model(tokens(2, 6))
            kept.append(recorder.trace())
    plain, steered = kept
    own = plain.sequence == 1
    assert (plain.ids[own] == steered.ids[own]).all()
    assert (plain.weights[own] == steered.weights[own]).all()
    assert (plain.ids[~own] != steered.ids[~own]).any()


def test_a_function_is_trained_from_the_identity_on() -> None:
    """The gradient of a bias that begins at 0 is that of the rule with the same number."""
    model, ids = of_model(), tokens(2, 6)
    delta = torch.zeros(E, requires_grad=True)

    def add(logits: Tensor, where: Where) -> Tensor:
        return logits + delta

    with mr.attach(model) as routed:
        with torch.no_grad():
            plain = model(ids, labels=ids).loss
        with routed.steer(Plan.apply(add, layers=1)):
            loss = model(ids, labels=ids).loss
        assert torch.equal(loss, plain)
        loss.backward()
        assert delta.grad is not None
        own = model.model.layers[1].mlp.gate.weight.grad.clone()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        torch.testing.assert_close(own, model.model.layers[1].mlp.gate.weight.grad, rtol=1e-3, atol=1e-6)
        step = 1e-2  # a central difference, in a direction that leaves every choice as it is
        slope = delta.grad.clone()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                delta.copy_(slope / slope.norm() * step * sign)
                with routed.steer(Plan.apply(add, layers=1)), routed.record() as recorder:
                    values.append(model(ids, labels=ids).loss.item())
                assert not recorder.statistics().scalar("flipped")[0, 1]
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope.norm().item(), rel=0.05)


@pytest.mark.parametrize(
    ("function", "error", "named"),
    [
        (lambda logits, where: logits[:, :4], ValueError, r"\[12, 4\]"),
        (lambda logits, where: logits.double(), ValueError, "float64"),
        (lambda logits, where: logits.masked_fill(logits == logits.max(), torch.nan), ValueError, "NaN"),
        (lambda logits, where: None, TypeError, "NoneType"),
    ],
)
def test_what_a_function_may_not_return(function: Callable[..., Any], error: type[Exception], named: str) -> None:
    with mr.attach(of_model()) as routed, routed.steer(Plan.apply(function)), pytest.raises(error, match=named):
        routed.model(tokens(2, 6))


def test_torch_compile_ends_its_graph_there_and_refuses_to_have_one() -> None:
    model, ids = of_model(), tokens(2, 6)
    with mr.attach(model) as routed, routed.steer(Plan.apply(raised)), torch.no_grad():
        expected = model(ids).logits
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, expected)
        torch.compiler.reset()
        with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
            torch.compile(model, backend="eager", fullgraph=True)(ids)
    torch.compiler.reset()


# ---- as an operator, against float64


def routed_tokens(plan: Plan, logits: Tensor, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and ids under the plan, and the natural ids."""
    (tables,) = plan.compile([LayerShape(E, K)]).tables
    assert isinstance(tables, TokenTables)
    spec = RouterSpec(renormalize="sum")
    natural = ops.route(logits, K, spec)[1]
    told = torch.zeros(len(logits), 4, dtype=torch.int64)
    table = token_table(len(logits), steering_row=0)
    weights, ids, _ = route_tokens(
        tables, logits, K, spec, tokens=table, counter=None, told=told, choice=natural, **more
    )
    return weights, ids.long(), natural.long()


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 2


def test_it_runs_before_every_other_rule_and_the_natural_choice_stays_the_models(logits: Tensor) -> None:
    """std and |z| are those of what the function returned; flips are counted from the model's own choice."""
    plan = Plan.activate({0: [1]}, strength=0.75) + Plan.apply(doubled) + Plan.magnitude({0: [2]}, strength=-0.5)
    statistics = StatisticsTables.zeros(E, groups=1, metrics=ops.METRICS)
    weights, ids, natural = routed_tokens(plan, logits.float(), statistics=statistics)
    z = 2 * logits
    steered = z.clone()
    steered[:, 1] += 0.75 * z.std(1, correction=0)
    steered[:, 2] -= 0.5 * z[:, 2].abs()
    expected = steered.topk(K)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(weights.double(), torch.softmax(expected.values, 1), rtol=1e-5, atol=1e-6)
    assert statistics.metric("natural_counts")[0].tolist() == torch.bincount(natural.flatten(), minlength=E).tolist()
    assert statistics.metric("counts")[0].tolist() == torch.bincount(ids.flatten(), minlength=E).tolist()
    moved = (~(ids[:, :, None] == natural[:, None]).any(2)).sum()
    assert statistics.scalar("flipped").item() == moved > 0
    mass = torch.softmax(steered, 1).sum(0)
    torch.testing.assert_close(statistics.metric("probability")[0].double() * FIXED_POINT, mass, rtol=1e-5, atol=1e-5)


def test_every_backend_routes_and_counts_alike(
    backend: Backend, logits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of each instruction set and of the emulated device, and torch, beside a float64 formula.

    Half of the tokens are changed by the function and half are left alone; a rule for std acts on all of them.
    """

    def on_even(values: Tensor, where: Where) -> Tensor:
        return torch.where((torch.arange(T) % 2 == 0)[:, None], values + torch.eye(E)[1] * 4, values)

    monkeypatch.setattr("moe_route.ops.token_rules.route", backend.route)
    for more in (Plan(), Plan.activate({0: [2]}, strength=0.5)):
        statistics = StatisticsTables.zeros(E, groups=1, metrics=ops.METRICS)
        weights, ids, natural = routed_tokens(Plan.apply(on_even) + more, logits.float(), statistics=statistics)
        z = logits.float().double()
        own = z.topk(K).indices
        z[::2, 1] += 4
        if more:
            z[:, 2] += 0.5 * z.std(1, correction=0)
        best = z.topk(K)
        assert torch.equal(natural, own)
        assert torch.equal(ids, best.indices)
        torch.testing.assert_close(weights.double(), torch.softmax(best.values, 1), rtol=1e-5, atol=1e-6)
        for metric, chosen in (("natural_counts", own), ("counts", best.indices)):
            assert statistics.metric(metric)[0].tolist() == torch.bincount(chosen.flatten(), minlength=E).tolist()
        flipped = (~(best.indices[:, :, None] == own[:, None]).any(2)).sum()
        assert statistics.scalar("flipped").item() == flipped > 0


def test_several_run_in_the_order_of_the_plan(logits: Tensor) -> None:
    first, last = Plan.apply(raised) + Plan.apply(doubled), Plan.apply(doubled) + Plan.apply(raised)
    assert first != last
    assert first.hash != last.hash
    assert first + Plan.top_k(1) == Plan.top_k(1) + first
    bias = torch.eye(E)[1] * 4.0
    for plan, z in ((first, (logits + bias) * 2), (last, logits * 2 + bias)):
        weights, ids, _ = routed_tokens(plan, logits.float())
        best = z.topk(K)
        assert torch.equal(ids, best.indices)
        torch.testing.assert_close(weights.double(), torch.softmax(best.values, 1), rtol=1e-5, atol=1e-6)


def test_minus_infinity_is_chosen_last(logits: Tensor) -> None:
    def only(logits: Tensor, where: Where) -> Tensor:
        return logits.masked_fill(torch.arange(E) != 5, -torch.inf)

    weights, ids, _ = routed_tokens(Plan.apply(only), logits.float())
    assert ids.tolist() == [[5, 0]] * T
    assert weights.tolist() == [[1, 0]] * T


def test_logits_that_stay_keep_float64_and_nan(logits: Tensor) -> None:
    def on_some(values: Tensor, where: Where) -> Tensor:
        return torch.where(torch.arange(T)[:, None] < 4, values + torch.eye(E)[1], values)

    logits[7, 3] = torch.nan
    weights, ids, natural = routed_tokens(Plan.apply(on_some), logits)
    own_weights, own_ids = ops.route(logits, K, RouterSpec(renormalize="sum"))
    assert torch.equal(weights[4:], own_weights[4:])
    assert torch.equal(ids[4:], own_ids[4:].long())
    assert torch.equal(ids[4:], natural[4:])


# ---- what a plan says of a function, and its files


def test_a_plan_holds_the_name_and_a_hash_of_the_source(tmp_path: Path) -> None:
    plan = Plan.apply(raised, layers=1, groups="de", phase="decode")
    content = json.loads(json.dumps(plan.to_dict()))["rules"][0]
    assert content["function"] == f"{__name__}:raised"
    assert len(content["source"]) == 64
    for name in ("plan.json", "plan.safetensors"):
        plan.save(tmp_path / name)
        again = Plan.load(tmp_path / name)
        assert again == plan
        assert again.hash == plan.hash
        compiled = again.compile([LayerShape(E, K)] * 2, ("de",))
        table = compiled.tables[1]
        assert isinstance(table, TokenTables)
        assert table.functions[0].function is raised
    assert "raised" in str(plan.rules[0])
    assert "decode" in str(plan.rules[0])


def test_other_source_and_modules_that_are_not_imported_are_refused(tmp_path: Path) -> None:
    source = "def own(logits, where):\n    return logits + 1\n"
    (tmp_path / "own_routing.py").write_text(source)
    sys.path.insert(0, str(tmp_path))
    try:
        import own_routing  # type: ignore[import-not-found]

        content = Plan.apply(own_routing.own).to_dict()
        del sys.modules["own_routing"]
        with pytest.raises(PlanError, match="import own_routing"):  # and nothing imports it
            Plan.from_dict(content).compile([LayerShape(E, K)])
        assert "own_routing" not in sys.modules
        other = ModuleType("own_routing")
        other.own = raised  # type: ignore[attr-defined]
        sys.modules["own_routing"] = other
        with pytest.raises(PlanError, match="source of own_routing:own"):
            Plan.from_dict(content).compile([LayerShape(E, K)])
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("own_routing", None)


def test_a_function_without_a_name_steers_and_is_not_saved(tmp_path: Path) -> None:
    one, other = (Plan.apply(lambda logits, where, by=by: logits + by) for by in (1, 2))
    assert one == one + Plan()
    assert one != other
    assert one.hash != other.hash
    for write in (one.to_dict, lambda: one.save(tmp_path / "plan.json"), lambda: one.save(tmp_path / "plan")):
        with pytest.raises(PlanError, match=r"lambda.*cannot be saved"):
            write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Plan.apply(3), "int"),  # type: ignore[arg-type]
        (lambda: Plan.apply(raised) * 2, "apply"),
        (lambda: -Plan.apply(raised), "apply"),
        (lambda: Plan.apply(raised).random_per_token(1), "apply"),
        (lambda: Plan.from_dict({"rules": [{"kind": "apply"}]}), "function"),
        (lambda: Plan.from_dict({"rules": [{"kind": "apply", "function": "os.system"}]}), "os.system"),
        (lambda: Plan.from_dict({"rules": [{"kind": "apply", "functoin": "a:b"}]}), '"function"'),
    ],
)
def test_what_a_plan_refuses(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        make()


def test_a_plan_with_a_function_moves_to_other_layers() -> None:
    plan = Plan.apply(raised, layers=[0])
    assert plan.in_layers([1]).rules == Plan.apply(raised, layers=[1]).rules
    assert plan.random(1, num_experts=E).rules == plan.rules

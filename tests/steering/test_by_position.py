"""Strengths by position: one rule does what one rule per position does, to the bit, and is written as one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_model, tokens

import moe_route as mr
from moe_route.base.files import FileRefusedError
from moe_route.recording import RoutingStatistics, Trace
from moe_route.steering import LayerShape, Plan, PlanError

EXPERTS = {0: {1: 1.0, 2: 0.3}, 1: {3: 1.0}}
NUMBERS = (1.0, 0.7, 0.1, 0.1, 0.4)
VECTOR = torch.randn(64, generator=torch.Generator().manual_seed(3))
Make = Callable[[Any], Plan]
MAKERS: dict[str, Make] = {
    "activate": lambda strength: Plan.activate(EXPERTS, strength=strength, correction=1),
    "deactivate": lambda strength: Plan.deactivate(EXPERTS, strength=strength),
    "bias": lambda strength: Plan.bias(EXPERTS, strength=strength),
    "magnitude": lambda strength: Plan.magnitude(EXPERTS, strength=strength),
    "scale_logits": lambda strength: Plan.scale_logits(EXPERTS, strength=strength),
    "scale_weights": lambda strength: Plan.scale_weights(EXPERTS, strength=strength, when="after"),
    "temperature": lambda strength: Plan.temperature(strength, [0, 1]),
    "add_output": lambda strength: Plan.add_output({0: dict.fromkeys(range(8), VECTOR)}, strength=strength),
}
CHANGES: dict[str, Callable[[Plan], Plan]] = {
    "as it is": lambda plan: plan,
    "times": lambda plan: plan * 0.3 * 0.7,
    "opposite": lambda plan: -plan,
    "only": lambda plan: plan.only("a", "prefill", [0], positions=[0, (2, None)]),
    "absent": lambda plan: plan.only(positions=slice(1, 3), absent=True) if "temp" not in str(plan) else plan,
    "random": lambda plan: plan.random(4, num_experts=8),
    "added": lambda plan: plan + Plan.bias({0: [1]}, strength=0.25) + plan,
}


def one_by_one(make: Make, numbers: Sequence[float] = NUMBERS) -> Plan:
    return sum((make(number).only(positions=at) for at, number in enumerate(numbers)), Plan())


def listed(compiled: Any) -> Any:
    """Everything a compiled plan says, as plain values."""

    def values(table: Any) -> Any:
        if isinstance(table, torch.Tensor):
            return table.tolist()
        if isinstance(table, (list, tuple)):
            return [values(part) for part in table]
        if isinstance(table, dict):
            return {name: values(part) for name, part in table.items()}
        return {name: values(getattr(table, name)) for name in SHOWN if hasattr(table, name)} or table

    return values([compiled.rows, compiled.bounds, compiled.tables, compiled.directions])


SHOWN = ("packed", "base", "parts", "planes", "named", "seed", "wide", "experts", "full", "vectors", "strength")


@pytest.mark.parametrize("change", [*CHANGES])
@pytest.mark.parametrize("name", [*MAKERS])
def test_a_table_is_the_plan_of_one_rule_per_position(name: str, change: str) -> None:
    if name in ("temperature", "add_output") and change == "absent":
        return
    table, rules = CHANGES[change](MAKERS[name](list(NUMBERS))), CHANGES[change](one_by_one(MAKERS[name]))
    assert len(table.rules) < len(rules.rules)
    routers = [LayerShape(8, 2)] * 2
    assert listed(table.compile(routers, ("a", "b"))) == listed(rules.compile(routers, ("a", "b")))
    if change != "added":
        assert not table.diff(rules)


def test_the_tables_hold_the_numbers() -> None:
    """Row by row: the std plane is strength * coefficient, and no rule acts past the table's end."""
    plan = Plan.activate({0: {1: 1.0, 2: 0.5}}, strength=np.array([1.0, 0.5, 0.0, 0.25])) * 2
    compiled = plan.compile([LayerShape(4, 2)])
    rows = [compiled.row("decode", position=at) for at in range(6)]
    assert rows[2] == rows[4] == rows[5] == -1
    (table,) = compiled.tables
    assert table is not None
    planes = table.packed[0][:, 0]
    assert [planes[row].tolist() for row in rows if row >= 0] == [[0, 2, 1, 0], [0, 1, 0.5, 0], [0, 0.5, 0.25, 0]]


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("name", [*MAKERS])
def test_a_model_gives_the_same_bits(name: str, engine: Any) -> None:
    """In prefill with padding and groups, in a batch of one, and step by step; past the table nothing changes."""
    model = tiny_model("qwen3_moe", head=True)
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.int64)
    mask[1, :3] = 0
    table = MAKERS[name](list(NUMBERS)).only(groups=["a"]) + MAKERS[name]([0.5, 2.0]).only(groups=["b"])
    rules = one_by_one(MAKERS[name]).only(groups=["a"]) + one_by_one(MAKERS[name], [0.5, 2.0]).only(groups=["b"])
    by_token = [["a"] * 4 + ["b"] * 4, ["b"] * 5 + ["a"] * 3, ["c"] * 8]
    runs = []
    with mr.attach(model, engine=engine) as routed, torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        for plan in (table, rules):
            seen = []
            with routed.steer(plan):
                for labels in (["a", "b", "c"], by_token):
                    with routed.labels(groups=labels):
                        seen.append(model(ids, attention_mask=mask).logits)
                with routed.labels(groups="a"):
                    seen.append(model(ids[:1]).logits)
                    made = model.generate(ids[:1, :2], max_new_tokens=5, do_sample=False, pad_token_id=0)
                    seen.append(made)
            runs.append(seen)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0][0], plain[0])
    assert torch.equal(runs[0][0][2], plain[2])


def test_tokens_past_the_table_keep_every_bit() -> None:
    """One layer, so that no attention carries a change on."""
    model, ids = tiny_model("qwen3_moe"), tokens(1, 8)
    last = len(model.layers) - 1
    with mr.attach(model) as routed, torch.no_grad():
        plain = model(ids)[0]
        with routed.steer(Plan.force_on({last: [1]}) + Plan.scale_weights({last: [1]}, strength=[3.0] * 8)):
            whole = model(ids)[0]
        with routed.steer(Plan.temperature([9.0, 4.0, 2.0], last)):
            steered = model(ids)[0]
    assert (whole != plain).any(-1).all()
    assert (steered != plain).any(-1).tolist() == [[True] * 3 + [False] * 5]


def test_it_is_saved_as_one_rule(tmp_path: Path) -> None:
    for name, make in MAKERS.items():
        for change in ("as it is", "times", "only"):
            plan = CHANGES[change](make(torch.tensor(NUMBERS, dtype=torch.float64)))
            for suffix in ("json", "safetensors"):
                plan.save(tmp_path / f"{name}.{suffix}")
                loaded = Plan.load(tmp_path / f"{name}.{suffix}")
                assert loaded == plan
                assert loaded.hash == plan.hash
                assert len(loaded.rules) == 1


def edited(path: Path, **keys: Any) -> Path:
    content = json.loads(path.read_text())
    content["rules"][0] |= keys
    path.write_text(json.dumps(content))
    return path


def test_a_file_may_hold_a_strength_beside_the_table(tmp_path: Path) -> None:
    for make in (MAKERS["activate"], MAKERS["scale_logits"]):
        plan = make([1.0, 0.5])
        plan.save(tmp_path / "plan.json")
        assert Plan.load(edited(tmp_path / "plan.json", strength=3.0)) == plan * 3.0


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"by_position": []}, "at least"),
        ({"by_position": ["1"]}, r"by_position\[0\]"),
        ({"by_position": 2}, "by_position"),
        ({"by_positions": [1.0]}, 'did you mean "by_position"'),
    ],
)
def test_files_are_refused_by_key(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    Plan.activate({0: [1]}).save(tmp_path / "plan.json")
    with pytest.raises(FileRefusedError, match=named):
        Plan.load(edited(tmp_path / "plan.json", **keys))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Plan.activate({0: [1]}, strength=[]), "at least"),
        (lambda: Plan.activate({0: [1]}, strength=[1.0, float("inf")]), "finite"),
        (lambda: Plan.activate({0: [1]}, strength="1,2"), "number"),  # type: ignore[arg-type]
        (lambda: Plan.activate({0: [1]}, strength=np.ones((2, 2))), "number"),
        (lambda: Plan.temperature([1.0, 0.0]), "above 0"),
        (lambda: Plan.scale_logits({0: [1]}, strength=[1.0, -1.0]), "0 or more"),
        (lambda: Plan.scale_weights({0: [1]}, strength=[1.0, 0.0]) * -1, "inverted"),
        (lambda: Plan.top_k([1, 2]), "by_position"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_table_is_refused(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        make()


def test_conditions_that_meet_no_number_leave_the_rule_out() -> None:
    plan = Plan.bias({0: [1]}, strength=[1.0, 2.0, 3.0])
    assert plan.only(positions=slice(3, None)) == Plan()
    assert plan.only(positions=range(2, 9)).rules[0].spans == ((2, 3),)
    assert "positions 2" in str(plan.only(positions=range(2, 9)))
    assert "1 to 3" in str(plan)


def a_trace(length: int) -> Trace:
    """One text whose tokens choose experts 0 and t % 3 + 1 in turn."""
    ids = np.array([[[0, t % 3 + 1]] for t in range(length)], np.int8)
    here = np.arange(length, dtype=np.int32)
    nothing = np.zeros(length, np.int32)
    weights = np.ones(ids.shape, np.float16)
    phase = nothing.astype(np.uint8)
    return Trace(("a",), (0,), ("x",), ("one",), nothing, nothing, here, here, phase, ids, weights)


@pytest.mark.parametrize("name", ["activate", "bias", "scale_weights"])
def test_a_trace_explains_the_sum_over_positions(name: str) -> None:
    def make(strength: Any) -> Plan:
        return getattr(Plan, name)({0: [1, 2]}, strength=strength)

    (found,) = make(list(NUMBERS)).explain(a_trace(4)).effects
    alone = one_by_one(make).explain(a_trace(4)).effects
    assert found.tokens == sum(effect.tokens for effect in alone) == 4
    assert found.moved == pytest.approx(sum(effect.moved for effect in alone))
    assert found.frequency == pytest.approx(3 / 8)  # of tokens 0 to 3, expert 1 has two and expert 2 one
    assert found.certainty == {"activate": "estimate", "bias": "at most", "scale_weights": "none"}[name]


def test_statistics_bound_it_by_its_largest_number() -> None:
    counts = np.array([[[10, 6, 4, 0]]])
    statistics = RoutingStatistics.from_token_sums(["x"], counts=counts, tokens=np.array([10]), top_k=2)
    (most,) = Plan.activate({0: [1]}, strength=2.0).explain(statistics).effects
    (found,) = Plan.activate({0: [1]}, strength=[0.5, 2.0, 1.0]).explain(statistics).effects
    assert (found.moved, found.certainty) == (most.moved, "at most")
    assert "positions" in found.note


def test_a_table_that_no_token_meets_is_said() -> None:
    model = tiny_model("qwen3_moe")
    with mr.attach(model) as routed, torch.no_grad():
        plan = Plan.activate({0: [1]}, strength=[1.0] * 4).only(phase="decode")
        with pytest.warns(RuntimeWarning, match="positions 0-3"), routed.steer(plan):
            model(tokens(1, 6))


def test_programs_without_positions_refuse_it(tmp_path: Path) -> None:
    plan = Plan.activate({0: [1]}, strength=[1.0, 0.5], correction=1)
    with pytest.raises(ValueError, match="EasySteer"):
        mr.convert.write(plan, tmp_path / "plan.json", "easysteer")


def test_a_long_table_compiles() -> None:
    """A thousand positions are one rule and one row each."""
    numbers = [0.99**at for at in range(1000)]
    compiled = Plan.activate({1: [3]}, strength=numbers).compile([LayerShape(64, 2)] * 2)
    (rows,) = {table.rows for table in compiled.tables if table is not None}
    assert rows == 1000

"""moe_route.steering: selections are sets, plans are sums, tables say exactly what the rules say."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_route as mr
from moe_route.base import files
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import Force, token_table
from moe_route.steering import ExpertSelection, LayerShape, Plan, PlanError, PlanModel, kinds
from moe_route.steering.cell import Plane
from moe_route.steering.compile import compile_rules
from moe_route.steering.layers import show_numbers
from moe_route.steering.rule import KINDS

LAYERS, EXPERTS, TOP_K = 6, 8, 2
SITES = [LayerShape(EXPERTS, TOP_K)] * LAYERS
GROUPS = ("en", "sw", "bn")
STEERED = ("scale", "bias", "std", "magnitude", "score_bias", "weight_scale", "force")
PARAMETERS = ("temperature", "top_k", "std_correction", "score_bias_weighs", "weight_scale_after")
SELECTION = ExpertSelection(
    {0: [7], 2: [3, 1], 4: [5]},
    scores={2: {3: 0.5, 1: 0.45}},
    threshold=0.4,
    description="math",
    num_experts=[EXPERTS] * LAYERS,
)


def plane(compiled, layer, name):
    """One plane [rows, E] of a layer's packed tables, or None where it is not there."""
    tables, mask, _, _ = compiled.tables[layer].packed
    present = [entry for bit, entry in enumerate(STEERED) if mask >> bit & 1]
    return tables[:, present.index(name)].numpy() if name in present else None


def parameter(compiled, layer, name):
    return compiled.tables[layer].packed[2][:, PARAMETERS.index(name)].tolist()


def tables_of(compiled):
    """Everything a compiled plan says, as comparable plain values."""

    def listed(packed):
        return [value.tolist() if isinstance(value, torch.Tensor) else value for value in packed]

    return compiled.rows.tolist(), [table and listed(table.packed) for table in compiled.tables]


# -- selections

experts_by_layer = st.dictionaries(
    st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), max_size=4), max_size=4
)
selections = experts_by_layer.map(lambda chosen: ExpertSelection(chosen, num_experts=[EXPERTS] * LAYERS))


def test_selection_is_a_mapping_whose_length_counts_experts():
    assert len(SELECTION) == 4
    assert list(SELECTION) == [0, 2, 4]
    assert SELECTION[2] == (1, 3)
    assert dict(SELECTION) == {0: (7,), 2: (1, 3), 4: (5,)} == SELECTION
    assert len(SELECTION.keys()) == len(SELECTION.items()) == len(SELECTION.values()) == 3
    assert SELECTION.pairs == ((0, 7), (2, 1), (2, 3), (4, 5))
    assert SELECTION.counts == {0: 1, 2: 2, 4: 1}
    assert not ExpertSelection({3: []})
    assert 3 not in ExpertSelection({3: []})


@given(selections, selections)
def test_selections_combine_like_sets_of_pairs(a, b):
    pairs_a, pairs_b = set(a.pairs), set(b.pairs)
    assert set((a | b).pairs) == pairs_a | pairs_b
    assert set((a & b).pairs) == pairs_a & pairs_b
    assert set((a - b).pairs) == pairs_a - pairs_b
    assert set((a ^ b).pairs) == pairs_a ^ pairs_b
    assert len(a | b) + len(a & b) == len(a) + len(b)
    assert (a | b) == (b | a)
    assert hash(a | b) == hash(b | a)


@given(selections, st.integers(0, 2**31))
def test_random_control_has_as_many_experts_in_each_layer_and_is_seeded(selection, seed):
    control = selection.random_like(seed)
    assert control.counts == selection.counts
    assert control == selection.random_like(seed)
    assert all(0 <= expert < EXPERTS for _, expert in control.pairs)


def test_random_control_reaches_every_expert_alike():
    drawn = [
        expert
        for seed in range(800)
        for expert in ExpertSelection({1: [0, 1]}, num_experts=EXPERTS).random_like(seed)[1]
    ]
    counts = np.bincount(drawn, minlength=EXPERTS)
    assert counts.sum() == 1600
    assert counts.min() > 150
    assert counts.max() < 250


def test_selection_keeps_scores_through_operations():
    kept = SELECTION & {2: [3], 5: [0]}
    assert kept.scores == {2: {3: 0.5}}
    assert SELECTION.restrict([2]).scores == {2: {1: 0.45, 3: 0.5}}
    assert (SELECTION | SELECTION).threshold == 0.4
    assert (SELECTION | {1: [1]}).threshold is None


@given(selections)
def test_selection_comes_back_from_its_dict(selection):
    again = ExpertSelection.from_dict(json.loads(json.dumps(selection.to_dict())))
    assert again == selection
    assert again.to_dict() == selection.to_dict()


def test_selection_saves_loads_and_shows_itself(tmp_path):
    SELECTION.save(tmp_path / "s")
    again = ExpertSelection.load(tmp_path / "s")
    assert again.to_dict() == SELECTION.to_dict()
    assert "layer 2: 1 (0.450), 3 (0.500)" in repr(again)
    assert "threshold 0.4" in repr(again)
    with pytest.raises(files.FileRefusedError, match="not 'plan'"):
        Plan.load(tmp_path / "s")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertSelection({0: [9]}, num_experts=8), "layer 0 has 8 experts"),
        (lambda: ExpertSelection({0: [-1]}), "no expert -1"),
        (lambda: ExpertSelection({7: [1]}, num_experts=[8] * 6), "there is no layer 7"),
        (lambda: ExpertSelection({-1: [1]}), "no layer -1"),
        (lambda: ExpertSelection({0: [1]}).random_like(), "pass num_experts"),
        (lambda: SELECTION | ExpertSelection({0: [1]}, num_experts=[4, 4]), "another model"),
        (lambda: ExpertSelection.from_dict({"rules": []}), 'no key "rules"'),
    ],
)
def test_selection_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_are_shown_as_runs():
    assert show_numbers([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"
    assert show_numbers([]) == ""


# -- rules and tables


def test_soft_activation_fills_the_std_plane_of_its_layers_only():
    compiled = Plan.activate(SELECTION, layers=range(1, 5), strength=0.5).compile(SITES)
    assert [table is None for table in compiled.tables] == [True, True, False, True, False, True]
    assert plane(compiled, 2, "std").tolist() == [[0, 0.5, 0, 0.5, 0, 0, 0, 0]]
    assert compiled.rows.tolist() == [[[0]], [[0]]]
    assert compiled.rows.dtype == torch.int32
    assert not compiled.is_null
    assert compiled.row("decode") == 0


def test_deactivate_is_activate_with_the_sign_turned():
    assert (
        Plan.deactivate(SELECTION, strength=0.5) == Plan.activate(SELECTION, strength=-0.5) == -Plan.activate(SELECTION)
    )


@pytest.mark.parametrize(
    ("plan", "name", "value"),
    [
        (Plan.bias({0: [3]}, strength=2.0), "bias", 2.0),
        (Plan.bias({0: {3: 0.5}}, strength=2.0), "bias", 1.0),
        (Plan.magnitude({0: {3: 0.25}}, strength=2.0), "magnitude", 0.5),
        (Plan.scale_logits({0: [3]}, strength=3.0), "scale", 3.0),
        (Plan.scale_logits({0: {3: 4.0}}) * 0.5, "scale", 2.0),
        (Plan.scale_weights({0: [3]}, strength=0.0), "weight_scale", 0.0),
        (Plan.bias({0: [3]}, strength=0.1, on="choice"), "score_bias", 0.1),
        (Plan.force_on({0: [3]}), "force", Force.ON_PAPER),
        (Plan.force_on({0: [3]}, weight="steermoe"), "force", Force.ON_STEERMOE),
        (Plan.force_on({0: [3]}, weight="natural"), "force", Force.ON_NATURAL),
        (Plan.force_off({0: [3]}), "force", Force.OFF_PAPER),
        (Plan.force_off({0: [3]}, weight="steermoe"), "force", Force.OFF_STEERMOE),
        (Plan.force_off({0: [3]}, weight="natural"), "force", Force.OFF_NATURAL),
        (Plan.forbid({0: [3]}), "force", Force.FORBID),
    ],
)
def test_every_rule_fills_its_plane_with_its_value(plan, name, value):
    compiled = plan.compile(SITES)
    found = plane(compiled, 0, name)
    neutral = 1.0 if name in ("scale", "weight_scale") else 0.0
    assert found.shape == (1, EXPERTS)
    assert found[0, 3] == np.float32(value)
    assert (np.delete(found[0], 3) == neutral).all()
    assert [entry for entry in STEERED if plane(compiled, 0, entry) is not None] == [name]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("plan", "name", "value"),
    [
        (Plan.temperature(2.0), "temperature", 2.0),
        (Plan.temperature(2.0) * 2, "temperature", 4.0),
        (Plan.top_k(1), "top_k", 1.0),
        (Plan.activate({0: [1]}, correction=1), "std_correction", 1.0),
        (Plan.bias({0: [1]}, on="score"), "score_bias_weighs", 1.0),
        (Plan.scale_weights({0: [1]}, strength=2, when="after"), "weight_scale_after", 1.0),
    ],
)
def test_row_parameters(plan, name, value):
    compiled = plan.compile(SITES)
    assert parameter(compiled, 0, name) == [value]
    assert Plan.from_dict(plan.to_dict()) == plan


# a plan of each kind of rule: a new kind takes its place here
def as_they_are(logits, where):
    return logits


OF_EACH_KIND = {
    "activate": Plan.activate({0: [1]}),
    "bias": Plan.bias({0: [1]}),
    "magnitude": Plan.magnitude({0: [1]}),
    "scale_logits": Plan.scale_logits({0: [1]}, strength=2),
    "scale_weights": Plan.scale_weights({0: [1]}, strength=2),
    "temperature": Plan.temperature(2),
    "force_on": Plan.force_on({0: [1]}),
    "force_off": Plan.force_off({0: [1]}),
    "forbid": Plan.forbid({0: [1]}),
    "top_k": Plan.top_k(1),
    "remap": Plan.remap({0: {1: 2}}),
    "replace_scores": Plan.replace_scores({0: {1: 0.5}}),
    "reserve_slot": Plan.reserve_slot({0: [1]}),
    "fix_choice": Plan.fix_choice({0: [1, 2]}),
    "replay": Plan.replay(torch.zeros(1, 4, LAYERS, 1, dtype=torch.int64)),
    "gumbel": Plan.gumbel(1),
    "apply": Plan.apply(as_they_are),
    "add_output": Plan.add_output({0: {1: [0.5, -2.0]}}, strength=3, weight="full"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rule_steers_is_written_and_shown(kind, tmp_path):
    plan = OF_EACH_KIND[kind]
    assert [rule.kind for rule in plan.rules] == [kind]
    assert not plan.compile(SITES).is_null
    for name in ("plan.json", "plan.safetensors"):
        plan.save(tmp_path / name)
        assert Plan.load(tmp_path / name) == plan
    assert all(plan.rules[0].shown[:2])


def test_remap_and_dropping():
    compiled = Plan.remap({1: {2: 5, 3: -1}}).compile(SITES)
    remap = compiled.tables[1].packed[3]
    assert remap.tolist() == [[0, 1, 5, -1, 4, 5, 6, 7]]
    assert remap.dtype == torch.int32


def test_off_wins_over_on_and_forbid_wins_over_all():
    on, off, forbid = Plan.force_on({0: [1, 2, 3]}), Plan.force_off({0: [2, 3]}), Plan.forbid({0: [3]})
    found = plane((on + off + forbid).compile(SITES), 0, "force")[0]
    assert found[1:4].tolist() == [Force.ON_PAPER, Force.OFF_PAPER, Force.FORBID]


def test_strengths_add_and_factors_multiply():
    plan = Plan.activate({0: [1]}, strength=0.5) + Plan.activate({0: [1, 2]}, strength=0.25)
    assert plane(plan.compile(SITES), 0, "std")[0, 1:3].tolist() == [0.75, 0.25]
    scaled = Plan.scale_logits({0: [1]}, strength=2.0) + Plan.scale_logits({0: [1]}, strength=3.0)
    assert plane(scaled.compile(SITES), 0, "scale")[0, 1] == 6.0


def test_strengths_of_any_size_add_exactly():
    plan = sum(Plan.bias({0: [1]}, strength=value) for value in (1e16, 1.5, -5e15, -5e15))
    assert plane(plan.compile(SITES), 0, "bias")[0, 1] == 1.5


def test_conditions_pick_rows_by_phase_and_group():
    plan = Plan.activate({0: [1]}).only(groups=["sw", "bn"]) + Plan.activate({0: [2]}).only(phase="prefill")
    compiled = plan.compile(SITES, GROUPS)
    std = plane(compiled, 0, "std")
    assert compiled.rows.shape == (2, 4, 1)
    assert compiled.row("decode") == compiled.row("decode", 0) == -1
    assert (
        std[compiled.row("prefill")].tolist() == std[compiled.row("prefill", 0)].tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0]
    )
    assert std[compiled.row("prefill", 1)].tolist() == [0, 0.5, 0.5, 0, 0, 0, 0, 0]
    assert std[compiled.row("decode", 2)].tolist() == [0, 0.5, 0, 0, 0, 0, 0, 0]
    assert compiled.rows.unique().tolist() == [-1, 0, 1, 2]
    assert std.shape[0] == 3


def test_equal_rows_are_one_row():
    plan = sum(Plan.activate({0: [1]}).only(groups=group) for group in GROUPS)
    compiled = plan.compile(SITES, GROUPS)
    assert compiled.rows.tolist() == [[[-1], [0], [0], [0]]] * 2
    assert plane(compiled, 0, "std").shape == (1, EXPERTS)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan.activate(SELECTION) * 0,
        Plan.activate({0: [1]}) - Plan.activate({0: [1]}),
        Plan.temperature(1),
        Plan.top_k(TOP_K),
    ],
)
def test_a_plan_that_steers_nothing_has_no_tables(plan):
    compiled = plan.compile(SITES, GROUPS)
    assert compiled.is_null
    assert compiled.tables == [None] * LAYERS
    assert (compiled.rows == -1).all()


def test_layers_of_different_sizes():
    routers = [LayerShape(4, 1), LayerShape(8, 2)]
    compiled = Plan.activate({0: [3], 1: [7]}).compile(routers)
    assert plane(compiled, 0, "std").shape == (1, 4)
    assert plane(compiled, 1, "std").shape == (1, 8)
    with pytest.raises(PlanError, match="expert 7 of layer 0, which has 4 experts"):
        Plan.activate({0: [7]}).compile(routers)


def test_layers_of_a_publication():
    assert mr.layers(8, 35) == range(8, 36)
    assert mr.layers(8, 35, base=1) == range(7, 35)
    assert mr.layers(3, base=1) == range(2, 3)
    assert Plan.activate([1], layers=mr.layers(1, 3, base=1)) == Plan.activate([1], layers=range(3))
    for first, last, base in ((0, 3, 1), (4, 3, 0), (-1, None, 0), (1, 3, 2)):
        with pytest.raises(ValueError, match=r"base must be 0 or 1|count upwards from"):
            mr.layers(first, last, base=base)


REFUSED = [
    (
        lambda: Plan.activate({48: [1]}).compile(SITES),
        r"layer 48, but the model has 6 MoE layers \(0-5\).*base=1",
    ),
    (lambda: Plan.activate({0: [8]}).compile(SITES), r"expert 8 of layer 0, which has 8 experts \(0-7\)"),
    (lambda: Plan.remap({0: {1: 8}}).compile(SITES), "expert 8 of layer 0"),
    (lambda: Plan.temperature(2, layers=9).compile(SITES), "layer 9"),
    (lambda: Plan.activate({0: [1]}).only(groups="xx").compile(SITES, GROUPS), "'xx', which is not among the groups"),
    (lambda: Plan.activate({0: [1]}).compile(SITES, ["a", "a"]), "repeat"),
    (lambda: Plan.activate(SELECTION).compile(SITES[:3]), "another model"),
    (lambda: Plan.forbid([*range(8)], layers=0).compile(SITES), "forbids all 8 experts of layer 0"),
    (lambda: Plan.top_k(9).compile(SITES), "more than the 8 of layer 0"),
    (lambda: (Plan.top_k(1) + Plan.top_k(2)).compile(SITES), "top-1 and top-2 at once"),
    (lambda: (Plan.force_on({0: [1]}) + Plan.force_on({0: [1]}, weight="natural")).compile(SITES), "two weights"),
    (
        lambda: (Plan.activate({0: [1]}) + Plan.activate({0: [2]}, correction=1)).compile(SITES),
        "'population' and 'sample'",
    ),
    (lambda: (Plan.remap({0: {1: 2}}) + Plan.remap({0: {1: 3}})).compile(SITES), "remapped to two experts"),
    (lambda: (Plan.bias({0: [1]}, strength=3e38) * 2).compile(SITES), "more than float32 holds"),
    (lambda: Plan.activate({}), "no experts: lower its threshold"),
    (lambda: Plan.activate(SELECTION, layers=[3]), "no experts in layers 3"),
    (lambda: Plan.activate([1, 2]), "experts without layers"),
    (lambda: Plan.activate({0: 1}), "mapping from layer"),
    (lambda: Plan.activate({0: [1.5]}), "mapping from layer"),
    (lambda: Plan.activate({0: [-1]}), "no expert -1"),
    (lambda: Plan.activate({-1: [1]}), "no layer -1"),
    (lambda: Plan.activate({0: [1]}, layers=[]), "no layer"),
    (lambda: Plan.activate([1], layers=[-1]), "no layer -1"),
    (lambda: Plan.activate({0: [1]}, correction=2), "correction must be 0"),
    (lambda: Plan.activate({0: [1]}, strength=float("nan")), "strength must be finite"),
    (lambda: Plan.activate({0: [1]}, strength="much"), "strength must be a number"),
    (lambda: Plan.bias({0: [1]}, strength=float("-inf")), "use Plan.forbid"),
    (lambda: Plan.force_on({0: [1]}, weight="hard"), "no mode 'hard': use one of 'paper', 'steermoe', 'natural'"),
    (lambda: Plan.temperature(0), "above 0"),
    (lambda: Plan.top_k(0), r"from 1 to the experts of the layer \(at most 64\)"),
    (lambda: Plan.top_k(1.5), "whole number"),
    (lambda: Plan.scale_logits({0: [1]}, strength=-1), "0 or more"),
    (lambda: Plan.scale_weights({0: [1]}, strength=0) * -1, "cannot be inverted"),
    (lambda: Plan.force_on({0: [1]}) * 0.5, "no strength to scale"),
    (lambda: Plan.forbid({0: [1]}) * 0.5, "no strength to scale"),
    (lambda: Plan.top_k(1) * 0.5, "no strength to scale"),
    (lambda: Plan.activate({0: [1]}).only(phase="training"), "no phase 'training'"),
    (lambda: Plan.activate({0: [1]}).only(groups=[]), "at least one"),
    (lambda: Plan.activate({0: [1]}).random(), "pass num_experts"),
    (lambda: Plan.activate({0: [1]}).in_layers(range(3, 5)), "no experts in layers 3-4"),
    (lambda: -Plan.forbid({0: [1]}), "no opposite"),
    (lambda: Plan.from_dict({"experts": {}}), 'no key "experts"'),
    (lambda: Plan.from_dict({"rules": [{"kind": "shout"}]}), r'rules\[0\].kind is "shout"'),
    (lambda: Plan.from_dict({"rules": [{"kind": "activate", "experts": [1]}]}), r"experts is \[1\]: give a table"),
    (lambda: Plan.activate({0: [1]}).compile(SITES, GROUPS).row("prefill", 3), "no row"),
    (lambda: Plan.force_on({0: [1]}, weight=""), "no mode ''"),
    (lambda: _edited(ghoups=["en"]), 'no key "ghoups": did you mean "groups"'),
    (lambda: _edited(value=2), 'no key "value": it has'),
    (lambda: _edited(mode="Sample"), 'mode is "Sample": give "pop'),
    (lambda: _edited(mode=""), 'mode is ""'),
    (lambda: _edited(strength="2"), 'strength is "2": give a number'),
    (lambda: _edited(strength=True), "strength is true"),
    (lambda: _edited(absent="false"), 'absent is "false"'),
    (lambda: _edited(layers="12"), 'layers is "12"'),
    (lambda: _edited(kind="activat"), 'did you mean "activate"'),
    (lambda: _edited(experts={"x": [1]}), r"experts\.x"),
    (lambda: Plan.from_dict({"rules": [], "modle": {}}), 'no key "modle": did you mean "model"'),
    (lambda: Plan.from_dict({"rules": [], "model": {"nam": "a"}}), 'no key "nam": did you mean "name"'),
    (lambda: Plan.from_dict(_with_table({"lenghts": [4]})), 'no key "lenghts": did you mean "lengths"'),
]


def _edited(**change):
    """A plan as in a file, with one key of its rule changed."""
    return Plan.from_dict({"rules": [{"kind": "activate", "experts": {"0": [1]}, **change}]})


def _with_table(change):
    """A plan with a table as in a file, with one key of the table changed."""
    content = Plan.replay(torch.zeros(1, 4, LAYERS, 1, dtype=torch.int64)).to_dict()
    return {**content, "tables": {name: {**table, **change} for name, table in content["tables"].items()}}


def test_a_plan_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "mine.json").write_text(
        '{"moe_route": "plan", "schema": 1, "rules": [{"kind": "forbid", "lyers": [1]}]}'
    )
    with pytest.raises(PlanError, match=r"mine.json: .*\"lyers\": did you mean \"layers\""):
        Plan.load(tmp_path / "mine.json")


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_plans_refuse_with_the_mend(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_too_many_forced_or_forbidden_experts_are_logged(caplog):
    Plan.forbid([*range(7)], layers=0).compile(SITES)
    Plan.force_on([0, 1, 2], layers=1).compile(SITES)
    assert "1 experts are allowed for 2 slots" in caplog.text
    assert "more experts are forced on than its top-2" in caplog.text


# -- algebra

some_experts = st.dictionaries(
    st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=3), min_size=1, max_size=3
)
strengths = st.floats(-8, 8, allow_nan=False).map(lambda value: round(value, 3))
soft_plans = st.one_of(
    st.builds(Plan.activate, some_experts, strength=strengths),
    st.builds(Plan.bias, some_experts, strength=strengths),
    st.builds(Plan.magnitude, some_experts, strength=strengths),
    st.builds(Plan.scale_logits, some_experts, strength=st.floats(0.1, 8)),
    st.builds(Plan.temperature, st.floats(0.1, 8)),
)
conditions = st.fixed_dictionaries(
    {},
    optional={
        "groups": st.sets(st.sampled_from(GROUPS), min_size=1).map(list),
        "phase": st.sampled_from(["prefill", "decode"]),
        "layers": st.sets(st.integers(0, LAYERS - 1), min_size=1).map(list),
    },
)
hard_plans = st.one_of(
    st.builds(Plan.force_on, some_experts),
    st.builds(Plan.force_off, some_experts),
    st.builds(Plan.forbid, some_experts),
)
conditioned = st.builds(lambda plan, only: plan.only(**only), soft_plans | hard_plans, conditions)
soft = st.builds(lambda plan, only: plan.only(**only), soft_plans, conditions)
POWERS = st.sampled_from([-2.0, -1.0, -0.5, 0.25, 0.5, 2.0])


@given(conditioned, conditioned, conditioned)
def test_sum_does_not_depend_on_order(a, b, c):
    assert a + b == b + a
    assert (a + b) + c == a + (b + c) == sum([c, a, b])
    assert (a + b).hash == (b + a).hash
    assert hash(a + b) == hash(b + a)
    assert a + Plan() == a == sum([a])


@settings(deadline=None)
@given(conditioned, conditioned)
def test_sum_compiles_alike_in_any_order(a, b):
    assert tables_of((a + b).compile(SITES, GROUPS)) == tables_of((b + a).compile(SITES, GROUPS))


@settings(deadline=None)
@given(soft, soft, POWERS, POWERS)
def test_scaling_distributes_and_composes(a, b, x, y):
    assert (a + b) * x == a * x + b * x == x * (a + b)
    assert (a * x) * y == a * (x * y)
    assert a * 1 == a
    assert -a == a * -1
    assert tables_of((a * 0).compile(SITES, GROUPS)) == tables_of(Plan().compile(SITES, GROUPS))


@settings(deadline=None)
@given(soft)
def test_twice_a_plan_is_the_plan_and_itself(a):
    rows, tables = tables_of((a + a).compile(SITES, GROUPS))
    other_rows, other_tables = tables_of((a * 2).compile(SITES, GROUPS))
    assert rows == other_rows
    for one, two in zip(tables, other_tables, strict=True):
        assert (one is None) == (two is None)
        for left, right in zip(one or (), two or (), strict=True):
            assert left == right or np.allclose(left, right, rtol=1e-6)


@given(conditioned, conditions, conditions)
def test_conditions_narrow_in_any_order(plan, one, two):
    assert plan.only(**one).only(**two) == plan.only(**two).only(**one)
    assert plan.only(**one).only(**one) == plan.only(**one)
    assert plan.only() == plan


@settings(deadline=None)
@given(st.lists(conditioned, max_size=3).map(sum).filter(bool))
def test_plans_come_back_from_dict_and_file(tmp_path_factory, plan):
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    assert again.hash == plan.hash
    assert again.describe() == plan.describe()
    assert tables_of(again.compile(SITES, GROUPS)) == tables_of(plan.compile(SITES, GROUPS))


def test_plans_are_immutable_and_differ_by_content():
    plan = Plan.activate({0: [1]})
    with pytest.raises(AttributeError, match="immutable"):
        plan.rules = ()
    with pytest.raises(AttributeError, match="immutable"):
        SELECTION.threshold = 0.1
    assert copy.deepcopy(plan) == plan == pickle.loads(pickle.dumps(plan))
    assert copy.deepcopy(SELECTION).to_dict() == SELECTION.to_dict()
    others = [
        Plan.activate({0: [2]}),
        plan * 0.5,
        plan.only(phase="decode"),
        plan.for_model("other"),
        Plan.force_on({0: [1]}),
        Plan(),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 7
    assert all(plan != other for other in others)
    assert not Plan()
    assert plan
    assert plan != "plan"
    with pytest.raises(TypeError):
        plan * "2"
    with pytest.raises(TypeError):
        plan + 1


def test_a_truncated_plan_file_is_refused(tmp_path):
    Plan.activate(SELECTION).save(tmp_path / "plan")
    data = (tmp_path / "plan").read_bytes()
    for length in range(0, len(data), 37):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(files.FileRefusedError):
            Plan.load(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(pickle.dumps({"rules": []}))
    with pytest.raises(files.FileRefusedError, match="pickle"):
        Plan.load(tmp_path / "cut")


# -- controls and models


def test_random_control_keeps_numbers_strengths_and_conditions():
    plan = Plan.activate(SELECTION, layers=range(1, 5)).only(groups="sw") + Plan.force_off({5: [0, 1]})
    control = plan.random(3)
    assert control == plan.random(3)
    assert control != plan
    for rule, drawn in zip(
        sorted(plan.rules, key=lambda r: r.kind), sorted(control.rules, key=lambda r: r.kind), strict=True
    ):
        assert (rule.kind, rule.strength, rule.layers, rule.groups) == (
            drawn.kind,
            drawn.strength,
            drawn.layers,
            drawn.groups,
        )
        assert [(layer, len(pairs)) for layer, pairs in rule.experts] == [
            (layer, len(pairs)) for layer, pairs in drawn.experts
        ]
    selected = {layer: tuple(expert for expert, _ in pairs) for layer, pairs in control.rules[0].experts}
    assert SELECTION.random_like(3) == selected, "the plan's and the selection's random control are the same draw"


def test_layer_control_uses_the_experts_found_there():
    middle = Plan.activate(SELECTION, layers=[2], strength=0.25)
    assert middle.in_layers([0, 4]) == Plan.activate(SELECTION, layers=[0, 4], strength=0.25)
    assert "control (other layers) of math" in middle.in_layers([0]).describe()


def test_other_controls():
    plan = Plan.activate(SELECTION, layers=range(5), strength=0.5) + Plan.force_on({5: [1]})
    assert -plan == Plan.deactivate(SELECTION, layers=range(5), strength=0.5) + Plan.force_off({5: [1]})
    soft_only = Plan.activate(SELECTION, layers=range(5), strength=0.5)
    other = soft_only.with_experts({3: [6]})
    assert other.rules == Plan.activate({3: [6]}, layers=range(5), strength=0.5).rules
    assert (
        Plan.scale_weights({0: [1]}, strength=2).with_experts({1: [2]}).rules
        == Plan.scale_weights({1: [2]}, strength=2).rules
    )


def test_a_plan_knows_its_model():
    plan = Plan.activate(SELECTION)
    assert plan.model == PlanModel(num_experts=(EXPERTS,) * LAYERS)
    marked = plan.for_model("demo", config_hash="abc", num_experts=[EXPERTS] * LAYERS)
    marked.check_model("demo", config_hash="abc", num_experts=[EXPERTS] * LAYERS)
    marked.check_model("/local/folder/demo", config_hash="abc")
    marked.check_model()
    for wrong in ({"name": "else"}, {"config_hash": "abd"}, {"num_experts": [4]}):
        with pytest.raises(PlanError, match="made for another model"):
            marked.check_model(**wrong)
    with pytest.raises(PlanError, match=r"\(configuration: 'a{12}', here 'b{12}'\)"):
        plan.for_model(config_hash="a" * 64).check_model(config_hash="b" * 64)
    with pytest.raises(PlanError, match="another model"):
        marked + plan.for_model("else")
    assert (marked + Plan.temperature(2.0)).model == marked.model
    marked.for_model().check_model("else", num_experts=[4])


def test_a_sum_of_many_plans_puts_them_in_order_once(monkeypatch):
    plans = [Plan.bias({0: [1]}, strength=float(n)).only(positions=n) for n in range(1, 300)]
    asked, canonical = [], files.canonical_json
    monkeypatch.setattr(files, "canonical_json", lambda value: asked.append(1) or canonical(value))
    plan = sum(plans)
    assert len(plan.rules) == 299
    assert len(asked) == 299
    assert plan == sum(reversed(plans))


def test_how_much_is_strength_and_cannot_be_taken_for_layers():
    for make in (Plan.activate, Plan.deactivate, Plan.bias, Plan.magnitude, Plan.scale_logits, Plan.scale_weights):
        assert make({0: [1]}, strength=2.0)
        with pytest.raises(TypeError):
            make({0: [1]}, None, 2.0)


def test_notebooks_show_the_rules_as_a_table():
    shown = (Plan.activate(SELECTION).only(groups="<sw>") + Plan.forbid({0: [1]}))._repr_html_()
    assert shown.count("<tr>") == 3
    assert "activate 4 experts in layers 0, 2, 4" in shown
    assert "groups &lt;sw&gt;" in shown
    many = sum(Plan.bias({0: [1]}, strength=float(n)) for n in range(1, 60))
    assert "and 9 more rules" in many._repr_html_()


def test_plans_describe_themselves():
    plan = Plan.activate(SELECTION, strength=0.5).only(groups=["sw"], phase="prefill") + Plan.deactivate(
        {1: [2]}, strength=1
    )
    shown = plan.describe()
    assert "activate 4 experts in layers 0, 2, 4: logit + 0.5 * std(logits) [groups sw; prefill only]" in shown
    assert "deactivate 1 expert in layer 1: logit - 1 * std(logits)" in shown
    assert "math" in shown
    assert plan.hash[:12] in shown
    assert "6 MoE layers of 8 experts" in shown
    assert repr(Plan()) == "Plan(nothing)"
    assert "activate 4 experts" in repr(plan)
    assert "weight * 0.5 to 2 (before renormalization)" in repr(Plan.scale_weights({0: {1: 0.5, 2: 2.0}}))
    assert "top k in every layer: 2 experts per token" in repr(Plan.top_k(2))


# -- through the gate: a plan does to routing what its equations say


def natural(logits, k=TOP_K):
    """Ids and renormalized softmax weights [T, k] of logits in plain torch, ties to the lower index."""
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return torch.softmax(values[:, :k], -1), ids[:, :k]


def steered(backend, plan, logits, layer=0, groups=(), phase="prefill", group=None):
    compiled = plan.compile(SITES, groups)
    number = -1 if group is None else groups.index(group)
    tokens = token_table(len(logits), steering_row=compiled.row(phase, number))
    spec = RouterSpec(renormalize="sum")
    weights, ids = backend.route(logits, TOP_K, spec, steering=compiled.tables[layer], tokens=tokens)
    return weights, ids.long()


def assert_same(found, expected):
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.fixture
def logits():
    return torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.parametrize("correction", [0, 1])
def test_soft_steering_is_equation_four(backend, logits, correction):
    expected = logits.clone()
    expected[:, [1, 5]] += 0.7 * logits.std(-1, correction=correction, keepdim=True)
    assert_same(
        steered(backend, Plan.activate({0: [1, 5]}, strength=0.7, correction=correction), logits), natural(expected)
    )


def test_forced_experts_are_chosen_first_and_weigh_as_the_largest(backend, logits):
    weights, ids = steered(backend, Plan.force_on({0: [6]}), logits)
    largest = logits.max(-1)
    other = logits.clone()
    other[:, 6] = -torch.inf
    assert (ids[:, 0] == 6).all()
    torch.testing.assert_close(ids[:, 1], natural(other)[1][:, 0])
    second = other.max(-1).values
    torch.testing.assert_close(
        weights, torch.softmax(torch.stack([largest.values, second], -1), -1), rtol=1e-5, atol=1e-6
    )


def test_off_and_forbidden_experts_are_not_chosen_while_there_are_others(backend, logits):
    without = logits.clone()
    without[:, [0, 3]] = -torch.inf
    for plan in (Plan.force_off({0: [0, 3]}), Plan.forbid({0: [0, 3]})):
        assert_same(steered(backend, plan, logits), natural(without))
    assert_same(steered(backend, Plan.forbid({0: [0, 3]}) + Plan.force_on({0: [0, 3]}), logits), natural(without))


def test_other_rules_through_the_gate(backend, logits):
    raised = logits.clone()
    raised[:, 2] += 1.5
    assert_same(steered(backend, Plan.bias({0: [2]}, strength=1.5), logits), natural(raised))
    grown = logits.clone()
    grown[:, 2] += 0.5 * logits[:, 2].abs()
    assert_same(steered(backend, Plan.magnitude({0: [2]}, strength=0.5), logits), natural(grown))
    scaled = logits.clone()
    scaled[:, 2] *= 3
    assert_same(steered(backend, Plan.scale_logits({0: [2]}, strength=3), logits), natural(scaled))
    assert_same(steered(backend, Plan.temperature(2.5), logits), natural(logits / 2.5))
    weights, ids = steered(backend, Plan.top_k(1), logits)
    assert (ids[:, 1] == -1).all()
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]).expand(64, 2))


def test_conditions_through_the_gate(backend, logits):
    plan = Plan.force_on({0: [6]}).only(groups="sw", phase="decode", layers=0)
    assert (steered(backend, plan, logits, groups=GROUPS, phase="decode", group="sw")[1][:, 0] == 6).all()
    for phase, group in [("prefill", "sw"), ("decode", "en"), ("decode", None)]:
        assert_same(steered(backend, plan, logits, groups=GROUPS, phase=phase, group=group), natural(logits))


def test_an_opposite_plan_cancels(backend, logits):
    plan = Plan.activate({0: [1]}, strength=0.7) + Plan.bias({0: [2]}, strength=2.0)
    assert_same(steered(backend, plan - plan, logits), natural(logits))


def test_all_random_sets_are_enumerated():
    plan = (
        Plan.activate({0: [1], 2: [0, 3]}, strength=0.5) + Plan.forbid({0: [1], 2: [0, 3]}).only(phase="decode")
    ).for_model(num_experts=[3, 3, 4])
    others = plan.all_random()
    found = {tuple((layer, tuple(e for e, _ in pairs)) for layer, pairs in other.rules[0].experts) for other in others}
    assert len(others) == len(found) == 3 * 6 - 1
    assert ((0, (1,)), (2, (0, 3))) not in found
    assert all(len({rule.experts for rule in other.rules}) == 1 for other in others)
    assert all(other.rules[0].strength in (0.5, 1.0) for other in others)
    with pytest.raises(PlanError, match="17 other sets, the limit is 16"):
        plan.all_random(16)
    with pytest.raises(PlanError, match="same experts"):
        (plan + Plan.activate({1: [0]})).all_random()
    with pytest.raises(PlanError, match="pass num_experts"):
        Plan.activate({0: [1]}).all_random()
    assert len(Plan.activate({0: [1]}).all_random(num_experts=4)) == 3


# -- a kind of rule is a class


def test_a_rule_of_ones_own_is_one_class(monkeypatch, tmp_path):
    monkeypatch.setattr("moe_route.steering.rule.KINDS", dict(KINDS))

    class Dampen(kinds.Additive):
        """``z_e -= strength * c_e * |z_e|``."""

        kind = "dampen"
        shows = "logit - {x} * |logit|"
        modes = {"": Plane("magnitude")}  # noqa: RUF012

        def write(self, cell, pairs):
            super().write(cell, tuple((expert, -coefficient) for expert, coefficient in pairs))

    plan = Plan([Dampen.of({0: [1]}, strength=0.5)]) + Plan.magnitude({0: [2]})
    assert plane(plan.compile(SITES), 0, "magnitude")[0].tolist() == [0, -0.5, 0.5, 0, 0, 0, 0, 0]
    assert str(plan.rules[0]) == "dampen 1 expert in layer 0: logit - 0.5 * |logit|"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [change.kind for change in plan.diff(plan * 2).changes] == ["dampen", "magnitude"]


def test_no_kind_is_compared_with_its_name():
    package = Path(mr.__file__).parent
    compared = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            names = {part.value for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)}
            if any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in sides) and names & KINDS.keys():
                compared.append(f"{path.relative_to(package)}:{node.lineno}")
    assert not compared


def test_a_rule_goes_through_each_file_once():
    """From `Plan.compile`, whose other work is the plan's identity (its model, its hash), to the kernel's table."""
    files_of_functions = []

    def enter(frame, event, _):
        name, function = frame.f_globals.get("__name__", ""), frame.f_code
        written = "<" not in function.co_name + function.co_filename  # not a comprehension, or made by dataclass
        if event == "call" and written and name.startswith("moe_route.") and files_of_functions[-1:] != [name[10:]]:
            files_of_functions.append(name[10:])

    rules = Plan.activate({0: [1]}).rules
    sys.setprofile(enter)
    try:
        compile_rules(rules, SITES[:1], (), "")
    finally:
        sys.setprofile(None)
    way = ["steering.compile", "steering.rule", "steering.kinds", "steering.cell", "contract.tables"]
    assert files_of_functions == way


def test_a_plan_for_groups_of_no_text_is_refused():
    plan = Plan.forbid({0: [1]}).only(groups=["eng_Latm"])
    with pytest.raises(PlanError, match=r'"eng_Latm".*did you mean "eng_Latn"'):
        plan.check_groups(["eng_Latn", "deu_Latn"])
    with pytest.raises(PlanError, match=r'"fra_Latm".*did you mean "fra_Latn"'):
        Plan.forbid({0: [1]}).only(groups=["deu_Latn", "fra_Latm"]).check_groups(["deu_Latn", "fra_Latn"])
    Plan.forbid({0: [1]}).check_groups([])
    plan.only(groups=["eng_Latm"]).check_groups(["eng_Latm"])

"""Scores of single tokens: given ones take the place of the router's own, others are left to it bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_model, tokens
from torch import Tensor

import moe_route as mr
from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import token_table
from moe_route.contract.token_tables import TokenTables
from moe_route.ops import token_rules
from moe_route.steering import LayerShape, Plan, PlanError

E, K, T = 8, 3, 12
SITES = [LayerShape(E, K)] * 2


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    """float32 [*shape, E], some of them 0."""
    drawn = torch.rand(*shape, E, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < 0.3, 0.0, drawn) + 1e-3 * (torch.arange(E) == 0)


def routed_by_hand(p: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    """Top-k of one row of scores, with weights that sum to 1; ties go to the lower expert."""
    order = sorted(range(len(p)), key=lambda e: (-p[e], e))[:k]
    total = sum(float(p[e]) for e in order)
    return order, [float(p[e]) / total for e in order]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_given_scores_route_as_written_out(score: Any) -> None:
    spec = RouterSpec(score=score, renormalize="sum")
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = random_scores(T, 2)
    scores[::4] = torch.nan
    steering = Plan.replace_scores(scores).compile(SITES).tables[1]
    assert isinstance(steering, TokenTables)
    entries = torch.arange(T)[:, None].clone()
    entries[5] = -1
    natural_weights, natural = ops.route(logits, K, spec)
    weights, ids, _ = token_rules.route_tokens(
        token_rules.fitted(steering, "here", spec),
        logits,
        K,
        spec,
        tokens=token_table(T, steering_row=0),
        counter=None,
        entries=entries,
        choice=natural,
    )
    for token in range(T):
        if token % 4 == 0 or token == 5:
            assert ids[token].tolist() == natural[token].tolist()
            assert torch.equal(weights[token], natural_weights[token])
            continue
        wanted, expected = routed_by_hand(scores[token, 1].double().numpy(), K)
        assert ids[token].tolist() == wanted
        assert weights[token].tolist() == pytest.approx(expected, rel=1e-5)


def test_other_rules_of_the_row_hold_for_tokens_without_scores() -> None:
    spec = RouterSpec(renormalize="sum")
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = random_scores(T, 2)
    scores[3] = torch.nan
    plan = Plan.replace_scores(scores) + Plan.bias({0: [6]}, strength=2.0)
    steering = plan.compile(SITES).tables[0]
    assert isinstance(steering, TokenTables)
    weights, ids, _ = token_rules.route_tokens(
        token_rules.fitted(steering, "here", spec),
        logits,
        K,
        spec,
        tokens=token_table(T, steering_row=0),
        counter=None,
        entries=torch.arange(T)[:, None],
        choice=ops.route(logits, K, spec)[1],
    )
    for token in range(T):
        z = logits[token].numpy() if token == 3 else np.log(np.maximum(scores[token, 0].double().numpy(), 1e-300))
        p = np.exp(z + 2.0 * (np.arange(E) == 6))
        wanted, expected = routed_by_hand(p, K)
        assert ids[token].tolist() == wanted
        assert weights[token].tolist() == pytest.approx(expected, rel=1e-5)


PLANS = {
    "rows": Plan.replace_scores(random_scores(2, 5, 2)),
    "items": Plan.replace_scores(random_scores(2, 5, 2), items=["a", 3]),
    "one": Plan.replace_scores(random_scores(5, 2), layers=[1, 0]),
    "sequences": Plan.replace_scores(random_scores(2, 2), items=["a", 3], per="sequence"),
    "missing": Plan.replace_scores(torch.cat([random_scores(4, 2), torch.full((1, 2, E), torch.nan)])),
    "narrow": Plan.replace_scores(random_scores(5, 1), layers=[1]).only(groups="x", phase="decode"),
}


@pytest.mark.parametrize("name", [*PLANS])
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_tables_of_scores_are_saved_hashed_and_shown(name: str, suffix: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    plan.save(tmp_path / f"plan.{suffix}")
    again = Plan.load(tmp_path / f"plan.{suffix}")
    assert again == plan
    assert (again.hash, again.describe()) == (plan.hash, plan.describe())
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
    assert "replace scores" in plan.describe()
    assert len({other.hash for other in PLANS.values()}) == len(PLANS)


def test_random_controls_rename_the_experts() -> None:
    scores = random_scores(5, 2)
    drawn = Plan.replace_scores(scores).random(3, num_experts=E)
    table = drawn.compile(SITES).tables[0]
    assert isinstance(table, TokenTables)
    assert torch.equal(table.scored[0].sort(1).values, scores[:, 0].sort(1).values)
    assert not torch.equal(table.scored[0], scores[:, 0])
    assert "drawn with seed 4" in Plan.replace_scores(scores).random_per_token(4).describe()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan.replace_scores(random_scores(5)), r"\[batch, tokens, layers, experts\].*not float32 \[5, 8\]"),
        (lambda: Plan.replace_scores(random_scores(5), per="sequence"), r"per sequence \[batch, layers, experts\]"),
        (lambda: Plan.replace_scores(random_scores(5, 2), per="word"), 'per "token" or per "sequence"'),
        (lambda: Plan.replace_scores(-random_scores(5, 2)), "token 0, layer 0 .* must be finite, 0 or more"),
        (lambda: Plan.replace_scores(torch.zeros(5, 2, E)), "one of them above 0"),
        (lambda: Plan.replace_scores(torch.full((5, 2, E), torch.inf)), "finite"),
        (lambda: Plan.replace_scores(np.where(np.arange(E) < 2, np.nan, np.ones((5, 2, E)))), "a row of NaN"),
        (lambda: Plan.replace_scores(torch.zeros(0, 2, E)), "there are no scores"),
        (lambda: Plan.replace_scores(np.full((5, 2, E), "a")), "replace_scores takes"),
        (lambda: Plan.replace_scores(random_scores(5, 2), layers=[0]), "each of the 2 layers of the scores"),
        (lambda: Plan.replace_scores(random_scores(2, 5, 2), items=["a"]), "1 items for 2 sequences"),
        (lambda: Plan.replace_scores({0: {1: 1.0}}, items=["a"]), "leave items= and per= out"),
        (lambda: Plan.replace_scores(random_scores(5, 3)).compile(SITES), "of 3 layers, the model has 2 MoE layers"),
        (
            lambda: Plan.replace_scores(random_scores(5, 2)).compile([LayerShape(9, K)] * 2),
            "scores of 8 experts for layer 0, which has 9",
        ),
        (
            lambda: Plan.replace_scores(random_scores(5, 2) + 1).compile([LayerShape(7, K)] * 2),
            "scores of 8 experts for layer 0, which has 7",
        ),
        (lambda: sum([PLANS["rows"], PLANS["one"]]).compile(SITES), "two replaced scores"),
        (lambda: (PLANS["rows"] + Plan.replace_scores({0: {1: 1}})).compile(SITES), "two replaced scores"),
        (lambda: PLANS["rows"] * 2, "no strength to scale"),
        (lambda: PLANS["rows"].in_layers([0]), "cannot move"),
        (lambda: Plan.from_dict({"rules": [{"kind": "replace_scores", "table": "abc"}]}), 'no table "abc"'),
    ],
)
def test_scores_that_cannot_be_used_are_refused(make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


def test_a_table_of_another_kind_is_refused() -> None:
    content = PLANS["rows"].to_dict()
    content["rules"][0]["kind"] = "replay"
    with pytest.raises(PlanError, match="a replay rule cannot use a table of scores"):
        Plan.from_dict(content)


def test_a_sigmoid_takes_scores_up_to_one_only() -> None:
    steering = Plan.replace_scores(random_scores(5, 2) * 2 + 0.5).compile(SITES).tables[0]
    assert isinstance(steering, TokenTables)
    with pytest.raises(ValueError, match="between 0 and 1"):
        token_rules.fitted(steering, "layers.0.gate", RouterSpec(score="sigmoid"))


# ---------------------------------------------------------------------------------------------------------------
# On models.

pytest.importorskip("transformers")


def choices(routed: mr.RoutedModel, ids: Tensor, items: list[str], **more: Tensor) -> Any:
    """int [sequence, token, layer, slot] and weights of one call, sorted by expert."""
    with routed.record(trace=True, trace_weights="float32") as recorder, recorder.labels(items=items), torch.no_grad():
        routed.model(input_ids=ids, **more)
    trace = recorder.trace()
    order = np.lexsort((trace.position, trace.sequence))
    return trace.ids[order], trace.weights[order], trace.sequence[order], trace.position[order]


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "gpt_oss"])
def test_models_choose_by_the_scores_of_each_token(name: str, engine: Any) -> None:
    """In the first layer, whose input no steering changes: given rows by hand, other rows bit for bit."""
    with mr.attach(tiny_model(name, head=True), engine=engine) as routed:
        ids, layers = tokens(2, 5), len(routed.routers)
        size, k = routed.routers[0].num_experts, routed.routers[0].top_k
        scores = torch.rand(2, 4, layers, size, generator=torch.Generator().manual_seed(3)) + 0.01
        scores[1, 2] = torch.nan
        natural, natural_weights, *_ = choices(routed, ids, ["a", "b"])
        plan = Plan.replace_scores(scores, items=["b", "a"])
        with routed.steer(plan):
            found, weights, sequence, position = choices(routed, ids, ["a", "b"])
            padded = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], 1)
            mask = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), torch.ones_like(ids)], 1)
            shifted, *_ = choices(routed, padded.flip(0), ["b", "a"], attention_mask=mask)
        for row in range(10):
            given = scores[1 - sequence[row], position[row], 0].numpy() if position[row] < 4 else [np.nan]
            if np.isnan(given[0]):
                assert found[row, 0].tolist() == natural[row, 0].tolist()
                assert weights[row, 0].tolist() == natural_weights[row, 0].tolist()
            else:
                assert set(found[row, 0].tolist()) == set(routed_by_hand(given, k)[0])
        # the other padding, and the other order of the batch, change nothing
        assert np.sort(shifted[:, 0], 1).tolist() == np.sort(found[:, 0], 1)[np.r_[5:10, 0:5]].tolist()


def test_scores_of_a_sequence_hold_for_all_of_its_tokens() -> None:
    with mr.attach(tiny_model("qwen3_moe", head=True)) as routed:
        scores = torch.rand(2, 1, 8, generator=torch.Generator().manual_seed(3)) + 0.01
        scores[1] = torch.nan
        plan = Plan.replace_scores(scores, layers=[1], items=["a", "b"], per="sequence")
        natural, *_ = choices(routed, tokens(2, 6), ["a", "b"])
        with routed.steer(plan):
            found, _, sequence, _ = choices(routed, tokens(2, 6), ["a", "b"])
            with routed.labels(items=["a"]):
                text = routed.model.generate(tokens(1, 3), max_new_tokens=3, do_sample=False, pad_token_id=0)
        wanted = set(routed_by_hand(scores[0, 0].numpy(), 2)[0])
        assert all(set(row[1].tolist()) == wanted for row in found[sequence == 0])
        assert (found[sequence == 1] == natural[sequence == 1]).all()
        assert text.shape == (1, 6)


def test_a_call_without_items_is_refused() -> None:
    with mr.attach(tiny_model("qwen3_moe", head=True)) as routed:
        scores = torch.ones(1, 4, 3, 8)
        with routed.steer(Plan.replace_scores(scores, items=["a"])):
            with pytest.raises(PlanError, match="replaces scores by item, and the call has no items"):
                routed.model(tokens(1, 4))
            with (
                routed.labels(items=["z"]),
                pytest.raises(PlanError, match="replaces scores for no sequence of item 'z'"),
            ):
                routed.model(tokens(1, 4))

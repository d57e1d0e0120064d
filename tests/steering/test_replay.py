"""Replay: each token is sent to the experts that were recorded for it, and to no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.model_decisions import look_last
from harness.tiny_models import inputs, tiny_model, tokens
from torch import Tensor, nn

import moe_route as mr
from moe_route import ops
from moe_route.base import files
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables, token_table
from moe_route.contract.token_tables import TokenTables
from moe_route.ops import token_rules
from moe_route.recording import Trace
from moe_route.steering import LayerShape, Plan, PlanError

E, K, T = 8, 3, 40
SITES = [LayerShape(E, K)] * 2
SOFTMAX, SIGMOID = RouterSpec(renormalize="sum"), RouterSpec(score="sigmoid", renormalize="sum", scale=2.0)


def random_ids(*shape: int, experts: int = E, k: int = K, seed: int = 0) -> Tensor:
    """int64 [*shape, k]: different experts in each row."""
    return torch.rand(*shape, experts, generator=torch.Generator().manual_seed(seed)).topk(k).indices


# ---------------------------------------------------------------------------------------------------------------
# One layer.


@pytest.mark.parametrize("spec", [SOFTMAX, SIGMOID, RouterSpec(), RouterSpec(order="topk_then_score")], ids=str)
def test_a_layer_replays_as_the_operator_does(spec):
    """Rows that begin with -1 are routed by their logits; a -1 further on is an empty slot, as `route` has it."""
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = random_ids(T, 2)
    ids[::5] = -1
    ids[1::5, :, 1:] = -1
    steering = Plan.replay(ids).compile(SITES).tables[0]
    assert isinstance(steering, TokenTables)
    entries = torch.arange(T)[:, None].clone()
    entries[T // 2] = -1  # a token that was not recorded
    natural_weights, natural = ops.route(logits, K, spec)
    statistics = StatisticsTables.zeros(E, groups=1, metrics=ops.METRICS)
    weights, found, _ = token_rules.route_tokens(
        token_rules.fitted(steering, "here", spec),
        logits,
        K,
        spec,
        tokens=token_table(T, steering_row=0),
        counter=None,
        entries=entries,
        choice=natural,
        statistics=statistics,
    )
    wanted = torch.where(entries >= 0, ids[:, 0], -1)
    counted = StatisticsTables.zeros(E, groups=1, metrics=ops.METRICS)
    expected_weights, expected = ops.route(logits, K, spec, choice=wanted, choice_mode="replay", statistics=counted)
    assert torch.equal(found, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=0)
    left = wanted[:, 0] < 0
    assert left.sum() == T // 5 + (T // 2 % 5 != 0)
    assert torch.equal(weights[left], natural_weights[left])
    for plane in ("counts", "natural_counts"):
        assert statistics.metric(plane).tolist() == counted.metric(plane).tolist()
    assert statistics.scalar("steered").item() == int((~left).sum())
    assert statistics.scalar("empty").item() == int((found < 0).sum())
    assert statistics.scalar("flipped").item() == counted.scalar("flipped").item()


def test_other_rules_act_on_the_scores_that_weigh():
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = random_ids(T, 2)
    steering = (Plan.replay(ids) + Plan.bias({0: [2]}, strength=1.5)).compile(SITES).tables[0]
    assert isinstance(steering, TokenTables)
    weights, found, _ = token_rules.route_tokens(
        token_rules.fitted(steering, "here", SOFTMAX),
        logits,
        K,
        SOFTMAX,
        tokens=token_table(T, steering_row=0),
        counter=None,
        entries=torch.arange(T)[:, None],
        choice=ops.route(logits, K, SOFTMAX)[1],
    )
    assert torch.equal(found.long(), ids[:, 0])
    scores = (logits + 1.5 * torch.eye(E)[2]).softmax(1).gather(1, ids[:, 0])
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------------
# What a replay says, keeps and refuses.


def a_trace(**changed: Any) -> Trace:
    """Item "a" in groups x and y (3 and 2 tokens), item 7 in x (1 token); two layers."""
    columns: dict[str, Any] = {
        "layers": ("gate.0", "gate.1"),
        "layer_numbers": (0, 1),
        "groups": ("x", "y"),
        "items": ("a", "a", 7),
        "sequence": np.array([0, 1, 0, 1, 0, 2], np.int32),
        "group": np.array([0, 1, 0, 1, 0, 0], np.int32),
        "position": np.array([0, 0, 1, 1, 2, 0], np.int32),
        "token": np.arange(6, dtype=np.int32),
        "phase": np.zeros(6, np.uint8),
        "ids": random_ids(6, 2).numpy().astype(np.int8),
        "weights": np.ones((6, 2, K), np.float16),
    }
    return Trace(**(columns | changed))


REPLAYS = {
    "trace": Plan.replay(a_trace()),
    "rows": Plan.replay(random_ids(2, 5, 2)),
    "items": Plan.replay(random_ids(2, 5, 2), items=["a", 3]),
    "one": Plan.replay(random_ids(5, 2), layers=[1, 0]),
    "narrow": Plan.replay(a_trace(), layers=1).only(groups="x", phase="decode", positions=range(3)),
    "two": Plan.replay(random_ids(5, 2)).only(phase="prefill") + Plan.replay(random_ids(9, 2)).only(phase="decode"),
}


@pytest.mark.parametrize("name", [*REPLAYS])
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_replays_are_saved_hashed_and_shown(name: str, suffix: str, tmp_path: Path) -> None:
    plan = REPLAYS[name]
    plan.save(tmp_path / f"plan.{suffix}")
    again = Plan.load(tmp_path / f"plan.{suffix}")
    assert again == plan
    assert (again.hash, again.describe()) == (plan.hash, plan.describe())
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert len({other.hash for other in REPLAYS.values()}) == len(REPLAYS)
    ours, theirs = (p.compile(SITES, ["x"]).tables for p in (plan, again))
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if isinstance(one, TokenTables) and isinstance(other, TokenTables):
            assert all(torch.equal(one.recorded[m], other.recorded[m]) for m in one.recorded | other.recorded)


def test_a_replay_prints_short():
    large = Plan.replay(random_ids(8, 400, 2))
    assert "replay in every layer: exactly the recorded experts of 3200 tokens of 8 sequences, found by batch row" in (
        large.describe()
    )
    assert len(repr(large)) < 200
    assert "found by item" in repr(REPLAYS["trace"])
    assert "layer 1: exactly" in repr(REPLAYS["narrow"])
    many = sum(Plan.bias({0: [1]}, strength=float(n)) for n in range(1, 50))
    assert repr(many).endswith("; and 41 more rules)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan.replay({0: [1, 2]}), "use Plan.fix_choice"),
        (lambda: Plan.replay(random_ids(5)), r"\[batch, tokens, layers, k\].*not int64 \[5, 3\]"),
        (lambda: Plan.replay(torch.rand(5, 2, 3)), "not float32"),
        (lambda: Plan.replay(random_ids(5, 2) - 2), "-2 is not an expert"),
        (lambda: Plan.replay(random_ids(5, 2) + 40000), "is not an expert"),
        (lambda: Plan.replay(torch.zeros(5, 2, 3, dtype=torch.int64)), "expert 0 is in two slots of token 0"),
        (lambda: Plan.replay(random_ids(0, 2)), "nothing to replay"),
        (lambda: Plan.replay(random_ids(5, 2), layers=[0]), "each of the 2 layers"),
        (lambda: Plan.replay(random_ids(5, 2), layers=[3, 3]), "each of the 2 layers"),
        (lambda: Plan.replay(random_ids(2, 5, 2), items=["a"]), "1 items for 2 sequences"),
        (lambda: Plan.replay(random_ids(2, 5, 2), items=["a", "a"]), "item 'a' is there more than once"),
        (lambda: Plan.replay(random_ids(2, 5, 2), items=["a", 1.5]), "a string or an integer"),
        (lambda: Plan.replay(a_trace(), items=["a"]), "has its own items"),
        (lambda: Plan.replay(a_trace(truncated=True)), "larger trace_limit"),
        (lambda: Plan.replay(a_trace(items=("a", None, 7))), "label all of them, or none"),
        (lambda: Plan.replay(a_trace(position=np.zeros(6, np.int32))), "several choices in one layer"),
        (lambda: Plan.replay(a_trace(items=("a", "a", "a"))), "item 'a' of group 'x' is there more than once"),
        (lambda: Plan.replay(random_ids(5, 3)).compile(SITES), "of 3 layers, the model has 2 MoE layers"),
        (lambda: Plan.replay(random_ids(5, 1), layers=[2]).compile(SITES), "steers layer 2"),
        (lambda: Plan.replay(random_ids(5, 2, experts=9, seed=1)).compile(SITES), "expert 8 of layer 0, which has 8"),
        (lambda: Plan.replay(random_ids(5, 2, k=4)).compile(SITES), "more than 3 experts for a token of layer 0"),
        (lambda: sum([REPLAYS["rows"], REPLAYS["one"]]).compile(SITES), "two fixed, replayed or drawn choices"),
        (lambda: (REPLAYS["rows"] + Plan.fix_choice({0: [1]})).compile(SITES), "two fixed, replayed or drawn choices"),
        (lambda: (REPLAYS["rows"] + Plan.top_k(5)).compile(SITES), "a replay rule and a top_k above"),
        (lambda: REPLAYS["rows"] * 2, "no strength to scale"),
        (lambda: -REPLAYS["rows"], "no opposite"),
        (lambda: REPLAYS["rows"].in_layers([0]), "cannot move"),
        (lambda: REPLAYS["rows"].with_experts({0: [1]}), "no other experts to go to"),
        (lambda: REPLAYS["rows"].only(absent=True), "cannot be left out"),
        (lambda: Plan.from_dict({"rules": [{"kind": "replay", "table": "abc"}]}), 'no table "abc"'),
    ],
)
def test_what_cannot_be_replayed_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_random_controls_of_a_replay():
    ids = random_ids(5, 2)
    drawn = Plan.replay(ids).random(3, num_experts=E)
    assert drawn == Plan.replay(ids).random(3, num_experts=E) != Plan.replay(ids)
    recorded = drawn.compile(SITES).tables[0].recorded[0].long()
    order = {}
    for before, after in zip(ids[:, 0].flatten().tolist(), recorded.flatten().tolist(), strict=True):
        assert order.setdefault(before, after) == after
    assert "drawn with seed 4" in Plan.replay(ids).random_per_token(4).describe()


def test_empty_slots_of_a_trace_come_last_and_sentinels_are_whole_rows():
    ids = random_ids(6, 2).numpy().astype(np.int8)
    ids[0, 0] = [-1, 4, -1]  # a token that lost a slot, to a capacity say
    ids[1, 0] = -1
    table = Plan.replay(a_trace(ids=ids)).rules[0].table
    assert table is not None
    assert table.in_layer(0)[[0, 3]].tolist() == [[4, -1, -1], [-1, -1, -1]]
    rows = Plan.replay(torch.from_numpy(ids)).rules[0].table
    assert rows is not None
    assert rows.in_layer(0)[:2].tolist() == [[-1, -1, -1], [-1, -1, -1]]


# ---------------------------------------------------------------------------------------------------------------
# On models.

transformers = pytest.importorskip("transformers")


OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
PROMPTS = [tokens(1, length, seed) for seed, length in enumerate((3, 6, 5))]


def batched(prompts: list[Tensor], left: bool) -> dict[str, Tensor]:
    """Input ids and mask of prompts, padded on one side."""
    width = max(ids.shape[1] for ids in prompts)
    sides = [(width - ids.shape[1], 0) if left else (0, width - ids.shape[1]) for ids in prompts]
    pad = nn.functional.pad
    ids = torch.cat([pad(ids, side) for ids, side in zip(prompts, sides, strict=True)])
    mask = torch.cat([pad(torch.ones_like(ids), side) for ids, side in zip(prompts, sides, strict=True)])
    return {"input_ids": ids, "attention_mask": mask}


def perturbed(routed: mr.RoutedModel, seed: int = 5) -> None:
    """Other routers: without a replay, other experts would be chosen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routed.routers:
            for parameter in router.module.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)


def choices(trace: Trace) -> dict[tuple[object, int], list[list[int]]]:
    """Experts of each layer by item and position."""
    return {
        (trace.items[sequence], int(position)): np.sort(ids, axis=1).tolist()
        for sequence, position, ids in zip(trace.sequence, trace.position, trace.ids, strict=True)
    }


@pytest.fixture(params=["hook", "fused"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    return request.param


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "phimoe", "deepseek_v3"])
def test_a_trace_is_replayed_in_other_batches(name: str, engine: str) -> None:
    """Recorded left-padded in one batch; replayed right-padded, alone, in another order, and token by token."""
    with mr.attach(tiny_model(name, head=True), engine=engine) as routed, torch.no_grad():
        model = routed.model

        def run(order: list[int], left: bool, steps: bool = False) -> None:
            given = batched([PROMPTS[i] for i in order], left)
            with recorder.labels(items=[f"text {i}" for i in order]):
                if not steps:
                    model(**given)
                    return
                cache = None
                for at in range(given["input_ids"].shape[1]):
                    mask = given["attention_mask"][:, : at + 1]
                    out = model(given["input_ids"][:, at : at + 1], attention_mask=mask, past_key_values=cache)
                    cache = out.past_key_values

        with routed.record(trace=True) as recorder:
            run([0, 1, 2], left=True)
        trace = recorder.trace()
        wanted = choices(trace)
        perturbed(routed)
        for batches in ([([2, 0, 1], False, False)], [([0], True, False), ([2, 1], True, True)]):
            with routed.record(trace=True) as recorder:
                for order, left, steps in batches:
                    run(order, left, steps)
            assert choices(recorder.trace()) != wanted
            with routed.steer(Plan.replay(trace)), routed.record(trace=True) as recorder:
                for order, left, steps in batches:
                    run(order, left, steps)
            assert choices(recorder.trace()) == wanted
            statistics = recorder.statistics()  # which checks the laws of conservation
            assert (statistics.scalar("steered").sum(0) == statistics.tokens().sum(0)).all()
            assert statistics.scalar("flipped").sum() > 0


def test_what_was_generated_is_replayed_in_training(engine: str) -> None:
    """Rollout by `generate`, then one forward over the whole texts: the same experts, prompt and answer."""
    with mr.attach(tiny_model("qwen3_moe", head=True), engine=engine) as routed:
        given = batched(PROMPTS, left=True)
        with routed.record(trace=True) as recorder, recorder.labels(items=[0, 1, 2]), torch.no_grad():
            texts = routed.model.generate(**given, **OPTIONS)
        trace = recorder.trace()
        perturbed(routed)
        mask = nn.functional.pad(given["attention_mask"], (0, 4), value=1)
        with (
            routed.steer(Plan.replay(trace)),
            routed.record(trace=True) as recorder,
            recorder.labels(items=[0, 1, 2]),
        ):
            routed.model(texts, attention_mask=mask, labels=texts).loss.backward()
        replayed, wanted = choices(recorder.trace()), choices(trace)
        assert len(wanted) == 14 + 3 * 3
        assert {key: replayed[key] for key in wanted} == wanted
        assert len(replayed) == len(wanted) + 3  # the last token of each was never run: routed as ever
        assert recorder.statistics().scalar("steered").sum(0).tolist() == [len(wanted)] * 3
        for router in routed.routers:
            assert router.module.weight.grad.abs().sum() > 0
        # and in generation itself, with and without a cache
        for cached in (True, False):
            with (
                routed.steer(Plan.replay(trace)),
                routed.record(trace=True) as recorder,
                recorder.labels(items=[0, 1, 2]),
                torch.no_grad(),
            ):
                routed.model.generate(**given, **OPTIONS, use_cache=cached)
            assert choices(recorder.trace()) == wanted


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_replaying_the_own_choice_changes_nothing(name: str, engine: str) -> None:
    """The same bits without a gradient; the same gradients with one, checkpointed or not."""
    given = batched(PROMPTS, left=True)
    with mr.attach(tiny_model(name, head=True), engine=engine) as routed:
        model = routed.model
        with routed.record(trace=True) as recorder, torch.no_grad():
            natural = model(**given).logits
        plan = Plan.replay(recorder.trace())
        with routed.steer(plan), torch.no_grad():
            assert torch.equal(model(**given).logits, natural)
        found = []
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable()
                model.train()
            for steered in (False, True):
                model.zero_grad()
                with routed.steer(plan if steered else Plan()):
                    model(**given, labels=given["input_ids"]).loss.backward()
                found.append([router.module.weight.grad.clone() for router in routed.routers])
        for gradients in found[1:]:
            for one, other in zip(found[0], gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert all(gradient.abs().sum() > 0 for gradient in found[0])


def test_gradients_are_those_of_the_replayed_weights(engine: str) -> None:
    """Against a plain MoE router in torch: softmax, the replayed experts, renormalized."""
    ids = random_ids(2, 6, 3, k=2)
    with mr.attach(tiny_model("qwen3_moe", head=True), engine=engine) as routed, routed.steer(Plan.replay(ids)):
        gate = routed.routers[1].module
        seen: list[tuple[Tensor, ...]] = []
        handle = look_last(gate, lambda _, args, output: seen.append((args[0], *output)))
        routed.model(input_ids=tokens(2, 6))
        handle.remove()
        hidden, _, weights, chosen = seen[0]
        weight = gate.weight.detach().clone().requires_grad_()
        scores = (hidden.detach().reshape(-1, hidden.shape[-1]) @ weight.T).softmax(1)
        expected = scores.gather(1, ids[:, :, 1].reshape(-1, 2))
        expected = expected / expected.sum(1, keepdim=True)
        assert torch.equal(chosen.long(), ids[:, :, 1].reshape(-1, 2))
        torch.testing.assert_close(weights, expected.to(weights), rtol=1e-5, atol=1e-6)
        target = torch.arange(12.0)[:, None] * torch.tensor([1.0, -2.0])
        (ours,) = torch.autograd.grad((weights * target).sum(), gate.weight)
        (theirs,) = torch.autograd.grad((expected * target).sum(), weight)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def traced_ids(routed: mr.RoutedModel, call: Any, items: Any = None) -> list[list[list[list[int]]]]:
    """Experts of what `call` runs, by sequence and position."""
    with routed.record(trace=True) as recorder, recorder.labels(items=items), torch.no_grad():
        call()
    trace = recorder.trace()
    order = np.lexsort((trace.position, trace.sequence))
    return [trace.ids[order][trace.sequence[order] == s].tolist() for s in np.unique(trace.sequence)]


def test_ids_by_batch_row(engine: str) -> None:
    ids = random_ids(3, 4, 3, k=2)
    ids[0, 1], ids[1, 2, 0], ids[2, 3, 1, 1] = -1, -1, -1
    with mr.attach(tiny_model("qwen3_moe", head=True), engine=engine) as routed:
        model, given = routed.model, batched(PROMPTS, left=True)
        names = ["a", "b", "c"]
        natural = traced_ids(routed, lambda: model(**given), names)
        with routed.steer(Plan.replay(ids)):
            replayed = traced_ids(routed, lambda: model(**given), names)
            apart = traced_ids(routed, lambda: model.generate(**given, **OPTIONS), names)
        for row, length in enumerate((3, 6, 5)):
            recorded = min(length, 4)
            for position in range(recorded):
                for layer in range(3):
                    wanted = ids[row, position, layer].tolist()
                    if wanted[0] >= 0:
                        assert replayed[row][position][layer] == wanted
            assert apart[row][:length] == replayed[row]
        assert replayed[0][1][0] == natural[0][1][0]  # a sentinel: the first layer sees what it saw
        assert replayed[1][4][0] == natural[1][4][0]  # past the end
        with routed.steer(Plan.replay(ids[0])):
            one = traced_ids(routed, lambda: model(PROMPTS[0].repeat(2, 1)), names[:2])
        assert one[0] == one[1]
        assert one[0][0] == ids[0, 0].tolist()
        with routed.steer(Plan.replay(ids)), torch.no_grad():
            model(tokens(6, 4))
            with pytest.raises(PlanError, match="3 sequences at a time, the batch has 2"):
                model(tokens(2, 4))
        with routed.steer(Plan.replay(ids[:, :, :1], layers=[2])):
            assert [row[0][2] for row in traced_ids(routed, lambda: model(**given), names)] == ids[:, 0, 0].tolist()
        with pytest.raises(PlanError, match="of 1 layers, the model has 3"):
            routed.steer(Plan.replay(ids[:, :, :1])).__enter__()


def test_tokens_that_keep_their_own_choice_keep_every_bit(engine: str) -> None:
    ids = random_ids(2, 4, 3, k=2)
    ids[:, :, 1:] = -1
    ids[:, 2] = -1
    with mr.attach(tiny_model("qwen3_moe", torch.bfloat16, head=True), engine=engine) as routed:
        outputs: list[tuple[Tensor, ...]] = []
        handle = look_last(routed.routers[0].module, lambda _, args, output: outputs.append(output))
        given = tokens(2, 6)
        routed.model(given)
        with routed.steer(Plan.replay(ids)):
            routed.model(given)
        handle.remove()
    (_, before, before_ids), (_, after, after_ids) = outputs
    kept = torch.tensor([2, 4, 5, 8, 10, 11])
    assert torch.equal(after[kept], before[kept])
    assert torch.equal(after_ids[kept], before_ids[kept])
    assert not torch.equal(after_ids, before_ids)


def test_items_in_several_groups_and_in_none() -> None:
    """A sentence and its translation share their item; the group tells them apart."""
    with mr.attach(tiny_model("qwen3_moe")) as routed, torch.no_grad():
        model = routed.model
        with routed.record(trace=True) as recorder:
            for group, seed in (("en", 1), ("sw", 2)):
                with recorder.labels(group, items=["s0", "s1"]):
                    model(tokens(2, 5, seed))
        trace, wanted = recorder.trace(), {}
        for number in range(4):
            kept = trace.sequence == number
            wanted[trace.groups[trace.group[kept][0]], trace.items[number]] = trace.ids[kept].tolist()
        perturbed(routed)
        with routed.steer(Plan.replay(trace)):
            with routed.record(trace=True) as recorder, recorder.labels(["sw", "en"], items=["s1", "s1"]):
                model(tokens(2, 5))
            ids = recorder.trace().ids
            assert ids[:5].tolist() == wanted["sw", "s1"]
            assert ids[5:].tolist() == wanted["en", "s1"]
            with routed.labels("fr", items=["s0", "s1"]), pytest.raises(PlanError, match="in that group: it has 'en'"):
                model(tokens(2, 5))
            with routed.labels("en", items=["s0", "s9"]), pytest.raises(PlanError, match="no sequence of item 's9'"):
                model(tokens(2, 5))
            with pytest.raises(PlanError, match=r"routed\.labels\(items=\[\.\.\.\]\)"):
                model(tokens(2, 5))
        half = Trace(**{**vars(trace), "items": trace.items[:2]} | _first(trace, 2))
        with routed.steer(Plan.replay(half)), routed.labels(items=["s1", "s0"]):
            model(tokens(2, 5))  # an item in one group is found whatever the group


def _first(trace: Trace, sequences: int) -> dict[str, np.ndarray]:
    kept = trace.sequence < sequences
    names = ("sequence", "group", "position", "token", "phase", "ids", "weights")
    return {name: getattr(trace, name)[kept] for name in names}


def test_conditions_narrow_a_replay() -> None:
    ids = random_ids(2, 6, 3, k=2)
    with mr.attach(tiny_model("qwen3_moe")) as routed:
        model = routed.model
        call = lambda: model(tokens(2, 6))  # noqa: E731
        natural = traced_ids(routed, call, ["a", "b"])
        plan = Plan.replay(ids).only(layers=[0], positions=range(2, 4))
        with routed.steer(plan):
            found = traced_ids(routed, call, ["a", "b"])
        for row in range(2):
            assert [found[row][p][0] for p in (2, 3)] == ids[row, 2:4, 0].tolist()
            assert [found[row][p][0] for p in (0, 1, 4, 5)] == [natural[row][p][0] for p in (0, 1, 4, 5)]
        with routed.steer(Plan.replay(ids).only(phase="decode")):
            assert traced_ids(routed, call, ["a", "b"]) == natural
        with routed.steer(Plan.replay(ids).only(groups="x")), routed.labels(["x", "y"]), torch.no_grad():
            seen: list[Tensor] = []
            handle = look_last(routed.routers[0].module, lambda _, args, output: seen.append(output[2]))
            call()
            handle.remove()
        assert seen[0][:6].tolist() == ids[0, :, 0].tolist()
        assert seen[0][6:].tolist() == [natural[1][p][0] for p in range(6)]


def test_texts_packed_into_one_row_go_on() -> None:
    """Positions that begin anew with each text do not say where in the row a token is."""
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with mr.attach(tiny_model("qwen3_moe")) as routed, torch.no_grad():
        call = lambda: routed.model(tokens(1, 7), position_ids=places)  # noqa: E731
        with routed.record(trace=True) as recorder, recorder.labels([["x"] * 3 + ["y"] * 4], items=["row"]):
            call()
        trace = recorder.trace()
        perturbed(routed)
        with routed.steer(Plan.replay(trace)):
            assert traced_ids(routed, call, ["row"]) == [trace.ids.tolist()]


def test_prefill_in_chunks_and_guidance() -> None:
    ids = random_ids(6, 3, k=2)
    with mr.attach(tiny_model("qwen3_moe", head=True)) as routed, torch.no_grad(), routed.steer(Plan.replay(ids)):
        with routed.record(trace=True) as recorder:
            first = routed.model(tokens(1, 6)[:, :4], use_cache=True)
            routed.model(tokens(1, 6)[:, 4:], past_key_values=first.past_key_values)
        assert recorder.trace().ids.tolist() == ids.tolist()
        with routed.record(trace=True) as recorder:
            routed.model.generate(tokens(1, 4), guidance_scale=1.5, negative_prompt_ids=tokens(1, 3, 9), **OPTIONS)
        assert recorder.trace().ids[:6].tolist() == ids.tolist()


@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe", "llama4_text_with_top2", "ernie4_5_moe"])
def test_models_of_other_forms_replay_their_trace(name: str) -> None:
    """Encoders beside decoders, capacities, routers that return no ids."""
    model = tiny_model(name)
    given = inputs(name, model)
    with mr.attach(model) as routed, torch.no_grad():
        with routed.record(trace=True) as recorder:
            model(**given)
        trace = recorder.trace()
        perturbed(routed)
        with routed.record(trace=True) as recorder:
            model(**given)
        assert (np.sort(recorder.trace().ids, axis=2) != np.sort(trace.ids, axis=2)).any()
        with routed.steer(Plan.replay(trace)), routed.record(trace=True) as recorder:
            model(**given)
        recorder.statistics()
        again = recorder.trace()
        # a token that lost its place to a capacity chose for itself
        chosen = (trace.ids >= 0).any(2)
        assert (np.sort(again.ids, axis=2)[chosen] == np.sort(trace.ids, axis=2)[chosen]).mean() > 0.99


def test_a_trace_file_is_replayed(tmp_path: Path) -> None:
    with mr.attach(tiny_model("qwen3_moe")) as routed, torch.no_grad():
        with routed.record(trace=[0, 2]) as recorder:
            routed.model(tokens(2, 5))
        recorder.trace().save(tmp_path / "t.safetensors")
        plan = Plan.replay(Trace.load(tmp_path / "t.safetensors"))
        assert plan.rules[0].touched_layers == (0, 2)
        assert plan == Plan.replay(recorder.trace())
        perturbed(routed)
        with routed.steer(plan):
            found = traced_ids(routed, lambda: routed.model(tokens(2, 5)), ["a", "b"])
    ids = recorder.trace().ids.reshape(2, 5, 2, -1)
    assert [[[row[0], row[2]] for row in rows] for rows in found] == ids.tolist()


def test_plans_of_json_are_read_compared_and_edited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "p.json"
    plan = Plan.activate({0: [1, 2]}, strength=0.5).only(groups="sw") + Plan.forbid({1: [3]})
    plan.save(path)
    content = json.loads(path.read_text())
    assert content["hash"] == plan.hash
    assert Plan.load(path) == plan
    assert not caplog.records
    path.write_text(path.read_text().replace('"strength": 0.5', '"strength": 2.0'))
    assert Plan.load(path) == Plan.activate({0: [1, 2]}, strength=2.0).only(groups="sw") + Plan.forbid({1: [3]})
    assert "was edited since it was saved" in caplog.text
    for text, message in (
        ("{", "is not JSON"),
        ("[" * 100_000, "nested deeper"),
        ("[1]", "is not a plan"),
        ('{"moe_route": "plan", "schema": 99}', "upgrade moe-route"),
    ):
        path.write_text(text)
        with pytest.raises(files.FileRefusedError, match=message):
            Plan.load(path)
    with pytest.raises(files.FileRefusedError, match="does not exist"):
        Plan.load(tmp_path / "none.json")
    path.write_text('{"moe_route": "plan", "schema": 1, "rules": [{"kind": "shout"}]}')
    with pytest.raises(PlanError, match='kind is "shout"'):
        Plan.load(path)

"""Rules that look at single tokens, in stock vLLM beside transformers: absent experts, draws, choices and scores."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from harness.vllm_demo import engine

import moe_route as mr
from moe_route.contract.spec import RouterSpec
from moe_route.integrations.serving.options import EngineNotSupportedError, Options
from moe_route.integrations.serving.plans import PlannedItems, PlanTables, TokenValues
from moe_route.integrations.serving.requests import Batch, RequestTable
from moe_route.integrations.serving.sites import Site, Stage
from moe_route.ops.token_rules import token_counter
from moe_route.steering import PlanError
from moe_route.steering.cell import LayerShape

GROUPS = ("plain", "steered")
E, K = 8, 2


def replay(items: list[str], lengths: int = 4, seed: int = 0, layers: int = 2) -> mr.Plan:
    generator = torch.Generator().manual_seed(seed)
    return mr.Plan.replay(torch.rand(len(items), lengths, layers, E, generator=generator).topk(K).indices, items=items)


class Tables:
    """Plans on two sites of a worker, without vLLM."""

    def __init__(self, *, captured: bool = False):
        self.sites: list[Any] = [
            Site(f"layers.{i}.mlp.gate", None, E, K, RouterSpec(), None, torch.device("cpu")) for i in range(2)
        ]
        options, stage = Options(groups=GROUPS, plans={"other": None}), Stage.among([[LayerShape(E, K)] * 2], 0)
        self.plans = PlanTables(
            self.sites, options, stage, torch.device("cpu"), graphs_off="--enforce-eager" if captured else None
        )
        self.requests = RequestTable(len(GROUPS), 2, 4)

    def compiled(self, plan: mr.Plan) -> Any:
        return self.plans.fitted(plan.compile(self.sites, GROUPS))

    def change(self, name: str, plan: mr.Plan | None) -> None:
        self.requests.plan_rows = self.plans.change(name, None if plan is None else self.compiled(plan))


@pytest.mark.parametrize(
    ("plan", "captured", "words"),
    [
        (mr.Plan.top_k(3), False, r"top_k above the model's \(layers \[0, 1\]\)"),
        (mr.Plan.forbid({0: [1]}).random_per_token(1), True, "start with --enforce-eager"),
        (mr.Plan.replay(torch.tensor([[[[0, 1], [0, 1]]]])), False, "give each request its moe_route_item"),
    ],
)
def test_rules_that_cannot_run_are_refused(plan: mr.Plan, captured: bool, words: str) -> None:
    with pytest.raises(EngineNotSupportedError, match=words):
        Tables(captured=captured).compiled(plan)


def as_they_are(logits: torch.Tensor, where: object) -> torch.Tensor:
    return logits


@pytest.mark.parametrize(
    ("plan", "kind"),
    [(mr.Plan.apply(as_they_are), "apply"), (mr.Plan.add_output({0: {1: [0.5]}}) + mr.Plan.top_k(1), "add_output")],
)
def test_rules_that_call_python_in_every_layer_are_refused(plan: mr.Plan, kind: str, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    with pytest.raises(EngineNotSupportedError, match=kind):
        Tables().plans.compiled(str(tmp_path / "plan.json"), "a model", "")


def test_groups_that_the_engine_does_not_declare_are_refused(tmp_path: Path) -> None:
    plan = mr.Plan.forbid({0: [1]})
    plan.only(groups=["steared"]).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r'"steared".*"steered".*"groups"'):
        Tables().plans.compiled(str(tmp_path / "plan.json"), "a model", "")
    plan.only(groups=["steered"]).save(tmp_path / "plan.json")
    Tables().plans.compiled(str(tmp_path / "plan.json"), "a model", "")


def test_a_table_over_positions_takes_the_rows_of_one_rule_per_position() -> None:
    numbers = [1.0, 0.5, 0.5, 0.25]
    rules = [mr.Plan.activate({0: [1]}, strength=number).only(positions=at) for at, number in enumerate(numbers)]
    found = []
    for plan in (mr.Plan.activate({0: [1]}, strength=numbers), sum(rules, mr.Plan())):
        made = Tables()
        made.change("default", plan)
        rows = made.requests.plan_rows
        found.append((rows.rows.tolist(), rows.bounds.tolist(), [part.tolist() for part in tensors(made.sites[0])]))
    assert found[0] == found[1]
    assert found[0][1] == [1, 2, 3, 4]


def tensors(site: Any) -> list[torch.Tensor]:
    return [part for part in site.steering.packed if isinstance(part, torch.Tensor)]


def test_rules_that_do_not_fit_the_router_are_refused() -> None:
    made = Tables()
    made.sites[1].spec = RouterSpec(score="sparsemixer")
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.gate.*cannot take replaced scores"):
        made.compiled(mr.Plan.replace_scores({0: {1: 1.0}, 1: {1: 1.0}}))


def test_each_request_finds_the_values_of_its_item() -> None:
    made = Tables()
    made.change("default", replay(["a", "b"]).only(groups=["steered"]))
    made.change(
        "other",
        replay(["b", "c"], lengths=3, seed=1).only(groups=["plain"]) + mr.Plan.gumbel(2).only(groups=["steered"]),
    )
    begin = made.requests.begin
    for name, group, plan in (("b", 1, 0), ("c", 0, 1), ("z", 0, 0), ("y", -1, -1)):
        begin(name, prompt=3, group=group, segment=0, plan=plan, item=name)
    failed: list[str] = []
    values = TokenValues(made.plans, made.requests, torch.device("cpu"), failed.append)
    ids = torch.arange(9, dtype=torch.int32) + 50
    batch = Batch(["c", "b", "z", "unknown", "y"], np.array([2, 3, 1, 1, 1]), np.array([2, 0, 0, 0, 0]), ids[:8])
    table = np.zeros((8, 4), np.int32)
    made.requests.fill(table, *batch[:3])
    values.lay_out(table[:, 0], batch)
    assert values.numbers.present
    assert values.numbers.entries is not None
    assert values.numbers.entries.tolist() == [
        [-1, 5],
        [-1, -1],
        [4, -1],
        [5, -1],
        [6, -1],
        [-1, -1],
        [-1, -1],
        [-1, -1],
    ]
    positions = torch.tensor([2, 3, 0, 1, 2, 0, 0, 0])
    assert torch.equal(values.numbers.counter, token_counter(positions, batch.token_ids))
    values.lay_out(np.full(8, -1, np.int32), batch)  # a step that no such rule reaches
    assert not values.numbers.present
    assert values.numbers.counter is values.numbers.entries is None
    assert not failed


def test_a_request_that_runs_when_a_plan_without_its_values_begins_is_told_once() -> None:
    made = Tables()
    for name, group in (("r", 1), ("plain", 0)):
        made.requests.begin(name, prompt=3, group=group, segment=0, plan=0, item="missing")
    made.change("default", replay(["a"]).only(groups=["steered"]))
    failed: list[str] = []
    values = TokenValues(made.plans, made.requests, torch.device("cpu"), failed.append)
    batch = Batch(["r", "plain"], np.array([1, 1]), np.array([0, 0]), torch.zeros(2, dtype=torch.int32))
    table = np.zeros((2, 4), np.int32)
    for _ in range(2):
        made.requests.fill(table, *batch[:3])
        values.lay_out(table[:, 0], batch)
        assert values.numbers.entries is not None
        assert values.numbers.entries.tolist() == [[-1], [-1]]
    assert len(failed) == 1
    assert "request r runs without its plan: the plan replays" in failed[0]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"moe_route_group": "steered", "moe_route_item": "a"}, None),
        ({"moe_route_group": "steered"}, "give the request moe_route_item"),
        ({"moe_route_group": "steered", "moe_route_item": "c"}, "no values for moe_route_item='c' in group 'steered'"),
        ({"moe_route_group": "plain", "moe_route_item": "c"}, None),
        ({"moe_route_group": "steered", "moe_route_plan": "none"}, None),
        ({}, None),
    ],
)
def test_a_request_without_values_is_refused(tmp_path: Path, extra: dict[str, str], words: str | None) -> None:
    file = tmp_path / "plan.safetensors"
    replay(["a", "b"]).only(groups=["steered"]).save(file)
    params = extra or None
    started = PlannedItems(Options(groups=GROUPS, plan=str(file)))
    told = PlannedItems(Options(groups=GROUPS))
    assert told.error(params) is None
    told.steered(file.read_bytes())
    for items in (started, told):
        found = items.error(params)
        assert found is words is None or (words and re.search(words, found or ""))
    told.steered(None)
    assert told.error(params) is None


def test_a_plan_that_only_workers_read_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = PlannedItems(Options(groups=GROUPS, plans={"other": str(tmp_path / "elsewhere.safetensors")}))
    assert "requests are not checked against plan 'other'" in caplog.text
    assert items.error({"moe_route_plan": "other"}) is None


vllm: Any = None
if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
needs_vllm = pytest.mark.skipif(vllm is None, reason="needs vLLM in an environment of its own: make test-vllm")
NEW, LAYERS = 10, 8


class Row(NamedTuple):
    group: str
    item: str
    ids: list[int]


@pytest.fixture(scope="module")
def model() -> Any:
    from moe_route.data import load_demo_model

    return load_demo_model()[0].float()


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    from moe_route.data import demo_corpus, load_demo_model

    tokenizer, corpus = load_demo_model()[1], demo_corpus().subset(["eng_Latn"], limit=24)
    texts = [tokenizer(" ".join(corpus["eng_Latn"][first : first + 3])).input_ids for first in range(0, 24, 3)]
    return [
        Row(GROUPS[number % 2], item, ids[: 40 + number])
        for number, (item, ids) in enumerate(zip(corpus.items, texts, strict=False))
    ]


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    made = engine(
        {"groups": list(GROUPS), "plans": {"other": None}},
        max_num_seqs=8,
        max_num_batched_tokens=32,  # prompts arrive in chunks
        enable_prefix_caching=True,
        block_size=32,
    )
    yield made
    del made
    gc.collect()


def in_vllm(llm: Any, rows: list[Row], plans: list[str] | None = None) -> tuple[list[list[int]], list[int]]:
    """Texts, and how many tokens of each prompt came from the cache."""
    params = [
        vllm.SamplingParams(
            temperature=0,
            max_tokens=NEW,
            ignore_eos=True,
            extra_args={
                "moe_route_group": row.group,
                "moe_route_item": row.item,
                **({"moe_route_plan": plans[number]} if plans else {}),
            },
        )
        for number, row in enumerate(rows)
    ]
    out = llm.generate([{"prompt_token_ids": row.ids} for row in rows], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in out], [o.num_cached_tokens for o in out]


def in_transformers(model: Any, rows: list[Row], plan: mr.Plan) -> tuple[list[list[int]], Any]:
    texts = []
    with mr.attach(model) as routed, torch.no_grad(), routed.steer(plan), routed.record(groups=GROUPS) as rec:
        for row in rows:
            with rec.labels(groups=row.group, items=[row.item]):
                ids = torch.tensor([row.ids])
                made = model.generate(
                    ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None
                )
            texts.append(made[0, len(row.ids) :].tolist())
        return texts, rec.statistics()


def of_every_token(rows: list[Row], kind: str) -> mr.Plan:
    """Values for the prompts and, of every second row, some of the answer."""
    generator = torch.Generator().manual_seed(11)
    longest = max(len(row.ids) for row in rows) + NEW // 2
    scores = torch.rand(len(rows), longest, LAYERS, 16, generator=generator) + 0.05
    items = [row.item for row in rows]
    if kind == "replay":
        return mr.Plan.replay(scores.topk(2).indices, items=items)
    for number, row in enumerate(rows):
        scores[number, len(row.ids) - number % 3 :] = torch.nan  # the router's own from there on
    return mr.Plan.replace_scores(scores, items=items)


PLANS = {
    "absent": mr.Plan.activate({layer: [1, 5, 9] for layer in range(LAYERS)}, strength=0.9).only(absent=True),
    "drawn": mr.Plan.force_on({2: [3], 4: [1]}).random_per_token(4) + mr.Plan.forbid({0: [1]}),
    "scores": mr.Plan.replace_scores({3: {1: 0.5, 4: 0.3, 7: 0.2}}),
    "fixed": mr.Plan.fix_choice({1: [6, 0], 5: [2]}).only(phase="decode"),
    "reserved": mr.Plan.reserve_slot({layer: [7] for layer in range(LAYERS)})
    + mr.Plan.magnitude({2: [1]}, strength=0.4),
    "gumbel": mr.Plan.gumbel(3, temperature=0.7),
    "top_k": mr.Plan.top_k(1, layers=[1, 2]),
    "replay": "replay",
    "given": "given",
}


@needs_vllm
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_steers_as_in_transformers(llm: Any, model: Any, rows: list[Row], name: str) -> None:
    plan = PLANS[name]
    plan = (of_every_token(rows, plan) if isinstance(plan, str) else plan).only(groups=["steered"])
    texts, there = in_transformers(model, rows, plan)
    mr.vllm.steer(llm, plan)
    try:
        mr.vllm.record(llm)
        found, _ = in_vllm(llm, rows)
        here = mr.vllm.statistics(llm)
        mr.vllm.pause(llm)
        assert found == texts
        for metric in ("counts", "natural_counts"):
            for phase in ("prefill", "decode"):
                np.testing.assert_array_equal(here.token_sum(metric, phase), there.token_sum(metric, phase))
        for scalar in ("tokens", "slots", "empty", "steered", "flipped"):
            np.testing.assert_array_equal(here.scalar(scalar), there.scalar(scalar), err_msg=scalar)
        assert here.metadata["fingerprint"] == there.metadata["fingerprint"]
        assert (there.token_sum("counts") != there.token_sum("natural_counts")).any()
        again = [in_vllm(llm, rows) for _ in range(2)]  # now from prefixes of each other, where they are alike
        assert [one[0] for one in again] == [texts, texts]
        assert sum(again[1][1]) > 0
    finally:
        mr.vllm.steer(llm, None)


@needs_vllm
def test_two_plans_steer_the_requests_that_choose_them(llm: Any, model: Any, rows: list[Row]) -> None:
    plans = {"default": of_every_token(rows, "replay"), "other": of_every_token(rows, "given") + PLANS["drawn"]}
    expected = {name: in_transformers(model, rows, plan)[0] for name, plan in plans.items()}
    expected["none"] = in_transformers(model, rows, mr.Plan())[0]
    for name, plan in plans.items():
        mr.vllm.steer(llm, plan, name=name)
    try:
        for shift in range(3):
            chosen = [list(expected)[(number + shift) % 3] for number in range(len(rows))]
            found, _ = in_vllm(llm, rows, chosen)
            assert found == [expected[name][number] for number, name in enumerate(chosen)]
    finally:
        for name in plans:
            mr.vllm.steer(llm, None, name=name)


@needs_vllm
def test_requests_of_one_prompt_and_other_items_share_no_prefix(llm: Any, model: Any, rows: list[Row]) -> None:
    first = rows[7]
    both = [first._replace(item=item) for item in ("left", "right")]
    plan = of_every_token(both, "replay")
    expected = in_transformers(model, both, plan)[0]
    assert expected[0] != expected[1]
    mr.vllm.steer(llm, plan)
    try:
        for row, text in zip(both * 2, expected * 2, strict=True):
            assert in_vllm(llm, [row])[0] == [text]
    finally:
        mr.vllm.steer(llm, None)


@needs_vllm
def test_an_engine_refuses_a_request_without_values_and_the_next_one_served(llm: Any, rows: list[Row]) -> None:
    mr.vllm.steer(llm, of_every_token(rows[:2], "replay"))
    try:
        with pytest.raises(vllm.exceptions.VLLMValidationError, match="no values for moe_route_item='nobody'"):
            in_vllm(llm, [rows[0]._replace(item="nobody")])
        assert len(in_vllm(llm, rows[:2])[0]) == 2
    finally:
        mr.vllm.steer(llm, None)


@needs_vllm
def test_what_another_engine_recorded_is_replayed(llm: Any, model: Any, rows: list[Row]) -> None:
    """A trace of transformers, steered there, chooses the experts here."""
    with (
        mr.attach(model) as routed,
        torch.no_grad(),
        routed.steer(PLANS["absent"]),
        routed.record(groups=GROUPS, trace=True) as rec,
    ):
        for row in rows[:4]:
            with rec.labels(groups=row.group, items=[row.item]):
                model.generate(torch.tensor([row.ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    plan = mr.Plan.replay(rec.trace())
    expected = in_transformers(model, rows[:4], plan)[0]
    assert expected != in_transformers(model, rows[:4], mr.Plan())[0]
    mr.vllm.steer(llm, plan)
    try:
        assert in_vllm(llm, rows[:4])[0] == expected
    finally:
        mr.vllm.steer(llm, None)

"""Prefix caching: who shares, who does not, and that texts and counts are those of transformers."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moe_route as mr
from moe_route.integrations.serving.options import Options
from moe_route.integrations.serving.plans import Steered, Workers, steered_prefixes
from moe_route.integrations.vllm.prefixes import Prefixes

GROUPS = ("plain", "soft", "late")


class Request:
    """The fields of vLLM's request that are read and set."""

    def __init__(self, *, salt: str | None = None, prompt: int = 64, computed: int = 0, **extra: Any):
        self.sampling_params = SimpleNamespace(extra_args={f"moe_route_{name}": value for name, value in extra.items()})
        self.cache_salt, self.num_prompt_tokens, self.num_computed_tokens = salt, prompt, computed
        self.skip_reading_prefix_cache = False
        self.block_hashes: list[str | None] = []
        self.update_block_hashes()

    def get_skip_reading_prefix_cache(self) -> bool:
        return False

    def update_block_hashes(self) -> None:
        self.block_hashes.append(self.cache_salt)


class Core:
    """Workers that answer what they are told to, and a scheduler."""

    def __init__(self, workers: Workers):
        self.workers, self.asked = workers, 0
        self.model_executor, self.scheduler = self, SimpleNamespace(requests={})

    def collective_rpc(self, method: str) -> list[Workers]:
        assert method == "moe_route_prefixes"
        self.asked += 1
        return [self.workers]


STEERED = {("default", "soft"): Steered("s", False), ("default", "late"): Steered("l", True)}


def prefixes(*, counts: bool = False, **options: Any) -> tuple[Core, Prefixes]:
    core = Core(Workers(counts, STEERED))
    return core, Prefixes(core, Options(groups=GROUPS, plans={"other": None}, **options))


def salt_of(made: Prefixes, **settings: Any) -> str | None:
    request = Request(**settings)
    made.prepare(request)
    assert request.block_hashes == [request.cache_salt]  # made again where the salt changed
    salt: str | None = request.cache_salt
    return salt


def test_requests_that_are_steered_alike_share_and_no_others() -> None:
    core, made = prefixes()
    assert salt_of(made) is None
    assert salt_of(made, group="plain") is None
    assert salt_of(made, group="soft", plan="none") is None
    assert salt_of(made, group="soft", plan="other") is None
    soft = salt_of(made, group="soft")
    assert soft == salt_of(made, group="soft", prompt=32)
    late = salt_of(made, group="late")
    assert late == salt_of(made, group="late")
    assert len({soft, late, salt_of(made, group="late", prompt=32), None}) == 4
    assert core.asked == 1


def test_the_salt_of_a_request_itself_is_kept() -> None:
    _, made = prefixes()
    assert salt_of(made, salt="mine") == "mine"
    soft = {salt_of(made, salt=salt, group="soft") for salt in (None, "mine", "yours")}
    assert len(soft) == 3
    forged = {salt_of(made, salt=salt) for salt in soft}  # a request that is not steered, and brings such a salt
    assert not forged & soft
    assert len(forged) == 3
    request = Request(salt="mine", group="soft")
    for _ in range(2):
        made.prepare(request)
    assert request.cache_salt == salt_of(made, salt="mine", group="soft")


def test_requests_that_are_counted_do_not_read_the_cache() -> None:
    _, made = prefixes(counts=True)
    for group, skips in (("plain", True), (None, False)):
        request = Request(**({"group": group} if group else {}))
        made.prepare(request)
        assert request.skip_reading_prefix_cache == skips


def test_counted_requests_read_the_cache_where_cached_tokens_need_not_count() -> None:
    _, made = prefixes(counts=True, count_cached=False)
    for asks, skips in (({}, False), ({"experts": "ids"}, True)):
        request = Request(group="plain", **asks)
        made.prepare(request)
        assert request.skip_reading_prefix_cache == skips


def test_a_plan_that_changes_while_requests_run_parts_them_from_later_ones() -> None:
    core, made = prefixes()
    running, waiting = Request(group="plain", computed=32), Request(group="plain")
    for request in (running, waiting):
        made.prepare(request)
    core.scheduler.requests = {"a": running, "b": waiting}
    core.workers = Workers(False, {("default", "plain"): Steered("p", False)})
    made.called("steer")
    assert running.cache_salt is None  # what it adds from now on serves nobody who comes later
    assert waiting.cache_salt == salt_of(made, group="plain") != running.cache_salt
    core.scheduler.requests, core.workers = {}, Workers()
    made.called("steer")
    assert salt_of(made, group="plain") is not None


def test_a_plan_that_changes_between_requests_finds_its_old_prefixes_again() -> None:
    core, made = prefixes()
    before = salt_of(made, group="soft")
    core.workers = Workers()
    made.called("steer")
    assert salt_of(made, group="soft") is None
    core.workers = Workers(False, STEERED)
    made.called("steer")
    assert salt_of(made, group="soft") == before


def test_what_steers_a_group_is_read_from_its_plan() -> None:
    routers = [SimpleNamespace(name=f"layers.{i}.gate", num_experts=8, top_k=2, role="text") for i in range(2)]
    plan = mr.Plan.forbid({0: [1]}).only(groups=["soft"]) + mr.Plan.force_off({1: [2]}).only(
        groups=["late"], phase="decode"
    )
    found = steered_prefixes({"default": plan.compile(routers, GROUPS)}, GROUPS)
    assert {key: one.by_phase for key, one in found.items()} == {("default", "soft"): False, ("default", "late"): True}
    assert len({one.digest for one in found.values()}) == 2
    everywhere = steered_prefixes({"x": mr.Plan.forbid({0: [1]}).compile(routers, GROUPS)}, GROUPS)
    assert list(everywhere) == [("x", None), *(("x", group) for group in GROUPS)]
    assert len(set(everywhere.values())) == 1  # every group is steered alike


vllm: Any = None
if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
needs_vllm = pytest.mark.skipif(vllm is None, reason="needs vLLM in an environment of its own: make test-vllm")
NEW = 6
PLAN = mr.Plan.force_on({layer: [3, 6] for layer in range(6)}).only(groups=["soft"])
LATE = mr.Plan.force_on({layer: [3, 6] for layer in range(6)}).only(groups=["late"], phase="decode")


@pytest.fixture(scope="module")
def model() -> Any:
    from moe_route.data import load_demo_model

    return load_demo_model()[0].float()


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    """Three prompts of 100 tokens, the first two with 70 tokens in common."""
    from moe_route.data import demo_corpus, load_demo_model

    tokenizer = load_demo_model()[1]
    text = tokenizer(" ".join(demo_corpus()["eng_Latn"][:40])).input_ids
    return [text[:100], text[:70] + text[200:230], text[300:400]]


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    from moe_route.data import demo_model_folder

    made = vllm.LLM(
        model=str(demo_model_folder()),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        enable_prefix_caching=True,
        block_size=32,
        disable_log_stats=True,
        additional_config={"moe_route": {"groups": list(GROUPS)}},
    )
    yield made
    del made
    gc.collect()


def answering(group: str | None, new: int = NEW, *, ignore_eos: bool = False, **extra: Any) -> Any:
    given = {"moe_route_group": group, **extra} if group else extra
    return vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=ignore_eos, extra_args=given)


def texts_of(llm: Any, prompts: list[list[int]], group: str | None, **extra: Any) -> tuple[list[list[int]], list[int]]:
    """The texts, and how many tokens of each prompt came from the cache."""
    params = answering(group, **extra)
    out = llm.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in out], [o.num_cached_tokens for o in out]


def in_transformers(model: Any, prompts: list[list[int]], group: str, plan: mr.Plan) -> Any:
    texts = []
    with (
        mr.attach(model) as routed,
        torch.no_grad(),
        routed.steer(plan),
        routed.record(groups=GROUPS) as rec,
    ):
        for one in prompts:
            with rec.labels(groups=group):
                made = model.generate(torch.tensor([one]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            texts.append(made[0, len(one) :].tolist())
    return texts, rec.statistics()


@needs_vllm
def test_a_steered_prefix_serves_steered_requests_only(llm: Any, model: Any, ids: list[list[int]]) -> None:
    plain, steered = (in_transformers(model, ids, group, PLAN)[0] for group in ("plain", "soft"))
    assert plain != steered
    mr.vllm.steer(llm, PLAN)
    try:
        for expected, group, extra in (
            (plain, "plain", {}),
            (steered, "soft", {}),
            (plain, "soft", {"moe_route_plan": "none"}),  # shares with the group that no rule reaches
            (plain, None, {}),
        ):
            runs = [texts_of(llm, [one], group, **extra) for one in ids for _ in range(2)]
            assert [run[0][0] for run in runs] == [text for text in expected for _ in range(2)]
            cached = [run[1][0] for run in runs]
            first = [96, 96, 96] if group is None or extra else [0, 64, 0]
            assert cached == [first[0], 96, first[1], 96, first[2], 96]
    finally:
        mr.vllm.steer(llm, None)
    again, cached = texts_of(llm, ids, "soft")  # no plan: the prefixes of unsteered requests
    assert (again, cached) == (plain, [96, 96, 96])


@needs_vllm
def test_a_prompt_that_an_answer_was_steered_for_is_not_served_by_it(
    llm: Any, model: Any, ids: list[list[int]]
) -> None:
    """Tokens of an answer, steered in decode, come again in a longer prompt, where no rule reaches them."""
    mr.vllm.steer(llm, LATE)
    try:
        short = ids[2][:34]
        (answer,), _ = texts_of(llm, [short], "late", new=32, ignore_eos=True)
        longer = short + answer + ids[2][34:60]
        expected = in_transformers(model, [longer], "late", LATE)[0]
        assert texts_of(llm, [longer], "late") == (expected, [0])
        assert texts_of(llm, [longer], "late") == (expected, [64])
    finally:
        mr.vllm.steer(llm, None)


@needs_vllm
def test_a_recording_is_complete_though_prefixes_are_cached(llm: Any, model: Any, ids: list[list[int]]) -> None:
    mr.vllm.steer(llm, PLAN)
    try:
        for group in ("plain", "soft"):
            texts_of(llm, ids, group)  # now their prefixes are cached
            mr.vllm.record(llm)
            texts, cached = texts_of(llm, ids, group)
            found = mr.vllm.statistics(llm)
            mr.vllm.pause(llm)
            expected, there = in_transformers(model, ids, group, PLAN)
            assert (texts, cached) == (expected, [0, 0, 0])
            for name in ("counts", "natural_counts"):
                np.testing.assert_array_equal(found.token_sum(name), there.token_sum(name))
            assert found.metadata["fingerprint"] == there.metadata["fingerprint"]
            assert found.metadata["cached_tokens"] == 0
    finally:
        mr.vllm.steer(llm, None)


@needs_vllm
def test_a_plan_that_begins_while_a_request_runs_spoils_no_prefix(llm: Any, model: Any, ids: list[list[int]]) -> None:
    llm.reset_prefix_cache()
    plain = in_transformers(model, ids[:1], "soft", mr.Plan())[0]
    steered = in_transformers(model, ids[:1], "soft", PLAN)[0]
    params = answering("soft", 20, ignore_eos=True)
    engine = llm.llm_engine
    engine.add_request("running", {"prompt_token_ids": ids[0][:60]}, params)
    engine.step()
    mr.vllm.steer(llm, PLAN)
    try:
        while engine.has_unfinished_requests():
            engine.step()
        assert texts_of(llm, ids[:1], "soft") == (steered, [0])
    finally:
        mr.vllm.steer(llm, None)
    assert texts_of(llm, ids[:1], "soft")[0] == plain

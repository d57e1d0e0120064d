"""Recordings and traces beside drafts, and under async scheduling, are those of a plain engine.

vLLM turns async scheduling off on a CPU, where nothing is gained by it. Its scheduler and its runner do not depend on
that, so these tests turn it on again, with stand-ins for the streams and events of CUDA.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

import moe_route as mr
from moe_route.integrations.vllm.texts import FIELD, Texts
from moe_route.recording import RoutingStatistics
from moe_route.recording.trace import Trace

if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
else:
    vllm = pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

GROUPS = ("plain", "steered")
PLAN = (
    mr.Plan.activate({2: [1, 5], 3: [0], 4: [7]}, strength=0.5)
    + mr.Plan.forbid({1: [3]})
    + mr.Plan.scale_logits({6: {1: 1.5}}).only(positions=[(2, 9), (40, 60)])
    + mr.Plan.force_off({5: [2, 4]}).only(phase="decode")
    + mr.Plan.forbid({7: [1, 2]}).random_per_token(1)
).only(groups=["steered"])
PLANS = (None, PLAN)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
TRACED = {"trace": True}


class Task(NamedTuple):
    """A prompt, and what else its sampling says."""

    ids: list[int]
    settings: dict[str, Any]


class Answers(NamedTuple):
    statistics: RoutingStatistics
    texts: list[list[int]]
    trace: Trace | None


def engine(options: dict[str, Any], **changes: Any) -> Any:
    from moe_route.data import demo_model_folder

    settings: dict[str, Any] = {
        "model": str(demo_model_folder()),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 48,  # prompts arrive in chunks, beside drafts
        "block_size": 32,
        "num_gpu_blocks_override": 8,  # requests are preempted
        "disable_log_stats": True,
        "async_scheduling": False,
        "additional_config": {"moe_route": {"groups": list(GROUPS), "sequences": True, **options}},
    }
    return vllm.LLM(**{**settings, **changes})


def drafting_model() -> dict[str, Any]:
    from moe_route.data import demo_model_folder

    return {"method": "draft_model", "model": str(demo_model_folder()), "num_speculative_tokens": 3}


class Nothing:
    """A stream or an event that need not wait."""

    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any):
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    record = synchronize = wait_stream


@contextlib.contextmanager
def ahead() -> Iterator[None]:
    """Engines that are asked for async scheduling inside have it, on a CPU too."""
    if torch.cuda.is_available():
        yield
        return
    from vllm.platforms import current_platform

    update = type(current_platform).check_and_update_config

    def updated(cls: Any, config: Any) -> None:
        update(config)
        config.scheduler_config.async_scheduling = True

    with (
        mock.patch.object(type(current_platform), "check_and_update_config", classmethod(updated)),
        mock.patch("torch.cuda.current_stream", Nothing),
        mock.patch("torch.cuda.stream", contextlib.nullcontext),
        mock.patch("torch.cuda.Stream", Nothing),
        mock.patch("torch.cuda.Event", Nothing),
    ):
        yield


def params_of(tasks: list[Task]) -> list[Any]:
    return [
        vllm.SamplingParams(
            temperature=0,
            extra_args={"moe_route_group": GROUPS[number // 2 % 2], "moe_route_item": str(number)},
            **{"max_tokens": 24, **task.settings},
        )
        for number, task in enumerate(tasks)
    ]


def texts_of(llm: Any, tasks: list[Task]) -> list[list[int]]:
    out = llm.generate([{"prompt_token_ids": task.ids} for task in tasks], params_of(tasks), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in out]


def run(llm: Any, tasks: list[Task], plan: mr.Plan | None) -> Answers:
    mr.vllm.steer(llm, plan)
    mr.vllm.record(llm)
    texts = texts_of(llm, tasks)
    traced = llm.llm_engine.vllm_config.additional_config["moe_route"].get("trace")
    return Answers(mr.vllm.statistics(llm), texts, mr.vllm.trace(llm) if traced else None)


def in_order(trace: Trace) -> dict[str, np.ndarray]:
    items = np.array([int(trace.items[number] or 0) for number in trace.sequence])
    order = np.lexsort((trace.position, items))
    columns = ("group", "position", "token", "phase", "ids", "weights")
    return {"item": items[order], **{name: getattr(trace, name)[order] for name in columns}}


@pytest.fixture(scope="module")
def plain() -> Iterator[tuple[list[Task], list[Answers]]]:
    """Tasks, and what a plain engine makes of them, without a plan and with one."""
    from vllm.platforms import current_platform

    from moe_route.data import demo_corpus, load_demo_model

    tokenizer, corpus = load_demo_model()[1], demo_corpus()
    generator = np.random.default_rng(0)
    long = {"ignore_eos": True, "max_tokens": 60}
    tasks = [Task(generator.integers(10, 4000, 20).tolist(), long) for _ in range(4)]
    tasks += [
        Task((tokenizer(text).input_ids[:8] * 9)[: 18 + 6 * number], {"ignore_eos": bool(number % 4)})
        for number, text in enumerate(corpus["eng_Latn"][:6])  # repeats, so that drafts are right at times
    ]
    llm = engine(TRACED)
    # vLLM 0.32 looks through every module of the process for kernels to replace, and fails at what drafting imports;
    # they are replaced already
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
    for number, text in enumerate(texts_of(llm, tasks)):
        if number % 2:  # ends at a token that came, where a step of drafts may go on
            stop = {"stop_token_ids": [text[min(3 * number, len(text) - 1)]]}
            tasks[number] = tasks[number]._replace(settings={**tasks[number].settings, **stop})
    yield tasks, [run(llm, tasks, plan) for plan in PLANS]
    del llm
    gc.collect()


@pytest.fixture(scope="module", params=["lookup", "lookup traced", "model traced", "ahead", "ahead traced"])
def other(request: pytest.FixtureRequest, plain: Any) -> Iterator[Any]:
    """An engine that runs tokens which may not become text; ``plain`` ran before it."""
    options = TRACED if "traced" in request.param else {}
    with contextlib.ExitStack() as stack:
        if "ahead" in request.param:
            stack.enter_context(ahead())
            llm = engine(options, async_scheduling=True)
            assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        else:
            llm = engine(options, speculative_config=NGRAM if "lookup" in request.param else drafting_model())
        yield llm
        del llm
        gc.collect()


def test_a_text_that_ends_at_a_string_ends_there_ahead_of_it_too(plain: Any) -> None:
    """The front end sees the string, and its engine core has scheduled a step more."""
    from moe_route.data import load_demo_model

    tokenizer = load_demo_model()[1]
    tasks, answers = plain
    task = tasks[2]._replace(settings={"stop": [tokenizer.decode(answers[0].texts[2][11:14])], "max_tokens": 24})
    found = []
    for manager in (contextlib.nullcontext, ahead):
        with manager():
            llm = engine({}, async_scheduling=manager is ahead)
            found.append(run(llm, [task], None))
            del llm
            gc.collect()
    assert found[0].texts == found[1].texts
    assert 2 < len(found[0].texts[0]) < 24
    np.testing.assert_array_equal(*(one.statistics.token_sum("counts") for one in found))
    assert found[0].statistics.metadata["fingerprint"] == found[1].statistics.metadata["fingerprint"]
    assert [one.statistics.metadata["tokens_rejected"] for one in found] == [0, 1]


@pytest.mark.parametrize("number", range(len(PLANS)), ids=["free", "steered"])
def test_what_became_text_is_counted_as_by_a_plain_engine(other: Any, plain: Any, number: int) -> None:
    tasks, answers = plain
    found, expected = run(other, tasks, PLANS[number]), answers[number]
    assert found.texts == expected.texts
    here, there = found.statistics, expected.statistics
    assert here.metrics == there.metrics
    for name in ("counts", *(["natural_counts"] if number else [])):
        for phase in ("prefill", "decode"):
            np.testing.assert_array_equal(here.token_sum(name, phase), there.token_sum(name, phase))
    for name in ("tokens", "slots", "empty", "steered", "flipped"):
        np.testing.assert_array_equal(here.scalar(name), there.scalar(name), err_msg=name)
    for name in ("probability", "weight", "weight_share"):  # float32 logits depend on what else is in a step
        np.testing.assert_allclose(here.token_sum(name), there.token_sum(name), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(here.sequences(), there.sequences())
    for name in ("fingerprint", "plans", "cached_tokens", "running_sequences"):
        assert here.metadata[name] == there.metadata[name]
    assert here.store is not None
    for item in range(len(tasks)):
        one, same = (store.counts(str(item), GROUPS[item // 2 % 2]) for store in (here.store, there.store))
        np.testing.assert_array_equal(one, same)
    assert here.metadata["tokens_rejected"] > 0 == there.metadata["tokens_rejected"]
    assert min(here.metadata["tokens_run_again"], there.metadata["tokens_run_again"]) > 0
    if other.llm_engine.vllm_config.speculative_config is not None:  # drafts were right
        assert here.metadata["calls"] < there.metadata["calls"]
    if found.trace is not None:
        assert expected.trace is not None
        mine, theirs = in_order(found.trace), in_order(expected.trace)
        for name in ("item", "group", "position", "token", "phase", "ids"):
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
        np.testing.assert_allclose(mine["weights"], theirs["weights"], atol=1e-3)


@pytest.mark.parametrize("other", ["lookup traced", "ahead traced"], indirect=True)
def test_verbs_between_the_steps_see_what_is_known(other: Any, plain: Any) -> None:
    """A plan ends while tokens are pending: they were steered by it, and are counted so."""
    core = other.llm_engine
    mr.vllm.steer(other, PLAN)
    mr.vllm.record(other)
    tasks = plain[0]
    for number, (task, params) in enumerate(zip(tasks, params_of(tasks), strict=True)):
        core.add_request(str(number), {"prompt_token_ids": task.ids}, params)
    steps = 0
    texts: dict[str, list[int]] = {}
    while core.has_unfinished_requests():
        for one in core.step():
            texts[one.request_id] = list(one.outputs[0].token_ids)
        steps += 1
        if steps % 2 == 0:
            mr.vllm.steer(other, PLAN if steps % 4 == 0 else None)
            other.collective_rpc("moe_route_statistics")
    found = mr.vllm.statistics(other)
    fed = [len(tasks[int(name)].ids) + len(text) - 1 for name, text in texts.items()]
    assert found.scalar("tokens").sum() == len(found.layers) * sum(fed)
    assert found.metadata["tokens_rejected"] > 0
    assert found.scalar("steered").sum() > 0
    trace = mr.vllm.trace(other)
    assert len(trace.position) == sum(fed)
    for layer in range(len(found.layers)):
        for group in range(len(GROUPS)):
            ids = trace.ids[trace.group == group, layer].ravel()
            counts = np.bincount(ids[ids >= 0], minlength=found.num_experts[layer])
            np.testing.assert_array_equal(found.token_sum("counts")[group, layer], counts)
    mr.vllm.steer(other, None)


@pytest.mark.parametrize("other", ["lookup", "ahead"], indirect=True)
def test_a_scheduler_that_does_not_tell_is_refused(other: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = Texts.attach

    def silent(self: Texts, news: Any, step: Any, requests: Any) -> None:
        attach(self, news, step, requests)
        delattr(step, FIELD)

    mr.vllm.record(other)
    with monkeypatch.context() as patched:
        patched.setattr(Texts, "attach", silent)
        texts_of(other, plain[0][:4])
    with pytest.raises(Exception, match="start it with its own scheduler"):
        mr.vllm.statistics(other)
    assert run(other, plain[0][:2], None).statistics.scalar("tokens").sum() > 0  # another recording is whole

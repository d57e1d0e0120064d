"""What `generate` knows and its calls do not say."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_route as mr
from moe_route.data import load_demo_model
from moe_route.patching import Attachment

transformers = pytest.importorskip("transformers")

from harness.tiny_models import tiny_model, tokens  # noqa: E402 (it needs transformers)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """In float64, so that no choice hangs on rounding."""
    made = tiny_model("qwen3_moe", torch.float64, head=True)
    made.set_experts_implementation("eager")
    return made


PROMPT = {"input_ids": tokens(2, 5), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}


def generated(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(3)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(**PROMPT, **options)


def recorded(model: nn.Module, plan: mr.Plan | None = None, labels: Any = ("x", "y"), **options: Any):
    with (
        mr.attach(model) as routed,
        routed.record(sequences=True, trace=True) as recorder,
        recorder.labels(labels, items=[1, 2]),
        nullcontext() if plan is None else routed.steer(plan),
    ):
        text = generated(model, **options)
    return text, recorder.statistics(), recorder.trace()


PLANS = {
    "none": None,
    "all": mr.Plan.forbid({0: [3], 1: [5]}),
    "prefill": mr.Plan.forbid({0: [3], 1: [5]}).only(phase="prefill"),
    "decode": mr.Plan.forbid({0: [3], 1: [5]}).only(phase="decode"),
    "of a group": mr.Plan.forbid({0: [3], 1: [5]}).only(phase="decode", groups="y"),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("labels", [["x", "y"], [["x"] * 3 + ["y"] * 2] * 2], ids=["sequences", "tokens"])
def test_without_a_cache_it_is_what_it_is_with_one(model: nn.Module, plan: str, labels: Any) -> None:
    """The same text, counts, phases, sequences, fingerprint and trace; and the same tokens are steered."""
    text, with_cache, trace = recorded(model, PLANS[plan], labels)
    again, without, other = recorded(model, PLANS[plan], labels, use_cache=False)
    assert torch.equal(text, again)
    assert with_cache.groups == without.groups
    for phase in ("prefill", "decode"):
        for name in ("counts", *(["natural_counts"] if PLANS[plan] else [])):
            np.testing.assert_array_equal(without.token_sum(name, phase), with_cache.token_sum(name, phase))
        np.testing.assert_array_equal(without.scalar("steered", phase), with_cache.scalar("steered", phase))
    assert without.sequences().tolist() == with_cache.sequences().tolist()
    assert without.metadata["fingerprint"] == with_cache.metadata["fingerprint"]
    np.testing.assert_array_equal(np.sort(other.ids, -1), np.sort(trace.ids, -1))
    np.testing.assert_array_equal(other.position, trace.position)


def test_the_same_text_in_two_generations_is_counted_twice(model: nn.Module) -> None:
    with mr.attach(model) as routed, routed.record() as recorder:
        for _ in range(2):
            generated(model, use_cache=False)
    assert recorder.statistics().sequences().tolist() == [4]
    assert recorder.statistics().tokens("prefill")[0].tolist() == [16] * 3


GIVEN = {
    "argument": lambda stop: {"eos_token_id": stop},
    "list": lambda stop: {"eos_token_id": [stop, 1]},
    "configuration": lambda stop: {
        "generation_config": transformers.GenerationConfig(eos_token_id=stop, pad_token_id=0, max_new_tokens=5)
    },
}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("given", GIVEN)
def test_ends_are_known_however_they_are_given(model: nn.Module, given: str, cached: bool) -> None:
    free = generated(model, eos_token_id=None)[:, 5:]
    stop = next(int(token) for token in free[0, :3] if token not in free[1])
    length = int((free[0] == stop).nonzero()[0])
    options = GIVEN[given](stop)
    if given == "configuration":  # both together are deprecated
        options |= {"max_new_tokens": None, "do_sample": None, "pad_token_id": None}
        options = {name: value for name, value in options.items() if value is not None}
        call = lambda: model.generate(**PROMPT, use_cache=cached, **options)  # noqa: E731
    else:
        call = lambda: generated(model, use_cache=cached, **options)  # noqa: E731
    with mr.attach(model) as routed, routed.record() as recorder, recorder.labels(["x", "y"]):
        call()
    assert recorder.statistics().tokens("decode").max(1).tolist() == [length, 4]


def test_a_padding_id_that_a_running_sequence_made_is_a_token(model: nn.Module) -> None:
    free = generated(model, eos_token_id=None)[:, 5:]
    pad = int(free[1, 1])
    with mr.attach(model) as routed, routed.record() as recorder, recorder.labels(["x", "y"]):
        generated(model, pad_token_id=pad, eos_token_id=None)
        generated(model, pad_token_id=pad, eos_token_id=127)
    expected = 8 if not (free == 127).any() else None
    assert expected is not None, "choose another end"
    assert recorder.statistics().tokens("decode").max(1).tolist() == [expected] * 2


def test_a_generation_that_fails_is_over(model: nn.Module) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    attachment = Attachment(model)
    with pytest.raises(ZeroDivisionError):
        generated(model, stopping_criteria=[fail])
    assert attachment._context.generation is None
    attachment.detach()
    assert not {"generate", "_get_stopping_criteria", "init_continuous_batching"} & vars(model).keys()


def test_who_replaced_generate_keeps_it(model: nn.Module) -> None:
    def mine(*_: Any, **__: Any) -> str:
        return "mine"

    model.generate = mine
    with mr.attach(model):
        assert model.generate() == "mine"
    assert vars(model).pop("generate") is mine


# ---------------------------------------------------------------------------------------------------------------
# Drafts: each token of the text once, as without them.


def same_recording(found: mr.RoutingStatistics, plain: mr.RoutingStatistics, steered: bool = False) -> None:
    """All that was counted, token by token and sequence by sequence."""
    assert found.groups == plain.groups
    for phase in ("prefill", "decode"):
        for name in ("counts", "probability", "weight", *(["natural_counts"] if steered else [])):
            np.testing.assert_allclose(found.token_sum(name, phase), plain.token_sum(name, phase), rtol=1e-6)
        np.testing.assert_array_equal(found.scalar("steered", phase), plain.scalar("steered", phase))
    assert found.sequences().tolist() == plain.sequences().tolist()
    assert found.metadata["fingerprint"] == plain.metadata["fingerprint"]
    assert found.store is not None
    np.testing.assert_array_equal(found.store.tokens(1, found.groups[0]), plain.store.tokens(1, plain.groups[0]))


def drafted(model: nn.Module, way: str, plan: mr.Plan | None = None, **more: Any) -> Any:
    """A text made with drafts, its statistics and trace; `way` is "none", "assistant", "early exit" or "lookup"."""
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | more
    if way == "assistant":
        options["assistant_model"] = assistant = tiny_model("olmoe", torch.float64, head=True, seed=3)
        assistant.set_experts_implementation("eager")
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
    elif way == "early exit":
        options["assistant_early_exit"] = 1
    elif way == "lookup":
        options["prompt_lookup_num_tokens"] = 4
    labels = [["x"] * 6 + ["y"] * 8] if more.get("tokens") else ["x"]
    options.pop("tokens", None)
    model.generation_config.eos_token_id = None
    with (
        mr.attach(model) as routed,
        routed.record(sequences=True, trace=True, phases=options.pop("phases", ("prefill", "decode"))) as recorder,
        recorder.labels(labels, items=[1]),
        nullcontext() if plan is None else routed.steer(plan),
    ):
        text = model.generate(**{"inputs": tokens(1, 4).repeat(1, 3)} | options)
    return text, recorder.statistics(), recorder.trace()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("way", ["assistant", "early exit", "lookup"])
def test_with_drafts_it_is_what_it_is_without(model: nn.Module, way: str, plan: str) -> None:
    text, plain, trace = drafted(model, "none", PLANS[plan])
    again, found, other = drafted(model, way, PLANS[plan])
    assert torch.equal(again, text)
    same_recording(found, plain, PLANS[plan] is not None)
    np.testing.assert_array_equal(np.sort(other.ids, -1), np.sort(trace.ids, -1))
    np.testing.assert_array_equal(other.position, trace.position)
    np.testing.assert_array_equal(other.phase, trace.phase)


@pytest.mark.parametrize("seed", range(6))
def test_drafts_under_guidance(model: nn.Module, seed: int) -> None:
    """A call beside the text comes between the drafts and the word on which of them were taken. (Of such drafts
    transformers makes another text than without them.)"""
    prompt = tokens(1, 4, seed).repeat(1, 3)
    _, found, trace = drafted(model, "lookup", guidance_scale=1.5, inputs=prompt)
    assert found.tokens("prefill").tolist() == [[12] * 3]
    assert found.tokens("decode").tolist() == [[8] * 3]
    assert trace.position.tolist() == list(range(20))


def test_drafts_after_padding(model: nn.Module) -> None:
    prompt = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens(1, 4).repeat(1, 3)], 1)
    options = {"inputs": prompt, "attention_mask": (torch.arange(15) > 2).long()[None]}
    _, plain, trace = drafted(model, "none", **options)
    _, found, other = drafted(model, "lookup", **options)
    same_recording(found, plain)
    for column in ("position", "phase"):
        np.testing.assert_array_equal(getattr(other, column), getattr(trace, column))


@pytest.mark.parametrize("recording", [False, True])
def test_criteria_may_be_asked_about_candidates_too(model: nn.Module, recording: bool) -> None:
    def two_of_each(model: Any, input_ids: Tensor, stopping_criteria: Any, **_: Any) -> Tensor:
        with torch.no_grad():
            for _ in range(3):
                best = model(input_ids).logits[:, -1].topk(2).indices
                stopping_criteria(torch.cat([input_ids.repeat_interleave(2, 0), best.reshape(-1, 1)], 1), None)
                input_ids = torch.cat([input_ids, best[:, :1]], 1)
                stopping_criteria(input_ids, None)
        return input_ids

    options = {"custom_generate": two_of_each, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(tokens(2, 5), **options)
    with mr.attach(model) as routed, routed.record() if recording else nullcontext():
        assert torch.equal(model.generate(tokens(2, 5), **options), plain)


def test_a_list_of_the_users_own_stays_what_it_is(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may return the very list that it was given."""
    own = transformers.LogitsProcessorList()
    monkeypatch.setattr(type(model), "_get_logits_processor", lambda self, *args, **kwargs: own)
    with mr.attach(model) as routed, routed.record():
        for _ in range(2):
            model.generate(tokens(1, 3), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert type(own) is transformers.LogitsProcessorList
    assert not vars(own)


def test_drafts_that_cannot_be_followed_are_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a transformers that makes them elsewhere."""
    monkeypatch.delattr(transformers.GenerationMixin, "_get_candidate_generator")
    with mr.attach(model) as routed, routed.record():
        with pytest.raises(RuntimeError, match="Generate without an assistant and without prompt lookup"):
            model.generate(tokens(1, 3), prompt_lookup_num_tokens=2, max_new_tokens=2)
        model.generate(tokens(1, 3), max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("options", [{"tokens": True}, {"phases": ("decode",)}, {"phases": ("prefill",)}], ids=str)
def test_drafts_keep_the_labels_of_tokens_and_the_phases_asked_for(model: nn.Module, options: dict[str, Any]) -> None:
    _, plain, trace = drafted(model, "none", **options)
    _, found, other = drafted(model, "lookup", **options)
    same_recording(found, plain)
    assert (found.tokens() == plain.tokens()).all()
    for column in ("group", "phase"):
        np.testing.assert_array_equal(getattr(other, column), getattr(trace, column))
    np.testing.assert_array_equal(np.diff(other.position), np.diff(trace.position))


def test_a_generation_with_drafts_that_fails_counts_no_draft(model: nn.Module) -> None:
    calls: list[int] = []

    def fail(module: nn.Module, args: object, given: dict[str, Any], output: object) -> None:
        calls.append(given["input_ids"].shape[1])
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = model.register_forward_hook(fail, with_kwargs=True)
    prompt = tokens(1, 4).repeat(1, 3)
    with mr.attach(model) as routed, routed.record(sequences=True) as recorder:
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt, prompt_lookup_num_tokens=4, max_new_tokens=9, do_sample=False, pad_token_id=0)
        hook.remove()
        with torch.no_grad():
            model(tokens(1, 3))
    statistics = recorder.statistics()
    assert statistics.tokens("prefill").max() == prompt.shape[1] + 3
    assert statistics.tokens("decode").max() < sum(calls) - prompt.shape[1]
    assert statistics.metadata["abandoned_sequences"] == 1


def test_an_assistant_that_is_recorded_itself_counts_what_it_runs(model: nn.Module) -> None:
    assistant = tiny_model("olmoe", torch.float64, head=True, seed=3)
    assistant.set_experts_implementation("eager")
    ran: list[int] = []
    assistant.register_forward_pre_hook(lambda _, args, given: ran.append(given["input_ids"].numel()), with_kwargs=True)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with mr.attach(assistant) as routed, routed.record() as recorder:
        model.generate(tokens(1, 5), assistant_model=assistant, **options)
    assert recorder.statistics().tokens().max() == sum(ran)
    assert recorder.statistics().sequences().tolist() == [1]


def test_guidance_is_beside_the_text(model: nn.Module) -> None:
    """It runs the model once more at every step, without the prompt."""
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "guidance_scale": 1.5}
    calls: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args, given: calls.append(1), with_kwargs=True)
    with mr.attach(model) as routed, routed.record(sequences=True) as recorder:
        model.generate(tokens(1, 5), **options)
    hook.remove()
    assert len(calls) == 10
    statistics = recorder.statistics()
    assert (statistics.tokens("prefill").max(), statistics.tokens("decode").max()) == (5, 4)
    assert statistics.sequences().tolist() == [1]


def test_stop_strings_end_a_sequence_of_a_batch() -> None:
    model, tokenizer = load_demo_model()
    given = tokenizer(["The sun", "A child reads a"], return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 8, "do_sample": False, "tokenizer": tokenizer}
    free = model.generate(**given, **options)[:, given.input_ids.shape[1] :].tolist()
    words = [[tokenizer.decode(token, skip_special_tokens=True) for token in row] for row in free]
    stop = next(word for word in words[0] if len(word.strip()) > 1 and not any(word in w for w in words[1]))
    with mr.attach(model) as routed, routed.record() as recorder, recorder.labels(["x", "y"]):
        text = model.generate(**given, **options, stop_strings=[stop])
    assert (text[0] == tokenizer.pad_token_id).sum() > (given.input_ids[0] == tokenizer.pad_token_id).sum()
    ended = next(i for i, word in enumerate(words[0]) if stop in word)
    until = free[1].index(tokenizer.eos_token_id) if tokenizer.eos_token_id in free[1] else len(free[1]) - 1
    assert recorder.statistics().tokens("decode").max(1).tolist() == [ended, until]


# ---------------------------------------------------------------------------------------------------------------
# Threads, and several requests at once.


def test_a_streamer_in_a_thread() -> None:
    model, tokenizer = load_demo_model()
    streamer = transformers.TextIteratorStreamer(tokenizer)
    given = tokenizer("The sun", return_tensors="pt")
    with mr.attach(model) as routed, routed.record(sequences=True) as recorder, recorder.labels("x", items=[1]):
        options = {"max_new_tokens": 6, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs={**given, **options})
        thread.start()
        text = "".join(streamer)
        thread.join()
    fed = tokenizer(text, add_special_tokens=False).input_ids
    assert recorder.statistics().tokens().max() == len(fed) - 1
    assert recorder.statistics().sequences().tolist() == [1]


@pytest.mark.parametrize("recording", [True, False])
def test_two_threads_that_generate(model: nn.Module, recording: bool) -> None:
    """Refused while something is recorded; else neither leaves anything of the other behind."""
    failures: list[RuntimeError] = []
    begun, go_on = threading.Event(), threading.Event()

    def wait(input_ids: Tensor, scores: Tensor) -> Tensor:
        begun.set()
        go_on.wait(600)
        return scores

    def first() -> None:
        generated(model, logits_processor=[wait])

    def second() -> None:
        try:
            generated(model)
        except RuntimeError as error:
            failures.append(error)

    with mr.attach(model) as routed:
        with routed.record() if recording else nullcontext() as recorder:
            threads = [threading.Thread(target=first), threading.Thread(target=second)]
            threads[0].start()
            begun.wait(600)
            threads[1].start()
            if recording:
                threads[1].join()
            go_on.set()
            for thread in threads:
                thread.join()
        assert routed.attachment._context.generations == []
    assert [("runs in another" in str(failure)) for failure in failures] == [True] * recording
    if recording:
        assert recorder.statistics().tokens().max() == 8 + 8


def test_continuous_batching_is_refused_by_name(model: nn.Module) -> None:
    ways = {
        "generate_batch": lambda: model.generate_batch([[3, 4, 5], [6, 7]], max_new_tokens=2),
        "paged": lambda: model.generate(tokens(1, 4), cache_implementation="paged", max_new_tokens=2),
        "manager": lambda: model.init_continuous_batching(),
    }
    with mr.attach(model) as routed, routed.record():
        for way in ways.values():
            with pytest.raises(RuntimeError, match=r"continuous batching .*padded batch, or run it outside record"):
                way()
        # a manager that was made before the recording calls the model with a paged cache
        cache = type("PagedAttentionCache", (), {})()
        with pytest.raises(RuntimeError, match="continuous batching"):
            model(input_ids=tokens(1, 4), cache=cache)


def test_what_generate_holds_is_freed_with_it(model: nn.Module) -> None:
    """No cycle keeps a cache until the next collection."""
    prompt = tokens(1, 4).repeat(1, 3)
    with mr.attach(model) as routed, routed.record():
        gc.collect()
        gc.disable()
        try:
            for options in ({}, {"prompt_lookup_num_tokens": 3}):
                cache = transformers.DynamicCache(config=model.config)
                seen = weakref.ref(cache)
                model.generate(prompt, past_key_values=cache, max_new_tokens=4, pad_token_id=0, **options)
                del cache
                assert seen() is None
        finally:
            gc.enable()

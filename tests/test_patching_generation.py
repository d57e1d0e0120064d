"""What `generate` knows and its calls do not say."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_route as mr
from moe_route.patching import Attachment

transformers = pytest.importorskip("transformers")

from tiny_models import tiny_model, tokens  # noqa: E402 (it needs transformers)


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
    assert "generate" not in vars(model)


def test_who_replaced_generate_keeps_it(model: nn.Module) -> None:
    def mine(*_: Any, **__: Any) -> str:
        return "mine"

    model.generate = mine
    with mr.attach(model):
        assert model.generate() == "mine"
    assert vars(model).pop("generate") is mine

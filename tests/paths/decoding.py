"""Ways of `generate` in which a call is no step: drafts, chunks of a prompt, a second turn, ends that no id tells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from harness.tiny_models import tokens
from torch import Tensor, nn
from transformers import DynamicCache, StoppingCriteria

import moe_route as mr
from moe_route.routers import RouterInfo
from paths.generation import GREEDY, generated, of_prompts, prompts
from paths.oracle import Valid, assert_counted, assert_forbidden, counts, favorites, same_outputs, watching
from paths.registry import path
from paths.subject import NotApplicableError, Subject, by_transformers

CHUNK = 2  # of prompts of five columns, so that the last chunk is one token long
TEXT = tokens(1, 4).repeat(1, 3)  # says everything three times, so that looking it up finds drafts


def needs_decoder(subject: Subject) -> None:
    subject.needs_generate()
    if subject.encodes:
        raise NotApplicableError("beside an encoder a prompt is a decoder's first token")


@path(
    "Decoding",
    "prompt lookup",
    "drafts, of which only those that become text are counted: each token once",
    cost="alike",
)
def prompt_lookup(subject: Subject) -> None:
    needs_decoder(subject)
    model, new = subject.model, 10

    def drafted() -> Tensor:
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        return model.generate(TEXT, prompt_lookup_num_tokens=3, **GREEDY | {"max_new_tokens": new})

    with calls_of(model) as fed:
        plain = by_transformers(drafted)
    with mr.attach(model) as routed:
        with watching(routed.routers) as seen, routed.record(sequences=True, trace=True) as recorder:
            same_outputs(drafted(), plain)
        prefill, decode = parts(fed, plain[0])
        statistics, trace = recorder.statistics(), recorder.trace()
        assert_both(statistics, routed.routers, seen, prefill, decode)
        assert statistics.tokens().max() == plain.shape[1] - 1
        assert statistics.sequences().tolist() == [1]
        np.testing.assert_array_equal(trace.position, np.arange(plain.shape[1] - 1))
        np.testing.assert_array_equal(trace.phase, trace.position >= TEXT.shape[1])
        experts = favorites(routed.routers, seen)
        if not experts:
            return
        plan = mr.Plan.forbid(experts).only(phase="decode")
        with (
            watching(routed.routers) as steered,
            routed.record() as recorder,
            routed.steer(plan),
            calls_of(model) as fed,
        ):
            text = drafted()
        prefill, decode = parts(fed, text[0])
        assert_both(recorder.statistics(), routed.routers, steered, prefill, decode)
        assert_forbidden(routed.routers, steered, experts, decode)
        assert not recorder.statistics().scalar("steered", "prefill").any()


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """The token ids [length] of each call inside."""
    fed: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, args, given: fed.append(given["input_ids"][0]), with_kwargs=True)
    try:
        yield fed
    finally:
        handle.remove()


def parts(fed: list[Tensor], text: Tensor) -> tuple[Valid, Valid]:
    """Which tokens of each call are of the prompt, and which of the generated text: told by the text that came out."""
    masks, at = [], 0
    for ids in fed:
        place = at + torch.arange(len(ids))
        inside = place < len(text) - 1  # the last token is returned, not fed
        same = ids == text[place.clamp(max=len(text) - 1)]
        kept = (inside & same).long().cumprod(0).bool()
        masks.append((kept & (place < TEXT.shape[1]), kept & (place >= TEXT.shape[1])))
        at += int(kept.sum())
    assert at == len(text) - 1

    def of(part: int) -> Valid:
        return lambda router, number: masks[number][part]

    return of(0), of(1)


def assert_both(statistics: mr.RoutingStatistics, routers: Any, seen: Any, prefill: Valid, decode: Valid) -> None:
    for phase, valid in (("prefill", prefill), ("decode", decode)):
        recorded = statistics.token_sum("counts", phase).sum(0)
        np.testing.assert_array_equal(recorded, counts(routers, seen, valid), err_msg=phase)


@path("Decoding", "prompt in chunks", "generate with prefill_chunk_size, its last chunk one token long, is all prefill")
def prompt_in_chunks(subject: Subject) -> None:
    needs_decoder(subject)
    model, given, mask = subject.model, GREEDY | {"prefill_chunk_size": CHUNK}, prompts()["attention_mask"].bool()
    plain = by_transformers(lambda: generated(model, given))
    chunks = mask.split(CHUNK, 1)

    def prompt(router: RouterInfo, number: int) -> Tensor | None:
        return chunks[number] if number < len(chunks) else torch.zeros(2, 1, dtype=torch.bool)

    def text(router: RouterInfo, number: int) -> Tensor | None:
        return torch.zeros_like(chunks[number]) if number < len(chunks) else None

    with (
        mr.attach(model) as routed,
        watching(routed.routers) as seen,
        routed.record(sequences=True) as recorder,
        recorder.labels(["x", "y"], items=[0, 0]),
    ):
        same_outputs(generated(model, given), plain)
    assert_both(recorder.statistics(), routed.routers, seen, prompt, text)
    assert recorder.statistics().sequences().tolist() == [1, 1]


@path("Decoding", "second turn", "a second generate goes on with the cache of the first: one sequence, nothing twice")
def second_turn(subject: Subject) -> None:
    needs_decoder(subject)
    model, more = subject.model, tokens(1, 3, seed=5)

    def turns() -> Tensor:
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        cache = DynamicCache(config=model.config.get_text_config())
        first = model.generate(TEXT[:, :4], past_key_values=cache, **GREEDY)
        return model.generate(torch.cat([first, more], 1), past_key_values=cache, **GREEDY)

    plain = by_transformers(turns)
    with mr.attach(model) as routed, watching(routed.routers) as seen, routed.record(sequences=True) as recorder:
        same_outputs(turns(), plain)
    statistics = recorder.statistics()
    assert_counted(statistics, routed.routers, seen)
    # the last token of an answer is fed with the next question
    assert statistics.tokens("prefill").max() == 4 + 1 + 3
    assert statistics.tokens().max() == plain.shape[1] - 1
    assert statistics.sequences().tolist() == [1]


class Stops(StoppingCriteria):
    """Ends the first row of a batch once it has so many columns."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.arange(len(input_ids)) < (input_ids.shape[1] >= self.columns)


@path("Decoding", "stopping criteria", "a sequence that a stopping criterion ends is counted up to there")
def stopping_criteria(subject: Subject) -> None:
    needs_decoder(subject)
    model, columns = subject.model, prompts()["input_ids"].shape[1]
    free = by_transformers(lambda: generated(model, GREEDY))
    never = next(token for token in range(3, 128) if not (free == token).any())
    given = GREEDY | {"stopping_criteria": [Stops(columns + 2)], "eos_token_id": never}  # with an end, rows are padded
    plain = by_transformers(lambda: generated(model, given))
    assert not plain[0, columns + 2 :].any()

    def running(router: RouterInfo, number: int) -> Tensor | None:
        return torch.tensor([[number < 2], [True]]) if number else of_prompts()(router, 0)

    with (
        mr.attach(model) as routed,
        watching(routed.routers) as seen,
        routed.record(sequences=True) as recorder,
        recorder.labels(["x", "y"], items=[0, 0]),
    ):
        same_outputs(generated(model, given), plain)
    assert_counted(recorder.statistics(), routed.routers, seen, running)
    assert recorder.statistics().tokens("decode").max(1).tolist() == [1, 3]

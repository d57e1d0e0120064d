"""Generation: caches, beams, chunks, and what `generate` says to nobody else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from harness.tiny_models import tokens
from torch import Tensor

import moe_route as mr
from moe_route.routers import RouterInfo
from paths.calls import padding
from paths.oracle import (
    Runs,
    Valid,
    assert_counted,
    assert_forbidden,
    assert_phases,
    favorites,
    first_run,
    same_outputs,
    watching,
)
from paths.registry import path
from paths.subject import NotApplicableError, Subject, by_transformers, run

PROMPTS = (3, 5)
NEW = 4
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prompts() -> dict[str, Tensor]:
    """Two prompts, the shorter one padded in front."""
    mask = padding("left", PROMPTS)
    return {"input_ids": tokens(2, max(PROMPTS)) * mask, "attention_mask": mask}


def of_prompts(ways: int = 1) -> Valid:
    """All tokens but the padding of the prompts; a decoder beside an encoder is given no prompt."""
    mask = padding("left", PROMPTS).bool()

    def valid(router: RouterInfo, number: int) -> Tensor | None:
        if number or router.role == "decoder":
            return None
        return mask if router.role == "encoder" else mask.repeat_interleave(ways, 0)

    return valid


def generated(model: Any, given: dict[str, Any]) -> Tensor:
    """Prompts and how `generate` continues them, with the prompts of `given` in place of these."""
    torch.manual_seed(3)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    text = model.generate(**prompts() | given)
    return getattr(text, "sequences", text)


def prefill_of(subject: Subject) -> Runs:
    """The first run of each router; where blocks are denoised, all runs of the encoder, which reads them when they are
    settled."""
    return (lambda router, number: router.role == "encoder") if subject.denoises else first_run


def check_generation(subject: Subject, given: dict[str, Any], ways: int = 1, valid: Valid | None = None) -> None:
    """The same text as unattached; prefill and decode counted apart, for the sequence that they belong to."""
    subject.needs_generate()
    if subject.denoises and ways > 1:
        raise NotApplicableError("blocks are denoised, one text a prompt")
    model, valid = subject.model, valid or of_prompts(ways)
    plain = by_transformers(lambda: generated(model, given))
    with mr.attach(model) as routed:
        with (
            watching(routed.routers) as seen,
            routed.record(sequences=True) as recorder,
            recorder.labels(["x", "y"], items=[0, 0]),
        ):
            same_outputs(generated(model, given), plain)
        statistics = recorder.statistics()
        assert_phases(statistics, routed.routers, seen, valid, prefill_of(subject))
        check_groups(statistics, routed.routers, seen, valid, ways)
        assert statistics.sequences().tolist() == [1, 1]


def check_groups(statistics: mr.RoutingStatistics, routers: Any, seen: Any, valid: Valid, ways: int) -> None:
    """The first rows of the batch belong to the first sequence, the others to the second."""
    for row, group in enumerate("xy"):

        def of_group(router: RouterInfo, number: int, row: int = row) -> Tensor:
            rows, repeats = len(seen[router.layer][number][0]), 1 if router.role == "encoder" else ways
            mine = torch.arange(2 * repeats)[:, None] // repeats == row
            keep = valid(router, number)
            mine = mine.expand(-1, rows // (2 * repeats))
            return mine if keep is None else mine & keep

        assert_counted(statistics.select(groups=[group]), routers, seen, of_group)


@path(
    "Generation", "generate", "prompts padded in front, a dynamic cache; prefill and decode counted and steered apart"
)
def dynamic_cache(subject: Subject) -> None:
    check_generation(subject, GREEDY)
    model, prefill = subject.model, prefill_of(subject)

    def decode(router: RouterInfo, number: int) -> bool:
        return not prefill(router, number)

    with mr.attach(model) as routed:
        with watching(routed.routers) as seen:
            generated(model, GREEDY)
        experts = favorites(routed.routers, seen)
        if not experts:
            return
        plan = mr.Plan.forbid(experts).only(phase="decode")
        with watching(routed.routers) as steered, routed.record() as recorder, routed.steer(plan):
            generated(model, GREEDY)
        assert_phases(recorder.statistics(), routed.routers, steered, of_prompts(), prefill)
        assert_forbidden(routed.routers, steered, experts, of_prompts(), decode)
        assert not recorder.statistics().scalar("steered", "prefill").any()
        for router, before, after in zip(routed.routers, seen, steered, strict=True):
            if before and prefill(router, 0):  # which is not steered
                same_outputs(before[0][0], after[0][0])


@path("Generation", "static cache", "a cache of fixed length, whose mask has columns of the future")
def static_cache(subject: Subject) -> None:
    check_generation(subject, GREEDY | {"cache_implementation": "static", "disable_compile": True})


@path("Generation", "beams", "two beams a sequence, each counted for the sequence it grew from")
def beams(subject: Subject) -> None:
    check_generation(subject, GREEDY | {"num_beams": 2}, ways=2)


@path("Generation", "returned sequences", "two samples a sequence, each counted for the sequence it grew from")
def returned_sequences(subject: Subject) -> None:
    check_generation(subject, GREEDY | {"do_sample": True, "num_return_sequences": 2}, ways=2)


@path("Generation", "chunked prefill", "a prompt in two calls is counted like one, as one sequence")
def chunked_prefill(subject: Subject) -> None:
    subject.needs_text()
    if subject.encodes:
        raise NotApplicableError("an encoder reads its text in one call")
    model, given = subject.fresh(), prompts()  # fresh: positions of an earlier text stay with some models
    subject.needs("attention_mask")

    def chunked() -> Tensor:
        ids, mask = given["input_ids"], given["attention_mask"]
        with torch.no_grad():
            first = model(input_ids=ids[:, :3], attention_mask=mask[:, :3], use_cache=True)
            cache = {"past_key_values": first.past_key_values}
            return model(input_ids=ids[:, 3:], attention_mask=mask, use_cache=True, **cache)[0]

    plain = by_transformers(chunked)
    mask = given["attention_mask"].bool()
    with (
        mr.attach(model) as routed,
        watching(routed.routers) as seen,
        routed.record(sequences=True) as recorder,
        recorder.labels(["x", "y"], items=[0, 0]),
    ):
        same_outputs(chunked(), plain)
    statistics = recorder.statistics()
    parts = (mask[:, :3], mask[:, 3:])
    assert_counted(statistics, routed.routers, seen, lambda router, number: parts[number])
    assert not statistics.tokens("decode").any()
    assert statistics.sequences().tolist() == [1, 1]


@path("Generation", "ended early", "sequences of a batch that end before others, by ids given to generate alone")
def ended_early(subject: Subject) -> None:
    """Counts of a batch are those of its sequences one by one, told by how far each of them got."""
    subject.needs_generate()
    if subject.denoises:
        check_ended_blocks(subject)
        return
    model = subject.model
    batch, new = tokens(4, 4), 6
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    free = {"max_new_tokens": new, "do_sample": True, "attention_mask": torch.ones_like(batch), "pad_token_id": 0}

    def texts(stop: int | None) -> Tensor:
        torch.manual_seed(3)
        return model.generate(batch, eos_token_id=stop, **free)

    fed = by_transformers(lambda: texts(None))[:, -new:-1]
    stop = next(token for token in fed.flatten().tolist() if len(before(fed, token).unique()) - 1 > 0)
    with mr.attach(model) as routed, routed.record() as recorder, recorder.labels(list("abcd")):
        ended = texts(stop)
    assert (ended[:, -new:] == 0).any(), "nothing was padded"
    np.testing.assert_array_equal(recorder.statistics().tokens("decode").max(1), before(fed, stop))


def before(fed: Tensor, stop: int) -> Tensor:
    """How many tokens of each row of `fed` come before its first `stop`."""
    return (fed != stop).long().cumprod(1).sum(1)


def check_ended_blocks(subject: Subject) -> None:
    """A sequence is denoised, and read, up to the block with its end."""
    model, batch, blocks = subject.model, tokens(4, 4), 3
    size, steps = model.config.canvas_length, model.generation_config.max_denoising_steps
    free = {"max_new_tokens": blocks * size, "pad_token_id": 0, "attention_mask": torch.ones_like(batch)}

    def texts(stop: int | None) -> Tensor:
        torch.manual_seed(3)
        return model.generate(batch, eos_token_id=stop, **free).sequences[:, batch.shape[1] :]

    def lasts(text: Tensor, stop: int) -> Tensor:
        """How many blocks of each row there are up to its end."""
        return (before(text, stop) // size + 1).clamp(max=blocks)

    fed = by_transformers(lambda: texts(None))
    stop = next(token for token in fed.flatten().tolist() if len(lasts(fed, token).unique()) > 1)
    with mr.attach(model) as routed, routed.record() as recorder, recorder.labels(list("abcd")):
        ended = texts(stop)
    last = lasts(ended, stop)
    assert len(last.unique()) > 1
    statistics = recorder.statistics()
    np.testing.assert_array_equal(statistics.tokens("decode").max(1), last * size * steps)
    np.testing.assert_array_equal(statistics.tokens("prefill").max(1), batch.shape[1] + (last - 1) * size)


@path("Generation", "without a cache", "the whole text runs again at every step, and every token is counted once")
def without_cache(subject: Subject) -> None:
    subject.needs_generate()
    if subject.denoises:
        raise NotApplicableError("blocks are denoised beside a cache")
    model, given = subject.model, GREEDY | {"use_cache": False}
    plain = by_transformers(lambda: generated(model, given))

    def new(router: RouterInfo, number: int) -> Tensor | None:
        if not number:
            return of_prompts()(router, 0)
        if router.role == "encoder":
            return None
        keep = torch.zeros(2, len(seen[router.layer][number][0]) // 2, dtype=torch.bool)
        keep[:, -1] = True
        return keep

    with (
        mr.attach(model) as routed,
        watching(routed.routers) as seen,
        routed.record(sequences=True) as recorder,
        recorder.labels(["x", "y"], items=[0, 0]),
    ):
        same_outputs(generated(model, given), plain)
    assert_phases(recorder.statistics(), routed.routers, seen, new)
    assert recorder.statistics().sequences().tolist() == [1, 1]


__all__ = ["GREEDY", "generated", "of_prompts", "prompts", "run"]

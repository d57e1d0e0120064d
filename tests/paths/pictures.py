"""Text with a picture in each sequence, one of them padded in front: whose tokens are counted, and how they differ."""

from __future__ import annotations

from typing import Any

import torch
from harness.whole_models import CANVAS, IMAGE, PATCHES, WHOLE, picture_inputs
from torch import Tensor

import moe_route as mr
from moe_route.routers import RouterInfo
from paths.calls import check_call
from paths.generation import GREEDY, check_generation
from paths.oracle import Valid, assert_counted, assert_forbidden, favorites, same_outputs, watching
from paths.registry import path
from paths.subject import NotApplicableError, Subject, by_transformers, run


def with_pictures(subject: Subject) -> dict[str, Any]:
    if subject.name not in WHOLE:
        raise NotApplicableError("the model takes text alone")
    return picture_inputs(subject.name, subject.model)


def of_tokens(given: dict[str, Any], tokens: Tensor) -> Valid:
    """Those of bool [B, S] that a router is given: one of a tower, the patches that they are made of; one that follows
    the text, as many as there are, like the last of them."""
    image = given["input_ids"] == IMAGE

    def valid(router: RouterInfo, number: int) -> Tensor | None:
        if router.role == "decoder":
            return tokens[:, -1:].expand(-1, CANVAS)
        if number:
            return None
        if router.adapter.patches:
            return tokens[image].repeat_interleave(PATCHES).view(len(tokens), -1)
        if router.role in ("text", "vision"):  # of one modality
            return tokens[image if router.role == "vision" else ~image].view(len(tokens), -1)
        return tokens

    return valid


@path("Pictures", "text and pictures", "one call: the tokens of pictures count, and are steered, like those of text")
def one_call(subject: Subject) -> None:
    given = with_pictures(subject)
    check_call(subject, given, of_tokens(given, given["attention_mask"].bool()))


@path(
    "Pictures", "told apart", "labels per token tell pictures from text: recorded apart, and pictures alone are steered"
)
def told_apart(subject: Subject) -> None:
    given = with_pictures(subject)
    model, image, real = subject.model, given["input_ids"] == IMAGE, given["attention_mask"].bool()
    labels = [["picture" if is_image else "text" for is_image in row] for row in image.tolist()]
    plain = by_transformers(lambda: run(model, given))
    with mr.attach(model) as routed:
        with watching(routed.routers) as seen, routed.record() as recorder, recorder.labels(labels):
            same_outputs(run(model, given), plain)
        statistics = recorder.statistics()
        for group, tokens in (("picture", image), ("text", real & ~image)):
            assert_counted(statistics.select(groups=[group]), routed.routers, seen, of_tokens(given, tokens))
        experts = favorites(routed.routers, seen)
        plan = mr.Plan.forbid(experts).only(groups=["picture"])
        with (
            watching(routed.routers) as steered,
            routed.record() as recorder,
            recorder.labels(labels),
            routed.steer(plan),
        ):
            changed = run(model, given)
        assert not torch.equal(changed, plain)
        statistics = recorder.statistics()
        assert_counted(statistics, routed.routers, steered, of_tokens(given, real))
        assert_forbidden(routed.routers, steered, experts, of_tokens(given, image))
        assert not statistics.select(groups=["text"]).scalar("steered").any()


@path("Pictures", "generate from pictures", "prompts with pictures: prefill and decode counted apart, by sequence")
def generate(subject: Subject) -> None:
    given = with_pictures(subject)
    given.pop("decoder_input_ids", None)
    check_generation(subject, GREEDY | given, valid=of_tokens(given, given["attention_mask"].bool()))

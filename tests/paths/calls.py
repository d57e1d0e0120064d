"""One call of the model: forms of padding and of masks, packed texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import moe_route as mr
from moe_route.routers import RouterInfo
from paths.oracle import Valid, assert_counted, assert_forbidden, favorites, same_outputs, watching
from paths.registry import path
from paths.subject import NotApplicableError, Subject, by_transformers, run

LENGTHS = (4, 7)


def padding(side: str, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """int64 [B, S], 1 where there is a token."""
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    return mask


def tokens_of(mask: Tensor) -> Valid:
    """The tokens of `mask` count in the encoder, or where there is none; all of the decoder's do."""

    def valid(router: RouterInfo, number: int) -> Tensor | None:
        return None if router.role == "decoder" else mask.bool()

    return valid


def check_call(subject: Subject, given: dict[str, Any], valid: Valid) -> None:
    """Recorded, nothing changes and the tokens that count are counted; steered, these and no others are."""
    model = subject.model
    plain = by_transformers(lambda: run(model, given))
    with mr.attach(model) as routed:
        with watching(routed.routers) as seen, routed.record(sequences=True) as recorder:
            same_outputs(run(model, given), plain)
        assert_counted(recorder.statistics(), routed.routers, seen, valid)
        experts = favorites(routed.routers, seen)
        if not experts:
            return
        with watching(routed.routers) as steered, routed.record() as recorder, routed.steer(mr.Plan.forbid(experts)):
            changed = run(model, given)
        assert_counted(recorder.statistics(), routed.routers, steered, valid)
        assert_forbidden(routed.routers, steered, experts, valid)
        assert not torch.equal(changed, plain)
        number = recorder.statistics().scalar("steered").sum(0)
        tokens = recorder.statistics().tokens().sum(0)
        for layer in experts:
            assert number[layer] == tokens[layer]


def masked(subject: Subject, mask: Any) -> dict[str, Any]:
    subject.needs("attention_mask")
    return subject.inputs(subject.model, len(LENGTHS), max(LENGTHS)) | {"attention_mask": mask}


@path("Calls", "no padding", "a batch of texts of one length, recorded and steered, no bit changed while recording")
def no_padding(subject: Subject) -> None:
    check_call(subject, subject.inputs(subject.model), lambda router, number: None)


@path("Calls", "left padding", "a 2-D mask: padding in front is neither counted nor steered")
def left_padding(subject: Subject) -> None:
    mask = padding("left")
    check_call(subject, masked(subject, mask), tokens_of(mask))


@path("Calls", "right padding", "a 2-D mask: padding behind is neither counted nor steered")
def right_padding(subject: Subject) -> None:
    mask = padding("right")
    check_call(subject, masked(subject, mask), tokens_of(mask))


def causal(mask: Tensor) -> Tensor:
    """The 4-D additive mask [B, 1, S, S] of a 2-D one, with padded rows masked from end to end."""
    length = mask.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


@path("Calls", "4-D mask", "an additive mask [batch, 1, length, length] in place of the 2-D one")
def four_dimensions(subject: Subject) -> None:
    mask = padding("left")
    check_call(subject, masked(subject, causal(mask)), tokens_of(mask))


@path("Calls", "mask dictionary", "a mask for each kind of attention in the model")
def dictionary(subject: Subject) -> None:
    kinds = sorted(set(getattr(subject.model.config.get_text_config(), "layer_types", None) or ["full_attention"]))
    mask = padding("left")
    masks = {kind: mask if kind.startswith(("linear", "conv", "mamba")) else causal(mask) for kind in kinds}
    check_call(subject, masked(subject, masks), tokens_of(mask))


@path("Calls", "packed", "two texts in one row, told apart by position ids, with a label per token")
def packed(subject: Subject) -> None:
    subject.needs_text()
    subject.needs("position_ids")
    model, first = subject.model, 4
    given = subject.inputs(model, 1, 7)
    if subject.encodes:
        raise NotApplicableError("texts cannot be packed beside an encoder")
    given["position_ids"] = torch.cat([torch.arange(first), torch.arange(7 - first)])[None]
    plain = by_transformers(lambda: run(model, given))
    labels = [["x"] * first + ["y"] * (7 - first)]
    with (
        mr.attach(model) as routed,
        watching(routed.routers) as seen,
        routed.record(groups=["x", "y"], sequences=True) as recorder,
        recorder.labels(labels, items=[0]),
    ):
        same_outputs(run(model, given), plain)
    statistics = recorder.statistics()
    for group, keep in (("x", slice(0, first)), ("y", slice(first, None))):
        mask = torch.zeros(7, dtype=torch.bool)
        mask[keep] = True
        assert_counted(statistics.select(groups=[group]), routed.routers, seen, tokens_of(mask))
    assert statistics.sequences().tolist() == [1, 1]
    np.testing.assert_array_equal(statistics.tokens().max(1), [first, 7 - first])

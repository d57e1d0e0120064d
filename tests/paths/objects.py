"""The attached model as an object: two of them, copies, pickles, threads, a second attachment."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch

import moe_route as mr
from moe_route.patching import AlreadyAttachedError
from paths.oracle import assert_counted, everything, same_outputs, watching
from paths.registry import path
from paths.subject import RefusedByNameError, Subject, by_transformers, first_sentence, refusal, run


@path("Objects", "side by side", "two attached models in one process, each with its own counts", cost="alike")
def side_by_side(subject: Subject) -> None:
    models = [subject.model, subject.fresh(seed=1)]
    given = subject.inputs(models[0])
    with mr.attach(models[0]) as one, mr.attach(models[1]) as other:
        watched = watching(one.routers), one.record(), watching(other.routers), other.record()
        with watched[0] as first, watched[1] as recorder, watched[2] as second, watched[3] as beside:
            run(models[0], given)
            run(models[1], given)
            run(models[1], given)
    assert_counted(recorder.statistics(), one.routers, first, everything)
    assert_counted(beside.statistics(), other.routers, second, everything)
    assert (beside.statistics().tokens() == 2 * recorder.statistics().tokens()).all()


@path(
    "Objects",
    "deep copy",
    "a copy of an attached model is free of the attachment, and can be attached to",
    cost="alike",
)
def deep_copy(subject: Subject) -> None:
    model, given = subject.fresh(), subject.inputs(subject.model)
    plain = by_transformers(lambda: run(copy.deepcopy(model), given))
    with mr.attach(model, engine="fused") as routed, routed.record() as recorder:
        other = by_transformers(lambda: copy.deepcopy(model))
        same_outputs(run(other, given), plain)
        with mr.attach(other) as beside, watching(beside.routers) as seen, beside.record() as second:
            run(other, given)
        assert_counted(second.statistics(), beside.routers, seen, everything)
        assert [type(m) for m in other.modules()] == [type(m) for m in subject.model.modules()]
    with pytest.raises(RuntimeError, match="nothing was recorded"):  # the calls of the copy are not the original's
        recorder.statistics()


@path(
    "Objects", "pickle", "torch.save of a whole attached model; save_pretrained writes a clean checkpoint", cost="alike"
)
def pickled(subject: Subject) -> None:
    model = subject.model
    by_transformers(lambda: torch.save(model, io.BytesIO()))
    with mr.attach(model), refusal(TypeError, naming="detach()"):
        torch.save(model, io.BytesIO())


@path("Objects", "second thread", "a call in a second thread while the model runs in a first one", cost="alike")
def second_thread(subject: Subject) -> None:
    model, given = subject.model, subject.inputs(subject.model)
    failures: list[BaseException] = []

    def call_too() -> None:
        try:
            run(model, given)
        except RuntimeError as error:
            failures.append(error)

    def elsewhere(*_: object) -> None:
        thread = threading.Thread(target=call_too)
        thread.start()
        thread.join()

    with mr.attach(model) as routed:
        with watching(routed.routers) as seen, routed.record() as recorder:
            stop: Any = routed.routers[0].module.register_forward_pre_hook(elsewhere)
            try:
                run(model, given)
            finally:
                stop.remove()
        assert len(failures) == 1, "nothing was refused"
        assert "thread" in str(failures[0])
        assert_counted(recorder.statistics(), routed.routers, seen, everything)
    raise RefusedByNameError(first_sentence(failures[0]))


@path("Objects", "attached twice", "a second attachment to the same model", cost="alike")
def attached_twice(subject: Subject) -> None:
    with mr.attach(subject.model), refusal(AlreadyAttachedError, naming="detach()"):
        mr.attach(subject.model)

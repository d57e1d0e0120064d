"""torch.compile of the model's forward, before and after attaching: one graph wherever it is one unattached."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import moe_route as mr
from paths.oracle import assert_counted, everything, watching
from paths.registry import path
from paths.subject import Subject, by_transformers, run


def compilable(subject: Subject) -> Any:
    """A model whose experts leave no break in the graph, where transformers has such."""
    model = subject.fresh()
    with suppress(ValueError, KeyError, AttributeError):  # experts with one implementation only
        model.set_experts_implementation("batched_mm")
    return model


def compile_forward(model: Any, whole: bool) -> None:
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=whole)


@lru_cache(maxsize=1)
def by_transformers_compiled(subject: Subject) -> tuple[Tensor, bool]:
    """The output of the compiled model, unattached, and whether it is one graph."""
    given = subject.inputs(subject.model)

    def call(whole: bool) -> Tensor:
        model = compilable(subject)
        compile_forward(model, whole)
        return run(model, given)

    try:
        return call(True), True
    except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode):
        return by_transformers(lambda: call(False)), False


def check(subject: Subject, first: str) -> None:
    """Counts right after compiling are those of the model uncompiled, and a plan steers. `first`: "attach" or
    "compile"."""
    given = subject.inputs(subject.model)
    plain, whole = by_transformers_compiled(subject)
    whole = whole and not subject.encodes  # two calls inside, and between them labels are asked for
    model = compilable(subject)
    expected = eager(model, given)
    if first == "compile":
        compile_forward(model, whole)
        run(model, given)
    with mr.attach(model) as routed:
        if first == "attach":
            compile_forward(model, whole)
        with routed.record() as recorder:
            torch.testing.assert_close(run(model, given), plain)
        np.testing.assert_array_equal(recorder.statistics().token_sum("counts").sum(0), expected)
        check_steered(routed, given, expected)


def eager(model: Any, given: dict[str, Tensor]) -> np.ndarray:
    with mr.attach(model) as routed, watching(routed.routers) as seen, routed.record() as recorder:
        run(model, given)
    assert_counted(recorder.statistics(), routed.routers, seen, everything)
    return recorder.statistics().token_sum("counts").sum(0)


def check_steered(routed: mr.RoutedModel, given: dict[str, Tensor], counts: np.ndarray) -> None:
    chosen = {router.layer: [int(counts[router.layer].argmax())] for router in routed.routers if router.steerable}
    chosen = {layer: experts for layer, experts in chosen.items() if counts[layer].any()}
    if not chosen:
        return
    with routed.record() as recorder, routed.steer(mr.Plan.forbid(chosen)):
        run(routed.model, given)
    steered = recorder.statistics().token_sum("counts").sum(0)
    for layer, (expert,) in chosen.items():
        assert steered[layer, expert] == 0


@path(
    "Compiled",
    "attach, then compile",
    "torch.compile(model.forward) of an attached model, with fullgraph=True wherever the model itself is one graph and "
    "no encoder beside a decoder",
    cost="costly",
)
def attach_then_compile(subject: Subject) -> None:
    check(subject, "attach")


@path("Compiled", "compile, then attach", "attached after the compiled forward has run", cost="costly")
def compile_then_attach(subject: Subject) -> None:
    check(subject, "compile")

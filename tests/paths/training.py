"""Training: layers that run twice, and gradients through a steering table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moe_route as mr
from moe_route.calls import Labels
from moe_route.ops import SteeringTables
from moe_route.patching import Attachment
from paths.oracle import assert_counted, everything, watching
from paths.registry import path
from paths.subject import NotApplicableError, Subject, by_transformers


def gradients(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one training step, with its random numbers fixed."""
    model.zero_grad()
    torch.manual_seed(5)
    model(**given)[0].float().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@path("Training", "training", "a training step: the same gradients while recording, every token counted once")
def training(subject: Subject) -> None:
    check_step(subject, subject.fresh().train())


@path("Training", "checkpointing", "gradient checkpointing: recomputed layers are not counted again")
def checkpointing(subject: Subject) -> None:
    model = subject.fresh().train()
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise NotApplicableError("the model has no gradient checkpointing")
    by_transformers(lambda: model.gradient_checkpointing_enable({"use_reentrant": False}))
    model.config.use_cache = False
    check_step(subject, model)


def check_step(subject: Subject, model: Any) -> None:
    given = subject.inputs(model)
    plain = by_transformers(lambda: gradients(model, given))
    with mr.attach(model) as routed:
        with watching(routed.routers) as seen, routed.record() as recorder:
            now = gradients(model, given)
        # a recomputed layer shows its router's choice once more
        assert_counted(recorder.statistics(), routed.routers, [runs[:1] for runs in seen], everything)
    assert now.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(now[name], gradient) or bool(gradient.isnan().any()), name


@path("Training", "trained table", "a steering table takes a gradient, in training mode")
def trained_table(subject: Subject) -> None:
    model = subject.fresh().train()
    given = subject.inputs(model)
    by_transformers(lambda: gradients(model, given))
    attachment = Attachment(model)
    torch.manual_seed(2)  # with others, hardly a token of a sparsemixer has a second expert in reach
    tables = {
        router.layer: (torch.randn(1, router.num_experts) * 0.1).requires_grad_()
        for router in attachment.routers
        if router.steerable
    }
    if not tables:
        raise NotApplicableError(f"the model's choice cannot be changed ({attachment.routers[0].family.unsteerable})")
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    attachment.set_steering(
        [
            SteeringTables(1, router.num_experts, bias=tables[router.layer]) if router.layer in tables else None
            for router in attachment.routers
        ]
    )
    gradients(model, given)
    attachment.detach()
    found = [table.grad for table in tables.values() if table.grad is not None]
    assert found
    assert all(bool(gradient.isfinite().all()) for gradient in found)
    assert any(bool(gradient.any()) for gradient in found)

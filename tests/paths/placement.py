"""Where the weights lie: offloaded to the CPU or to disk by accelerate, hooked in before or after attaching."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch

import moe_route as mr
from paths.oracle import assert_recorded_and_steered
from paths.registry import path
from paths.subject import NotApplicableError, Subject, by_transformers, run

CPU = torch.device("cpu")


def cpu_offload(model: Any) -> None:
    import accelerate

    accelerate.cpu_offload(model, execution_device=CPU)
    assert any(parameter.is_meta for parameter in model.parameters())


def device_map(model: Any) -> None:
    """Every child of the model by itself: the first on the CPU, the others on disk."""
    import accelerate

    folder = tempfile.TemporaryDirectory()
    model._folder = folder  # removed with the model
    names = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    places: dict[str, Any] = {}
    for name in names:
        inner = [
            child for child, module in getattr(model, name).named_children() if any(True for _ in module.parameters())
        ]
        places |= {f"{name}.{child}": "disk" for child in inner} if inner else {name: "disk"}
        places |= {f"{name}.{own}": "cpu" for own, _ in getattr(model, name).named_parameters(recurse=False)}
    places |= {own: "cpu" for own, _ in model.named_parameters(recurse=False)}
    places[next(iter(places))] = "cpu"
    buffers = {f"{name}": "cpu" for name, _ in model.named_buffers()}
    covered = {k: v for k, v in buffers.items() if not any(k == p or k.startswith(p + ".") for p in places)}
    accelerate.dispatch_model(model, places | covered, main_device="cpu", offload_dir=folder.name)


def check(subject: Subject, place: Callable[[Any], None], first: str) -> None:
    """`first`: "attach" or "place"."""
    reference = subject.fresh()
    given = subject.inputs(reference)

    def placed() -> torch.Tensor:
        model = subject.fresh()
        place(model)
        return run(model, given)

    plain = by_transformers(placed)
    if not torch.allclose(plain, run(reference, given), rtol=1e-3, atol=1e-4):
        raise NotApplicableError("transformers computes something else when its weights are offloaded")
    model = subject.fresh()
    if first == "place":
        place(model)
    with mr.attach(model) as routed:
        if first == "attach":
            place(model)
        assert_recorded_and_steered(routed, model, given, plain)


@path(
    "Placement",
    "offload, then attach",
    "accelerate's cpu_offload, the weights on meta when attached to",
    packages=("accelerate",),
)
def offload_then_attach(subject: Subject) -> None:
    check(subject, cpu_offload, "place")


@path("Placement", "attach, then offload", "accelerate's cpu_offload of an attached model", packages=("accelerate",))
def attach_then_offload(subject: Subject) -> None:
    check(subject, cpu_offload, "attach")


@path(
    "Placement",
    "device map",
    "accelerate's dispatch_model over CPU and disk, then attach",
    cost="costly",
    packages=("accelerate",),
)
def dispatched(subject: Subject) -> None:
    check(subject, device_map, "place")

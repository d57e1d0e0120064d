"""PEFT around a model: LoRA on the experts' tensors, on the gate's, and a gate that is trained whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_route as mr
from moe_route.routers import RouterInfo, find_routers
from paths.oracle import assert_recorded_and_steered
from paths.registry import path
from paths.subject import NotApplicableError, Subject, by_transformers, run


def wrap(model: Any, **options: Any) -> Any:
    """A PEFT model with adapters that change something."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, lora_dropout=0.0, **options)).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return wrapped


def check(subject: Subject, options: Callable[[Any], dict[str, Any]]) -> None:
    """Attached to the PEFT model, and to the model before it was wrapped."""
    chosen = options(subject.fresh())
    given = subject.inputs(subject.model)
    plain = by_transformers(lambda: run(wrap(subject.fresh(), **chosen), given))
    wrapped = wrap(subject.fresh(), **chosen)
    with mr.attach(wrapped) as routed:
        assert_recorded_and_steered(routed, wrapped, given, plain)
    inner = subject.fresh()
    with mr.attach(inner) as routed:
        outer = wrap(inner, **chosen)
        if "modules_to_save" in chosen or hasattr(getattr(routed.routers[0].module, "router_gate", None), "base_layer"):
            check_gate_elsewhere(routed, outer, given)
        else:
            assert_recorded_and_steered(routed, outer, given, plain)


def check_gate_elsewhere(routed: mr.RoutedModel, model: nn.Module, given: dict[str, Tensor]) -> None:
    """PEFT runs a copy of the gate, or adds to a gate inside its block, which the attachment does not see: said."""
    with pytest.raises(RuntimeError, match="attach"), routed.record():
        run(model, given)


def experts_of(router: RouterInfo) -> tuple[str, nn.Module]:
    """Name and module of the experts of a router."""
    name = "experts" if hasattr(router.block, "experts") else ""
    above = router.name.rpartition(".")[0] if router.block is not router.module else router.name
    if not name:
        raise NotApplicableError("the experts are no module of their own")
    return f"{above}.{name}", router.block.experts


@path(
    "Wrapped",
    "LoRA on experts",
    "PEFT's LoRA on the experts' tensors (target_parameters), attached to before and after",
    cost="costly",
    packages=("peft",),
)
def lora_on_experts(subject: Subject) -> None:
    def options(model: Any) -> dict[str, Any]:
        found: set[str] = set()
        for router in find_routers(model):
            name, experts = experts_of(router)
            found |= {f"{name}.{p}" for p, tensor in experts.named_parameters(recurse=False) if tensor.dim() == 3}
        if not found:
            raise NotApplicableError("the experts are no 3-D tensors")
        return {"target_modules": [], "target_parameters": sorted(found)}

    check(subject, options)


@path(
    "Wrapped",
    "LoRA on the gate",
    "PEFT's LoRA on the gate's matrix (target_parameters), attached to before and after",
    cost="costly",
    packages=("peft",),
)
def lora_on_gate(subject: Subject) -> None:
    def options(model: Any) -> dict[str, Any]:
        found = [
            f"{router.name}.{name}"
            for router in find_routers(model)
            for name, tensor in router.module.named_parameters(recurse=False)
            if tensor.dim() == 2
        ]
        if not found:
            raise NotApplicableError("the gate is a module of its own (LoRA on modules)")
        return {"target_modules": [], "target_parameters": found}

    check(subject, options)


@path(
    "Wrapped",
    "LoRA on modules",
    "PEFT's LoRA on every nn.Linear below the head, gates among them",
    cost="costly",
    packages=("peft",),
)
def lora_on_modules(subject: Subject) -> None:
    check(subject, lambda model: {"target_modules": "all-linear"})


@path(
    "Wrapped",
    "modules_to_save",
    "PEFT trains whole copies of the routers beside LoRA on every other nn.Linear, attached to afterwards",
    cost="costly",
    packages=("peft",),
)
def modules_to_save(subject: Subject) -> None:
    def options(model: Any) -> dict[str, Any]:
        routers = find_routers(model)
        inside = {module for router in routers for module in router.module.modules()} | {model.get_output_embeddings()}
        outside = [n for n, module in model.named_modules() if type(module) is nn.Linear and module not in inside]
        return {"target_modules": outside, "modules_to_save": sorted({router.name for router in routers})}

    check(subject, options)

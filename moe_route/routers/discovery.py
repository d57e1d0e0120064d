"""Find the routers of a model, in forward order."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from moe_route.contract.spec import RouterSpec
from moe_route.modules.intercept import device_of
from moe_route.modules.wrappers import in_use, outermost
from moe_route.routers.adapter import Adapter, Place
from moe_route.routers.catalog import REFUSED, family_of, refused_name
from moe_route.routers.family import TESTED, Family, known_issues
from moe_route.routers.recognize import as_returned, recognize

# Class names of modules that route, or that own a module that routes.
_ROUTING = re.compile(r"Router|Gating|TopKGate|SparseMoe|MoE$")


# Names under which a block holds the correction bias of its router.
_BIASES_OF_BLOCKS = ("e_score_correction_bias", "expert_bias", "correction_bias")


class ModelNotSupportedError(ValueError):
    """Raised for a model without routers, or with one that cannot be attached to; names what was found and the fix."""


@dataclass(slots=True, eq=False)
class RouterInfo:
    """One router of a live model."""

    name: str  # dotted name of the router in the model
    layer: int  # index among the MoE layers, from 0
    module: nn.Module
    block: nn.Module  # the module that owns the router
    family: Family  # row of the table that describes the router
    adapter: Adapter
    num_experts: int
    top_k: int
    spec: RouterSpec
    engine: str = "hook"  # "hook" (a forward hook) or "fused" (gate matrix and one `route` call)
    reason: str = ""  # why this engine is used
    role: str = ""  # "text", "vision", "encoder", "attention", ...; "" in a model with one kind of router
    notes: tuple[str, ...] = ()  # peculiarities, why it cannot be steered, known bugs of transformers

    @property
    def steerable(self) -> bool:
        """Whether the model's choice can be changed here; if not, `notes` give the reason."""
        return not self.family.unsteerable

    @property
    def parameter(self) -> torch.Tensor | None:
        """The gate matrix, where the router keeps one as a plain parameter (possibly on the meta device)."""
        return next(self.module.parameters(), None)

    @property
    def weights(self) -> list[torch.Tensor]:
        """What the router decides by: its parameters and saved buffers, and a bias that its block holds for it.

        Experts inside the router's module are left out.
        """
        held = [
            tensor
            for name, module in self.module.named_modules()
            if not any(part.startswith(("experts", "shared_expert")) for part in name.split("."))
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and name not in module._non_persistent_buffers_set
        ]
        beside = {**self.block._parameters, **self.block._buffers}
        held += [t for name, t in beside.items() if name in _BIASES_OF_BLOCKS and t is not None]
        return [tensor for tensor in {id(tensor): tensor for tensor in held}.values() if tensor.is_floating_point()]

    @property
    def device(self) -> torch.device:
        """The device on which the router runs."""
        return device_of(self.module)


def find_routers(model: nn.Module) -> list[RouterInfo]:
    """Find the routers of `model` in forward order.

    A model with several kinds of router (`RouterInfo.role`) yields one kind after the other, those of adapters last.

    Raises:
        TypeError: `model` is not a module.
            ModelNotSupportedError: there is no router, a router is of a kind that cannot be attached to, or a block
                bypasses its router. The message names what was found and how to fix it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, not {type(model).__name__}")
    modules = dict(model.named_modules())
    families = _known_families(modules)
    families |= _unknown_families(model, modules, families)
    routers = [
        _described(name, modules, families[name]) for name in modules if name in families and in_use(name, modules)
    ]
    if not routers:
        raise ModelNotSupportedError(_without_router(model, modules))
    return _in_order(routers)


def _without_router(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    unknown = next((name for name, m in modules.items() if name and _ROUTING.search(type(m).__name__)), None)
    if unknown is not None:
        return (
            f"{type(model).__name__} has no known router, though {type(modules[unknown]).__name__} at {unknown!r} "
            "seems to route. Use the model class of transformers 5 (transformers 4 and remote code decide in another "
            "form)."
        )
    return (
        f"{type(model).__name__} has no router: none of its {len(modules)} modules is a known router and none owns "
        "experts, so it looks like a dense model. Attach to a Mixture-of-Experts model, such as Qwen3-MoE or OLMoE."
    )


def _in_order(routers: list[RouterInfo]) -> list[RouterInfo]:
    roles = list(dict.fromkeys(router.role for router in routers))
    routers = sorted(routers, key=lambda router: (router.adapter.added, roles.index(router.role)))  # stable
    for layer, router in enumerate(routers):
        router.layer = layer
    return routers


def _described(name: str, modules: dict[str, nn.Module], family: Family) -> RouterInfo:
    """Describe the router `name`. A router that is the whole model counts as its own block."""
    above = outermost(name, modules).rpartition(".")[0]
    module, block, higher = modules[name], modules[above], modules[above.rpartition(".")[0]] if above else None
    kind = type(module).__name__
    form = family.form_of(module)
    adapter = family.adapter(Place(form, name, module, block, higher))
    obstacle = adapter.obstacle()
    if obstacle is not None:
        raise ModelNotSupportedError(f"{kind} at {name!r} cannot be attached to: {obstacle}.")
    if not isinstance(form.num_experts, int) or not isinstance(form.top_k, int):
        raise ModelNotSupportedError(
            f"{kind} at {name!r} does not say its number of experts ({family.num_experts}) and top-k ({family.top_k}): "
            f"another version of transformers lays it out otherwise. Install {TESTED}."
        )
    try:
        spec = family.spec_of(module)
    except ValueError as error:
        raise ModelNotSupportedError(f"router at {name!r}: {error}. It cannot be attached to.") from error
    unsteerable = (f"cannot be steered: {family.unsteerable}",) if family.unsteerable else ()
    notes = (*unsteerable, *family.notes, *adapter.notes(), *known_issues(family, adapter, spec))
    return RouterInfo(
        name=name,
        layer=0,
        module=module,
        block=block,
        family=family,
        adapter=adapter,
        num_experts=form.num_experts,
        top_k=form.top_k,
        spec=spec,
        role=adapter.role,
        notes=notes,
    )


def _known_families(modules: dict[str, nn.Module]) -> dict[str, Family]:
    """Map the name of every router in the table to its row. A block that makes the choice counts as a router."""
    families: dict[str, Family] = {}
    for name, module in modules.items():  # a block comes before the modules inside it
        family = family_of(module)
        if family is not None and not any(name.startswith(above and f"{above}.") for above in families):
            families[name] = as_returned(family, module)
    return families


def _unknown_families(model: nn.Module, modules: dict[str, nn.Module], known: dict[str, Family]) -> dict[str, Family]:
    """Map the name of every router that is not in the table to a row made for it.

    Raises `ModelNotSupportedError` for a router that is not recognized.
    """
    families: dict[str, Family] = {}
    seen: dict[type[nn.Module], Family | str] = {}
    owners = {outermost(name, modules).rpartition(".")[0] for name in known} | set(known)
    strangers = [name for name, m in modules.items() if name not in owners and _routes_unknown(m)]
    for name in strangers:
        block = modules[name]
        refused = refused_name(block)
        if refused is not None:
            raise ModelNotSupportedError(
                f"{type(model).__name__}: {refused} at {name!r} cannot be attached to: {REFUSED[refused]}. "
                f"{len(strangers)} such module(s). Use a model with a router."
            )
        of_gate = "gate" if block._modules.get("gate") is not None else "router"
        gate = block.get_submodule(of_gate)
        if type(gate) not in seen:
            seen[type(gate)] = recognize(gate, block)
        family = seen[type(gate)]
        if isinstance(family, str):
            raise ModelNotSupportedError(
                f"{type(model).__name__}: {type(block).__name__} at {name!r} owns experts, but its gate "
                f"{type(gate).__name__} is not a known router, and {family}. {len(strangers)} such module(s). Use the "
                "model class of transformers 5 (transformers 4 and remote code decide in another form)."
            )
        families[f"{name}.{of_gate}" if name else of_gate] = family
    return families


def _routes_unknown(module: nn.Module) -> bool:
    """Whether a module owns experts, or is in `REFUSED`, so that routing must happen in it."""
    if refused_name(module) is not None:
        return True
    gate = module._modules.get("gate") or module._modules.get("router")
    return module._modules.get("experts") is not None and gate is not None

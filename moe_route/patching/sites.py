"""Router sites: every place of a model where tokens are routed, in forward order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from moe_route.ops import RouterSpec
from moe_route.patching.families import SPECIALS, Family, at, family_of, special_name


class ModelNotSupported(ValueError):  # noqa: N818 (a state, said by its name)
    """The model has no router that can be attached to, or one that cannot; says what was found and the mend."""


@dataclass(slots=True, eq=False)
class RouterSite:
    """One router of a live model.

    `engine` is "observed" (a forward hook) or "fused" (gate matrix and one `route` call), `reason` says why that one.
    `steerable` is False where the model's choice cannot be changed; `notes` are known peculiarities.
    """

    name: str  # dotted name of the router in the model
    layer: int  # 0-based among the MoE layers
    module: nn.Module
    block: nn.Module  # the module that owns the router
    family: Family
    num_experts: int
    top_k: int
    spec: RouterSpec
    engine: str = "observed"
    reason: str = ""
    steerable: bool = True
    notes: tuple[str, ...] = ()

    @property
    def parameter(self) -> torch.Tensor | None:
        """The gate matrix, where the router keeps one as a plain parameter (possibly on the meta device)."""
        return next(self.module.parameters(), None)


def find_sites(model: nn.Module) -> list[RouterSite]:
    """The routers of `model` in forward order.

    Raises `ModelNotSupported` where there is none, where one is of a kind that cannot be attached to, or where a block
    goes round its router; the message names what was found and the mend.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, not {type(model).__name__}")
    modules = dict(model.named_modules())
    sites: list[RouterSite] = []
    for name, module in modules.items():
        family = family_of(module)
        if family is not None:
            block = modules[name.rpartition(".")[0]] if name else module
            sites.append(_site(name, len(sites), module, block, family))
    routed = {id(site.block) for site in sites} | {id(site.module) for site in sites}
    strangers = [(name, m) for name, m in modules.items() if id(m) not in routed and _routes_unknown(m)]
    if strangers:
        raise ModelNotSupported(_describe_strangers(model, strangers))
    if not sites:
        raise ModelNotSupported(
            f"{type(model).__name__} has no router: none of its {len(modules)} modules is a known router and none owns "
            "experts, so it looks like a dense model. Attach to a Mixture-of-Experts model, such as Qwen3-MoE or OLMoE."
        )
    return sites


def _site(name: str, layer: int, module: nn.Module, block: nn.Module, family: Family) -> RouterSite:
    refuse_bypass(name, module, block)
    num_experts, top_k = at(module, family.num_experts), at(module, family.top_k)
    if not isinstance(num_experts, int) or not isinstance(top_k, int):
        raise ModelNotSupported(
            f"{type(module).__name__} at {name!r} does not say its number of experts ({family.num_experts}) and top-k "
            f"({family.top_k}): another version of transformers lays it out otherwise. Install transformers 5.23."
        )
    try:
        spec = family.spec_of(module)
    except ValueError as error:
        raise ModelNotSupported(f"router at {name!r}: {error}. It cannot be attached to.") from error
    return RouterSite(
        name, layer, module, block, family, num_experts, top_k, spec, steerable=family.steerable, notes=family.notes
    )


def refuse_bypass(name: str, module: nn.Module, block: nn.Module) -> None:
    """Raise `ModelNotSupported` where the block computes its own routing and never calls the router (quantised and
    kernelised gpt-oss): a hook there would see nothing."""
    kind = type(block).__name__
    if kind == "Mxfp4GptOssMLP" and not getattr(block.experts, "_is_hooked", False):
        raise ModelNotSupported(
            f"{kind} above {name!r} routes inside its MXFP4 kernel and never calls its router. Load the model with "
            "quantization_config=Mxfp4Config(dequantize=True)."
        )
    if kind == "GptOssMLP" and "forward" in vars(block) and not hasattr(block, "_hf_hook"):
        raise ModelNotSupported(
            f"the forward of {kind} above {name!r} was replaced (kernelised) and never calls its router. Load the "
            "model with use_kernels=False."
        )


def _routes_unknown(module: nn.Module) -> bool:
    """Whether a module owns experts, or is a known special, and so must route somewhere."""
    if special_name(module) is not None:
        return True
    experts = module._modules.get("experts")
    gate = module._modules.get("gate") or module._modules.get("router")
    return experts is not None and gate is not None and family_of(gate) is None


def _describe_strangers(model: nn.Module, strangers: list[tuple[str, nn.Module]]) -> str:
    name, module = strangers[0]
    gate = module._modules.get("gate") or module._modules.get("router") or module
    special = special_name(module) or special_name(gate)
    if special is not None:
        what = f"{special} at {name!r} cannot be attached to: {SPECIALS[special]}."
        mend = "Use a model whose router returns (logits, weights, ids)."
    else:
        what = (
            f"{type(module).__name__} at {name!r} owns experts, but its gate {type(gate).__name__} is no known router."
        )
        mend = "Use the model class of transformers 5 (transformers 4 and remote code decide in another form)."
    return f"{type(model).__name__}: {what} {len(strangers)} such module(s). {mend}"

"""Which layers of a model get adapters, their sizes, and the block of layers that each stands in."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_route.modules.intercept import device_of
from moe_route.routers import family_of
from moe_route.training.adapters.config import AdapterConfig, AdapterError

_ROUTING = ("gate", "router")
# Layers that run again, at every step of a generation, on all tokens that the cache holds (latent attention).
_OF_CACHE = ("kv_b_proj",)


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """One linear layer or embedding of a model."""

    name: str
    module: nn.Module
    block: str  # dotted name of the block of layers that it stands in; "" for none

    @property
    def kind(self) -> str:
        """Its name in its block: layers of one kind share a pool of shards."""
        return self.name.removeprefix(f"{self.block}.")

    @property
    def is_embedding(self) -> bool:
        """Whether its inputs are token ids."""
        return isinstance(self.module, nn.Embedding)

    @property
    def transposed(self) -> bool:
        """Whether its weight is kept as [in, out] (embeddings, GPT-2)."""
        return not isinstance(self.module, nn.Linear)

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of inputs and of outputs."""
        if isinstance(self.module, nn.Linear):
            return self.module.in_features, self.module.out_features
        inner, outer = self.module.get_parameter("weight").shape
        return inner, outer

    @property
    def weight(self) -> Tensor:
        return self.module.get_parameter("weight")

    @property
    def device(self) -> torch.device:
        """The device that it runs on. Offloaded weights, and those of empty models, are on the meta device."""
        return device_of(self.module) if hasattr(self.module, "_hf_hook") else self.weight.device


def adapted_layers(model: nn.Module, config: AdapterConfig) -> list[AdaptedLayer]:
    """The layers that `config.target_modules` names, in the order of the model.

    Raises `AdapterError` for a name that no such layer has, and for layers whose rows a router cannot tell apart.
    """
    modules = dict(model.named_modules())
    known = {name: module for name, module in modules.items() if _is_known(module) and name}
    chosen = [name for name in known if _is_target(name, config, modules)]
    _check_targets(config, list(known), chosen)
    layers = [AdaptedLayer(name, known[name], _block_of(name, modules)) for name in chosen]
    for layer in layers if config.routed else ():
        why = _unroutable(layer, config)
        if why:
            raise AdapterError(
                f"{layer.name!r} {why}: no decision of router={config.router!r} fits its rows. Leave it out by "
                "target_modules=, or use router='none' or 'group'"
            )
    return layers


def _by_token(config: AdapterConfig) -> bool:
    return config.router == "token" or (config.router == "sequence" and config.pooling == "prefix")


def _unroutable(layer: AdaptedLayer, config: AdapterConfig) -> str:
    """Why no router can decide for the rows of a layer, or ""."""
    if layer.is_embedding:
        return ""  # it has no router
    if not layer.block:
        return "stands in no block"
    if _is_of_experts(layer.name):
        return "belongs to an expert, which is given some of the tokens"
    if _by_token(config) and layer.name.endswith(_OF_CACHE):
        return "runs again on the tokens that the cache holds"
    return ""


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward  # others scale what they look up
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and "weight" in module._parameters)


def _is_target(name: str, config: AdapterConfig, modules: dict[str, nn.Module]) -> bool:
    targets = config.target_modules
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if targets is not None:
        return any(name == target or name.endswith(f".{target}") for target in targets)
    if _by_token(config) and name.endswith(_OF_CACHE):
        return False
    if isinstance(modules[name], nn.Embedding) or _is_of_experts(name) or _is_of_router(name, modules):
        return False
    return bool(_block_of(name, modules))


def _check_targets(config: AdapterConfig, names: list[str], chosen: list[str]) -> None:
    targets = config.target_modules
    known = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
    if not chosen:
        raise AdapterError(f"no linear layer or embedding is named {targets!r}: the model's are {known}")
    if isinstance(targets, tuple):
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in chosen):
                raise AdapterError(
                    f"target_modules: no linear layer or embedding is named {target!r}; the model's are {known}"
                )


def _block_of(name: str, modules: dict[str, nn.Module]) -> str:
    """The outermost entry of a list of modules that `name` is inside, or ""."""
    pieces = name.split(".")
    for length in range(2, len(pieces)):
        if isinstance(modules.get(".".join(pieces[: length - 1])), nn.ModuleList):
            return ".".join(pieces[:length])
    return ""


def _is_of_experts(name: str) -> bool:
    return ".experts." in f".{name}."


def _is_of_router(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer is, or belongs to, a router."""
    pieces = name.split(".")
    above = [".".join(pieces[:length]) for length in range(1, len(pieces) + 1)]
    if any(family_of(modules[each]) is not None and modules[each]._modules.get("experts") is None for each in above):
        return True
    owner = modules.get(".".join(pieces[:-1]))
    return pieces[-1] in _ROUTING and owner is not None and owner._modules.get("experts") is not None

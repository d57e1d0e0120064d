"""Put adapters on a model, and what can be done with them: labels, switch, count, merge, save, load."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_route.base import files
from moe_route.base.devices import Block
from moe_route.calls.call import name_groups, named_groups
from moe_route.calls.reader import call_readers
from moe_route.modules.intercept import Change, ForwardHook, ForwardPreHook
from moe_route.nn import load_balancing_loss
from moe_route.recording.labels import LabelBlock
from moe_route.training.adapters.call_state import CallState, valid_tokens
from moe_route.training.adapters.config import AdapterConfig, AdapterError
from moe_route.training.adapters.layers import AdaptedLayer, adapted_layers
from moe_route.training.adapters.mixture import (
    AdapterRouter,
    BlockInput,
    EmbeddingMixture,
    LowRankMixture,
    OwnFactors,
    PooledFactors,
    Pools,
)

_KIND = "adapters"
_CHILD, _POOLS = "adapter", "adapter_pools"  # names of the modules that are added; a second set is "adapter_2"


class ParameterCount(NamedTuple):
    """Numbers of parameters."""

    trainable: int
    total: int


class AdaptedModel:
    """A model with adapters on its linear layers.

    The model itself is changed: hooks add what the adapters compute, and no weight or class is replaced. `attach`
    sees the routers of the adapters beside the model's own.

    Attributes:
        model: the model. Train it, attach to it, generate with it.
        config: what the adapters are made of.
        layers: dotted names of the adapted layers.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig) -> None:
        self.model, self.config = model, config
        self._state = CallState(config)
        self._adapted = adapted_layers(model, config)
        self.layers = tuple(layer.name for layer in self._adapted)
        self._suffix = _free_suffix(model, self._adapted)
        self._pools: dict[str, Pools] = {}
        self._mixtures: list[LowRankMixture] = []
        self._changes: list[Change] = []
        self._trained_before = {name: p.requires_grad for name, p in model.named_parameters()}
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    @property
    def transposed(self) -> bool:
        """Whether the adapted linear layers keep their weights as [in, out] (GPT-2)."""
        return any(layer.transposed and not layer.is_embedding for layer in self._adapted)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Dotted names of the adapted embeddings, which are among `layers`."""
        return tuple(layer.name for layer in self._adapted if layer.is_embedding)

    # ---- use

    def labels(self, groups: str | Sequence[str]) -> Block[None]:
        """Name the group of each sequence of a batch, for all calls inside: one name, or one for each sequence.

        `labels` of an attached model and of a recording name it too, so one of them is enough. They hold in the thread
        that names them. Calls raise `AdapterError` for a group without adapter.
        """
        return Block("adapted.labels(...)", self._labeled(LabelBlock.parse(groups, None, None, None)))

    @contextlib.contextmanager
    def _labeled(self, block: LabelBlock) -> Iterator[None]:
        before = named_groups()
        try:
            name_groups(block.named)
            yield
        finally:
            name_groups(before)

    @property
    def enabled(self) -> bool:
        """Whether the adapters change anything."""
        return self._state.enabled

    def enable(self) -> None:
        """Let the adapters work again."""
        self._state.enabled = True

    def disable(self) -> None:
        """Let the model compute what it did without adapters, bit for bit."""
        self._state.enabled = False

    def disabled(self) -> Block[None]:
        """`disable` inside the block."""
        return Block("adapted.disabled()", self._switched_off())

    @contextlib.contextmanager
    def _switched_off(self) -> Iterator[None]:
        before = self.enabled
        try:
            self.disable()
            yield
        finally:
            self._state.enabled = before

    @property
    def router_logits(self) -> dict[str, Tensor]:
        """Router logits of the latest call in training, by layer: [T, n], or [B, n] where a sequence is decided once.

        For losses of your own, such as `moe_route.training.own_expert_loss`. Empty before such a call, and for adapters
        without routers.
        """
        return {self.layers[number]: logits for number, (logits, _) in self._state.decisions.items()}

    def balance_loss(self) -> Tensor:
        """Mean of `moe_route.nn.load_balancing_loss` over the routers, for the latest call in training.

        Raises `AdapterError` for adapters without routers, or before such a call.
        """
        decisions, sequences = self._state.decisions, self._state.sequences
        if not decisions or sequences is None:
            raise AdapterError(
                "no decision to balance: it needs router='token' or 'sequence', and a call of the model in training "
                "mode with gradients"
            )
        once = self.config.router == "sequence" and self.config.pooling != "prefix"
        valid = None if once else valid_tokens(sequences.call).flatten()
        losses = [
            load_balancing_loss(logits, ids, None if valid is None else valid.to(ids.device))
            for logits, ids in decisions.values()
        ]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def trainable_parameters(self) -> ParameterCount:
        """How many parameters of the model are trained now, and how many it has."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return ParameterCount(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of adapters, routers and pools, by their names in the model."""
        return {
            name: p for prefix, module in self._modules(self._suffix) for name, p in module.named_parameters(prefix)
        }

    # ---- take out

    @torch.no_grad()
    def merge(self, group: str | None = None) -> nn.Module:
        """Add the adapters to the weights of the model and take them out. Returns the model.

        Args:
            group: whose adapters, for `router="group"`.

        Raises `AdapterError` for a mixture that depends on the input, an unknown group, and weights that are quantized
        or shared with other layers. The model is then as before.
        """
        expert = self.expert_of(group)
        users: dict[int, int] = {}
        for _, parameter in self.model.named_parameters(remove_duplicate=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
        for layer in self._adapted:
            if not layer.weight.is_floating_point() or layer.weight.is_meta:
                raise AdapterError(
                    f"the weight of {layer.name!r} is quantized or not loaded: load the model unquantized"
                )
            if users.get(id(layer.weight), 0) > 1:
                raise AdapterError(
                    f"the weight of {layer.name!r} is shared with another layer: keep the adapters apart"
                )
        for layer, mixture in zip(self._adapted, self._mixtures, strict=True):
            a, b = mixture.factors()
            update = b[expert].float().t() @ a[expert].float() * self.config.scale
            layer.weight.copy_(layer.weight.float() + (update.t() if layer.transposed else update))
        self.remove()
        return self.model

    def expert_of(self, group: str | None) -> int:
        """Number of the one adapter per layer that does not depend on the input. Raises `AdapterError` if none is."""
        if self.config.routed:
            raise AdapterError(
                f"router={self.config.router!r} mixes anew for every input: its adapters cannot be merged into weights"
            )
        if self.config.router == "group":
            if group not in self.config.groups:
                raise AdapterError(f"group= must be one of {', '.join(self.config.groups)}, got {group!r}")
            return self.config.groups.index(group)
        if group is not None:
            raise AdapterError(f"the adapters have no groups, and group={group!r} was given: leave it out")
        return 0

    def remove(self) -> nn.Module:
        """Take the adapters out. The model is then what it was before, bit for bit. Safe to call twice."""
        while self._changes:
            self._changes[-1].remove()
            self._changes.pop()
        for layer in self._adapted:
            layer.module._modules.pop(_CHILD + self._suffix, None)
        self.model._modules.pop(_POOLS + self._suffix, None)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trained_before.get(name, parameter.requires_grad))
        return self.model

    # ---- files

    def factors(self, number: int) -> tuple[Tensor, Tensor]:
        """Factors A [n, r, d_in] and B [n, r, d_out] of the adapters of layer `number` of `layers`."""
        a, b = self._mixtures[number].factors()
        return a, b

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the adapters, routers and pools to one file, without the model's own weights.

        The file is written whole, then renamed. `load_adapters` reads it.
        """
        header = {"config": self.config.as_dict(), "layers": list(self.layers), "model": type(self.model).__name__}
        files.write(path, self.tensors(), header, _KIND)

    def _modules(self, suffix: str) -> Iterator[tuple[str, nn.Module]]:
        """What was added to the model, each module with its name in a model whose adapters have this suffix."""
        for layer, mixture in zip(self._adapted, self._mixtures, strict=True):
            yield f"{layer.name}.{_CHILD}{suffix}", mixture
        for key, pools in self._pools.items():
            yield f"{_POOLS}{suffix}.{key}", pools

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in a file."""
        return {
            name: tensor.detach()
            for prefix, module in self._modules("")
            for named in (module.named_parameters(prefix), module.named_buffers(prefix))
            for name, tensor in named
        }

    # ---- making

    def _install(self) -> None:
        generator = torch.Generator().manual_seed(self.config.seed)
        pools = self._pools = self._make_pools(generator)
        blocks: dict[str, BlockInput] = {}
        drawn = dict.fromkeys(pools, 0)
        for number, layer in enumerate(self._adapted):
            place: dict[str, Any] = {"device": layer.device, "dtype": torch.float32}
            if self.config.pool is None:
                factors: nn.Module = OwnFactors(self.config.experts, self.config.rank, layer.sizes, generator, **place)
            else:
                key = _pool_key(layer)
                factors = PooledFactors(pools[key], self.config.experts, drawn[key], generator)
                drawn[key] += self.config.experts
            mixture: LowRankMixture
            if layer.is_embedding:
                mixture = EmbeddingMixture(layer.name, number, self.config, factors, self._state, **place)
            else:
                router, block = None, None
                if self.config.router != "none" and layer.block:
                    block = blocks.setdefault(layer.block, BlockInput(layer.block, len(blocks), self._state))
                if self.config.routed:
                    router = AdapterRouter.of(self.config, _hidden_size(self.model), generator, **place)
                mixture = LowRankMixture(layer.name, number, self.config, factors, router, self._state, block)
            self._mixtures.append(mixture.train(layer.module.training))
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        if pools:
            self.model.add_module(_POOLS + self._suffix, nn.ModuleDict(pools).train(self.model.training))
        self._hook(blocks)

    def _make_pools(self, generator: torch.Generator) -> dict[str, Pools]:
        if self.config.pool is None:
            return {}
        users: dict[str, list[AdaptedLayer]] = {}
        for layer in self._adapted:
            users.setdefault(_pool_key(layer), []).append(layer)
        made = {}
        for key, layers in users.items():
            if len({layer.device for layer in layers}) > 1:
                raise AdapterError(
                    f"the layers {key!r} lie on several devices, and share one pool: load the model on one device"
                )
            count, place = len(layers) * self.config.experts, {"device": layers[0].device, "dtype": torch.float32}
            made[key] = Pools(self.config.pool, self.config.rank, count, layers[0].sizes, generator, **place)
        return made

    def _hook(self, blocks: dict[str, BlockInput]) -> None:
        for layer, mixture in zip(self._adapted, self._mixtures, strict=True):
            layer.module.add_module(_CHILD + self._suffix, mixture)
            self._change(ForwardHook(layer.module, mixture.add))
        inside = [name for name in self.layers if name not in self.embeddings or self.config.router == "group"]
        readers = [] if self.config.router == "none" else call_readers(self.model, inside)
        for module, reader in readers:
            self._change(ForwardPreHook(module, partial(self._state.enter, reader), with_kwargs=True))
            self._change(ForwardHook(module, self._state.leave, always_call=True))
        for name, block in blocks.items():
            module = self.model.get_submodule(name)
            self._change(ForwardPreHook(module, block.see, with_kwargs=True))
            self._change(ForwardHook(module, block.forget))

    def _change(self, change: Change) -> None:
        self._changes.append(change)
        change.install()


def add_adapters(model: nn.Module, config: AdapterConfig) -> AdaptedModel:
    """Put low-rank adapters on linear layers of a model, and freeze everything else.

    The model itself is changed, by hooks; its weights keep their names and values. At the start it computes what it did
    before, since B is zero. Adapters are kept in float32.

    A model may get several sets of adapters: what they add is summed, and the latest set is the one that is trained.

    Raises `AdapterError` for a config that does not fit the model, which is then as before.
    """
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"an AdapterConfig is needed, not {type(config).__name__}")
    if config.router == "sequence" and config.pooling == "mean":
        _refuse_causal(model)
    return AdaptedModel(model, config)


def load_adapters(model: nn.Module, path: str | os.PathLike[str]) -> AdaptedModel:
    """Put the adapters that `AdaptedModel.save` wrote on a model.

    Raises `AdapterError` for a model whose layers have other names or sizes, which is then as before, and
    `FileRefusedError` for a damaged or foreign file.
    """
    tensors, header = files.read(path, _KIND, framework="torch")
    adapted = add_adapters(model, AdapterConfig.from_dict(header.get("config", {})))
    try:
        _fill(adapted, tensors, header, path)
    except BaseException:
        adapted.remove()
        raise
    return adapted


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the parameters of all adapters, routers and pools of a model."""
    added = [(name, each) for name, each in model.named_modules() if isinstance(each, (LowRankMixture, Pools))]
    return {name for prefix, module in added for name, _ in module.named_parameters(prefix)}


def _free_suffix(model: nn.Module, layers: Sequence[AdaptedLayer]) -> str:
    taken = set(model._modules).union(*(layer.module._modules for layer in layers))
    numbered = (f"_{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([""], numbered) if not {_CHILD + each, _POOLS + each} & taken)


def _fill(adapted: AdaptedModel, tensors: dict[str, Tensor], header: dict[str, Any], path: Any) -> None:
    own = adapted.tensors()
    shapes = {name: list(tensor.shape) for name, tensor in own.items()}
    if shapes != {name: list(tensor.shape) for name, tensor in tensors.items()}:
        raise AdapterError(
            f"{path} holds adapters of a {header.get('model')} whose layers have other names or sizes than those of "
            f"this {type(adapted.model).__name__}: load the model that they were made for"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _pool_key(layer: AdaptedLayer) -> str:
    inner, outer = layer.sizes
    return f"{layer.kind.replace('.', '-')}-{inner}x{outer}"


def _hidden_size(model: nn.Module) -> int:
    """Width of the hidden states that blocks are given."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "hidden_size", None)
    if not isinstance(size, int):
        raise AdapterError(
            f"{type(model).__name__} has no configuration with a hidden_size, which its routers need: use a "
            "transformers model, or router='none' or 'group'"
        )
    return size


def _refuse_causal(model: nn.Module) -> None:
    """Raise `AdapterError` unless the model says of all its attention that it is not causal."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if not said or any(said):
        raise AdapterError(
            "pooling='mean' reads the whole sequence, so in a causal model every token would depend on those after it. "
            "Use pooling='first' or 'prefix'"
        )


# ---- stages of a training, as data: which parts of a model are trained, and which are frozen

PARTS = ("embeddings", "body", "head", "adapters", "routers")
"""Parts of a model.

"embeddings": the input embeddings. "body": the rest of the model without its head. "head": what stands outside the
base model (the output embeddings, a classifier). "adapters" and "routers": those of `add_adapters`.
"""


@dataclass(frozen=True)
class Stage:
    """What one stage trains; all the rest is frozen.

    Attributes:
        name: for people.
        trains: names of `PARTS`, or patterns of parameter names ("*.lm_head.*").
    """

    name: str
    trains: tuple[str, ...]


STAGES = (
    Stage("embeddings", ("embeddings", "head")),
    Stage("body", ("body", "head")),
    Stage("adapters", ("adapters", "routers", "head")),
)
"""The three stages of MT4CrossOIE (arXiv 2308.06552 section 3.3), in order."""


def freeze(model: nn.Module, stage: Stage | Iterable[str]) -> dict[str, int]:
    """Train what `stage` names, and freeze all other parameters of `model`.

    Parameters that two parts share (tied embeddings) belong to the first of them.

    Returns the number of parameters that are trained, by part. Raises `AdapterError` if an entry names nothing; the
    model is then as before.
    """
    wanted = stage.trains if isinstance(stage, Stage) else tuple(stage)
    parts = _parts(model)
    trained = {}
    for name, part in parts.items():
        trained[name] = part in wanted or any(fnmatchcase(name, entry) for entry in wanted)
    for entry in wanted:
        if not any(part == entry or fnmatchcase(name, entry) for name, part in parts.items()):
            has = ", ".join(part for part in PARTS if part in parts.values())
            raise AdapterError(f"nothing of the model is called {entry!r}: its parts are {has}")
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
        counts[parts[name]] += parameter.numel() if trained[name] else 0
    return {part: number for part, number in counts.items() if number}


def _parts(model: nn.Module) -> dict[str, str]:
    """Name of each parameter -> its part."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    of_embeddings = {id(p) for p in embeddings.parameters()} if isinstance(embeddings, nn.Module) else set()
    prefix = getattr(model, "base_model_prefix", "")
    has_head = bool(prefix) and isinstance(getattr(model, prefix, None), nn.Module)
    of_adapters, parts = adapter_names(model), {}
    for name, parameter in model.named_parameters():
        if name in of_adapters:
            parts[name] = "routers" if ".router." in name else "adapters"
        elif id(parameter) in of_embeddings:
            parts[name] = "embeddings"
        else:
            parts[name] = "head" if has_head and not name.startswith(f"{prefix}.") else "body"
    return parts

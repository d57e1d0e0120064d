"""Turn a dense model into a sparse one whose experts belong to families of groups [ApolloMoE, arXiv 2410.10626].

`upcycle` makes it, `own_expert_loss` trains its routers, `load_upcycled` loads it again.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route.nn import SparseMoE
from moe_route.routers import find_routers
from moe_route.steering import Plan
from moe_route.training import stock
from moe_route.training.adapters.handle import adapter_names
from moe_route.training.dense import DenseBlock, UpcyclingError, dense_blocks
from moe_route.training.stock import UpcycledShape

_OF_CONFIG = ("cache_dir", "local_files_only", "revision", "token")  # options of loading that say where files are


class Upcycled(NamedTuple):
    """What `upcycle` returns."""

    model: nn.Module  # the sparse model
    plan: Plan  # gives each group's tokens the expert of its family; for training


def upcycle(
    model: nn.Module,
    *,
    families: Mapping[str, str | int],
    layers: Iterable[int] | None = None,
    top_k: int = 2,
    renormalize: Literal["sum", "none"] = "sum",
    fixed_by_label: bool = False,
    experts_from: Sequence[nn.Module] | None = None,
    router_std: float = 0.02,
    noise: float = 0.0,
    seed: int = 0,
    stack: str | None = None,
    stock_class: bool | None = None,
) -> Upcycled:
    """Make a sparse model of a dense one: its feed-forward blocks of some layers become experts, one a family.

    Each expert starts as a copy of the block, and each router at random. With `renormalize="sum"` the sparse model
    therefore computes what the dense one does (to rounding); with "none", as published, each block is scaled by the sum
    of the chosen probabilities, and the model starts worse. The dense model itself is not changed: memory for both is
    needed, and for a second sparse one for a moment where a stock class is used.

    The result is of a stock transformers class where one can hold it (Qwen3 -> Qwen3-MoE; Llama and Mistral -> Mixtral
    if all layers are chosen). Elsewhere it keeps its class and has `moe_route.nn.SparseMoE` blocks. `save_pretrained`
    saves both; `load_upcycled` loads both (`AutoModelForCausalLM` only the first).

    Train under the plan (`routed.steer(plan)` with `routed.labels(groups=...)`): where a token's own expert is not
    among its top k, it replaces the last one (hybrid-k). Without the plan, the same model routes by plain top-k.
    As long as all experts of a block are the same, "sum" gives its router no gradient; the plan makes them part in the
    first step, `noise` before it.

    Args:
        model: a dense model with its weights loaded.
        families: group (a language) -> name or number of its family. Names are numbered in the order in which they
            first come; numbers must be 0 to E - 1. E is the number of families. See `moe_route.data.families_of`.
        layers: indices of the model's layers, from 0; by default the last two.
        top_k: experts per token.
        renormalize: "sum": weights are divided by their sum. "none": they are the probabilities.
        fixed_by_label: route every token of a known group to its own expert alone, with weight 1. It needs `top_k=1`,
            which is refused otherwise: the weight of a single renormalized expert is always 1, so the router would get
            no gradient. Here it gets none either; add `own_expert_loss`, or give labels at inference too.
        experts_from: a model per expert, fine-tuned from `model`: expert e is the block of the e-th. All weights
            outside the experts are their average.
        router_std: standard deviation of the router's first weights.
        noise: standard deviation of noise on the copies, relative to that of each matrix.
        seed: of routers and noise.
        stack: name of the list of layers, where a model has several.
        stock_class: True refuses a model that no stock class can hold, False never uses one.

    Raises `UpcyclingError` (a ``ValueError``) for options that contradict each other, layers or families out of range,
    models that are not dense, quantized weights, or models in `experts_from` of another shape.
    """
    experts = _numbered(families)
    num_experts = max(experts.values()) + 1
    _check(num_experts, top_k, renormalize, fixed_by_label)
    if adapter_names(model):
        raise UpcyclingError("the model has adapters, which experts would not keep: merge() or remove() them first")
    blocks = dense_blocks(model, stack)
    chosen = _chosen(blocks, layers)
    if experts_from is not None and len(experts_from) != num_experts:
        raise UpcyclingError(f"experts_from has {len(experts_from)} models for {num_experts} experts")
    first = blocks[chosen[0]]
    shape = UpcycledShape(
        layers=tuple(chosen),
        stack=first.stack,
        block=first.inner_name,
        hidden_size=first.down.shape[0],
        intermediate_size=first.down.shape[1],
        num_experts=num_experts,
        top_k=top_k,
        renormalize=renormalize,
        activation=first.activation,
        gated=first.form.gated,
        bias=first.biases is not None,
        stock_class=False,
        families=experts,
    )
    generator = torch.Generator().manual_seed(seed)
    sources = [dense_blocks(each, stack) for each in experts_from or ()]
    sparse = copy.deepcopy(model)
    if experts_from is not None:
        _average(sparse, experts_from, set(shape.names))
    made = {}
    for layer in chosen:
        of_expert = [source[layer] for source in sources] or [blocks[layer]] * num_experts
        made[blocks[layer].name] = _sparse_block(of_expert, shape, router_std, noise, generator)
    shape.install(sparse, made)
    shape.write(sparse)
    if stock_class is not False:
        held = stock.converted(sparse, shape)
        if isinstance(held, nn.Module):
            sparse = held
        elif stock_class:
            raise UpcyclingError(f"no stock class can hold {type(model).__name__} upcycled like this: {held}")
    return Upcycled(sparse, family_plan(sparse))


def family_plan(model: nn.Module, families: Mapping[str, str | int] | None = None) -> Plan:
    """The plan that reserves a slot for the expert of each group's family, in every sparse layer of a model.

    Args:
        model: an upcycled model, or any other sparse one.
        families: as for `upcycle`; by default those that the model was upcycled with (its configuration keeps them).

    Raises `UpcyclingError` if the model keeps no families and none are given, or for more families than experts.
    """
    if families is None:
        shape = UpcycledShape.read(getattr(model, "config", None))
        if shape is None:
            raise UpcyclingError(
                "the model's configuration keeps no families: it was not upcycled here; give families="
            )
        families = shape.families
    experts = _numbered(families)
    routers = find_routers(model)
    smallest = min(router.num_experts for router in routers)
    if max(experts.values()) >= smallest:
        raise UpcyclingError(f"{max(experts.values()) + 1} families are more than the {smallest} experts of a layer")
    plan = Plan(description="each group keeps a slot for the expert of its family")
    for expert in sorted(set(experts.values())):
        groups = [group for group, own in experts.items() if own == expert]
        plan = plan + Plan.reserve_slot({router.layer: [expert] for router in routers}).only(groups=groups)
    return plan


def _numbered(families: Mapping[str, str | int]) -> dict[str, int]:
    """Group -> number of its expert."""
    if not isinstance(families, Mapping) or not families:
        raise UpcyclingError("families must map groups to families, such as {'eng_Latn': 'Germanic'}")
    names = list(dict.fromkeys(families.values()))
    if all(isinstance(name, int) and not isinstance(name, bool) for name in names):
        if sorted(names) != list(range(len(names))):  # type: ignore[type-var]
            raise UpcyclingError(f"numbered families must be 0 to {len(names) - 1} without gaps, got {sorted(names)}")  # type: ignore[type-var]
        return {group: int(family) for group, family in families.items()}
    return {group: names.index(family) for group, family in families.items()}


def _check(num_experts: int, top_k: int, renormalize: str, fixed_by_label: bool) -> None:
    if renormalize not in ("sum", "none"):
        raise UpcyclingError(f"renormalize must be 'sum' or 'none', got {renormalize!r}")
    if not 1 <= top_k <= num_experts:
        raise UpcyclingError(f"top_k must lie between 1 and the {num_experts} families, got {top_k}")
    if fixed_by_label and (top_k, renormalize) != (1, "sum"):
        raise UpcyclingError("fixed_by_label gives one expert the weight 1: it needs top_k=1 and renormalize='sum'")
    if top_k == 1 and renormalize == "sum" and not fixed_by_label:
        raise UpcyclingError(
            "with top_k=1 and renormalize='sum' every weight is 1, so the router gets no gradient and never learns. "
            "Use top_k=2, renormalize='none', or fixed_by_label=True"
        )


def _chosen(blocks: list[DenseBlock], layers: Iterable[int] | None) -> list[int]:
    count = len(blocks)
    chosen = list(range(max(0, count - 2), count)) if layers is None else sorted({int(layer) for layer in layers})
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < count:
        raise UpcyclingError(f"layers must be some of 0 to {count - 1}, got {chosen}")
    alike = {(b.form, b.activation, b.up.shape, b.down.shape, b.biases is None) for b in (blocks[i] for i in chosen)}
    if len(alike) > 1:
        raise UpcyclingError("the blocks of these layers differ in shape or form: upcycle layers that are alike")
    return chosen


def _average(sparse: nn.Module, models: Sequence[nn.Module], experts: set[str]) -> None:
    """Give every parameter outside the blocks `experts` the average of those of `models`."""
    others = [dict(each.named_parameters()) for each in models]
    for name, parameter in sparse.named_parameters():
        if any(name.startswith(f"{block}.") for block in experts):
            continue
        alike = [other[name] for other in others if name in other and other[name].shape == parameter.shape]
        if len(alike) < len(others):
            raise UpcyclingError(f"not every model of experts_from has {name!r} of shape {list(parameter.shape)}")
        total = torch.zeros_like(parameter, dtype=torch.float32)
        for each in alike:
            total += each.detach().to(total)
        parameter.data.copy_(total / len(alike))


def _sparse_block(
    of_expert: Sequence[DenseBlock], shape: UpcycledShape, router_std: float, noise: float, generator: torch.Generator
) -> SparseMoE:
    first = of_expert[0]
    block = shape.sparse_block(first.down.dtype, first.down.device)
    with torch.no_grad():
        weight = block.router.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * router_std)
        for expert, source in enumerate(of_expert):
            if source.up.shape != first.up.shape or (source.biases is None) != (first.biases is None):
                raise UpcyclingError(f"model {expert} of experts_from has blocks of another shape or form")
            up, down = block.experts.up[0], block.experts.down_proj
            up[expert] = _noisy(source.up, noise, generator)
            down[expert] = _noisy(source.down, noise, generator)
            if source.biases is not None:
                assert block.experts.up[1] is not None
                assert block.experts.down_proj_bias is not None
                block.experts.up[1][expert], block.experts.down_proj_bias[expert] = source.biases
    block.train(first.module.training)
    return block


def _noisy(matrix: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if noise == 0:
        return matrix
    drawn = torch.randn(matrix.shape, generator=generator).to(matrix.device)
    return (matrix.float() + drawn * noise * matrix.float().std()).to(matrix.dtype)


def is_upcycled(config: object) -> bool:
    """Whether a configuration is that of a model made by `upcycle`."""
    return UpcycledShape.read(config) is not None


def with_sparse_blocks(model: nn.Module) -> nn.Module:
    """Give a model made from the configuration of an upcycled one its sparse blocks, with weights at random.

    Other models, and those of a stock class, are returned as they are. `model` itself is changed and returned.
    """
    shape = UpcycledShape.read(getattr(model, "config", None))
    if shape is not None and not shape.stock_class:
        parameter = next(model.parameters())
        shape.install(model, {name: shape.sparse_block(parameter.dtype, parameter.device) for name in shape.names})
    return model


def load_upcycled(folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load a model that `upcycle` made and `save_pretrained` saved.

    A model of a stock class could also be loaded by `AutoModelForCausalLM`. Others have blocks of `moe_route.nn`, which
    transformers would not put in: it would ignore the experts and start dense blocks at random.

    Args:
        folder: the folder, or the name of a repository on the hub.
        options: what `from_pretrained` takes (`dtype`, `device_map`, ...).

    Raises `UpcyclingError` for a model that was not upcycled here, and the errors of transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("loading an upcycled model needs transformers: pip install 'moe-route[hf]'") from error
    of_config = {name: options[name] for name in _OF_CONFIG if name in options}
    config = transformers.AutoConfig.from_pretrained(folder, **of_config)
    shape = UpcycledShape.read(config)
    if shape is None:
        raise UpcyclingError(
            f"{os.fspath(folder)} is no upcycled model: load it by AutoModelForCausalLM.from_pretrained"
        )
    (name,) = config.architectures or ("AutoModelForCausalLM",)
    kind = getattr(transformers, name, None)
    if kind is None:
        raise UpcyclingError(f"this transformers {transformers.__version__} has no class {name}: install a newer one")
    loading = kind if shape.stock_class else _sparse(kind)
    model = loading.from_pretrained(folder, **options)
    model.__class__ = kind
    return model


def _sparse(kind: type[nn.Module]) -> Any:
    """A subclass of a dense class whose instances are made with sparse blocks."""

    class Sparse(kind):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(config, *arguments, **options)
            with_sparse_blocks(self)

    # from_pretrained looks up what it converts by the name and the module of the class.
    Sparse.__name__, Sparse.__module__ = kind.__name__, kind.__module__
    return Sparse


# ---- losses on router logits (the load-balancing loss is `moe_route.nn.load_balancing_loss`)


def own_expert_loss(router_logits: Tensor, experts: Tensor) -> Tensor:
    """Mean of ``-log p`` over tokens, where p is the router's probability of the token's own expert.

    It teaches a router whose choice is fixed in training (k = 1), and that gets no gradient from the model's own loss,
    to find the expert by itself.

    Args:
        router_logits: [T, E].
        experts: integers [T], each token's own expert; -1 leaves a token out (padding, or no family).

    Returns a float32 scalar, 0 if every token is left out. Raises ``ValueError`` for other shapes, or for an expert
    that the router does not have.
    """
    if router_logits.dim() != 2 or experts.shape != router_logits.shape[:1]:
        raise ValueError(
            f"router_logits [T, E] and experts [T] are needed, not {list(router_logits.shape)} and "
            f"{list(experts.shape)}"
        )
    if experts.numel() and not -1 <= int(experts.min()) <= int(experts.max()) < router_logits.shape[1]:
        raise ValueError(f"experts must lie between -1 and {router_logits.shape[1] - 1}")
    total = F.cross_entropy(router_logits.float(), experts.long(), ignore_index=-1, reduction="sum")
    return total / torch.clamp((experts >= 0).sum(), min=1)

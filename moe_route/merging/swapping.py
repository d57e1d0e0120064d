"""Layers or experts of one model in another: both were trained from the same base."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from moe_route.merging.checkpoint import Checkpoint, Merged, check_alike, check_descent
from moe_route.merging.layout import Layout

Source: TypeAlias = "Checkpoint | nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]"
_PUBLISHED = 32  # layers of the model of arXiv 2410.01335, with 5 at the bottom, 2 at the top and transitions of 1


def opened(source: Source) -> Checkpoint:
    """The checkpoint of a model, a state dict or a folder."""
    return source if isinstance(source, Checkpoint) else Checkpoint(source)


def average(tensors: list[Tensor]) -> Tensor:
    """The mean, computed in float32, in the dtype of the first tensor; equal tensors keep their bits."""
    first = tensors[0]
    if not first.is_floating_point() or all(torch.equal(first, other) for other in tensors):
        return first
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(first.dtype)


def swap_layers(
    *,
    task: Source,
    language: Source,
    bottom: int | None = None,
    top: int | None = None,
    transition: int | tuple[int, int] | None = None,
    others: Literal["language", "task", "average"] = "language",
) -> Merged:
    """Merge a model of a task with a model of a language: outer layers from the language, the middle from the task.

    Source: Bandarkar et al., Layer Swapping for Zero-Shot Cross-Lingual Transfer (arXiv 2410.01335).

    Args:
        task, language: models, state dicts or folders, both fine-tuned from one base.
        bottom, top: number of lowest and highest layers from ``language``. By default 5 and 2 of 32, in proportion.
        transition: number of layers that are averaged after ``bottom`` and before ``top``, by default 1 of 32 in
            proportion (at least 1). There is no transition at an end without layers from ``language``.
        others: embeddings, head and final norm. The published choice is not known.

    Raises ``ValueError`` for more layers than the model has, and for models that cannot be merged (see
    docs/merging.md).
    """
    if others not in ("language", "task", "average"):
        raise ValueError(f'others={others!r}: choose "language", "task" or "average"')
    models = {"task": opened(task), "language": opened(language)}
    check_alike(list(models.values()))
    check_descent(models["task"], models["language"])
    layout = Layout(models["task"])
    total = len(layout.layers)
    bottom, top = (
        round(total * published / _PUBLISHED) if given is None else given
        for given, published in ((bottom, 5), (top, 2))
    )
    mixed = max(1, round(total / _PUBLISHED)) if transition is None else transition
    below, above = mixed if isinstance(mixed, tuple) else (mixed, mixed)
    below, above = below if bottom else 0, above if top else 0
    if min(bottom, top, below, above) < 0 or bottom + below + above + top > total:
        raise ValueError(
            f"bottom={bottom}, top={top} and transitions of {below} and {above} do not fit into {total} layers"
        )
    origins = ["language"] * bottom + ["average"] * below
    origins += ["task"] * (total - len(origins) - above - top) + ["average"] * above + ["language"] * top
    by_layer = dict(zip(layout.layers, origins, strict=True))

    def read(name: str) -> Tensor:
        place = layout.places[name]
        number = place.layer if place.stack == layout.stack else None
        origin = others if number is None else by_layer[number]
        if origin == "average":
            return average([checkpoint.read(name) for checkpoint in models.values()])
        return models[origin].read(name)

    recipe = {"function": "swap_layers", "layers": origins, "others": others}
    return Merged(models, read, recipe, models["task"])


def swap_experts(
    a: Source,
    b: Source,
    selection: Mapping[int, Iterable[int]],
    *,
    router: Literal["expert", "a", "b", "average", "base"],
    others: Literal["a", "b", "average"] = "b",
    base: Source | None = None,
) -> Merged:
    """Put the selected experts of ``a`` into ``b``.

    Args:
        a, b: models, state dicts or folders, both fine-tuned from one base.
        selection: layer -> experts that come from ``a``, such as an ``ExpertSelection``. A layer is an index among the
            MoE layers.
        router: where the routers come from. ``"expert"``: the row of each expert comes with it. ``"a"``, ``"b"``,
            ``"base"``: whole routers. ``"average"``: the mean of ``a`` and ``b``. It has no default, since experts
            under a router that does not know them are the main reason for a failure.
        others: where everything else comes from (attention, norms, embeddings, shared experts, dense layers).
        base: the model that both were trained from. It is needed for ``router="base"``; if given, both are compared
            with it.

    Raises ``ValueError`` for layers or experts that the model lacks, and for models that cannot be merged.
    """
    for option, value, choices in (
        ("router", router, ("expert", "a", "b", "average", "base")),
        ("others", others, ("a", "b", "average")),
    ):
        if value not in choices:
            raise ValueError(f"{option}={value!r}: choose one of {', '.join(choices)}")
    if router == "base" and base is None:
        raise ValueError('router="base" needs base=, the model that both were trained from')
    models = {"a": opened(a), "b": opened(b)} | ({} if base is None else {"base": opened(base)})
    check_alike([models["b"], models["a"], *([models["base"]] if base is not None else [])])
    for role in ("a", "b") if base is not None else ("a",):
        check_descent(models[role], models["base" if base is not None else "b"])
    layout = Layout(models["b"])
    moved = _moved(layout, selection)

    def one(name: str, origin: str) -> Tensor:
        if origin == "average":
            return average([models["a"].read(name), models["b"].read(name)])
        return models[origin].read(name)

    def read(name: str) -> Tensor:
        place = layout.places[name]
        if place.part == "other":
            return one(name, others)
        experts = moved.get(place.block or "", ())
        if place.part == "router" and router != "expert":
            return one(name, router)
        if place.expert is not None:
            return one(name, "a" if place.expert in experts else "b")
        if not experts:
            return one(name, "b")
        return _with_rows(one(name, "b"), one(name, "a"), sorted(experts), layout.num_experts(place.block or ""))

    recipe = {
        "function": "swap_experts",
        "router": router,
        "others": others,
        "experts_of_a": {str(layer): sorted(int(e) for e in experts) for layer, experts in selection.items()},
    }
    return Merged(models, read, recipe, models["b"])


def _moved(layout: Layout, selection: Mapping[int, Iterable[int]]) -> dict[str, set[int]]:
    """Block -> experts that come from a."""
    blocks = {p.layer: p.block for p in layout.places.values() if p.part == "experts" and p.layer is not None}
    if not blocks:
        raise ValueError("the models have no experts: use swap_layers or merge")
    if layout.stack is None or len(blocks) != len(layout.blocks):
        raise ValueError("several lists of layers have experts: use merge")
    moved: dict[str, set[int]] = {}
    for layer, experts in selection.items():
        ids = set(experts)
        if not 0 <= layer < len(layout.moe_layers):
            raise ValueError(f"there is no MoE layer {layer}: 0 to {len(layout.moe_layers) - 1}")
        block = blocks[layout.moe_layers[layer]] or ""
        number = layout.num_experts(block)
        if any(not 0 <= expert < number for expert in ids):
            raise ValueError(f"MoE layer {layer} has experts 0 to {number - 1}, not {sorted(ids)}")
        moved[block] = ids
    return moved


def _with_rows(kept: Tensor, given: Tensor, experts: list[int], number: int) -> Tensor:
    """``kept`` with the entries of some experts from ``given``; entries lie on the first axis that long, [E, ...]
    or [1, E]."""
    axis = next((axis for axis, size in enumerate(kept.shape) if size == number), None)
    if axis is None:
        return kept  # one value for all experts, such as a scale
    index = torch.tensor(experts)
    return kept.index_copy(axis, index, given.index_select(axis, index))

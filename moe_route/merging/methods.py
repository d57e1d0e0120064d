"""``merge``: several fine-tunes of one base become one model, expert by expert."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from moe_route.merging.checkpoint import Checkpoint
from moe_route.merging.layout import Layout
from moe_route.merging.merged import Merged
from moe_route.merging.pcb import pcb_scores
from moe_route.merging.refusals import check_alike, check_descent
from moe_route.merging.swapping import Source, opened
from moe_route.merging.widen import widen

__all__ = ["METHODS", "Method", "merge"]

Method: TypeAlias = Literal["linear", "task_arithmetic", "ties", "dare", "pcb", "widen"]
# Method -> options that it reads, with their defaults; None for weights is one share each.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weights": None},
    "task_arithmetic": {"weights": None, "density": 1.0},
    "ties": {"weights": 1.0, "density": 0.2},
    "dare": {"weights": None, "density": 0.5, "seed": 0},
    "pcb": {"ratio": 0.1, "scale": 1.0},
    "widen": {},
}
_Part: TypeAlias = Callable[[str, Tensor, Tensor], Tensor]  # name, base, differences [models, ...] -> merged


def merge(
    models: Sequence[Source],
    *,
    base: Source | None = None,
    method: Method = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    ratio: float | None = None,
    scale: float | None = None,
    seed: int | None = None,
) -> Merged:
    """Merge fine-tunes of one base.

    Weighted sums work on single values. The other methods but ``"pcb"`` work on each matrix of each expert by itself,
    gate and up apart, whatever the layout of the checkpoint. Products are computed in float32; the result has the
    dtypes of the base (of the first model, for ``"linear"``). Tensors that are not floating point come from the base.

    Args:
        models: models, state dicts or folders.
        base: the model that all were trained from. Needed by every method but ``"linear"``, which takes none.
        method: ``"linear"``, the weighted sum of the models; ``"task_arithmetic"``, the base plus the weighted sum of
            the differences, of which each keeps the share ``density`` of largest size (arXiv 2212.04089, 2110.07560);
            ``"ties"`` (2306.01708) and ``"dare"`` (2311.03099), whose functions are PEFT's; ``"pcb"`` (2410.02396);
            ``"widen"`` (2408.03092).
        weights: one per model, for the first four methods. By default 1 for ``"ties"``, and otherwise 1 / models.
        density: share of each difference that is kept, by default 1 for ``"task_arithmetic"``, 0.2 for ``"ties"``
            (largest), 0.5 for ``"dare"`` (drawn at random).
        ratio: share of the parameters that ``"pcb"`` keeps, by default 0.1.
        scale: factor of the merged difference of ``"pcb"``, by default 1.
        seed: of the drawing of ``"dare"``, by default 0.

    Raises ``ValueError`` for an option that the method does not read, for models that cannot be merged and for a base
    that a model was not trained from; ``ImportError`` without PEFT.
    """
    given = {"weights": weights, "density": density, "ratio": ratio, "scale": scale, "seed": seed}
    options = _options(method, {name: value for name, value in given.items() if value is not None}, len(models))
    if (base is None) != (method == "linear"):
        raise ValueError(
            'method="linear" takes no base: use "task_arithmetic"'
            if base is not None
            else f'method="{method}" merges differences: name base=, the model that all were trained from'
        )
    checkpoints = [opened(model) for model in models]
    start = checkpoints[0] if base is None else opened(base)
    check_alike([start, *checkpoints])
    for checkpoint in checkpoints:
        check_descent(checkpoint, start)
    # A sum needs no experts told apart, so it also runs where the layout does not tell them apart.
    layout = None if method == "linear" or (method == "task_arithmetic" and options["density"] == 1) else Layout(start)
    part = _parts(method, options, start, checkpoints)

    def read(name: str) -> Tensor:
        origin = start.read(name)
        if not origin.is_floating_point():
            return origin
        before = origin.float()
        after = [checkpoint.read(name).float() for checkpoint in checkpoints]
        merged = torch.empty_like(before, memory_format=torch.contiguous_format)
        views = [
            [(None, "", tensor)] if layout is None else layout.matrices(name, tensor)
            for tensor in (before, merged, *after)
        ]
        for number, ((expert, kind, old), (_, _, out), *new) in enumerate(zip(*views, strict=True)):
            values = torch.stack([view for _, _, view in new])
            out.copy_(part(f"{name} {expert} {kind} {number}", old, values if base is None else values - old))
        return merged.to(origin.dtype)

    sources = {f"model {number}": checkpoint for number, checkpoint in enumerate(checkpoints)}
    if base is not None:
        sources["base"] = start
    return Merged(sources, read, {"function": "merge", "method": method, **options}, start)


def _options(method: str, given: dict[str, Any], models: int) -> dict[str, Any]:
    """The options of a method; refuses a method or an option that is not known, and values out of range."""
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    if not models:
        raise ValueError("there is nothing to merge: give at least one model")
    foreign = sorted(given.keys() - METHODS[method].keys())
    if foreign:
        known = ", ".join(METHODS[method]) or "none"
        raise ValueError(f'method="{method}" does not read {", ".join(foreign)}; its options: {known}')
    options = {**METHODS[method], **given}
    if "weights" in options:
        weights = options["weights"]
        shares = [1 / models] * models if weights is None else [weights] * models if weights == 1.0 else list(weights)
        if len(shares) != models:
            raise ValueError(f"{len(shares)} weights for {models} models: give one for each")
        options["weights"] = [float(share) for share in shares]
    for name in ("density", "ratio"):
        if name in options and not 0 < options[name] <= 1:
            raise ValueError(f"{name}={options[name]}: a share is above 0 and at most 1")
    return options


def _parts(method: str, options: dict[str, Any], base: Checkpoint, models: list[Checkpoint]) -> _Part:
    """The function that merges one matrix."""
    if method == "widen":
        return lambda name, old, differences: widen(old, differences)
    if method == "pcb":
        scores = pcb_scores(lambda: _differences(base, models), options["ratio"])

        def compete(name: str, old: Tensor, differences: Tensor) -> Tensor:
            merged = scores.merge(differences.reshape(len(differences), -1)).reshape(old.shape)
            return old + options["scale"] * merged

        return compete
    weights = torch.tensor(options["weights"])
    if method == "linear":
        return lambda name, old, values: torch.tensordot(weights, values, 1)
    if method == "task_arithmetic" and options["density"] == 1:
        return lambda name, old, differences: old + torch.tensordot(weights, differences, 1)
    return _of_peft(method, weights, options["density"], options.get("seed", 0))


def _of_peft(method: str, weights: Tensor, density: float, seed: int) -> _Part:
    try:
        from peft.utils import merge_utils
    except ImportError as error:
        raise ImportError(f"this merge ({method}) uses functions of PEFT: pip install 'moe-route[train]'") from error

    def pruned(name: str, old: Tensor, differences: Tensor) -> Tensor:
        tensors = list(differences)
        if method == "ties":
            merged = merge_utils.ties(tensors, weights, density)
        elif method == "dare":
            # The name seeds the drawing, so that the result does not depend on the order in which tensors are read.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                merged = merge_utils.dare_linear(tensors, weights, density)
        else:
            merged = merge_utils.magnitude_prune(tensors, weights, density)
        return old + merged

    return pruned


def _differences(base: Checkpoint, models: list[Checkpoint]) -> Iterator[Tensor]:
    """float32 [models, n] of each tensor."""
    for name in base.names:
        before = base.read(name)
        if before.is_floating_point() and before.numel():
            yield torch.stack([(model.read(name).float() - before.float()).reshape(-1) for model in models])

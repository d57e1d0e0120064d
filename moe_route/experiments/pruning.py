"""Pruning: the loss of a model by the share of experts that it keeps, and a pruned model as a smaller checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_route.analysis.effects import paired_difference
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.pruning import CRITERIA, prune
from moe_route.analysis.result import Result
from moe_route.base.files import check_new_folder, new_folder
from moe_route.base.identity import checkpoint_of, identity_of
from moe_route.base.table import Table
from moe_route.data.batches import EncodedTexts, Text
from moe_route.experiments.text_run import TextRun
from moe_route.modules.intercept import modeling_of
from moe_route.recording import RoutingStatistics
from moe_route.routed import RoutedModel
from moe_route.routers.discovery import RouterInfo, find_routers
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.lines import KeptRuns
from moe_route.steering import ExpertSelection, Plan, PlanError, PlanModel

# Names under which configurations hold the number of experts.
_SIZES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass(frozen=True, eq=False, repr=False)
class PruningCurve(Result, derived=("increase",)):
    """Loss in nats per token by criterion, share of experts kept, and group; it is exact for the texts that ran.

    Attributes:
        loss: float64 [C, K, G], with the other experts forbidden.
        low, high: float64 [C, K, G], 95 % interval of ``loss - base`` for other texts; NaN for a single text.
        base: float64 [G], loss of the whole model.
        criteria, keep, groups: the axes.
        texts: int64 [G], number of texts per group.
    """

    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    base: np.ndarray
    criteria: tuple[str, ...]
    keep: tuple[float, ...]
    groups: tuple[str, ...]
    texts: np.ndarray

    @property
    def increase(self) -> np.ndarray:
        """Loss minus that of the whole model, float64 [C, K, G]."""
        return self.loss - self.base

    def columns(self) -> dict[str, Any]:
        """``criterion``, share kept (``keep``), ``group``, ``loss``, ``increase``, and its ``low`` and ``high``."""
        measured = {"loss": self.loss, "increase": self.increase, "low": self.low, "high": self.high}
        return self.over("criterion keep group", measured)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {"unit": "nats per token", **super().to_dict()}

    def tables(self) -> list[Table]:
        whole = [["(whole)", 1.0, *map(float, self.base)]]
        rows = [
            [criterion, share, *map(float, self.loss[c, k])]
            for c, criterion in enumerate(self.criteria)
            for k, share in enumerate(self.keep)
        ]
        return [Table(("criterion", "kept", *self.groups), [*whole, *rows], "loss in nats per token")]


def pruning_curve(
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    statistics: RoutingStatistics,
    *,
    criteria: Sequence[str] = ("reap", "frequency", "random"),
    keep: Sequence[float] = (0.75, 0.5, 0.25),
    group: str | None = None,
    reference: str | None = None,
    allocation: str = "uniform",
    seed: int = 0,
    routed: RoutedModel | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
    kept: KeptRuns | None = None,
) -> PruningCurve:
    """Measure the loss of texts while experts are pruned, by criterion and by share kept [arXiv 2605.28042].

    The experts of ``analysis.prune`` are forbidden (``Plan.forbid``), which gives the losses of the exported model
    (``export_pruned``). Measure on other texts than those of ``statistics``.

    Args:
        criteria, group, reference, allocation, seed: as in ``analysis.prune``; ``reference`` is for "difference".
        keep: shares of experts to keep.
        routed: the attached model, if it is attached already.
        batch_size, max_length: as in ``LanguageModel.losses``.
        progress: show a bar per run.
        kept: as in ``knockout``.

    Raises ``AnalysisError`` for what ``prune`` refuses, before the model runs.
    """
    unknown = [name for name in criteria if name not in CRITERIA]
    if unknown or not criteria or not keep:
        raise AnalysisError(f"criteria are some of {', '.join(CRITERIA)}, and keep some shares; not {list(criteria)}")
    with TextRun(language_model, texts, routed, batch_size, max_length, progress, kept) as run:
        spec = run.routed.routers[0].spec
        options: dict[str, Any] = {"group": group, "allocation": allocation, "seed": seed}
        options |= {"n_group": spec.groups, "topk_group": spec.top_groups}
        dropped = [
            prune(
                statistics,
                keep=share,
                criterion=criterion,  # type: ignore[arg-type]
                reference=reference if criterion == "difference" else None,
                **options,
            )
            for criterion in criteria
            for share in keep
        ]
        plans = [None, *(Plan.forbid(selection) if selection else None for selection in dropped)]
        losses = [run.losses(plan, name) for name, plan in zip(["whole", *_names(criteria, keep)], plans, strict=True)]
    return _curve(np.stack(losses), run, criteria, keep)


def _names(criteria: Sequence[str], keep: Sequence[float]) -> list[str]:
    return [f"{criterion}, {share:.0%}" for criterion in criteria for share in keep]


def _curve(nats: np.ndarray, run: TextRun, criteria: Sequence[str], keep: Sequence[float]) -> PruningCurve:
    """The curve from summed losses [1 + C * K, texts], of which the first are those of the whole model."""
    groups = tuple(dict.fromkeys(run.groups))
    labels = np.asarray(run.groups, dtype=object)
    shape = (len(criteria), len(keep), len(groups))
    loss, low, high = np.empty((3, len(nats) - 1, len(groups)))
    base, texts = np.empty(len(groups)), np.empty(len(groups), np.int64)
    for g, group in enumerate(groups):
        natural, *pruned = nats[:, labels == group]
        tokens = run.tokens[labels == group]
        base[g], texts[g] = natural.sum() / tokens.sum(), len(tokens)
        for at, steered in enumerate(pruned):
            change = paired_difference(steered, natural, tokens)
            loss[at, g], low[at, g], high[at, g] = base[g] + change.value, change.low, change.high
    loss, low, high = (values.reshape(shape) for values in (loss, low, high))
    return PruningCurve(loss, low, high, base, tuple(criteria), tuple(keep), groups, texts)


class CannotExportError(ValueError):
    """Raised for a selection or a model that cannot be written as a smaller checkpoint; names the fix."""


def export_pruned(
    model: nn.Module,
    selection: Mapping[int, Iterable[int]],
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
) -> None:
    """Write ``model`` without the experts of ``selection`` to ``folder``, for ``from_pretrained``.

    The tensors of these experts and their rows in the routers (gate matrix, biases) are cut, and the configuration gets
    the new number of experts. Routing weights follow as usual from the remaining scores, so the outputs are those of
    the whole model under ``Plan.forbid(selection)``, up to the rounding of other matrix shapes.

    Args:
        model: a model of transformers in memory, attached to or not; it is not changed.
        selection: layer -> experts to drop (``analysis.prune``).
        folder: a new or empty folder. It appears when everything is written: an export that is stopped leaves none.
        tokenizer: saved beside the model, if given.

    A configuration has one number of experts, so every layer must drop equally many, and every router group of a
    group-limited router too. Raises ``CannotExportError`` otherwise, and for layouts that cannot be cut: quantized or
    offloaded weights, experts without a tensor axis of their own. Raises it too for an ``ExpertSelection`` that was
    made for another model or checkpoint: ``dict(selection)`` lifts that check.
    """
    check_new_folder(folder)
    if modeling_of(model) is None or not hasattr(model, "save_pretrained"):
        raise CannotExportError(f"{type(model).__name__} is not a model of transformers, so it has no format to write")
    routers = find_routers(model)
    _check_model(model, selection, routers)
    kept = _kept_experts(routers, selection)
    config, whole = _smaller_config(model, routers, len(kept[0]))
    state = dict(model.state_dict())
    for router, experts in zip(routers, kept, strict=True):
        for name, tensor in _tensors_of(model, router, whole):
            axis = 0 if tensor.shape[0] == whole else 1
            state[name] = tensor.index_select(axis, torch.tensor(experts, device=tensor.device))
    with torch.device("meta"):
        smaller: Any = type(model)(config)
    try:
        smaller.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CannotExportError(
            f"{type(model).__name__} of {len(kept[0])} experts has other tensors than those that were cut "
            f"({str(error).splitlines()[-1].strip()}): it cannot be exported; steer with Plan.forbid(selection)"
        ) from error
    smaller.tie_weights()
    smaller.generation_config = getattr(model, "generation_config", None)
    with new_folder(folder) as unfinished:
        smaller.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)


def _check_model(model: nn.Module, selection: Mapping[int, Iterable[int]], routers: Sequence[RouterInfo]) -> None:
    """Refuse a selection that was made for another model, or for other weights."""
    if not isinstance(selection, ExpertSelection):
        return
    identity, made = identity_of(model), selection.model
    known = made.weights_hash or made.router_hash
    hashes = checkpoint_of(model, [router.weights for router in routers]) if known else {}
    live = PlanModel.of_recording({"model": identity | hashes}, tuple(router.num_experts for router in routers))
    if made.config_hash == live.config_hash:  # whatever either is called
        made, live = replace(made, name=None), replace(live, name=None)
    try:
        made.merged(live)
    except PlanError as error:
        raise CannotExportError(
            f"the selection was {str(error).partition(': make')[0]}: prune by statistics of this model, or lift the "
            "check with dict(selection), `moe-route prune SELECTION --any-model --out FOLDER`"
        ) from None


def _kept_experts(routers: list[RouterInfo], selection: Mapping[int, Iterable[int]]) -> list[list[int]]:
    """The experts that stay in each layer."""
    dropped = {layer: set(experts) for layer, experts in selection.items()}
    for layer, experts in dropped.items():
        if layer >= len(routers) or any(not 0 <= expert < routers[layer].num_experts for expert in experts):
            raise CannotExportError(
                f"the model lacks experts {sorted(experts)} in layer {layer}: prune with its statistics"
            )
    kept = [[e for e in range(r.num_experts) if e not in dropped.get(r.layer, ())] for r in routers]
    sizes = {len(experts) for experts in kept}
    if len(sizes) != 1:
        raise CannotExportError(
            f"layers would keep {', '.join(map(str, sorted(sizes)))} experts, and a configuration has one number for "
            'all: prune with allocation="uniform", or steer with Plan.forbid(selection)'
        )
    for router, remaining in zip(routers, kept, strict=True):
        _refuse_layer(router, remaining)
    return kept


def _refuse_layer(router: RouterInfo, kept: list[int]) -> None:
    if len(kept) < router.top_k:
        raise CannotExportError(
            f"layer {router.layer} would keep {len(kept)} experts, and its tokens choose {router.top_k}"
        )
    if router.family.chosen_by != "logits" or router.role:
        what = "chooses by token id" if router.family.chosen_by != "logits" else f"is one of a {router.role} part"
        raise CannotExportError(
            f"{type(router.module).__name__} of layer {router.layer} {what}, which cannot be cut: steer with "
            "Plan.forbid(selection)"
        )
    groups = router.spec.groups
    if groups > 1:
        size = router.num_experts // groups
        counts = [sum(first <= e < first + size for e in kept) for first in range(0, router.num_experts, size)]
        if len(set(counts)) != 1:
            raise CannotExportError(
                f"the router groups of layer {router.layer} would keep {', '.join(map(str, counts))} experts, and they "
                f"must be equally many: prune(..., n_group={groups}, topk_group={router.spec.top_groups})"
            )


def _smaller_config(model: Any, routers: list[RouterInfo], kept: int) -> tuple[Any, int]:
    """A copy of the configuration with ``kept`` experts, and the number of experts before."""
    sizes = {router.num_experts for router in routers}
    whole = sizes.pop()
    if sizes:
        raise CannotExportError("its layers have different numbers of experts: steer with Plan.forbid(selection)")
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    names = [name for name in _SIZES if getattr(text, name, None) == whole]
    if not names:
        raise CannotExportError(
            f"{type(text).__name__} holds no number of experts ({whole}) under {', '.join(_SIZES)}: steer with "
            "Plan.forbid(selection)"
        )
    for name in names:
        setattr(text, name, kept)
    return config, whole


def _tensors_of(model: nn.Module, router: RouterInfo, whole: int) -> Iterable[tuple[str, Tensor]]:
    """Names and tensors of one layer with an entry per expert: [E, ...], or [1, E] in a router."""
    names = {id(module): name for name, module in model.named_modules()}
    experts = next((o._modules["experts"] for o in (router.module, router.block) if o._modules.get("experts")), None)
    if (
        experts is None
        or isinstance(experts, (nn.ModuleList, nn.ModuleDict))
        or next(experts.parameters(), None) is None
    ):
        raise CannotExportError(
            f"the experts of {type(router.block).__name__} are not tensors with an axis of experts: steer with "
            "Plan.forbid(selection)"
        )
    for module, recurse in ((experts, True), (router.module, True), (router.block, False)):
        if module is router.block and module is router.module:
            continue
        prefix = names[id(module)]
        for name, tensor in _own(module, recurse).items():
            full = f"{prefix}.{name}" if prefix else name
            _refuse_tensor(full, tensor)
            if module is experts and tensor.shape[:1] != (whole,):
                raise CannotExportError(
                    f"{full} of {type(experts).__name__} has shape {list(tensor.shape)}, whose first axis is not the "
                    f"{whole} experts: steer with Plan.forbid(selection)"
                )
            if tensor.shape[:1] == (whole,) or tensor.shape == (1, whole):
                yield full, tensor


def _own(module: nn.Module, recurse: bool) -> dict[str, Tensor]:
    """Saved tensors of a module, with or without those of the modules inside it."""
    return {name: tensor for name, tensor in module.state_dict().items() if recurse or "." not in name}


def _refuse_tensor(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.is_floating_point():
        what = "offloaded" if tensor.is_meta else f"a {type(tensor).__name__} of {tensor.dtype}"
        raise CannotExportError(f"{name} is {what}: load the model in memory in floating point to export it")

"""What experts add, the few that a model cannot do without, and which to prune, by how little they are used or add."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np

from moe_route.analysis.experts import expert_difference
from moe_route.analysis.inputs import AnalysisError, group_index, pick_groups, selection
from moe_route.analysis.measures import places, ratio
from moe_route.analysis.resampling import ResampledStatistics, resampled_statistics
from moe_route.analysis.result import Result, by_depth, mean_of_seen, plain
from moe_route.base.table import Table, number_of
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection, PlanModel
from moe_route.steering.selection import random_permutation

# ---- saliency: how much the output of an expert adds, on average, to the tokens that are routed to it

_SHOWN = 3  # experts per layer at either end of the table


@dataclass(frozen=True, eq=False, repr=False)
class Saliency(Result, hidden=("model",)):
    """Saliency of every expert, in units of the norm of the hidden states.

    Attributes:
        values: float64 [G, L, E]; NaN for experts that no token of the group chose, and for padding experts.
        tokens: int64 [G, L, E], number of tokens that chose the expert.
        groups: names of the groups, or ("all groups",) for all of them together.
        layers: names of the layers.
        num_experts: experts of each layer.
        model: the model, which selections inherit.
    """

    values: Annotated[np.ndarray, "group layer expert as saliency"]
    tokens: Annotated[np.ndarray, "group layer expert"]
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    model: PlanModel = field(default_factory=PlanModel)

    def least(self, number: int, group: str | None = None) -> ExpertSelection:
        """Select the ``number`` least salient experts of each layer; experts that no token chose come first."""
        return self._select(number, group, "least", np.nan_to_num(-self._of(group), nan=np.inf))

    def most(self, number: int, group: str | None = None) -> ExpertSelection:
        """Select the ``number`` most salient experts of each layer."""
        return self._select(number, group, "most", np.nan_to_num(self._of(group), nan=-np.inf))

    def _of(self, group: str | None) -> np.ndarray:
        """Values [L, E] of one group."""
        if group is None and len(self.groups) != 1:
            raise AnalysisError(f"name the group: there is saliency of {', '.join(self.groups)}")
        if group is not None and group not in self.groups:
            raise AnalysisError(f"no group {group!r}: there is saliency of {', '.join(self.groups)}")
        return self.values[0 if group is None else self.groups.index(group)]

    def _select(self, number: int, group: str | None, which: str, order: np.ndarray) -> ExpertSelection:
        if not 1 <= number <= min(self.num_experts):
            raise AnalysisError(f"number must be from 1 to {min(self.num_experts)} experts per layer, not {number}")
        chosen = places(np.where(real_experts(self.num_experts, order.shape[1]), order, -np.inf)) < number
        values = np.nan_to_num(self._of(group))
        experts_of = {
            layer: {int(expert): float(values[layer, expert]) for expert in np.flatnonzero(chosen[layer])}
            for layer in range(len(chosen))
        }
        text = f"{which} salient experts{'' if group is None else f' of {group}'}"
        return ExpertSelection(
            experts_of, scores=experts_of, description=text, num_experts=self.num_experts, model=self.model
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None); the values are the ``saliency``."""
        content = super().to_dict()
        return {"saliency": content.pop("values"), **content}

    def tables(self) -> list[Table]:
        means = mean_of_seen(self.values, 2)[0]
        shown = [by_depth(self.groups, means, title="saliency, mean over the experts that were chosen")]
        for group, values in zip(self.groups, self.values, strict=True):
            rows = [[layer, *_ends(of_layer)] for layer, of_layer in enumerate(values)]
            shown.append(Table(("layer", "most salient", "least salient"), rows, title=f"experts of {group}"))
        return shown


def _ends(values: np.ndarray) -> tuple[str, str]:
    """The experts with the largest and the smallest values, in words."""
    seen = [int(expert) for expert in np.argsort(-values, kind="stable") if not np.isnan(values[expert])]
    shown = [f"{expert} ({values[expert]:.3f})" for expert in seen]
    return ", ".join(shown[:_SHOWN]) or "-", ", ".join(shown[::-1][:_SHOWN]) or "-"


def saliency(
    statistics: RoutingStatistics,
    *,
    groups: Sequence[str] | str | None = None,
    pool: bool = False,
) -> Saliency:
    """Measure the saliency of every expert, as REAP does [arXiv 2510.13999, eq. 8].

    ``S_e = mean over the tokens t routed to e of g_e(t) * ||f_e(x_t)||``, with the routing weight g_e that the experts
    receive and the Euclidean norm of the expert's output. It needs ``record(expert_outputs=True)``.

    Args:
        groups: the groups to use; by default all.
        pool: join the groups into one, "all groups".

    Raises ``AnalysisError`` for unknown or empty groups, ``ValueError`` if expert outputs were not recorded.
    """
    names = pick_groups(statistics, groups)
    rows = [group_index(statistics, name) for name in names]
    sums = statistics.expert_outputs("weighted_norm")[rows]
    tokens = statistics.token_sum("counts")[rows]
    if pool:
        sums, tokens, names = sums.sum(0, keepdims=True), tokens.sum(0, keepdims=True), ("all groups",)
    values = ratio(sums, tokens)
    sizes = tuple(statistics.num_experts)
    model = PlanModel.of_recording(statistics.metadata, sizes)
    return Saliency(values, tokens, names, tuple(statistics.layers), sizes, model)


def real_experts(num_experts: Sequence[int], width: int) -> np.ndarray:
    """bool [L, E]: false for the padding of layers with fewer experts than the widest."""
    return np.arange(width) < np.asarray(num_experts)[:, None]


# ---- super experts: the few whose outputs hold the largest activations of the model


@dataclass(frozen=True, eq=False, repr=False)
class SuperExperts(Result):
    """The n super experts, by falling peak.

    Attributes:
        selection: the experts; their scores are the peaks.
        layer, expert: int64 [n].
        peak: float64 [n], largest absolute element of the expert's output.
        first: float64 [n], share of the first tokens of all sequences that chose the expert.
        threshold: an expert is super if its peak is above this.
        largest: the largest peak of the model.
    """

    selection: ExpertSelection
    layer: np.ndarray
    expert: np.ndarray
    peak: np.ndarray
    first: np.ndarray
    threshold: float
    largest: float

    def __len__(self) -> int:
        return len(self.layer)

    def columns(self) -> dict[str, Any]:
        """``layer``, ``expert``, ``peak`` and ``first`` of each super expert."""
        return {"layer": self.layer, "expert": self.expert, "peak": self.peak, "first": self.first}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        columns = self.columns()
        rows = zip(*map(plain, columns.values()), strict=True)
        experts = [dict(zip(columns, row, strict=True)) for row in rows]
        return {"super_experts": experts, "threshold": self.threshold, "largest": self.largest}

    def tables(self) -> list[Table]:
        rows = list(zip(*(column.tolist() for column in self.columns().values()), strict=True))
        note = f"peak above {self.threshold:.3f}; the largest of the model is {self.largest:.3f}"
        return [Table(("layer", "expert", "peak", "share of first tokens"), rows, "super experts", note)]


def super_experts(
    statistics: RoutingStatistics,
    *,
    quantile: float = 0.995,
    share: float = 0.1,
    groups: Sequence[str] | str | None = None,
) -> SuperExperts:
    """Find the super experts of a model [arXiv 2507.23279, eq. 6].

    The peak of an expert is the largest absolute element of its output over all tokens routed to it. An expert is super
    if its peak is above the ``quantile`` of the peaks of all experts, and above ``share`` of the largest peak. Super
    experts serve the first tokens (attention sinks) of a text. Without them a model fails on any text, so controls
    should leave them out (``plan.random(seed, exclude=super_experts(...).selection)``). It needs
    ``record(expert_outputs=True)``.

    Args:
        quantile: the paper's is 0.995.
        share: the paper's is a tenth.
        groups: the groups whose tokens count; by default all.

    Experts that no token chose have peak 0. Raises ``AnalysisError`` for a quantile or share outside [0, 1) and for
    outputs that are all zero or not finite, ``ValueError`` if expert outputs were not recorded.
    """
    for name, value in (("quantile", quantile), ("share", share)):
        if not 0 <= value < 1:
            raise AnalysisError(f"{name} must be at least 0 and below 1, not {value}")
    rows = [group_index(statistics, name) for name in pick_groups(statistics, groups)]
    peak = statistics.expert_outputs("peak")[rows].max(0)
    first = statistics.expert_outputs("first")[rows].sum(0)
    if not np.isfinite(peak).all() or not peak.any():
        raise AnalysisError("the peaks of expert outputs are all zero or not finite: record texts the model can read")
    peaks = peak[real_experts(statistics.num_experts, peak.shape[1])]
    threshold = max(float(np.quantile(peaks, quantile)), share * float(peaks.max()))
    sequences = first.sum(1, keepdims=True) / np.asarray(statistics.top_k)[:, None]
    shares = ratio(first, sequences, empty=0.0)
    text = f"super experts (peak above {threshold:.3g})"
    experts = selection(peak > threshold, peak, statistics, threshold=threshold, description=text)
    layer, expert = np.nonzero(peak > threshold)
    order = np.argsort(-peak[layer, expert], kind="stable")
    layer, expert = layer[order], expert[order]
    columns = (layer, expert, peak[layer, expert], shares[layer, expert])
    return SuperExperts(experts, *columns, threshold, float(peaks.max()))


# ---- the experts to prune

Criterion = Literal["frequency", "difference", "reap", "random"]
Allocation = Literal["uniform", "global"]
CRITERIA = ("frequency", "difference", "reap", "random")


@dataclass(frozen=True)
class _Limits:
    """How many experts of each router group must stay.

    Attributes:
        sizes: int [L], experts per layer.
        least: int [L], experts that must stay in each router group.
        n_group: number of router groups of a layer, which divide its experts evenly.
    """

    sizes: np.ndarray
    least: np.ndarray
    n_group: int

    @classmethod
    def of(cls, sizes: Sequence[int], top_k: Sequence[int], n_group: int, topk_group: int) -> _Limits:
        """The limits of group-limited routers: the chosen groups together hold k experts, and a group is scored by two.

        Without groups, k experts stay per layer.
        """
        if n_group < 1 or not 1 <= topk_group <= n_group or any(size % n_group for size in sizes):
            raise AnalysisError(
                f"n_group={n_group} and topk_group={topk_group} do not fit layers of {sorted(set(sizes))} experts: "
                "give the values of the model's configuration"
            )
        least = [max(math.ceil(k / topk_group), 2 if n_group > 1 else 1) for k in top_k]
        return cls(np.asarray(sizes), np.asarray(least), n_group)


def prune(
    statistics: RoutingStatistics,
    *,
    keep: float,
    criterion: Criterion = "reap",
    group: str | None = None,
    reference: str | None = None,
    allocation: Allocation = "uniform",
    seed: int = 0,
    protect: Mapping[int, Sequence[int]] | None = None,
    n_group: int = 1,
    topk_group: int = 1,
) -> ExpertSelection:
    """Select the experts to drop. Give the result to ``Plan.forbid`` or to ``experiments.export_pruned``.

    The experts with the smallest importance are dropped. A layer never keeps fewer experts than its top-k.

    Args:
        keep: share of the experts to keep, in (0, 1]. The number is rounded up.
        criterion: importance of an expert. "frequency": tokens that chose it, divided by all tokens. "difference": its
            frequency in ``group`` minus that in ``reference`` [arXiv 2510.04694, eq. 3, over tokens]. "reap": its
            saliency [arXiv 2510.13999], 0 if no token chose it. "random": a permutation drawn with ``seed``.
        group: the group whose tokens count; by default all of them together.
        reference: the group to subtract, for "difference" only.
        allocation: "uniform" keeps the same share in every layer. "global" ranks the experts of all layers together,
            so some layers keep more [arXiv 2605.28042]; saliency is first divided by its sum over the layer, since the
            norm of hidden states grows with depth.
        protect: experts that are never dropped, such as ``super_experts(...).selection``.
        n_group, topk_group: the router groups of a group-limited router (DeepSeek-V3), as its configuration names them.
            Each group then keeps enough experts to be chosen as before; with "uniform", every group keeps the same
            number.

    Ties keep the expert with the lower index. Scores of the selection are the importances. Raises ``AnalysisError`` for
    values out of range, unknown or empty groups, and a share that is too small for the top-k or the protected experts.
    """
    names = () if group is None else (group,)
    values = _importance(statistics, names, criterion, reference, seed)
    limits = _Limits.of(statistics.num_experts, statistics.top_k, n_group, topk_group)
    kept = _kept(values, keep, allocation, limits, protect, criterion == "reap")
    dropped = real_experts(statistics.num_experts, values.shape[1]) & ~kept
    of = "" if group is None else f" of {group}"
    text = f"pruned to {keep:.0%} by {criterion}{of}{f' (seed {seed})' if criterion == 'random' else ''}"
    return selection(dropped, values, statistics, threshold=None, description=text)


def _importance(
    statistics: RoutingStatistics, groups: Sequence[str], criterion: str, reference: str | None, seed: int
) -> np.ndarray:
    """Importance of every expert, float64 [L, E]."""
    if criterion not in CRITERIA:
        raise AnalysisError(f"no criterion {criterion!r}: use one of {', '.join(CRITERIA)}")
    if (reference is not None) != (criterion == "difference"):
        raise AnalysisError(
            'reference= (--reference) names the group to subtract: criterion="difference" needs it, no other takes it'
        )
    if criterion == "random":
        return _random(statistics, seed)
    if criterion == "reap":
        return np.nan_to_num(saliency(statistics, pool=True, groups=groups or None).values[0])
    if criterion == "difference":
        if not groups:
            raise AnalysisError("name the group= whose experts are to stay")
        given = {"group": groups[0], "baseline_group": reference}
        return np.nan_to_num(expert_difference(statistics, statistics, by="token", **given))
    return _frequency(statistics, groups)


def _frequency(statistics: RoutingStatistics | ResampledStatistics, groups: Sequence[str]) -> np.ndarray:
    """Tokens of these groups (by default all) that chose each expert, divided by all their tokens, float64 [L, E]."""
    rows = [group_index(statistics, name) for name in pick_groups(statistics, groups or None)]
    counts, tokens = statistics.token_sum("counts")[rows].sum(0), statistics.tokens()[rows].sum(0)[:, None]
    return ratio(counts, tokens, empty=0.0)


def _random(statistics: RoutingStatistics, seed: int) -> np.ndarray:
    values = np.zeros((len(statistics.layers), max(statistics.num_experts)))
    for layer, size in enumerate(statistics.num_experts):
        values[layer, :size] = random_permutation(seed, layer, size) / size
    return values


def _kept(
    values: np.ndarray,
    keep: float,
    allocation: str,
    limits: _Limits,
    protect: Mapping[int, Sequence[int]] | None,
    scaled: bool,
) -> np.ndarray:
    """bool [L, E]: the experts to keep."""
    if not 0 < keep <= 1:
        raise AnalysisError(f"keep is a share of the experts, above 0 and at most 1, not {keep}")
    if allocation not in ("uniform", "global"):
        raise AnalysisError(f'allocation must be "uniform" or "global", not {allocation!r}')
    safe = _protected(values.shape, protect, limits)
    order = np.where(safe, np.inf, values)
    if allocation == "uniform":
        return _uniform(order, keep, limits, safe)
    if scaled:
        total = values.sum(1, keepdims=True)
        order = np.where(safe, np.inf, ratio(values, total, empty=0.0))
    return _global(order, keep, limits, safe)


def _protected(shape: tuple[int, ...], protect: Mapping[int, Sequence[int]] | None, limits: _Limits) -> np.ndarray:
    safe = np.zeros(shape, dtype=bool)
    for layer, experts in (protect or {}).items():
        known = 0 <= layer < len(limits.sizes)
        if not known or any(not 0 <= expert < limits.sizes[layer] for expert in experts):
            raise AnalysisError(f"protect names experts of layer {layer} that the model lacks: use its own selection")
        safe[layer, list(experts)] = True
    return safe


def _uniform(order: np.ndarray, keep: float, limits: _Limits, safe: np.ndarray) -> np.ndarray:
    kept = np.zeros(order.shape, dtype=bool)
    for layer, size in enumerate(limits.sizes.tolist()):
        in_group = size // limits.n_group
        number = math.ceil(keep * in_group - 1e-9)
        _refuse_few(number, layer, limits, keep, in_group)
        for first in range(0, size, in_group):
            part = slice(first, first + in_group)
            if safe[layer, part].sum() > number:
                raise AnalysisError(f"layer {layer} keeps {number} experts, fewer than are protected: raise keep")
            kept[layer, first + _largest(order[layer, part], number)] = True
    return kept


def _refuse_few(number: int, layer: int, limits: _Limits, keep: float, size: int) -> None:
    least = int(limits.least[layer])
    if number < least:
        what = f"a router group of layer {layer}" if limits.n_group > 1 else f"layer {layer}"
        raise AnalysisError(
            f"keep={keep:g} leaves {number_of(number, 'expert')} in {what}, and the tokens need {least}: "
            f"keep at least {least / size:.3g}"
        )


def _global(order: np.ndarray, keep: float, limits: _Limits, safe: np.ndarray) -> np.ndarray:
    """The experts that every router group needs, then the best of all layers."""
    kept = safe.copy()
    for layer, size in enumerate(limits.sizes.tolist()):
        in_group = size // limits.n_group
        for first in range(0, size, in_group):
            best = _largest(order[layer, first : first + in_group], int(limits.least[layer]))
            kept[layer, first + best] = True
    number = math.ceil(keep * int(limits.sizes.sum()) - 1e-9)
    if kept.sum() > number:
        raise AnalysisError(
            f"keep={keep:g} leaves {number} experts, and the top-k of all layers (and protected experts) need "
            f"{int(kept.sum())}: raise keep"
        )
    free = real_experts(limits.sizes.tolist(), order.shape[1]) & ~kept
    rest = np.where(free, order, -np.inf).reshape(-1)
    flat = kept.reshape(-1)
    flat[_largest(rest, number - int(kept.sum()))] = True
    return flat.reshape(kept.shape)


def _largest(values: np.ndarray, number: int) -> np.ndarray:
    """Indices of the ``number`` largest values; ties go to the lower index."""
    return np.argsort(-values, kind="stable")[:number]


@dataclass(frozen=True, eq=False, repr=False)
class PruningStability(Result):
    """How stable the kept experts are when other sentences are recorded.

    Attributes:
        kept: float64 [L, E], share of the resamples in which an expert is kept.
        jaccard: float64 [L], mean Jaccard index of the experts kept in a resample and those kept with all items.
        chosen: bool [L, E], the experts kept with all items.
        layers: names of the layers.
        num_experts: experts of each layer.
        items: number of items.
        resamples: number of resamples.
    """

    kept: Annotated[np.ndarray, "layer expert"]
    jaccard: np.ndarray
    chosen: Annotated[np.ndarray, "layer expert"]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    items: int
    resamples: int

    def tables(self) -> list[Table]:
        title = "Jaccard index of the experts kept in a resample and those kept with all items"
        note = f"mean of {self.resamples} resamples of {self.items} items"
        return [by_depth(["kept"], self.jaccard[None], title=title, note=note)]


def pruning_stability(
    statistics: RoutingStatistics,
    *,
    keep: float,
    group: str | None = None,
    allocation: Allocation = "uniform",
    resamples: int = 200,
    seed: int = 0,
    n_group: int = 1,
    topk_group: int = 1,
) -> PruningStability:
    """Measure how much the experts that ``prune`` keeps by frequency depend on the sentences [arXiv 2605.28042].

    Items are drawn with replacement, as in ``stability_selection``, and the experts are chosen again. It needs
    ``record(sequences=True)`` and at least five items in each group. Other arguments are those of ``prune``.

    Raises ``AnalysisError`` without kept sequences, or with too few items.
    """
    names = pick_groups(statistics, group)
    limits = _Limits.of(statistics.num_experts, statistics.top_k, n_group, topk_group)

    def chosen_from(items: RoutingStatistics | ResampledStatistics) -> np.ndarray:
        return _kept(_frequency(items, names), keep, allocation, limits, None, False)

    selected = statistics.select(groups=names)
    samples = [chosen_from(items) for (items,) in resampled_statistics([selected], resamples, seed)]
    drawn, whole = np.stack(samples), chosen_from(statistics)
    jaccard = ((drawn & whole).sum(2) / (drawn | whole).sum(2)).mean(0)
    layers, sizes = tuple(statistics.layers), tuple(statistics.num_experts)
    assert statistics.store is not None
    items = len({item for name in names for item in statistics.store.items(name)})
    return PruningStability(drawn.mean(0), jaccard, whole, layers, sizes, items, resamples)

"""Choose the experts to prune, by how little they are used or add, and measure how stable the choice is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_route.analysis.experts import expert_difference
from moe_route.analysis.inputs import AnalysisError, group_index, pick_groups, selection
from moe_route.analysis.resampled_statistics import ResampledStatistics, resampled_statistics
from moe_route.analysis.result import by_depth, plain
from moe_route.analysis.saliency import real_experts, saliency
from moe_route.recording.frames import data_frame
from moe_route.steering.selection import random_permutation
from moe_route.texttable import ShownAsTables, Table, number_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from moe_route.recording import RoutingStatistics
    from moe_route.steering import ExpertSelection

__all__ = ["CRITERIA", "PruningStability", "prune", "pruning_stability"]

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
    return np.divide(counts, tokens, out=np.zeros(counts.shape), where=tokens > 0)


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
        order = np.where(safe, np.inf, np.divide(values, total, out=np.zeros(values.shape), where=total > 0))
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
class PruningStability(ShownAsTables):
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

    kept: np.ndarray
    jaccard: np.ndarray
    chosen: np.ndarray
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    items: int
    resamples: int

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (layer, expert): ``kept`` and ``chosen``."""
        layers, experts = np.nonzero(real_experts(self.num_experts, self.kept.shape[1]))
        columns = {"layer": layers, "router": np.asarray(self.layers, dtype=object)[layers], "expert": experts}
        return data_frame({**columns, "kept": self.kept[layers, experts], "chosen": self.chosen[layers, experts]})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        sizes = {"items": self.items, "resamples": self.resamples, "num_experts": list(self.num_experts)}
        values = {name: plain(getattr(self, name)) for name in ("kept", "jaccard", "chosen")}
        return {"layers": list(self.layers), **sizes, **values}

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

"""Load of experts: how evenly the choices of a layer are spread, and the committee that takes most of every group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError, pick_groups, selection
from moe_route.analysis.measures import entropy_of, places, ratio
from moe_route.analysis.result import Result, by_depth, mean_of_seen
from moe_route.analysis.u_shape import middle_layers
from moe_route.base.table import Table
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection
from moe_route.steering.layers import show_numbers

_POOLED = "all groups"
LAYER_METRICS = {
    "tokens": "Tokens counted.",
    "normalized_entropy": "Entropy of the load over its maximum: 1 is an even load.",
    "top_share": "Share of the choices that the expert with the largest load takes.",
    "dead_experts": "Experts that no token chose.",
    "steered_share": "Share of the tokens that a rule of a plan reached.",
}
"""What a dashboard shows of a layer: name, behind "moe_route_" -> what it says."""


@dataclass(frozen=True, eq=False, repr=False)
class LoadBalance(Result, hidden=("load",)):
    """Balance of the load by group and layer, float64 [G, L]; NaN where a group has no tokens.

    With ``p_e`` the share of a layer's choices that go to expert e, and E experts:

    Attributes:
        load: ``p``, float64 [G, L, E]; 0 for padding experts.
        entropy: ``H(p) / log E``, in [0, 1]; 1 is an even load. NaN for a layer with one expert.
        max_share: ``max_e p_e``.
        max_violation: ``E * max_e p_e - 1``: by how much the largest load exceeds the mean load, relative to the mean
            (MaxVio, arXiv 2408.15664).
        variation: coefficient of variation, the standard deviation of the loads over their mean.
        dead: share of the experts that were never chosen.
        rare: share of the experts whose load is below ``rare_below`` times the mean load; dead experts are among them.
        effective: ``exp(H(p))``, the number of equally loaded experts with the same entropy.
        groups, layers: names of the axes.
        num_experts: E of each layer.
        rare_below: see ``rare``.
    """

    load: np.ndarray
    entropy: Annotated[np.ndarray, "group layer"]
    max_share: Annotated[np.ndarray, "group layer"]
    max_violation: Annotated[np.ndarray, "group layer"]
    variation: Annotated[np.ndarray, "group layer"]
    dead: Annotated[np.ndarray, "group layer"]
    rare: Annotated[np.ndarray, "group layer"]
    effective: Annotated[np.ndarray, "group layer"]
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    rare_below: float

    def scalars(self, group: str | None = None, *, by_layer: bool = False) -> dict[str, float]:
        """Scalars of one group under the names that training logs use, for a logger.

        ``moe/normalized_entropy_mean`` and ``_min``, ``moe/max_share_mean`` and ``_max``, ``moe/expert_diversity``
        (mean of ``effective / E``) and ``moe/max_vio`` (mean) are over layers. ``moe/dead_expert_frac`` is over the
        experts of all layers. All but ``moe/max_vio`` lie in [0, 1].

        Args:
            group: by default the only one.
            by_layer: add ``moe/normalized_entropy_layer_<n>`` and ``moe/max_share_layer_<n>``.

        Layers without tokens are left out. Raises ``AnalysisError`` if no layer has tokens.
        """
        row = self._row(group)
        sizes = np.asarray(self.num_experts, dtype=np.float64)
        seen = ~np.isnan(self.max_share[row])
        if not seen.any():
            raise AnalysisError(f"group {self.groups[row]!r} has no tokens in this phase: leave phase out")
        entropy, share = self.entropy[row], self.max_share[row]
        scalars = {
            "moe/normalized_entropy_mean": _or_nan(np.mean, entropy),
            "moe/normalized_entropy_min": _or_nan(np.min, entropy),
            "moe/max_share_mean": float(share[seen].mean()),
            "moe/max_share_max": float(share[seen].max()),
            "moe/dead_expert_frac": float((self.dead[row] * sizes)[seen].sum() / sizes[seen].sum()),
            "moe/expert_diversity": float((self.effective[row] / sizes)[seen].mean()),
            "moe/max_vio": float(self.max_violation[row][seen].mean()),
        }
        if by_layer:
            for layer in np.flatnonzero(seen).tolist():
                scalars[f"moe/normalized_entropy_layer_{layer}"] = float(entropy[layer])
                scalars[f"moe/max_share_layer_{layer}"] = float(share[layer])
        return scalars

    def _row(self, group: str | None) -> int:
        names = ", ".join(map(repr, self.groups))
        if group is None and len(self.groups) != 1:
            raise AnalysisError(f"name the group, one of {names}; load_balance(pool=True) joins them")
        if group is not None and group not in self.groups:
            raise AnalysisError(f"no group {group!r} here: one of {names}")
        return 0 if group is None else self.groups.index(group)

    def tables(self) -> list[Table]:
        shown = (
            ("entropy", "entropy of the load / log E"),
            ("max_violation", "largest load over the mean load, minus 1"),
            ("variation", "coefficient of variation of the load"),
            ("dead", "share of experts that were never chosen"),
            ("rare", f"share of experts below {self.rare_below:g} of the mean load"),
        )
        return [by_depth(self.groups, getattr(self, name), title=title) for name, title in shown]


def layer_metrics(
    statistics: RoutingStatistics,
    rows: Sequence[int] | None = None,
    before: RoutingStatistics | None = None,
) -> dict[str, np.ndarray]:
    """The numbers of ``LAYER_METRICS``, float64 [L]; NaN in a layer without tokens, but for the tokens.

    ``rows``: indices of groups that are added up, by default all. ``before``: an earlier state of the same recording,
    whose counts are taken off; all count if a new recording began since.
    """
    rows = range(len(statistics.groups)) if rows is None else rows

    def new(read: Callable[[RoutingStatistics], np.ndarray]) -> np.ndarray:
        now = read(statistics)
        former = np.zeros_like(now) if before is None or read(before).shape != now.shape else read(before)
        added: np.ndarray = (now - former)[rows].sum(0)
        return now[rows].sum(0) if (added < 0).any() else added

    counts = new(lambda one: one.token_sum("counts")).astype(np.float64)
    tokens, steered = (new(lambda one, name=name: one.scalar(name)) for name in ("tokens", "steered"))  # type: ignore[misc]
    seen = tokens > 0
    balance = _balance(ratio(counts, counts.sum(-1, keepdims=True))[None], (_POOLED,), statistics, 0.1)
    values = {
        "normalized_entropy": balance.entropy[0],
        "top_share": balance.max_share[0],
        "dead_experts": balance.dead[0] * np.asarray(statistics.num_experts),
        "steered_share": ratio(steered.astype(np.float64), tokens.astype(np.float64)),
    }
    return {"tokens": tokens.astype(np.float64), **{name: np.where(seen, of, np.nan) for name, of in values.items()}}


def metrics_text(statistics: RoutingStatistics, groups: Sequence[str] = ()) -> str:
    """``layer_metrics`` as Prometheus reads them from a file: over all groups, and of each of ``groups``."""
    shown = [("", layer_metrics(statistics))]
    shown += [(name, layer_metrics(statistics, [statistics.groups.index(name)])) for name in groups]
    lines = []
    for name, words in LAYER_METRICS.items():
        series, kind = (f"moe_route_{name}_total", "counter") if name == "tokens" else (f"moe_route_{name}", "gauge")
        lines += [f"# HELP {series} {words}", f"# TYPE {series} {kind}"]
        for group, values in shown:
            label = group.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            lines += [
                f'{series}{{group="{label}",layer="{layer}"}} {"NaN" if np.isnan(value) else repr(float(value))}'
                for layer, value in zip(statistics.layers, values[name], strict=True)
            ]
    return "\n".join(lines) + "\n"


def load_balance(
    statistics: RoutingStatistics,
    *,
    groups: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    by: Literal["token", "sequence"] = "token",
    pool: bool = False,
    rare_below: float = 0.1,
) -> LoadBalance:
    """Measure how evenly the choices of each group are spread over the experts of each layer.

    Args:
        groups: by default all.
        phase: "prefill", "decode" or both.
        by: the load is a share of all choices ("token"), or the mean over sequences of such shares ("sequence").
        pool: join the groups into one, all choices with equal weight; needs ``by="token"``.
        rare_below: an expert is rare below this share of the mean load.

    Raises ``AnalysisError`` for unknown or empty groups, ``ValueError`` if counts were not recorded.
    """
    if not 0 < rare_below < 1:
        raise AnalysisError(f"rare_below must lie between 0 and 1, not {rare_below}")
    names = pick_groups(statistics, groups, phase=phase)
    rows = [statistics.groups.index(name) for name in names]
    if pool:
        if by != "token":
            raise AnalysisError('pooling adds up choices: leave by at "token"')
        counts = statistics.token_sum("counts", phase)[rows].sum(0, keepdims=True).astype(np.float64)
        total = counts.sum(-1, keepdims=True)
        load = ratio(counts, total)
        names = names if len(names) == 1 else (_POOLED,)
    else:
        load = statistics.mean_distribution("count", phase, by)[rows]
    return _balance(load, names, statistics, rare_below)


def _balance(
    load: np.ndarray, groups: tuple[str, ...], statistics: RoutingStatistics, rare_below: float
) -> LoadBalance:
    sizes = np.asarray(statistics.num_experts, dtype=np.float64)
    real = np.arange(load.shape[-1]) < sizes[:, None]
    seen = ~np.isnan(load).any(-1)
    entropy = entropy_of(load)
    most = np.log(sizes)
    relative = load * sizes[:, None]  # 1 is the mean load

    def share(chosen: np.ndarray) -> np.ndarray:
        return np.where(seen, (chosen & real).sum(-1) / sizes, np.nan)

    return LoadBalance(
        load=load,
        entropy=ratio(entropy, most),
        max_share=load.max(-1),
        max_violation=relative.max(-1) - 1.0,
        variation=np.sqrt(np.where(real, (relative - 1.0) ** 2, 0.0).sum(-1) / sizes),
        dead=share(load == 0),
        rare=share(relative < rare_below),
        effective=np.exp(entropy),
        groups=groups,
        layers=tuple(statistics.layers),
        num_experts=tuple(statistics.num_experts),
        rare_below=float(rare_below),
    )


def _or_nan(reduce: Any, values: np.ndarray) -> float:
    """A reduction of the values that are not NaN; NaN if there are none."""
    kept = values[~np.isnan(values)]
    return float(reduce(kept)) if kept.size else float("nan")


# ---- narrowing: fewer experts in the last layers than in the middle, against a reference language


@dataclass(frozen=True, eq=False, repr=False)
class Narrowing(Result):
    """Effective number of experts ``exp(H(q))`` by group and layer, and how it falls towards the last layers.

    Attributes:
        effective: float64 [group, layer].
        ratio: float64 [group], mean of the last layers over that of the middle.
        against: float64 [group], ``ratio`` over that of the reference; below 1 the group narrows more than it does.
        groups, layers: names of the axes.
        reference: the group of comparison.
        first_layers, middle_layers, last_layers: the layers of each mean.
        kind: of the distributions q.
    """

    effective: Annotated[np.ndarray, "group layer"]
    ratio: Annotated[np.ndarray, "group"]
    against: Annotated[np.ndarray, "group"]
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    reference: str
    first_layers: tuple[int, ...]
    middle_layers: tuple[int, ...]
    last_layers: tuple[int, ...]
    kind: str

    def mean(self, layers: Sequence[int]) -> np.ndarray:
        """float64 [group]: mean effective number of these layers."""
        return mean_of_seen(self.effective[:, list(layers)], 1)[0]

    def tables(self) -> list[Table]:
        parts = (self.first_layers, self.middle_layers, self.last_layers)
        head = ["group", *(f"layers {show_numbers(part)}" for part in parts), "last / middle", "against reference"]
        columns = [*(self.mean(part).tolist() for part in parts), self.ratio.tolist(), self.against.tolist()]
        note = (
            f"against {self.reference}; below 1: fewer experts in the last layers than {self.reference} has. It is no "
            "mark of languages with little text: German and Chinese show it as well"
        )
        rows = [[name, *row] for name, *row in zip(self.groups, *columns, strict=True)]
        return [Table(head, rows, "Effective number of experts, exp(H)", note)]


def narrowing(
    statistics: RoutingStatistics,
    reference: str = "eng_Latn",
    *,
    groups: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    kind: str = "full",
    by: Literal["token", "sequence"] = "token",
) -> Narrowing:
    """Compare how far the experts in use narrow towards the last layers with how far those of a reference do.

    The claim that usage entropy falls sharply in the last layers in some languages, and little in English, is that of
    arXiv 2605.17598. Its definition could not be read: this is ``exp(H(q))`` of the pooled distribution, the mean over
    the last layers (a twelfth) over that of ``middle_layers``.

    Args:
        groups: by default all; the reference is always among them.
        kind: "full", "topk" or "count", see ``RoutingStatistics.mean_distribution``. phase, by: likewise.
    """
    pick_groups(statistics, (reference,), phase=phase)
    names = pick_groups(statistics, groups, phase=phase)
    names = (reference, *(name for name in names if name != reference))
    number = len(statistics.layers)
    edge = max(1, number // 12)
    parts = tuple(range(edge)), middle_layers(number), tuple(range(number - edge, number))
    rows = [statistics.groups.index(name) for name in names]
    q: Any = statistics.mean_distribution(kind, phase, by)[rows]  # type: ignore[arg-type]
    effective = np.exp(entropy_of(q))
    middle, last = (mean_of_seen(effective[:, list(part)], 1)[0] for part in parts[1:])
    share = ratio(last, middle)
    return Narrowing(effective, share, ratio(share, share[0]), names, tuple(statistics.layers), reference, *parts, kind)


# ---- the experts that every group uses most


@dataclass(frozen=True, eq=False, repr=False)
class Committee(Result):
    """Experts that are among the most used of every group, and concentration of the load.

    Attributes:
        experts: the committee: experts among the ``top`` most used of every group. The score is the smallest share of
            the choices that an expert has in any group.
        gini: float64 [G, L], Gini coefficient of the loads: 0 if all experts have the same load, (E - 1) / E if one
            expert has all.
        coverage: float64 [G, L], share of a group's choices that go to the ``top`` experts most used over all groups.
        share: float64 [G, L], share of a group's choices that go to the committee; 0 in a layer without one.
        top: number of experts in each layer that count as most used.
        groups, layers: names of the axes.
        num_experts: experts of each layer.
    """

    experts: ExpertSelection
    gini: np.ndarray
    coverage: np.ndarray
    share: np.ndarray
    top: tuple[int, ...]
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]

    @property
    def sizes(self) -> np.ndarray:
        """int64 [L]: number of committee members per layer."""
        counts = self.experts.counts
        return np.array([counts.get(layer, 0) for layer in range(len(self.layers))], dtype=np.int64)

    def columns(self) -> dict[str, Any]:
        """``members`` of the committee and ``top`` of the layer, ``gini``, ``coverage`` and ``share``."""
        members = np.broadcast_to(self.sizes, self.gini.shape)
        by_group = {name: getattr(self, name) for name in ("gini", "coverage", "share")}
        return self.over("group layer", {"members": members, "top": np.asarray(self.top), **by_group})

    def tables(self) -> list[Table]:
        top = "/".join(map(str, sorted(set(self.top))))
        rows = {
            "members": self.sizes.astype(np.float64),
            "Gini": self.gini.mean(0),
            f"share of the {top} most used": self.coverage.mean(0),
            "share of the committee": self.share.mean(0),
        }
        title = f"experts among the {top} most used of each of {len(self.groups)} groups: {len(self.experts)}"
        return [by_depth(rows, title=title, note="shares, Gini: mean over groups")]

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.experts!r}"


def committee(
    statistics: RoutingStatistics,
    *,
    top: int | None = None,
    groups: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    by: Literal["token", "sequence"] = "token",
) -> Committee:
    """Find the experts that every group uses most: a committee that serves all languages or domains.

    The idea of a domain-invariant "standing committee" is that of arXiv 2601.03425. The measures here are defined in
    :class:`Committee` and are not claimed to be those of the paper.

    Args:
        top: number of most used experts per layer; by default the layer's top-k. Ties go to the lower index; an expert
            that a group never chose is not among them.
        groups: by default all; at least two.
        phase, by: as in ``load_balance``.

    Raises ``AnalysisError`` for fewer than two groups, groups without tokens of the phase, and a ``top`` out of range.
    """
    names = pick_groups(statistics, groups, phase=phase)
    if len(names) < 2:
        raise AnalysisError("a committee is what several groups share: give two groups or more")
    limits = np.asarray(statistics.top_k if top is None else [top] * len(statistics.layers))
    sizes = np.asarray(statistics.num_experts)
    if (limits < 1).any() or (limits > sizes).any():
        raise AnalysisError(f"top must be between 1 and {sizes.min()}, the experts of the smallest layer, not {top}")
    load = statistics.mean_distribution("count", phase, by)[[statistics.groups.index(name) for name in names]]
    known = np.nan_to_num(load)
    most_used = (places(known) < limits[:, None]) & (known > 0)
    members = most_used.all(0)
    overall = places(known.sum(0)) < limits[:, None]
    seen = ~np.isnan(load).any(-1)
    text = f"among the most used experts of {len(names)} groups"
    return Committee(
        experts=selection(members, known.min(0), statistics, threshold=None, description=text),
        gini=_gini(known, sizes, seen),
        coverage=np.where(seen, (known * overall).sum(-1), np.nan),
        share=np.where(seen, (known * members).sum(-1), np.nan),
        top=tuple(limits.tolist()),
        groups=names,
        layers=tuple(statistics.layers),
        num_experts=tuple(statistics.num_experts),
    )


def _gini(load: np.ndarray, sizes: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """float64 [G, L]: mean absolute difference of two experts' loads over twice the mean load; NaN without tokens.

    ``load`` sums to 1 over the experts of a layer. Sorted in increasing order, padding first, the load in place i (from
    0) is weighted by ``2 i + 1 - width``, which counts the padding; ``width - E`` takes it out again.
    """
    width = load.shape[-1]
    weight = 2.0 * np.arange(width) + 1.0 - width
    unevenness = (np.sort(load, axis=-1) * weight).sum(-1) - (width - sizes)
    return np.where(seen, unevenness / sizes, np.nan)

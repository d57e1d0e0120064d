"""Find the experts that a task, a language or a data set uses more than another. Each rule gives selections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_route.analysis.inputs import (
    AnalysisError,
    Frequencies,
    Statistics,
    as_array,
    group_index,
    pick_groups,
    selection,
)
from moe_route.analysis.measures import places
from moe_route.analysis.result import mean_of_seen
from moe_route.steering.layers import as_layers
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    from moe_route.steering import ExpertSelection

__all__ = [
    "LanguageExperts",
    "RiskExperts",
    "entropy_experts",
    "esft_experts",
    "expert_difference",
    "frequency_share_experts",
    "multilingual_experts",
    "risk_experts",
    "task_experts",
]

_ROUNDING = 1e-12  # larger than the rounding error of a float64 sum of shares


def _frequency(given: Frequencies, group: str | None, role: str, phase: str | None, by: str) -> np.ndarray:
    """Mean number of times that a token of the group chooses each expert, float64 [L, E]; arrays average over items."""
    if isinstance(given, Statistics):
        return given.frequency(phase, by)[group_index(given, group, role)]
    values = as_array(given, f"the {role}")
    if values.ndim == 2:
        return values
    return mean_of_seen(values)[0]


def expert_difference(
    task: Frequencies,
    baseline: Frequencies,
    *,
    group: str | None = None,
    baseline_group: str | None = None,
    phase: str | None = None,
    by: str = "sequence",
) -> np.ndarray:
    """Difference in how often tokens choose each expert, task minus baseline [arXiv 2510.04694, eq. 3].

    ``Delta = mean_i(a_i / L_i | task) - mean_j(a_j / L_j | baseline)``, in [-1, 1].

    Args:
        task, baseline: ``RoutingStatistics``, or frequencies [L, E] or [sequence, L, E] (each in [0, 1]).
        group: the group of the task, if the statistics hold several; also that of the baseline unless
            ``baseline_group`` is given.
        phase: "prefill", "decode" or both.
        by: mean over "sequence" (the paper's) or "token".

    Returns float64 [L, E], NaN in layers without tokens, 0 for padding experts.
    """
    ours = _frequency(task, group, "task group", phase, by)
    theirs = _frequency(baseline, _other_group(baseline, group, baseline_group), "baseline group", phase, by)
    if isinstance(task, Statistics) and isinstance(baseline, Statistics) and task.num_experts != baseline.num_experts:
        raise AnalysisError(
            "task and baseline come from models with other numbers of experts: record both with one model"
        )
    if ours.shape != theirs.shape:
        raise AnalysisError(
            f"task and baseline have shapes {list(ours.shape)} and {list(theirs.shape)}: give the same layers"
        )
    return ours - theirs


def _other_group(baseline: Frequencies, group: str | None, baseline_group: str | None) -> str | None:
    if baseline_group is not None or not isinstance(baseline, Statistics):
        return baseline_group
    return group if len(baseline.groups) > 1 else None


def task_experts(
    task: Frequencies,
    baseline: Frequencies,
    *,
    threshold: float,
    group: str | None = None,
    baseline_group: str | None = None,
    layers: Iterable[int] | None = None,
    top: int | None = None,
    phase: str | None = None,
    by: str = "sequence",
) -> ExpertSelection:
    """Select the experts of a task: ``Delta > threshold`` between task text and general text of one language.

    See arXiv 2510.04694, section 5.2. Takes the arguments of ``expert_difference``, and these:

    Args:
        threshold: published settings are between 0.25 and 0.5.
        layers: only these layers (indices from 0). Leave it out to keep the experts of other layers for controls.
        top: largest number of experts per layer, those with the largest difference.
    """
    delta = expert_difference(task, baseline, group=group, baseline_group=baseline_group, phase=phase, by=by)
    chosen = _above(delta, threshold, top) & _in_layers(delta, layers)
    return selection(chosen, delta, task, threshold=threshold, description=f"task experts{_of(group)}")


def multilingual_experts(
    statistics: Statistics,
    reference: str,
    *,
    threshold: float,
    groups: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    top: int | None = None,
    phase: str | None = None,
    by: str = "sequence",
) -> ExpertSelection:
    """Select experts used more in some other language than in the reference: ``Delta > threshold`` [arXiv 2510.04694].

    The groups must hold the same text in each language. The score of an expert is its largest difference over
    languages.
    """
    frequency = statistics.frequency(phase, by)
    base = frequency[group_index(statistics, reference, "reference group")]
    rows = [statistics.groups.index(name) for name in pick_groups(statistics, groups, leave_out=reference)]
    delta = frequency[rows] - base
    largest = np.where(np.isnan(delta).all(0), np.nan, np.nanmax(np.where(np.isnan(delta), -np.inf, delta), axis=0))
    chosen = _above(largest, threshold, top) & _in_layers(largest, layers)
    text = f"multilingual experts against {reference}"
    return selection(chosen, largest, statistics, threshold=threshold, description=text)


def _above(values: np.ndarray, threshold: float, top: int | None) -> np.ndarray:
    """bool [L, E]: above the threshold and, with ``top``, among the largest of the layer (ties: the lower index)."""
    if not np.isfinite(threshold):
        raise AnalysisError(f"threshold must be a number, not {threshold}")
    chosen = np.nan_to_num(values, nan=-np.inf) > threshold
    return chosen if top is None else chosen & _largest(values, top)


def _largest(values: np.ndarray, top: int) -> np.ndarray:
    if top < 1:
        raise AnalysisError(f"top must be 1 or more, not {top}")
    return places(np.nan_to_num(values, nan=-np.inf)) < top


def _in_layers(values: np.ndarray, layers: Iterable[int] | None) -> np.ndarray:
    kept = np.ones((len(values), 1), dtype=bool)
    if layers is not None:
        numbers = as_layers(layers)
        if not numbers or numbers[-1] >= len(values):
            raise AnalysisError(f"layers must name some of the {len(values)} layers (0-{len(values) - 1})")
        kept[:] = False
        kept[list(numbers)] = True
    return kept


def _of(group: str | None) -> str:
    return "" if group is None else f" of {group}"


class RiskExperts(NamedTuple):
    """Experts to activate and to deactivate, and the risk differences [L, E] by which they were ranked."""

    activate: ExpertSelection
    deactivate: ExpertSelection
    values: np.ndarray

    def __repr__(self) -> str:
        return f"activate: {self.activate}\ndeactivate: {self.deactivate}"

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{name}</p>{found._repr_html_()}"
            for name, found in (("activate", self.activate), ("deactivate", self.deactivate))
        )


def risk_experts(
    positive: Frequencies,
    negative: Frequencies,
    *,
    top_n: int | None = None,
    activations: int | None = None,
    deactivations: int | None = None,
    per_layer: int | None = None,
    group: str | None = None,
    baseline_group: str | None = None,
    phase: str | None = None,
) -> RiskExperts:
    """Select SteerMoE's experts by risk difference, the difference of token-pooled frequencies [arXiv 2509.09660].

    Give either ``activations`` and ``deactivations``, as SteerMoE does (published settings are 15 and 0, or 5 and 480),
    or ``top_n``. These numbers are for all layers together. Activations beyond ``per_layer`` in a layer are then
    dropped without replacement, so fewer may remain.

    Args:
        positive, negative: routing on tokens that show the behavior and on tokens that do not (as in
            ``expert_difference``).
        top_n: number of experts with the largest absolute difference.
        activations: number of experts with the largest positive difference; none by default.
        deactivations: number of experts with the largest negative difference; none by default.
        per_layer: largest number of activations per layer; by default the layer's top-k, since no more can be forced
            on.

    Activated experts have a positive difference, deactivated ones a negative one. Ties go to the lower layer and
    expert. Raises ``AnalysisError`` if the numbers are given in neither of the two ways.
    """
    values = expert_difference(positive, negative, group=group, baseline_group=baseline_group, phase=phase, by="token")
    limits = _activation_limits(positive, per_layer, len(values))
    signed = np.nan_to_num(values)
    if (top_n is None) == (activations is None and deactivations is None):
        raise AnalysisError("say how many experts in one of two ways: activations= and deactivations=, or top_n=")
    if top_n is None:
        on = _first(signed, _count(activations or 0, "activations", 0))
        off = _first(-signed, _count(deactivations or 0, "deactivations", 0))
        text = f"risk difference, {activations or 0} activations and {deactivations or 0} deactivations"
    else:
        largest = _first(np.abs(signed), _count(top_n, "top_n", 1))
        on, off = largest & (signed > 0), largest & (signed < 0)
        text = f"risk difference, {top_n} largest"
    on &= places(signed) < limits[:, None]
    raised, lowered = (selection(part, values, positive, threshold=None, description=text) for part in (on, off))
    return RiskExperts(raised, lowered, values)


def _count(number: int, name: str, least: int) -> int:
    if number < least:
        raise AnalysisError(f"{name} must be {least} or more, not {number}")
    return number


def _first(values: np.ndarray, count: int) -> np.ndarray:
    """bool [L, E]: the ``count`` largest positive values of all layers; ties go to the lower layer and expert."""
    order = np.argsort(-values, axis=None, kind="stable")[:count]
    chosen = np.zeros(values.size, dtype=bool)
    chosen[order] = True
    return chosen.reshape(values.shape) & (values > 0)


def _activation_limits(given: Frequencies, per_layer: int | None, layers: int) -> np.ndarray:
    if per_layer is not None:
        return np.full(layers, per_layer)
    if not isinstance(given, Statistics):
        raise AnalysisError("per_layer is needed with arrays: the model's top-k")
    return np.asarray(given.top_k)


@dataclass(frozen=True, eq=False, repr=False)
class LanguageExperts(ShownAsTables, Mapping[str, "ExpertSelection"]):
    """Mapping from group to the selection of its experts; ``shared`` holds the experts that are exclusive to none."""

    by_group: dict[str, ExpertSelection]
    shared: ExpertSelection | None = None

    def __getitem__(self, group: str) -> ExpertSelection:
        return self.by_group[group]

    def __iter__(self) -> Any:
        return iter(self.by_group)

    def __len__(self) -> int:
        return len(self.by_group)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        groups = {group: found.to_dict() for group, found in self.by_group.items()}
        return {"groups": groups, "shared": None if self.shared is None else self.shared.to_dict()}

    def tables(self) -> list[Table]:
        rows = [[group, len(found)] for group, found in self.by_group.items()]
        shared = [] if self.shared is None else [["(shared)", len(self.shared)]]
        return [Table(["group", "experts"], [*rows, *shared])]


def frequency_share_experts(
    statistics: Statistics,
    *,
    top: int,
    threshold: float,
    groups: Sequence[str] | None = None,
    phase: str | None = None,
    by: str = "token",
) -> LanguageExperts:
    """Select exclusive and shared experts by share of frequency [arXiv 2601.14050].

    In each layer and language the ``top`` most frequent experts are kept, and their frequencies are divided by the sum
    over languages. An expert is exclusive to a language whose share is above ``threshold``. It is shared if it is kept
    but no language has such a share. From a threshold of 0.5 on, an expert is exclusive to at most one language.
    """
    if not 0 < threshold < 1:
        raise AnalysisError(f"threshold must lie between 0 and 1, not {threshold}")
    names = pick_groups(statistics, groups)
    frequency = np.nan_to_num(_rows(statistics, names, phase, by))
    kept = np.where(_largest(frequency, top), frequency, 0.0)
    total = kept.sum(0)
    share = np.divide(kept, total, out=np.zeros(kept.shape), where=total > 0)
    found = {
        name: selection(
            share[i] > threshold, share[i], statistics, threshold=threshold, description=f"exclusive experts of {name}"
        )
        for i, name in enumerate(names)
    }
    none_alone = (total > 0) & (share <= threshold).all(0)
    shared = selection(none_alone, share.max(0), statistics, threshold=threshold, description="shared experts")
    return LanguageExperts(found, shared)


def entropy_experts(
    statistics: Statistics,
    *,
    top_n: int,
    percentile: float = 95.0,
    groups: Sequence[str] | None = None,
    phase: str | None = None,
    by: str = "token",
) -> LanguageExperts:
    """Select the ``top_n`` most language-specific experts of each group, by lowest entropy over groups.

    This follows LAPE: an expert's frequencies are divided by their sum over groups; low entropy means that few groups
    use it. Candidates of a group are the experts it uses more often than the ``percentile`` of all frequencies. Ties go
    to the lower layer and expert.
    """
    if not 0 <= percentile <= 100 or top_n < 1:
        raise AnalysisError("top_n must be 1 or more and percentile between 0 and 100")
    names = pick_groups(statistics, groups)
    frequency = _rows(statistics, names, phase, by)
    real = np.arange(frequency.shape[-1]) < np.asarray(statistics.num_experts)[:, None]
    seen = real & ~np.isnan(frequency)
    cut = np.percentile(frequency[seen], percentile)
    frequency = np.where(seen, frequency, 0.0)
    total = frequency.sum(0)
    share = np.divide(frequency, total, out=np.zeros(frequency.shape), where=total > 0)
    spread = -(share * np.log(np.where(share > 0, share, 1.0))).sum(0) + 0.0
    found = {}
    for i, name in enumerate(names):
        candidates = seen[i] & (frequency[i] > cut)
        order = np.argsort(np.where(candidates, spread, np.inf).reshape(-1), kind="stable")[:top_n]
        chosen = np.zeros(candidates.size, dtype=bool)
        chosen[order] = True
        chosen = chosen.reshape(candidates.shape) & candidates
        text = f"low-entropy experts of {name}"
        found[name] = selection(chosen, spread, statistics, threshold=None, description=text)
    return LanguageExperts(found)


def _rows(statistics: Statistics, names: Sequence[str], phase: str | None, by: str) -> np.ndarray:
    return statistics.frequency(phase, by)[[statistics.groups.index(name) for name in names]]


def esft_experts(scores: Frequencies, *, top_p: float = 0.2, group: str | None = None) -> ExpertSelection:
    """Select ESFT's experts of a task: in each layer the fewest, most used first, whose scores add up to ``top_p``.

    Args:
        scores: token scores [L, E] (selections divided by k * tokens, so that a layer sums to 1), or
            ``RoutingStatistics``, from which the scores of ``group`` are taken.
        top_p: share of the selections to cover, in (0, 1].
        group: the group of the statistics; by default the only one.
    """
    if not 0 < top_p <= 1:
        raise AnalysisError(f"top_p must be above 0 and at most 1, not {top_p}")
    if isinstance(scores, Statistics):
        values = scores.mean_distribution("count", None, "token")[group_index(scores, group)]
    else:
        values = as_array(scores, "the scores")
    if values.ndim != 2:
        raise AnalysisError("ESFT scores must be [layer, expert]")
    known = np.nan_to_num(values)
    order = np.argsort(-known, axis=-1, kind="stable")
    reached = np.cumsum(np.take_along_axis(known, order, -1), -1)
    before = np.concatenate([np.zeros((len(values), 1)), reached[:, :-1]], axis=1)
    chosen = np.zeros(values.shape, dtype=bool)
    # 0.7 + 0.1 is below 0.8 by a rounding error only, and counts as reaching it
    np.put_along_axis(chosen, order, before < top_p - _ROUNDING, axis=-1)
    chosen &= known > 0
    return selection(chosen, values, scores, threshold=top_p, description=f"ESFT experts{_of(group)}, top_p {top_p:g}")

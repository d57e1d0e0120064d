"""Experts that a task, a language or a behavior uses more than a baseline does: differences, and those above a bar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np

from moe_route.analysis.inputs import (
    AnalysisError,
    Frequencies,
    Statistics,
    as_array,
    check_one_model,
    compared_with,
    group_index,
    refuse_itself,
    selection,
)
from moe_route.analysis.measures import places, ratio
from moe_route.analysis.overlap import above, chance_of_overlap, first, in_layers
from moe_route.analysis.resampling import Sequences, draw_together, stability_selection, tokens_per_sequence
from moe_route.analysis.result import Result, mean_of_seen
from moe_route.analysis.stats import RESAMPLES, normal_of_t, t_of_normal
from moe_route.analysis.tokens import check_trace, class_index, token_rows
from moe_route.base.table import Table
from moe_route.recording import Trace
from moe_route.steering import ExpertSelection

# ---- how much more often a task's tokens choose each expert than a baseline's, with intervals over items

_ROUNDING = 1e-12  # a difference that varies by less is constant
_SHOWN = 10


def _frequency(given: Frequencies, group: str | None, role: str, phase: str | None, by: str) -> np.ndarray:
    """Mean number of times that a token of the group chooses each expert, float64 [L, E]; arrays average over items."""
    if isinstance(given, Statistics):
        return given.frequency(phase, by)[group_index(given, group, role, phase)]
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
    other = _other_group(baseline, group, baseline_group)
    theirs = _frequency(baseline, other, "baseline group", phase, by)
    if isinstance(task, Statistics) and isinstance(baseline, Statistics):
        if task.num_experts != baseline.num_experts:
            raise AnalysisError(
                "task and baseline come from models with other numbers of experts: record both with one model"
            )
        check_one_model(task, baseline)
        if np.array_equal(ours, theirs, equal_nan=True):  # also of one recording that was read twice
            refuse_itself([group or task.groups[0]], other or baseline.groups[0])
    if ours.shape != theirs.shape:
        raise AnalysisError(
            f"task and baseline have shapes {list(ours.shape)} and {list(theirs.shape)}: give the same layers"
        )
    return ours - theirs


def _other_group(baseline: Frequencies, group: str | None, baseline_group: str | None) -> str | None:
    if baseline_group is not None or not isinstance(baseline, Statistics):
        return baseline_group
    return group if len(baseline.groups) > 1 else None


@dataclass(frozen=True, eq=False, repr=False)
class ExpertDifference(Result):
    """Difference in how often tokens choose each expert, with intervals and p-values from a bootstrap over items.

    Attributes:
        values: float64 [layer, expert], task minus baseline; NaN in layers without tokens.
        low, high: float64 [layer, expert], interval of each expert by itself.
        joint_low, joint_high: float64 [layer, expert], intervals that hold for all experts of all layers together.
        p_value: float64 [layer, expert], two-sided, of no difference, for each expert by itself.
        p_adjusted: float64 [layer, expert], the same, corrected for all experts of all layers.
        level: level of the intervals.
        items: number of items of the task and of the baseline.
        shared: number of items that both have, which are drawn together.
    """

    values: Annotated[np.ndarray, "layer expert as difference"]
    low: Annotated[np.ndarray, "layer expert"]
    high: Annotated[np.ndarray, "layer expert"]
    joint_low: Annotated[np.ndarray, "layer expert"]
    joint_high: Annotated[np.ndarray, "layer expert"]
    p_value: Annotated[np.ndarray, "layer expert"]
    p_adjusted: Annotated[np.ndarray, "layer expert"]
    level: float
    items: tuple[int, int]
    shared: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None); the values are the ``difference``."""
        content = super().to_dict()
        return {"difference": content.pop("values"), **content}

    def tables(self) -> list[Table]:
        """The experts with the largest differences."""
        order = np.argsort(-np.abs(np.nan_to_num(self.values)), axis=None, kind="stable")[:_SHOWN]
        cells = [divmod(int(cell), self.values.shape[1]) for cell in order]
        shown = (self.values, self.low, self.high, self.joint_low, self.joint_high)
        rows: list[list[object]] = []
        for cell in cells:
            ends = [float(values[cell]) for values in shown]
            p, p_of_all = float(self.p_value[cell]), float(self.p_adjusted[cell])
            rows.append([*cell, *ends, f"{p:.4f}", f"{p_of_all:.4f}"])
        head = ("layer", "expert", "difference", "low", "high", "joint low", "joint high", "p", "p (all experts)")
        title = f"Difference of frequency over {self.items[0]} and {self.items[1]} items ({self.shared} shared)"
        note = f"{self.level * 100:g} % intervals; joint: for all {self.values.size} experts together"
        return [Table(head, rows, f"{title}: the {len(rows)} largest", note)]


def expert_difference_interval(
    task: Frequencies,
    baseline: Frequencies,
    *,
    group: str | None = None,
    baseline_group: str | None = None,
    by: str = "sequence",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ExpertDifference:
    """``expert_difference`` with intervals and p-values from a bootstrap over items.

    Items are drawn with replacement. Items that task and baseline share, such as translations, are drawn together; if
    there are none, both are drawn independently. With ``t = |resampled - observed| / standard deviation`` of each
    expert, an interval reaches ``t``'s quantile to both sides. The quantile of the largest t of all experts gives the
    joint intervals, and its distribution the adjusted p-values (single-step max-T of Westfall and Young 1993). t is
    widened as Student's t is wider than a normal variable, by the smaller number of items.

    An expert whose difference is the same in every resample has an interval without width.

    Args:
        task, baseline, group, baseline_group, by: as in ``expert_difference``. Statistics need
            ``record(sequences=True)``; arrays must be [item, layer, expert], and their items are drawn independently.
        level: level of the intervals, in (0, 1).
        resamples: number of resamples; p-values are at least 1 / (resamples + 1).

    Raises ``AnalysisError`` for sequences that were not kept, and fewer than five items on either side.
    """
    if not 0 < level < 1:
        raise AnalysisError(f"level must lie between 0 and 1, not {level}")
    if resamples < 1:
        raise AnalysisError(f"resamples must be 1 or more, not {resamples}")
    values = expert_difference(task, baseline, group=group, baseline_group=baseline_group, by=by)
    ours = _sequences(task, group, "task")
    theirs = _sequences(baseline, _other_group(baseline, group, baseline_group), "baseline")
    drawn = draw_together([ours.items, theirs.items], resamples, seed)
    fewest = min(len(ours.items), len(theirs.items))
    spread, quantile, p_value = np.full((3, *values.shape), np.nan)
    reached, largest = np.full(values.shape, np.nan), np.zeros(resamples)
    for layer, value in enumerate(values):  # one layer at a time, to bound memory
        means = [_drawn_means(one, weights, layer, by) for one, weights in zip((ours, theirs), drawn, strict=True)]
        difference = means[0] - means[1]
        spread[layer] = difference.std(0)
        varies = spread[layer] > _ROUNDING
        scale = np.where(varies, spread[layer], 1.0)
        z = np.where(varies, np.abs(difference - value), 0.0) / scale
        spread[layer] *= np.sqrt(fewest / (fewest - 1))
        constant = np.where(np.abs(value) > _ROUNDING, np.inf, 0.0)
        t = np.where(varies, np.abs(value) / np.where(varies, spread[layer], 1.0), constant)
        reached[layer] = normal_of_t(t, fewest - 1)  # z is compared in place of every t, which rises with it
        quantile[layer] = t_of_normal(np.quantile(z, level, axis=0), fewest - 1)
        p_value[layer] = _share_of(z, reached[layer])
        largest = np.fmax(largest, z.max(1))
    undefined = np.isnan(spread)
    p_value[undefined] = np.nan
    p_adjusted = np.where(undefined, np.nan, _share_of(largest[:, None], reached.reshape(-1)).reshape(values.shape))
    half, joint = spread * quantile, spread * t_of_normal(np.quantile(largest, level), fewest - 1)
    return ExpertDifference(
        values,
        values - half,
        values + half,
        values - joint,
        values + joint,
        p_value,
        p_adjusted,
        level,
        (len(ours.items), len(theirs.items)),
        len(set(ours.items) & set(theirs.items)),
    )


def _sequences(given: Frequencies, group: str | None, role: str) -> Sequences:
    if isinstance(given, Statistics):
        name = given.groups[group_index(given, group, f"{role} group")]
        return Sequences.of_group(given, name, role)
    values = as_array(given, f"the {role}")
    if values.ndim != 3:
        raise AnalysisError(f"an interval needs the single items: give the {role} as [item, layer, expert]")
    return Sequences.of_array(values, role)


def _drawn_means(sequences: Sequences, drawn: np.ndarray, layer: int, by: str) -> np.ndarray:
    """Frequencies of one layer in every resample, float64 [resample, expert]; NaN without tokens."""
    terms, weights = sequences.terms(by)
    total, weight = drawn @ terms[:, layer], (drawn @ weights[:, layer])[:, None]
    return ratio(total, weight)


def _share_of(resampled: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """p-values float64 [expert]: share of ``resampled`` [resample, expert or 1] that reaches ``reached`` [expert]."""
    ordered = np.sort(resampled, axis=0)
    columns = range(len(reached))
    below = [np.searchsorted(ordered[:, c % ordered.shape[1]], reached[c] - _ROUNDING) for c in columns]
    return (1 + len(ordered) - np.asarray(below)) / (len(ordered) + 1)


def task_experts(
    task: Frequencies,
    baseline: Frequencies,
    *,
    threshold: float,
    group: str | None = None,
    baseline_group: str | None = None,
    layers: Iterable[int] | None = None,
    top: int | None = None,
    lower: bool = False,
    level: float = 0.95,
    phase: str | None = None,
    by: str = "sequence",
    matched: Literal["digits"] | None = None,
    classes: Sequence[str] | None = None,
) -> ExpertSelection:
    """Select the experts of a task: ``Delta > threshold`` between task text and general text of one language.

    See arXiv 2510.04694, section 5.2. Takes the arguments of ``expert_difference``, and these:

    Args:
        threshold: published settings are between 0.25 and 0.5.
        layers: only these layers (indices from 0). Leave it out to keep the experts of other layers for controls.
        top: largest number of experts per layer, those with the largest difference.
        lower: ask that the lower end of the difference's joint interval is above the threshold, so that all experts
            selected have such a difference with probability ``level`` (see ``expert_difference_interval``). Needs
            kept sequences, of both phases.
        level: level of that interval.
        matched: "digits" compares digits with digits and other tokens with other tokens, both weighed by their share in
            the task. So experts of digits are no experts of a task that has more of them. ``task`` and ``baseline`` are
            then traces.
        classes: for ``matched``, the class of each token id, as ``token_classes`` gives it.

    If no expert is above the threshold, the description names the largest difference, and a threshold to try. It ends
    with what else differs between the two recordings: shares of digits, punctuation and first tokens, and tokens per
    text. What differs there may be what the experts are experts of.
    """
    text = f"task experts{'' if group is None else f' of {group}'}"
    if matched is not None or isinstance(task, Trace):
        if matched != "digits" or lower:
            raise AnalysisError('traces are compared by matched="digits", without lower: pass that, or statistics')
        delta, also = _matched_difference(task, baseline, group, baseline_group, phase, by, classes)
        experts = _above_threshold(above(delta, threshold, top), delta, delta, layers, None, threshold, text, also)
        # the trace does not say how many experts there are
        return ExpertSelection(experts, scores=experts.scores, threshold=threshold, description=experts.description)
    also = what_else_differs(task, baseline, group, baseline_group)
    if not lower:
        delta = expert_difference(task, baseline, group=group, baseline_group=baseline_group, phase=phase, by=by)
        chosen, bar = above(delta, threshold, top), delta
    else:
        if phase is not None:
            raise AnalysisError("kept sequences join prefill and decode: leave phase out, or lower")
        joint = expert_difference_interval(
            task, baseline, group=group, baseline_group=baseline_group, by=by, level=level
        )
        delta, bar = joint.values, joint.joint_low
        chosen = above(delta, threshold, top) & above(bar, threshold)
        text = f"{text}, lower end of the joint {level * 100:g} % interval"
    return _above_threshold(chosen, delta, bar, layers, task, threshold, text, also)


# ---- what else differs between a task and its baseline


def what_else_differs(
    task: Frequencies, baseline: Frequencies, group: str | None = None, baseline_group: str | None = None
) -> str:
    """Shares of digits, punctuation and first tokens, and tokens per text, of the task and of the baseline.

    A line that begins with "; ", or "" for arrays. Digits and punctuation are those that ``record_texts`` counted.
    """
    if not (isinstance(task, Statistics) and isinstance(baseline, Statistics)):
        return ""
    ours = task.groups[group_index(task, group, "task group")]
    theirs = baseline.groups[group_index(baseline, _other_group(baseline, group, baseline_group), "baseline group")]
    return _differing(_contents(task, ours), _contents(baseline, theirs))


def _contents(statistics: Any, group: str) -> dict[str, float]:
    """Name of a property of the texts -> its value; those that are not known are left out."""
    (per_text,) = tokens_per_sequence(statistics, (group,)).tolist()
    counted = (statistics.metadata.get("token_classes") or {}).get(group)
    contents = {}
    if counted:
        contents = {name: counted.get(key, 0) / sum(counted.values()) for name, key in _CLASSES.items()}
    if per_text > 0:  # NaN where no sequences were counted
        contents |= {"first tokens": 1 / per_text, "tokens per text": per_text}
    return contents


_CLASSES = {"digits": "digit", "punctuation": "punctuation"}


def _differing(ours: dict[str, float], theirs: dict[str, float]) -> str:
    shown = []
    for name in (*_CLASSES, "first tokens", "tokens per text"):
        if name in ours and name in theirs:
            ends = (ours[name], theirs[name])
            shown.append(name + " " + " / ".join(f"{x:.1f}" if "per" in name else f"{x:.1%}" for x in ends))
        elif name in _CLASSES:
            shown.append(f"{name} not recorded")
    return f"; what else differs (task / baseline): {', '.join(shown)}"


def _matched_difference(
    task: Any,
    baseline: Any,
    group: str | None,
    baseline_group: str | None,
    phase: str | None,
    by: str,
    classes: Sequence[str] | None,
) -> tuple[np.ndarray, str]:
    """Delta [layer, expert] of traces with digits compared among themselves, and what else differs."""
    for trace in (task, baseline):
        check_trace(trace)
    if classes is None:
        raise AnalysisError("digits are told from the texts of token ids: pass classes=token_classes(...)")
    if task.layer_numbers != baseline.layer_numbers:
        raise AnalysisError("task and baseline were traced in other layers: trace the same ones")
    other = baseline_group or (group if len(baseline.groups) > 1 else None)
    ours, theirs = (_OfClasses.of(*given, phase, classes, by) for given in ((task, group), (baseline, other)))
    for number, name in enumerate(("other tokens", "digits")):
        if ours.share[number] > 0 and not theirs.tokens[number]:
            raise AnalysisError(
                f"the baseline has no {name}, and {ours.share[number]:.0%} of the task's tokens are: take a baseline "
                "that has some"
            )
    experts = max(int(trace.ids.max(initial=0)) for trace in (task, baseline)) + 1
    delta = np.full((max(task.layer_numbers) + 1, experts), np.nan)
    for place, layer in enumerate(task.layer_numbers):
        differences = [ours.frequency(place, c, experts) - theirs.frequency(place, c, experts) for c in (0, 1)]
        weighed = [share * one for share, one in zip(ours.share, differences, strict=True) if share > 0]
        delta[layer] = np.sum(weighed, axis=0)
    return delta, ", digits matched" + _differing(ours.contents, theirs.contents)


@dataclass(frozen=True, eq=False)
class _OfClasses:
    """Tokens of one group of a trace, digits (1) and others (0).

    Attributes:
        rows, digit, sequence: int64 [n], bool [n], int64 [n]: the tokens in the trace, and the sequence of each.
        share: [2], share of each class, mean over sequences or tokens.
        tokens: [2], tokens of each class.
    """

    trace: Any
    rows: np.ndarray
    digit: np.ndarray
    sequence: np.ndarray
    by: str
    share: tuple[float, float]
    tokens: tuple[int, int]
    contents: dict[str, float]

    @classmethod
    def of(cls, trace: Any, group: str | None, phase: str | None, classes: Sequence[str], by: str) -> _OfClasses:
        if group is None and len(trace.groups) > 1:
            raise AnalysisError(f"name the group: the trace holds {', '.join(trace.groups)}")
        rows = token_rows(trace, group, phase)
        index, names = class_index(trace, rows, classes)
        named = np.asarray(names)[index]
        digit = named == "digit"
        _, sequence = np.unique(trace.sequence[rows], return_inverse=True)
        sizes = np.bincount(sequence)
        texts = float(np.mean(np.bincount(sequence, digit) / sizes)) if by == "sequence" else float(digit.mean())
        contents = {
            "digits": float(digit.mean()),
            "punctuation": float((named == "punctuation").mean()),
            "first tokens": len(sizes) / len(rows),
            "tokens per text": len(rows) / len(sizes),
        }
        number = int(digit.sum())
        return cls(trace, rows, digit, sequence, by, (1 - texts, texts), (len(rows) - number, number), contents)

    def frequency(self, place: int, of_class: int, experts: int) -> np.ndarray:
        """Mean number of times that a token of a class chooses each expert, float64 [E]."""
        kept = self.digit == bool(of_class)
        ids, sequence = self.trace.ids[self.rows[kept], place], self.sequence[kept]
        _, sequence, sizes = np.unique(sequence, return_inverse=True, return_counts=True)
        weight = (
            1 / (len(sizes) * sizes[sequence]) if self.by == "sequence" else np.full(len(sequence), 1 / len(sequence))
        )
        chosen = ids >= 0
        return np.bincount(ids[chosen], np.broadcast_to(weight[:, None], ids.shape)[chosen], experts)


def _above_threshold(
    chosen: np.ndarray,
    delta: np.ndarray,
    bar: np.ndarray,
    layers: Iterable[int] | None,
    statistics: Any,
    threshold: float,
    text: str,
    also: str = "",
) -> ExpertSelection:
    """The chosen experts of these layers; if there are none, the description says which threshold would find some.

    ``bar`` float64 [layer, expert] is what is compared with the threshold, ``delta`` the scores, ``also`` the end of
    the description.
    """
    kept = in_layers(len(delta), layers)
    if not (chosen & kept).any():
        most = float(np.max(np.nan_to_num(bar, nan=-np.inf), where=kept, initial=-np.inf))
        text += f": none, the largest difference is {most:.3g}" if np.isfinite(most) else ": none, no token was seen"
        if most > 0:
            below = float(f"{most * 0.995:.2g}")  # of two digits
            text += f", so try threshold {below if below < most else most * 0.9:.2g} (--threshold)"
    return selection(chosen & kept, delta, statistics, threshold=threshold, description=text + also)


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
    languages. If there is none, the description names the largest difference, and a threshold to try.
    """
    delta = multilingual_difference(statistics, reference, groups=groups, phase=phase, by=by)
    text = f"multilingual experts against {reference}"
    return _above_threshold(above(delta, threshold, top), delta, delta, layers, statistics, threshold, text)


def multilingual_difference(
    statistics: Statistics,
    reference: str,
    *,
    groups: Sequence[str] | None = None,
    phase: str | None = None,
    by: str = "sequence",
) -> np.ndarray:
    """Largest difference of frequency of each expert between another language and the reference.

    float64 [layer, expert]; NaN in layers that saw no token of any other language.
    """
    frequency = statistics.frequency(phase, by)
    base = frequency[group_index(statistics, reference, "reference group", phase)]
    rows = [statistics.groups.index(name) for name in compared_with(statistics, groups, reference, phase)]
    delta = frequency[rows] - base
    return np.where(np.isnan(delta).all(0), np.nan, np.where(np.isnan(delta), -np.inf, delta).max(axis=0))


# ---- experts of a behavior by risk difference, as SteerMoE finds them


@dataclass(frozen=True, eq=False, repr=False)
class RiskExperts(Result):
    """Experts to activate and to deactivate, and the risk differences [L, E] by which they were ranked."""

    activate: ExpertSelection
    deactivate: ExpertSelection
    values: Annotated[np.ndarray, "layer expert as value"]

    def columns(self) -> dict[str, Any]:
        """``layer``, ``expert``, risk difference ``value``, and ``choice``: "activate", "deactivate" or ""."""
        choice = np.full(self.values.shape, "", object)
        for name in ("activate", "deactivate"):
            for layer, experts in getattr(self, name).items():
                choice[layer, list(experts)] = name
        return self.over("layer expert", {"value": self.values, "choice": choice})

    def tables(self) -> list[Table]:
        rows = [[name, len(experts), f"{experts!r}"] for name, experts in self._both().items()]
        return [Table(["to", "experts", "which"], rows)]

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {experts}" for name, experts in self._both().items())

    def _repr_html_(self) -> str:
        return "".join(f"<p>{name}</p>{experts._repr_html_()}" for name, experts in self._both().items())

    def _both(self) -> dict[str, ExpertSelection]:
        return {"activate": self.activate, "deactivate": self.deactivate}


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
    resamples: int | None = None,
    keep: float = 0.8,
    seed: int = 0,
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
        resamples: select in this many resamples of the items, and keep the experts that are selected in a share of
            ``keep`` of them (``stability_selection``); their scores are these shares. Needs kept sequences.
        keep, seed: as in ``stability_selection``.

    Activated experts have a positive difference, deactivated ones a negative one. Ties go to the lower layer and
    expert. Raises ``AnalysisError`` if the numbers are given in neither of the two ways.
    """
    rule = partial(
        _of_all_items,
        top_n=top_n,
        activations=activations,
        deactivations=deactivations,
        per_layer=per_layer,
        group=group,
        baseline_group=baseline_group,
        phase=phase,
    )
    whole = rule(positive, negative)
    if resamples is None:
        return whole
    if not isinstance(positive, Statistics) or not isinstance(negative, Statistics):
        raise AnalysisError("resamples need statistics with kept sequences: record(sequences=True)")
    on, off = (
        stability_selection(one, positive, negative, resamples=resamples, keep=keep, seed=seed)
        for one in (lambda p, n: rule(p, n).activate, lambda p, n: rule(p, n).deactivate)
    )
    # resamples that activate different experts of a layer may together keep more than can be forced on
    room = places(on.share) < _activation_limits(positive, per_layer, len(on.share))[:, None]
    text = on.selection.description
    kept = selection((on.share >= keep) & room, on.share, positive, threshold=keep, description=text)
    return RiskExperts(kept, off.selection, whole.values)


def _of_all_items(
    positive: Frequencies,
    negative: Frequencies,
    *,
    top_n: int | None,
    activations: int | None,
    deactivations: int | None,
    per_layer: int | None,
    group: str | None,
    baseline_group: str | None,
    phase: str | None,
) -> RiskExperts:
    """``risk_experts`` without resamples."""
    values = expert_difference(positive, negative, group=group, baseline_group=baseline_group, phase=phase, by="token")
    limits = _activation_limits(positive, per_layer, len(values))
    signed = np.nan_to_num(values)
    if (top_n is None) == (activations is None and deactivations is None):
        raise AnalysisError("say how many experts in one of two ways: activations= and deactivations=, or top_n=")
    if top_n is None:
        on = first(signed, _count(activations or 0, "activations", 0))
        off = first(-signed, _count(deactivations or 0, "deactivations", 0))
        text = f"risk difference, {activations or 0} activations and {deactivations or 0} deactivations"
    else:
        largest = first(np.abs(signed), _count(top_n, "top_n", 1))
        on, off = largest & (signed > 0), largest & (signed < 0)
        text = f"risk difference, {top_n} largest"
    on &= places(signed) < limits[:, None]
    text += what_else_differs(positive, negative, group, baseline_group)
    raised, lowered = (selection(part, values, positive, threshold=None, description=text) for part in (on, off))
    return RiskExperts(raised, lowered, values)


def _count(number: int, name: str, least: int) -> int:
    if number < least:
        raise AnalysisError(f"{name} must be {least} or more, not {number}")
    return number


def _activation_limits(given: Frequencies, per_layer: int | None, layers: int) -> np.ndarray:
    if per_layer is not None:
        return np.full(layers, _count(per_layer, "per_layer", 0))
    if not isinstance(given, Statistics):
        raise AnalysisError("per_layer is needed with arrays: the model's top-k")
    return np.asarray(given.top_k)


# ---- task and multilingual experts by threshold

THRESHOLDS = tuple(step / 20 for step in range(1, 13))


_SETS = ("task", "multilingual", "both")


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Result, derived=("jaccard", "containment")):
    """Task and multilingual experts at several thresholds.

    Attributes:
        thresholds: in increasing order.
        task, multilingual, both: int64 [threshold, layer], number of experts of each set, and of both.
        expected: float64 [threshold], mean number of experts in both if as many in each layer were drawn at random.
        p_more, p_fewer: float64 [threshold], probability that random sets share as many experts or more, and as few or
            fewer.
        separate_from: the smallest threshold, of all numbers of 0 or more, at which no expert is in both sets.
        layers: the layers that were looked at.
    """

    thresholds: tuple[float, ...]
    task: np.ndarray
    multilingual: np.ndarray
    both: np.ndarray
    expected: np.ndarray
    p_more: np.ndarray
    p_fewer: np.ndarray
    separate_from: float
    layers: tuple[int, ...]

    @property
    def jaccard(self) -> np.ndarray:
        """|A & B| / |A | B| over all layers, float64 [threshold]; NaN where both sets are empty."""
        both = self.both.sum(1)
        return ratio(both, self.task.sum(1) + self.multilingual.sum(1) - both)

    @property
    def containment(self) -> np.ndarray:
        """Share of the task experts that are multilingual experts too, float64 [threshold]."""
        return ratio(self.both.sum(1), self.task.sum(1))

    def columns(self) -> dict[str, Any]:
        """``threshold``, ``layer``, and the numbers ``task``, ``multilingual`` and ``both`` in the layers looked at."""
        here = list(self.layers)
        return self.over("threshold layer", {name: getattr(self, name)[:, here] for name in _SETS})

    def tables(self) -> list[Table]:
        counts = [values.sum(1).tolist() for values in (self.task, self.multilingual, self.both)]
        chance = [values.tolist() for values in (self.expected, self.jaccard, self.p_more, self.p_fewer)]
        rows = [list(row) for row in zip(map(float, self.thresholds), *counts, *chance, strict=True)]
        head = ("threshold", "task", "multilingual", "both", "by chance", "Jaccard", "p (more)", "p (fewer)")
        note = f"no expert is in both sets from threshold {self.separate_from:.3f} on"
        return [Table(head, rows, f"Experts by threshold in {len(self.layers)} layers", note)]


def sweep(
    task: Frequencies,
    baseline: Statistics,
    *,
    reference: str,
    thresholds: Iterable[float] = THRESHOLDS,
    group: str | None = None,
    languages: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    phase: str | None = None,
    by: str = "sequence",
) -> Sweep:
    """Count task experts and multilingual experts, and those that are both, by threshold [arXiv 2510.04694, section 5].

    The paper finds that the two sets do not meet from a threshold of 0.3 on.

    Args:
        task: routing of task text in the reference language.
        baseline: routing of general text in several languages, the reference among them.
        reference: group of ``baseline`` that both rules compare with, such as "eng_Latn".
        thresholds: numbers of 0 or more.
        group: group of ``task``; by default ``reference`` if ``task`` has it, else the only group.
        languages: groups of ``baseline`` for the multilingual experts; by default all others.
        layers: count in these layers only.
        phase, by: as in ``expert_difference``.
    """
    taus = tuple(sorted({float(threshold) for threshold in thresholds}))
    if not taus or taus[0] < 0 or not np.isfinite(taus).all():
        raise AnalysisError("thresholds must be one or more numbers of 0 or more")
    if group is None and isinstance(task, Statistics) and reference in task.groups:
        group = reference
    ours = expert_difference(task, baseline, group=group, baseline_group=reference, phase=phase, by=by)
    others = multilingual_difference(baseline, reference, groups=languages, phase=phase, by=by)
    kept = in_layers(len(ours), layers)
    sets = [np.stack([above(values, tau) & kept for tau in taus]) for values in (ours, others)]
    counts = [chosen.sum(-1) for chosen in (*sets, sets[0] & sets[1])]
    width = np.asarray(baseline.num_experts)
    chance = [chance_of_overlap(width, a, b, int(both.sum())) for a, b, both in zip(*counts, strict=True)]
    expected, p_more, p_fewer = np.array(chance).T
    smaller = np.minimum(*(np.nan_to_num(values, nan=-np.inf) for values in (ours, others)))
    separate_from = max(float(smaller[kept[:, 0]].max()), 0.0)
    looked_at = tuple(np.flatnonzero(kept[:, 0]).tolist())
    return Sweep(taus, counts[0], counts[1], counts[2], expected, p_more, p_fewer, separate_from, looked_at)

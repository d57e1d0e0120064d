"""What rules will do to tokens whose natural routing is known, before any of them is run, and how two plans differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from moe_route.base.table import ShownAsTables, Table, data_frame, number_of
from moe_route.calls.call import PHASES
from moe_route.steering.layers import show_numbers
from moe_route.steering.model import PlanError, PlanModel
from moe_route.steering.rule import GAINS, LOSES, Rule, Seen

SATURATED = 0.02  # an expert is saturated if it is chosen by fewer, or by more than all but these, of the tokens
_SHOWN, _SHOWN_CHANGES = 40, 60  # rows that are printed
_CERTAINTIES = ("none", "exact", "estimate", "at most")  # each says less than the one before
_UNPLACED = "statistics do not say which tokens are at the rule's positions: all are counted"


class Counted(Protocol):
    """The part of ``recording.RoutingStatistics`` that is read."""

    @property
    def groups(self) -> Sequence[str]: ...
    @property
    def num_experts(self) -> Sequence[int]: ...
    @property
    def top_k(self) -> Sequence[int]: ...
    @property
    def metrics(self) -> Sequence[str]: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    def tokens(self, phase: Any = None) -> np.ndarray: ...
    def token_sum(self, metric: str, phase: Any = None) -> np.ndarray: ...


@dataclass(frozen=True)
class RuleEffect:
    """What one rule does in one layer to the tokens of one group.

    Attributes:
        rule: index into ``Plan.rules``.
        group, layer: the tokens and the layer.
        experts: the experts that the rule changes there; all of the layer for rules without experts.
        tokens: tokens that the rule's conditions let through.
        frequency: share of these tokens that choose an expert of the rule, mean over its experts; NaN without tokens.
        moved: choices that change, summed over the experts: a token that gains or loses one of them counts once for
            each.
        moved_tokens: tokens with such a change; None where only sums over tokens are known.
        certainty: "exact", "estimate", "at most", or "none" if the rule can change no choice there.
        saturated: experts that nearly all tokens choose already (or nearly none, for a rule that takes them away).
        note: what limits the effect, or how it was estimated.
    """

    rule: int
    group: str
    layer: int
    experts: tuple[int, ...]
    tokens: int
    frequency: float
    moved: float
    moved_tokens: int | None
    certainty: str
    saturated: tuple[int, ...]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        content = asdict(self)
        content["experts"], content["saturated"] = list(self.experts), list(self.saturated)
        content["frequency"] = None if np.isnan(self.frequency) else self.frequency
        return content


@dataclass(frozen=True, repr=False)
class PlanExplanation(ShownAsTables):
    """What a plan will do, before it runs.

    Each layer is looked at by itself: the tokens are those that arrive there without the plan.

    Attributes:
        effects: one entry per (rule, group, layer) that the plan reaches.
        idle: (rule, reason) for rules that will change nothing in these tokens.
        rules: the rules in words.
        notes: remarks on the statistics.
    """

    effects: tuple[RuleEffect, ...]
    idle: tuple[tuple[int, str], ...]
    rules: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that the plan reaches."""
        return tuple(sorted({effect.layer for effect in self.effects}))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that the plan reaches."""
        return tuple(dict.fromkeys(effect.group for effect in self.effects))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {
            "rules": list(self.rules),
            "effects": [effect.to_dict() for effect in self.effects],
            "idle": [{"rule": rule, "reason": reason} for rule, reason in self.idle],
            "layers": list(self.layers),
            "groups": list(self.groups),
            "notes": list(self.notes),
        }

    def to_pandas(self) -> Any:
        """A data frame with a row per effect; needs pandas."""
        rows = [effect.to_dict() for effect in self.effects]
        return data_frame({name: [row[name] for row in rows] for name in RuleEffect.__dataclass_fields__})

    def tables(self) -> list[Table]:
        head = ("rule", "group", "layer", "experts", "tokens", "chosen now", "choices moved", "", "saturated")
        rows = [
            (
                effect.rule + 1,
                effect.group,
                effect.layer,
                show_numbers(effect.experts) if len(effect.experts) <= 4 else number_of(len(effect.experts), "expert"),
                effect.tokens,
                effect.frequency,
                round(effect.moved),
                effect.certainty,
                show_numbers(effect.saturated) or "none",
            )
            for effect in self.effects[:_SHOWN]
        ]
        more = len(self.effects) - len(rows)
        reached = f"Layers reached: {show_numbers(self.layers)}; groups: {', '.join(self.groups)}"
        title = "\n".join(
            [*(f"{number}. {rule}" for number, rule in enumerate(self.rules, 1)), reached if self.effects else ""]
        ).rstrip()
        notes = [f"and {more} more rows: to_pandas()"] if more > 0 else []
        notes += [f"rule {rule + 1} will do nothing: {reason}" for rule, reason in self.idle]
        notes += dict.fromkeys(effect.note for effect in self.effects if effect.note)
        return [Table(head, rows, title, "\n".join([*notes, *self.notes]))]


def explain(
    rules: Sequence[Rule], model: PlanModel, given: Any, groups: Sequence[str] | str | None = None
) -> PlanExplanation:
    """Explain the rules of a plan for ``model``; see ``Plan.explain``."""
    source: _Sums | _Tokens
    if hasattr(given, "layer_numbers"):
        source = _Tokens(given, model.num_experts)
    elif hasattr(given, "token_sum"):
        source = _Sums(given)
        recorded = PlanModel.of_recording(given.metadata, tuple(given.num_experts))
        model.merged(replace(recorded, name=None))  # the same weights may have several names
    else:
        raise PlanError(
            f"explain takes RoutingStatistics or a Trace, not {type(given).__name__}: recorder.statistics()"
        )
    names = [groups] if isinstance(groups, str) else list(source.groups if groups is None else groups)
    unknown = [name for name in names if name not in source.groups]
    if unknown or not names:
        raise PlanError(
            f"no group {unknown[0]!r} was recorded: there are {', '.join(map(repr, source.groups))}"
            if unknown
            else "there is no group to explain: record some texts"
        )
    effects: list[RuleEffect] = []
    idle: list[tuple[int, str]] = []
    for number, rule in enumerate(rules):
        _check_fits(rule, source)
        of_rule = list(_effects(number, rule, source, names))
        effects += of_rule
        if not any(effect.moved for effect in of_rule):
            idle.append((number, _reason(rule, of_rule, names)))
    return PlanExplanation(tuple(effects), tuple(idle), tuple(map(str, rules)), tuple(source.notes))


def _check_fits(rule: Rule, source: _Sums | _Tokens) -> None:
    for layer in rule.touched_layers or ():
        if layer >= source.num_layers:
            raise PlanError(
                f"the plan steers layer {layer}, the recording has {source.num_layers} layers: explain it with a "
                "recording of the model that it was made for"
            )
        size = source.size(layer)
        wrong = [expert for expert, _ in rule.in_layer(layer) if size is not None and expert >= size]
        if wrong:
            raise PlanError(
                f"the plan names expert {wrong[0]} of layer {layer}, which has {size} experts: explain it with a "
                "recording of the model that it was made for"
            )


def _reason(rule: Rule, effects: Sequence[RuleEffect], names: Sequence[str]) -> str:
    if rule.groups is not None and not set(rule.groups) & set(names):
        return f"none of its groups ({', '.join(rule.groups)}) is among these"
    if not effects:
        return "it reaches no layer of the recording"
    if not any(effect.tokens for effect in effects):
        return "no recorded token meets its conditions"
    if rule.unmoved:
        return rule.unmoved
    if all(set(effect.saturated) == set(effect.experts) for effect in effects):
        return "its experts are saturated already"
    return "it leaves every choice as it is"


def _effects(number: int, rule: Rule, source: _Sums | _Tokens, names: Sequence[str]) -> Iterator[RuleEffect]:
    for group in names:
        if not (rule.groups is None or group in rule.groups):
            continue
        for layer in range(source.num_layers):
            if rule.touches(layer) and source.has(layer):
                yield _effect(number, rule, group, layer, source)


def _effect(number: int, rule: Rule, group: str, layer: int, source: _Sums | _Tokens) -> RuleEffect:
    if not rule.by_position:
        return _effect_of(number, rule, group, layer, source)
    parts = [_effect_of(number, part, group, layer, source) for part in rule.parts]
    if not source.sees_tokens:  # each part counts all tokens
        most = max(parts, key=lambda part: part.moved)
        return (
            most if most.certainty == "none" else replace(most, moved_tokens=None, certainty="at most", note=_UNPLACED)
        )
    seen = [part for part in parts if part.tokens] or parts[:1]
    tokens = sum(part.tokens for part in seen)
    moved = [part.moved_tokens for part in seen]
    return replace(
        seen[0],
        tokens=tokens,
        frequency=sum(part.frequency * part.tokens for part in seen) / tokens if tokens else float("nan"),
        moved=sum(part.moved for part in seen),
        moved_tokens=None if None in moved else sum(count for count in moved if count is not None),
        certainty=max((part.certainty for part in seen), key=_CERTAINTIES.index),
        saturated=tuple(e for e in seen[0].saturated if all(e in part.saturated for part in seen)),
    )


def _effect_of(number: int, rule: Rule, group: str, layer: int, source: _Sums | _Tokens) -> RuleEffect:
    tokens, counts = source.counts(rule, group, layer)
    pairs = rule.in_layer(layer)
    experts = tuple(expert for expert, _ in pairs) or tuple(range(len(counts)))
    chosen = counts[list(experts)]
    moved, certainty, side, note, others = rule.forecast(Seen(tokens, counts, source.top_k(layer), pairs))
    if certainty == "exact" and rule.positions is not None and not source.sees_tokens:
        certainty, note = "at most", _UNPLACED
    if not moved.any() and certainty != "at most":
        certainty = "none" if certainty == "exact" else certainty
    share = chosen / tokens if tokens else np.full(len(experts), np.nan)
    full = (
        share > 1 - SATURATED if side == GAINS else share < SATURATED if side == LOSES else np.zeros(len(share), bool)
    )
    saturated = tuple(expert for expert, is_full in zip(experts, full, strict=True) if is_full)
    exact = certainty in ("exact", "none")
    touched = (
        source.touched(rule, group, layer, experts if others is None else others, side) if exact and side else None
    )
    frequency = float(share.mean()) if len(share) else float("nan")
    return RuleEffect(
        number, group, layer, experts, tokens, frequency, float(moved.sum()), touched, certainty, saturated, note
    )


class _Sums:
    """Counts of a recording that kept sums."""

    sees_tokens = False

    def __init__(self, statistics: Counted) -> None:
        self.statistics = statistics
        self.groups = tuple(statistics.groups)
        self.num_layers = len(statistics.num_experts)
        self.notes: list[str] = []
        self.metric = "counts"
        if "natural_counts" in statistics.metrics:
            self.metric = "natural_counts"
            self.notes.append("the recording was steered: the natural choice is taken")
        elif statistics.metadata.get("plans"):
            self.notes.append("the recording was steered, and only the steered choice was kept")
        self._counts: dict[str | None, np.ndarray] = {}

    def has(self, layer: int) -> bool:
        return layer < self.num_layers

    def size(self, layer: int) -> int:
        return int(self.statistics.num_experts[layer])

    def top_k(self, layer: int) -> int:
        return int(self.statistics.top_k[layer])

    def counts(self, rule: Rule, group: str, layer: int) -> tuple[int, np.ndarray]:
        """Tokens of the phase, and how many of them chose each expert."""
        if rule.phase not in self._counts:
            self._counts[rule.phase] = self.statistics.token_sum(self.metric, rule.phase)
        row = self.groups.index(group)
        counts = self._counts[rule.phase][row, layer, : self.size(layer)]
        return int(self.statistics.tokens(rule.phase)[row, layer]), counts

    def touched(self, *_: Any) -> int | None:
        return None


class _Tokens:
    """Choices of single tokens."""

    sees_tokens = True

    def __init__(self, trace: Any, num_experts: Sequence[int] | None) -> None:
        self.trace, self.num_experts = trace, num_experts
        self.groups = tuple(trace.groups)
        self.layers = tuple(trace.layer_numbers)
        self.num_layers = max(self.layers, default=-1) + 1
        self.notes = ["the trace is cut: later tokens are missing"] if trace.truncated else []

    def has(self, layer: int) -> bool:
        return layer in self.layers

    def size(self, layer: int) -> int | None:
        return None if self.num_experts is None else self.num_experts[layer]

    def top_k(self, layer: int) -> int:
        return int(self.trace.ids.shape[2])

    def _ids(self, rule: Rule, group: str, layer: int) -> np.ndarray:
        """Ids [tokens, k] of the tokens that meet the conditions of the rule."""
        trace = self.trace
        kept = trace.group == self.groups.index(group)
        if rule.phase is not None:
            kept &= trace.phase == PHASES.index(rule.phase)
        if rule.positions is not None:
            inside = [
                (trace.position >= start) & (trace.position < (np.inf if stop is None else stop))
                for start, stop in rule.positions
            ]
            kept &= np.any(inside, axis=0)
        ids: np.ndarray = trace.ids[kept, self.layers.index(layer)].astype(np.int64)
        return ids

    def counts(self, rule: Rule, group: str, layer: int) -> tuple[int, np.ndarray]:
        ids = self._ids(rule, group, layer)
        named = [expert for expert, _ in rule.in_layer(layer)]
        seen = int(self.trace.ids.max(initial=-1))
        width = max([seen + 1, self.size(layer) or 0, self.top_k(layer), *(expert + 1 for expert in named)])
        return len(ids), np.bincount(ids[ids >= 0], minlength=width)

    def touched(self, rule: Rule, group: str, layer: int, experts: Sequence[int], side: str) -> int | None:
        """Tokens that lack one of the experts (a rule that adds them), or have one (a rule that takes them away)."""
        if rule.absent and side == LOSES:
            return 0
        ids = self._ids(rule, group, layer)
        has = (ids[:, :, None] == np.asarray(experts, np.int64)).any(1)
        return int((~has).any(1).sum() if side == GAINS else has.any(1).sum())


# ---- two plans compared

# what a rule does, and where: kind, mode, conditions, layer (None for every layer), expert (None for the whole layer)
_Place = tuple[str, str, str, "int | None", "int | None"]


@dataclass(frozen=True)
class PlanChange:
    """Experts of one layer that two plans treat differently.

    Attributes:
        kind, where: the kind of rule, with its mode, and its conditions in words.
        layer: None for every layer.
        experts: () for rules of a whole layer.
        before, after: the strength, factor or value in each plan, "yes" for rules without one, None where the plan has
            no such rule.
    """

    kind: str
    where: str
    layer: int | None
    experts: tuple[int, ...]
    before: float | str | None
    after: float | str | None


@dataclass(frozen=True, repr=False)
class PlanDifference(ShownAsTables):
    """Differences between two plans. False if they do the same; ``model`` holds two models if those differ."""

    changes: tuple[PlanChange, ...]
    model: tuple[str, str] | None = None

    def __bool__(self) -> bool:
        return bool(self.changes or self.model)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        changes = [{**vars(change), "experts": list(change.experts)} for change in self.changes]
        return {"changes": changes, "model": None if self.model is None else list(self.model)}

    def tables(self) -> list[Table]:
        if not self:
            return [Table(("the plans are equal",), [])]
        rows = [
            (
                change.kind,
                "every" if change.layer is None else change.layer,
                show_numbers(change.experts) or "all",
                change.where or "everywhere",
                *(f"{value:+g}" if isinstance(value, float) else value for value in (change.before, change.after)),
            )
            for change in self.changes[:_SHOWN_CHANGES]
        ]
        more = len(self.changes) - len(rows)
        title = "" if self.model is None else f"made for another model: {self.model[0]}, {self.model[1]}"
        head = ("rule", "layer", "experts", "where", "before", "after")
        return [Table(head, rows, title, f"and {more} more rows: to_dict()" if more > 0 else "")]


def compare(before: Sequence[Rule], after: Sequence[Rule], models: tuple[PlanModel, PlanModel]) -> PlanDifference:
    """Compare the rules of two plans, and the models that they are for; see ``Plan.diff``."""
    old, new = _values(before), _values(after)
    grouped: dict[tuple[Any, ...], list[int]] = {}
    for place in sorted({*old, *new}, key=repr):
        if old.get(place) != new.get(place):
            *what, expert = place
            grouped.setdefault((*what, old.get(place), new.get(place)), []).extend([] if expert is None else [expert])
    changes = [
        PlanChange(f"{kind} ({mode})" if mode else kind, where, layer, tuple(sorted(experts)), was, now)
        for (kind, mode, where, layer, was, now), experts in grouped.items()
    ]
    changes.sort(key=lambda change: (-1 if change.layer is None else change.layer, change.kind, change.experts))
    return PlanDifference(tuple(changes), None if models[0] == models[1] else (str(models[0]), str(models[1])))


def _values(rules: Sequence[Rule]) -> dict[_Place, float | str]:
    """The combined value of all rules, by place: strengths add, factors multiply."""
    values: dict[_Place, float | str] = {}
    for rule in (part for whole in rules for part in whole.parts):
        mode, where = rule.mode if len(rule.modes) > 1 else "", rule.shown[2]
        for layer, expert, value in rule.entries():
            place = (rule.kind, mode, where, layer, expert)
            known = values.get(place)
            if isinstance(known, float) and isinstance(value, float):
                values[place] = rule.joined(known, value)
            else:
                values[place] = value if known is None else f"{known}, {value}"
    return values

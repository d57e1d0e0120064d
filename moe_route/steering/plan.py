"""``Plan``: what is done to which experts, where and when. Immutable; plans add up and scale."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import Any

import numpy as np

from moe_route import files
from moe_route.steering.compiled import CompiledPlan, HasExperts, compile_rules
from moe_route.steering.model import PlanError, PlanModel
from moe_route.steering.rule import (
    LAYER_KINDS,
    VALUED_KINDS,
    Experts,
    Rule,
    as_groups,
    as_phase,
    as_positions,
    checked,
    make_rule,
    rule_from_dict,
)
from moe_route.steering.selection import ExpertSelection, random_permutation

__all__ = ["Plan"]

_KIND = "plan"


class Plan:
    """An immutable collection of steering rules.

    Made by the class methods below, each of which gives a plan of one rule; combined with ``+`` (any order is the same
    plan), scaled with ``*``, narrowed with ``only``. Experts are a mapping from layer (0-based among MoE layers) to
    expert ids, such as an ``ExpertSelection``, or to {expert: coefficient}; or ids alone, meant for each of ``layers``.
    ``layers`` restricts the rule to some layers and is counted from ``layer_base`` (0 or 1), since published recipes
    differ; the keys of a mapping always count from 0.

    Where rules meet on one expert: strengths add, factors multiply, off wins over on, forbid wins over all.

    Two plans are equal, and have the same ``hash``, when they hold the same rules for the same model, whatever their
    order and description. Bad values raise ``PlanError``.
    """

    __slots__ = ("description", "model", "rules")
    rules: tuple[Rule, ...]
    model: PlanModel
    description: str

    def __init__(self, rules: Iterable[Rule] = (), *, model: PlanModel | None = None, description: str = "") -> None:
        # one order for one plan: a sum does not depend on the order of its terms
        ordered = sorted(rules, key=lambda rule: files.canonical_json(rule.to_dict()))
        self.rules = tuple(ordered)
        self.model = model or PlanModel()
        self.description = str(description)

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, name):
            raise AttributeError("a plan is immutable: make a new one")
        object.__setattr__(self, name, value)

    # -- what can be done to experts

    @classmethod
    def activate(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        strength: float = 0.5,
        *,
        std: str = "population",
        layer_base: int = 0,
    ) -> Plan:
        """Soft activation: ``z_e += strength * std(z)``, std over the allowed logits of the token [arXiv 2510.04694,
        eq. 4].

        ``std`` is "population" (default) or "sample".
        """
        return cls._of("activate", experts, layers, layer_base, strength=strength, mode=std)

    @classmethod
    def deactivate(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        strength: float = 0.5,
        *,
        std: str = "population",
        layer_base: int = 0,
    ) -> Plan:
        """Soft deactivation: ``z_e -= strength * std(z)``; the opposite of ``activate``."""
        return cls.activate(experts, layers, -strength, std=std, layer_base=layer_base)

    @classmethod
    def force_on(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        weight: str = "paper",
        *,
        layer_base: int = 0,
    ) -> Plan:
        """Choose the experts first. ``weight`` says what they weigh.

        "paper": their logit becomes the largest of the row [arXiv 2510.04694, eq. 5]; "steermoe": the largest
        log-softmax plus 0.01 [arXiv 2509.09660]; "natural": their own.
        """
        return cls._of("force_on", experts, layers, layer_base, mode=weight)

    @classmethod
    def force_off(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        weight: str = "paper",
        *,
        layer_base: int = 0,
    ) -> Plan:
        """Choose the experts last: only where fewer than k others are left. ``weight`` as in ``force_on``, with the
        row's smallest logit.
        """
        return cls._of("force_off", experts, layers, layer_base, mode=weight)

    @classmethod
    def forbid(cls, experts: Experts, layers: Iterable[int] | int | None = None, *, layer_base: int = 0) -> Plan:
        """Never choose the experts (ablation, ``z_e = -inf``); a slot with nothing left to choose stays empty."""
        return cls._of("forbid", experts, layers, layer_base)

    @classmethod
    def bias(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        value: float = 1.0,
        *,
        on: str = "logit",
        layer_base: int = 0,
    ) -> Plan:
        """Add ``value`` (times each expert's coefficient): to the "logit", to the "score", or to the score for the
        "choice" alone.
        """
        return cls._of("bias", experts, layers, layer_base, strength=value, mode=on)

    @classmethod
    def magnitude(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        strength: float = 0.5,
        *,
        layer_base: int = 0,
    ) -> Plan:
        """``z_e += strength * c_e * |z_e|``, c_e the expert's coefficient, 1 unless given [arXiv 2601.14050]."""
        return cls._of("magnitude", experts, layers, layer_base, strength=strength)

    @classmethod
    def scale_logits(
        cls, experts: Experts, layers: Iterable[int] | int | None = None, factor: float = 1.0, *, layer_base: int = 0
    ) -> Plan:
        """``z_e *= factor`` (times each expert's coefficient). ``plan * x`` gives ``factor ** x``."""
        return cls._of("scale_logits", experts, layers, layer_base, factor=factor)

    @classmethod
    def scale_weights(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        factor: float = 1.0,
        *,
        when: str = "before",
        layer_base: int = 0,
    ) -> Plan:
        """``w_e *= factor`` after selection, "before" or "after" the weights are renormalized. ``plan * x`` gives
        ``factor ** x``.
        """
        return cls._of("scale_weights", experts, layers, layer_base, factor=factor, mode=when)

    @classmethod
    def temperature(cls, value: float, layers: Iterable[int] | int | None = None, *, layer_base: int = 0) -> Plan:
        """``z /= value`` for all experts of the layers (every layer by default). ``plan * x`` gives ``value ** x``."""
        return cls._of("temperature", None, layers, layer_base, value=value)

    @classmethod
    def top_k(cls, k: int, layers: Iterable[int] | int | None = None, *, layer_base: int = 0) -> Plan:
        """Fewer or more experts a token: the first ``k`` slots are filled, the rest stay empty; from 1 to the layer's
        number of experts. More than the model's own k costs those layers that many slots for every token.
        """
        return cls._of("top_k", None, layers, layer_base, value=k)

    @classmethod
    def scores(
        cls,
        scores: Mapping[int, Mapping[int, float]],
        layers: Iterable[int] | int | None = None,
        *,
        layer_base: int = 0,
    ) -> Plan:
        """Put ``scores[layer][expert]`` in the place of the router's scores (0 for experts not named), then choose and
        weigh as ever [arXiv 2504.07964]. Scores of a softmax are shares, whatever their sum; other rules act on them
        as on the router's own. ``only`` says at which tokens. ``ValueError`` when steering a SparseMixer router.
        """
        return cls._of("scores", scores, layers, layer_base)

    @classmethod
    def slot(cls, experts: Experts, layers: Iterable[int] | int | None = None, *, layer_base: int = 0) -> Plan:
        """The last slot goes to this expert (one a layer) where the router did not choose it: a group's own expert,
        with ``only(groups=...)`` [hybrid-k, arXiv 2410.10626]. It weighs by its own score; forbid and force_off win
        over it.
        """
        return cls._of("slot", experts, layers, layer_base)

    @classmethod
    def replay(
        cls,
        experts: Mapping[int, Sequence[int]],
        layers: Iterable[int] | int | None = None,
        *,
        layer_base: int = 0,
    ) -> Plan:
        """Exactly these experts, in this order, weighed by the model's own scores [arXiv 2510.11370]; slots beyond them
        stay empty. Tokens that other conditions leave out are routed as ever.
        """
        placed = {layer: {expert: slot for slot, expert in enumerate(ids)} for layer, ids in experts.items()}
        return cls._of("replay", placed, layers, layer_base)

    @classmethod
    def remap(
        cls,
        experts: Mapping[int, Mapping[int, int]],
        layers: Iterable[int] | int | None = None,
        *,
        layer_base: int = 0,
    ) -> Plan:
        """After selection expert e of a layer becomes ``experts[layer][e]`` (-1: dropped); duplicates merge, their
        weights add up.
        """
        return cls._of("remap", experts, layers, layer_base)

    @classmethod
    def _of(
        cls, kind: str, experts: Experts | None, layers: Iterable[int] | int | None, layer_base: int, **values: Any
    ) -> Plan:
        rule = make_rule(kind, experts, layers, layer_base=layer_base, **values)
        if not isinstance(experts, ExpertSelection):
            return cls([rule])
        return cls([rule], model=experts.model, description=experts.description)

    # -- conditions and algebra

    def only(
        self,
        groups: Sequence[str] | str | None = None,
        phase: str | None = None,
        layers: Iterable[int] | int | None = None,
        positions: Any = None,
        *,
        absent: bool = False,
        layer_base: int = 0,
    ) -> Plan:
        """The plan where these conditions hold too: group of the token, "prefill" or "decode", layers, positions of the
        token in its sequence (padding not counted: a number, a range, or several), and, with ``absent``, only for
        experts that the router does not choose by itself. Conditions narrow each other.

        Rules that can then never hold are left out, so ``p.only(phase="prefill").only(phase="decode")`` is the empty
        plan.
        """
        names, at, where = as_groups(groups), as_phase(phase), as_positions(positions)
        numbers = (
            None if layers is None else make_rule("temperature", None, layers, layer_base=layer_base, value=1).layers
        )
        narrowed = (rule.restricted(names, at, numbers, where, absent) for rule in self.rules)
        return self._with(rule for rule in narrowed if rule is not None)

    def _with(self, rules: Iterable[Rule]) -> Plan:
        return Plan(rules, model=self.model, description=self.description)

    def __add__(self, other: Plan) -> Plan:
        """Both plans at once; ``PlanError`` when they were made for different models."""
        if not isinstance(other, Plan):
            return NotImplemented
        texts = [text for text in dict.fromkeys([self.description, other.description]) if text]
        return Plan(
            self.rules + other.rules, model=self.model.merged(other.model), description=" + ".join(sorted(texts))
        )

    def __radd__(self, other: object) -> Plan:
        """Lets ``sum`` start from 0."""
        return self if other == 0 and not isinstance(other, Plan) else NotImplemented

    def __mul__(self, factor: float) -> Plan:
        """Every strength times ``factor`` (factors of multiplicative rules to that power); ``PlanError`` for forced and
        forbidden experts.
        """
        if isinstance(factor, bool) or not hasattr(factor, "__float__") or isinstance(factor, Plan):
            return NotImplemented
        return self._with(rule.scaled(float(factor)) for rule in self.rules)

    __rmul__ = __mul__

    def __neg__(self) -> Plan:
        return self * -1.0

    def __sub__(self, other: Plan) -> Plan:
        return self + other * -1.0 if isinstance(other, Plan) else NotImplemented

    def __bool__(self) -> bool:
        """False for the plan without rules."""
        return bool(self.rules)

    def __eq__(self, other: object) -> bool:
        return self._content() == other._content() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[tuple[Rule, ...], PlanModel]:
        return self.rules, self.model

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the rules and the model: the same for equal plans, on any machine. Part of any cache key of
        steered results.
        """
        content = self.to_dict()
        del content["description"]
        return hashlib.sha256(files.canonical_json(content).encode()).hexdigest()

    # -- controls

    def control(self, kind: str, value: Any = None, *, num_experts: int | Sequence[int] | None = None) -> Plan:
        """The plan's control experiment, one argument away [the ablations of arXiv 2510.04694].

        Args:
            kind: "random": as many experts of each layer, drawn at random by the seed ``value`` (default 0); "tokens":
                the same, drawn anew for each token, from the seed, its position and its id, whatever the batch;
                "layers": the same selection in other layers, ``value`` (its experts there, which the plan has kept);
                "experts": other experts, ``value`` (a mapping from layer to ids), under the same rules; "deactivate":
                strengths negated, on and off exchanged.
            value: what the kind needs.
            num_experts: experts per layer for "random", where the plan does not know its model.

        Raises ``PlanError`` for what cannot be done, such as layers in which the selection has no expert.
        """
        controls: dict[str, Callable[[], Plan]] = {
            "random": lambda: self._random(0 if value is None else value, num_experts),
            "tokens": lambda: self._with(
                checked(replace(rule, draw=index(0 if value is None else value))) for rule in self.rules
            ),
            "layers": lambda: self._in_layers(value),
            "experts": lambda: self._with_experts(value),
            "deactivate": lambda: self._with(rule.opposite() for rule in self.rules),
        }
        if kind not in controls:
            raise PlanError(f"there is no control {kind!r}: use one of {', '.join(map(repr, controls))}")
        made = controls[kind]()
        shown = f"{kind} {value!r}" if kind in ("random", "tokens") and value is not None else kind
        return Plan(made.rules, model=made.model, description=f"control ({shown}) of {self.description or 'a plan'}")

    def _random(self, seed: int, num_experts: int | Sequence[int] | None) -> Plan:
        shape = num_experts if num_experts is not None else self.model.num_experts
        if shape is None:
            raise PlanError("how many experts the layers have is not known: pass num_experts")

        def relabeled(rule: Rule) -> Rule:
            # a permutation keeps what distinguishes rules and experts from each other and only draws which experts they
            # are
            experts = []
            for layer, pairs in rule.experts:
                size = shape if isinstance(shape, int) else shape[layer] if layer < len(shape) else 0
                _check_experts(layer, pairs, size)
                order = random_permutation(seed, layer, size)
                new = {int(order[e]): _relabeled_target(c, order) if rule.kind == "remap" else c for e, c in pairs}
                experts.append((layer, tuple(sorted(new.items()))))
            return replace(rule, experts=tuple(experts))

        return self._with(map(relabeled, self.rules))

    def _in_layers(self, layers: Iterable[int] | int | None) -> Plan:
        if layers is None:
            raise PlanError('control("layers") needs the layers to steer: control("layers", range(0, 8))')
        rules = []
        for rule in self.rules:
            experts = None if rule.kind in LAYER_KINDS else {layer: dict(pairs) for layer, pairs in rule.experts}
            moved = make_rule(rule.kind, experts, layers, value=rule.value, mode=rule.mode)
            rules.append(_as_before(moved, rule))
        return self._with(rules)

    def _with_experts(self, experts: Experts | None) -> Plan:
        if experts is None:
            raise PlanError('control("experts") needs the other experts: control("experts", multilingual)')
        rules = []
        for rule in self.rules:
            if rule.kind in LAYER_KINDS or rule.kind == "remap":
                rules.append(rule)
                continue
            factors = {coefficient for _, pairs in rule.experts for _, coefficient in pairs}
            if len(factors) > 1 or rule.kind in VALUED_KINDS:
                raise PlanError(f"a {rule.kind} rule with a coefficient for each expert has no other experts to go to")
            other = make_rule(rule.kind, experts, rule.layers, factor=min(factors), mode=rule.mode)
            rules.append(_as_before(other, rule))
        return self._with(rules)

    # -- the model, tables, files

    def for_model(
        self, name: str | None = None, *, config_hash: str | None = None, num_experts: Sequence[int] | None = None
    ) -> Plan:
        """The plan marked as made for this model; without arguments for any model."""
        shape = None if num_experts is None else tuple(num_experts)
        return Plan(self.rules, model=PlanModel(name, config_hash, shape), description=self.description)

    def check_model(
        self, name: str | None = None, *, config_hash: str | None = None, num_experts: Sequence[int] | None = None
    ) -> None:
        """Raises ``PlanError`` when the plan was made for another model than this; what either side does not say is not
        compared.
        """
        shape = None if num_experts is None else tuple(num_experts)
        # names of the same weights differ (a hub id, a local folder), so a matching configuration decides over the name
        same = self.model.config_hash is not None and self.model.config_hash == config_hash
        self.model.merged(PlanModel(None if same else name, config_hash, shape))

    def compile(self, routers: Sequence[HasExperts], groups: Sequence[str] = ()) -> CompiledPlan:
        """The plan as steering tables, one per layer, and the row of each (phase, group).

        ``routers`` gives the experts and top-k of each MoE layer in order (``RouterInfo`` or ``LayerShape``); ``groups``
        the names of the groups, by index. Raises ``PlanError`` for layers, experts or groups that are not there, and
        for rules that contradict each other.
        """
        self.check_model(num_experts=[router.num_experts for router in routers])
        return compile_rules(self.rules, routers, tuple(groups), self.hash)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content: ``from_dict`` gives an equal plan."""
        return {
            "rules": [rule.to_dict() for rule in self.rules],
            "model": self.model.to_dict(),
            "description": self.description,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """The plan that ``to_dict`` described; ``PlanError`` for anything else."""
        try:
            rules = [rule_from_dict(rule) for rule in content["rules"]]
            return cls(rules, model=PlanModel(**content.get("model", {})), description=content.get("description", ""))
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"this is not a plan ({error!r}): pass what Plan.to_dict gave") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to ``path``, whole or not at all."""
        files.write(path, {}, {**self.to_dict(), "hash": self.hash}, _KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what ``save`` wrote; raises ``files.FileRefusedError`` for anything else."""
        return cls.from_dict(files.read(path, _KIND)[1])

    def describe(self) -> str:
        """What the plan does, a line for each rule."""
        count = f"{len(self.rules)} rule{'' if len(self.rules) == 1 else 's'}"
        first = f"Plan of {count} for {self.model}, hash {self.hash[:12]}"
        note = [f"  {self.description}"] if self.description else []
        return "\n".join([first, *note, *(f"  {number}. {rule}" for number, rule in enumerate(self.rules, 1))])

    def __repr__(self) -> str:
        return f"Plan({'; '.join(map(str, self.rules)) or 'nothing'})"


def _as_before(rule: Rule, before: Rule) -> Rule:
    """``rule`` with the strength and the conditions of ``before`` but for its layers."""
    kept = ("strength", "groups", "phase", "positions", "absent", "draw")
    return replace(rule, **{name: getattr(before, name) for name in kept})


def _check_experts(layer: int, pairs: tuple[tuple[int, float], ...], size: int) -> None:
    if not size or pairs[-1][0] >= size:
        raise PlanError(f"layer {layer} has {size} experts, the plan names expert {pairs[-1][0]}: check num_experts")


def _relabeled_target(target: float, order: np.ndarray) -> float:
    return target if target < 0 else float(order[int(target)])

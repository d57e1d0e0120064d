"""``Plan``: changes to experts, with their layers, tokens and strengths. Plans are immutable, add up and scale."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from math import comb, prod
from operator import index
from typing import Any, Literal

import numpy as np
from torch import Tensor

from moe_route.base import files, hub
from moe_route.base.schema import Kind, meant
from moe_route.base.table import Table, printable
from moe_route.steering import kinds
from moe_route.steering.compile import CompiledPlan, HasExperts, compile_rules
from moe_route.steering.explain import PlanDifference, PlanExplanation, compare, explain
from moe_route.steering.functions import Function, RoutingFunction
from moe_route.steering.model import PlanError, PlanFileError, PlanModel
from moe_route.steering.rule import (
    Experts,
    Rule,
    RuleContent,
    Strength,
    as_groups,
    as_phase,
    as_positions,
    rule_of,
)
from moe_route.steering.selection import ExpertSelection, random_permutation
from moe_route.steering.tables import (
    DirectionContent,
    DirectionTable,
    PlanTable,
    RecordedChoices,
    ReplayTable,
    ScoreTable,
    TableContent,
    table_of,
)

_KIND = "plan"
_SHOWN, _SHOWN_IN_HTML = 8, 50  # number of rules that repr and notebooks list
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanContent:
    """A plan: rules that steer the experts of a model.

    Attributes:
        rules: what is done, in any order.
        model: the model that the plan is for; without it, any model.
        description: where the plan comes from.
        tables: values per token, and directions, that rules name; a name is the hash of its table.
        hash: hash of the rules and the model when the plan was saved; the log tells if they were edited since.
    """

    rules: tuple[RuleContent, ...]
    model: PlanModel = field(default_factory=PlanModel)
    description: str = ""
    tables: Mapping[str, TableContent | DirectionContent] = field(default_factory=dict)
    hash: str | None = None


PLAN = Kind(_KIND, PlanContent)
"""Files of plans."""


class Plan:
    """An immutable collection of steering rules.

    The class methods below each make a plan of one rule. Plans are combined with ``+`` (in any order), scaled with
    ``*`` and narrowed with ``only``.

    Experts are a mapping from layer (index among the MoE layers) to expert ids, such as an ``ExpertSelection``, or to
    {expert: coefficient}. They may also be ids alone, used in each of ``layers``. ``layers`` restricts a rule to some
    layers. The layer numbers of a publication may count from 1 and include both ends;
    ``moe_route.layers(8, 35, base=1)`` converts them.

    ``strength`` is the size of the change in all methods: a number, or numbers by position of the sequence, from 0
    (padding not counted), past the last of which the rule does nothing. Several numbers are one rule, which does what
    one rule per position does, to the bit.

    If rules meet on one expert, strengths add, factors multiply, off wins over on, and forbid wins over everything.

    Two plans are equal, and have the same ``hash``, if they hold the same rules for the same model, whatever their
    order and description. Invalid values raise ``PlanError``.
    """

    __slots__ = ("_ordered", "_rules", "description", "model")
    _rules: tuple[Rule, ...]
    _ordered: bool
    model: PlanModel
    description: str

    def __init__(self, rules: Iterable[Rule] = (), *, model: PlanModel | None = None, description: str = "") -> None:
        self._rules = tuple(rules)
        self._ordered = len(self._rules) < 2
        self.model = model or PlanModel()
        self.description = str(description)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules in a canonical order, independent of the order in which they were added.

        Functions of ``apply`` come last, in the order in which they were added, since they run in it.
        """
        if not self._ordered:  # sorted on first use, so that a sum of many plans sorts once
            free = (rule for rule in self._rules if not rule.ordered)
            ordered = sorted(free, key=lambda rule: files.canonical_json(rule.to_dict()))
            ordered += (rule for rule in self._rules if rule.ordered)
            object.__setattr__(self, "_rules", tuple(ordered))
            object.__setattr__(self, "_ordered", True)
        return self._rules

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, name):
            raise AttributeError("a plan is immutable: make a new one")
        object.__setattr__(self, name, value)

    # -- rules

    @classmethod
    def activate(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        *,
        strength: Strength = 0.5,
        correction: int = 0,
    ) -> Plan:
        """Soft activation: ``z_e += strength * std(z)``, std over the token's allowed logits [arXiv 2510.04694, eq. 4].

        ``correction`` is that of ``torch.std``: 0 for the population (default), 1 for a sample.
        """
        if correction not in (0, 1):
            raise PlanError(f"correction must be 0 (population) or 1 (sample), as for torch.std, not {correction!r}")
        mode = "sample" if correction else "population"
        return cls._of(kinds.Activate, experts, layers, strength=strength, mode=mode)

    @classmethod
    def deactivate(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        *,
        strength: Strength = 0.5,
        correction: int = 0,
    ) -> Plan:
        """Soft deactivation: ``z_e -= strength * std(z)``, the opposite of ``activate``."""
        return cls.activate(experts, layers, strength=strength, correction=correction) * -1

    @classmethod
    def force_on(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        *,
        weight: str = "paper",
    ) -> Plan:
        """Choose these experts before all others. ``weight`` determines their weights.

        "paper": their logit becomes the largest of the row [arXiv 2510.04694, eq. 5]. "steermoe": their logit becomes
        the largest log-softmax plus 0.01 [arXiv 2509.09660]. "natural": they keep their own logit.
        """
        return cls._of(kinds.ForceOn, experts, layers, mode=weight)

    @classmethod
    def force_off(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        *,
        weight: str = "paper",
    ) -> Plan:
        """Choose these experts last, only if fewer than k others are left.

        ``weight`` is as in ``force_on``, with the smallest logit of the row.
        """
        return cls._of(kinds.ForceOff, experts, layers, mode=weight)

    @classmethod
    def forbid(cls, experts: Experts, layers: Iterable[int] | int | None = None) -> Plan:
        """Never choose these experts (ablation, ``z_e = -inf``); a slot without any eligible expert stays empty."""
        return cls._of(kinds.Forbid, experts, layers)

    @classmethod
    def bias(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        *,
        strength: Strength = 1.0,
        on: str = "logit",
    ) -> Plan:
        """Add ``strength`` times the expert's coefficient (1 by default).

        ``on="logit"`` adds it to the logit, ``"score"`` to the score, and ``"choice"`` to the score for the choice
        only.
        """
        return cls._of(kinds.Bias, experts, layers, strength=strength, mode=on)

    @classmethod
    def magnitude(
        cls, experts: Experts, layers: Iterable[int] | int | None = None, *, strength: Strength = 0.5
    ) -> Plan:
        """``z_e += strength * c_e * |z_e|``, with the expert's coefficient c_e (1 by default) [arXiv 2601.14050]."""
        return cls._of(kinds.Magnitude, experts, layers, strength=strength)

    @classmethod
    def scale_logits(
        cls, experts: Experts, layers: Iterable[int] | int | None = None, *, strength: Strength = 1.0
    ) -> Plan:
        """``z_e *= strength``, times the expert's coefficient. ``plan * x`` gives ``strength ** x``."""
        return cls._of(kinds.ScaleLogits, experts, layers, factor=strength)

    @classmethod
    def scale_weights(
        cls,
        experts: Experts,
        layers: Iterable[int] | int | None = None,
        *,
        strength: Strength = 1.0,
        when: str = "before",
    ) -> Plan:
        """``w_e *= strength`` after selection, "before" or "after" renormalization. ``plan * x``: ``strength ** x``."""
        return cls._of(kinds.ScaleWeights, experts, layers, factor=strength, mode=when)

    @classmethod
    def temperature(cls, strength: Strength, /, layers: Iterable[int] | int | None = None) -> Plan:
        """``z /= strength`` for all experts of the layers (default: all layers). ``plan * x``: ``strength ** x``."""
        return cls._of(kinds.Temperature, None, layers, value=strength)

    @classmethod
    def top_k(cls, k: int, /, layers: Iterable[int] | int | None = None) -> Plan:
        """Choose ``k`` experts per token: the first ``k`` slots are filled, the rest stay empty.

        ``k`` is from 1 to the layer's number of experts (at most 64). With more than the model's own k, those layers
        compute that many slots for every token.
        """
        return cls._of(kinds.TopK, None, layers, value=k)

    @classmethod
    def replace_scores(
        cls,
        scores: Mapping[int, Mapping[int, float]] | Tensor | np.ndarray,
        layers: Iterable[int] | int | None = None,
        *,
        items: Sequence[str | int] | None = None,
        per: Literal["token", "sequence"] = "token",
    ) -> Plan:
        """Replace the router's scores before the choice [C3PO, arXiv 2504.07964].

        Choosing and weighing work as for the router's own scores, and so do other rules. Scores of a softmax are
        relative: only their ratios matter. ``only`` restricts the tokens. Steering a SparseMixer router raises
        ``ValueError``.

        Args:
            scores: ``scores[layer][expert]`` for all tokens (0 for experts that it leaves out). Or an array of scores
                for each token ``[B, T, L, E]`` (``[T, L, E]`` for one sequence), or with ``per="sequence"`` for each
                sequence ``[B, L, E]``. A token keeps the router's own scores, bit for bit, where its row is NaN, and
                past the end of its sequence.
            layers: for a mapping, use these layers only. For an array, the MoE layers that the L entries stand for, in
                order (by default all layers of the model).
            items: an item for each of the B sequences of an array, by which they are matched as in ``replay``. Without
                items they are matched by batch row.
            per: whether an array has a row for each "token" or each "sequence".

        Raises ``PlanError`` for negative, infinite or all-zero scores and for a wrong shape. Compiling raises it for
        layers or experts that the model lacks, and a call inside ``steer`` for a sequence without scores.
        """
        if isinstance(scores, Mapping):
            if items is not None or per != "token":
                raise PlanError("a mapping from layer to scores is for all tokens: leave items= and per= out")
            return cls._of(kinds.ReplaceScores, scores, layers)
        table = ScoreTable.of_scores(scores, _named_layers(layers), items, per=per)
        return cls([kinds.ReplaceScores.of(table=table)])

    @classmethod
    def reserve_slot(cls, experts: Experts, layers: Iterable[int] | int | None = None) -> Plan:
        """Give the last slot to this expert (one per layer) unless the router chose it [hybrid-k, arXiv 2410.10626].

        With ``only(groups=...)`` a group gets an expert of its own. The expert is weighed by its own score. forbid and
        force_off win over this rule.
        """
        return cls._of(kinds.ReserveSlot, experts, layers)

    @classmethod
    def fix_choice(cls, experts: Mapping[int, Sequence[int]], layers: Iterable[int] | int | None = None) -> Plan:
        """Choose exactly these experts for every token, in this order, weighed by the model's own scores.

        Further slots stay empty. Tokens outside the conditions of the plan are routed as usual. ``replay`` does the
        same with a separate choice per token.
        """
        placed = {layer: {expert: slot for slot, expert in enumerate(ids)} for layer, ids in experts.items()}
        return cls._of(kinds.FixChoice, placed, layers)

    @classmethod
    def replay(
        cls,
        recorded: RecordedChoices | Tensor | np.ndarray,
        layers: Iterable[int] | int | None = None,
        *,
        items: Sequence[str | int] | None = None,
    ) -> Plan:
        """Choose for each token the experts that were recorded for it (routing replay) [arXiv 2510.11370].

        They are weighed by the model's own scores, with a gradient to the router. A token whose ids begin with -1, or
        that lies past the end of its recorded sequence, keeps the router's own choice bit for bit. A later -1 leaves
        that slot empty.

        Args:
            recorded: a ``Trace``, or integer ids ``[B, T, L, k]`` (``[T, L, k]`` for one sequence). Tokens are matched
                by sequence and position, padding not counted, in prefill and decode alike. Sequences of a trace are
                matched by item (and group, if an item was recorded in several), so the steered run names them with
                ``labels(items=...)``, in any batch. Sequences without items, and ids, are matched by batch row. In a
                batch of n * B rows (beams, returned sequences), each sequence has n rows.
            layers: for a trace, use these layers only. For ids, the MoE layers that the L entries stand for, in order
                (by default all layers of the model).
            items: an item for each of the B sequences of ids, by which they are matched.

        Raises ``PlanError`` for invalid choices (a wrong shape, an expert twice for one token, a truncated trace).
        Compiling raises it for layers or experts that the model lacks. A call inside ``steer`` raises it for a sequence
        that was not recorded.
        """
        if isinstance(recorded, Mapping):
            raise PlanError("a mapping from layer to experts is one choice for all tokens: use Plan.fix_choice")
        if isinstance(recorded, (list, tuple)):
            recorded = np.asarray(recorded)
        if isinstance(recorded, (Tensor, np.ndarray)):
            return cls([kinds.Replay.of(table=ReplayTable.of_ids(recorded, _named_layers(layers), items))])
        if not hasattr(recorded, "layer_numbers"):
            raise PlanError(f"replay takes a Trace or ids, not {type(recorded).__name__}: recorder.trace()")
        if items is not None:
            raise PlanError("a trace has its own items: leave items= out")
        return cls([kinds.Replay.of(None, layers, table=ReplayTable.of_trace(recorded))])

    @classmethod
    def gumbel(cls, seed: int = 0, *, temperature: float = 1.0, layers: Iterable[int] | int | None = None) -> Plan:
        """Draw each token's experts: the top k of ``z + temperature * Gumbel noise`` [Gumbel-top-k, arXiv 1903.06059].

        For a softmax router this draws k experts without replacement, with probabilities softmax(z / temperature). The
        router's own correction bias and groups apply as usual. Other rules act on the noisy logits. The chosen experts
        are weighed by the model's own scores. Several seeds give several routes of the same size [arXiv 2605.07260].

        The draw depends on ``seed``, layer, and the token's position and id, not on the batch. ``layers``: all layers
        by default.
        """
        return cls._of(kinds.Gumbel, None, layers, value=temperature, draw=seed)

    @classmethod
    def apply(
        cls,
        function: Function,
        layers: Iterable[int] | int | None = None,
        *,
        groups: Sequence[str] | str | None = None,
        phase: str | None = None,
    ) -> Plan:
        """Apply a function of your own to the router logits: ``logits = function(logits, where)``.

        It is called once per layer and call, with the tokens that meet the conditions and no padding: ``logits``
        float32 [tokens, E], the model's own, before every other rule, and ``where``, which tells layer, sequence,
        position, token id and phase of each (``contract.Where``). It returns logits of the same shape and dtype, on the
        same device; gradients flow through it. -inf makes an expert the last to be chosen. A token whose logits it
        leaves alone keeps every bit. Other rules, std and ``|z|`` among them, then see what it returned; the natural
        choice that a recording counts stays the model's own. Several functions run in the order in which their plans
        were added.

        Works wherever Python runs in each call: a CUDA graph, ``torch.compile(fullgraph=True)`` and vLLM refuse it.
        A layer that is checkpointed calls it again in the backward pass.

        Saved, a plan holds the function's name and a hash of its source. One without a name that can be imported (a
        lambda, an inner function) cannot be saved. Loading imports nothing: import the module of the function before
        the plan steers.

        Raises ``PlanError`` for what cannot be called. A call of the model raises ``ValueError`` or ``TypeError`` if
        the function returns anything but such logits, or NaN where the logit was a number.
        """
        plan = cls([kinds.Apply.of(None, layers, function=RoutingFunction.of(function))])
        return plan.only(groups=groups, phase=phase)

    @classmethod
    def add_output(
        cls,
        directions: Mapping[int, Mapping[int, Any]],
        layers: Iterable[int] | int | None = None,
        *,
        weight: Literal["model", "full"] = "model",
        strength: Strength = 1.0,
    ) -> Plan:
        """Add ``strength * weight * v`` to the output of a layer, for a vector v of an expert e [arXiv 2606.04160].

        "model" weighs by the weight that the model gives to e: the same, up to rounding, as adding ``strength * v`` to
        what e computes, and a token that did not choose e keeps every bit. "full" is the paper's formula, the softmax
        of the router's own logits over all experts, which moves every token. The two agree only for tokens that chose
        e, in models that weigh by that softmax (OLMoE). A scaling factor that the model puts on its weights
        (`routed_scaling_factor`) counts in both. It is added to the sum of the experts' outputs, in its dtype, once
        after all ranks of tensor parallelism are summed. Several directions add up.

        Args:
            directions: ``directions[layer][expert]``, a tensor, array or list [H] as long as the hidden states (or as
                the outputs of experts that run in a smaller space).
            layers: use these layers only.
            weight: "model" or "full".
            strength: c; ``plan * x`` multiplies it.

        Raises ``PlanError`` for vectors of different lengths or values that are not finite. Steering raises
        ``NoExpertOutputsError`` for experts that are not one module ``experts(hidden, ids, weights)``, and vLLM refuses
        it.
        """
        table = DirectionTable.of(directions)
        return cls([kinds.AddOutput.of(None, layers, table=table, mode=weight, strength=strength)])

    @classmethod
    def remap(cls, experts: Mapping[int, Mapping[int, int]], layers: Iterable[int] | int | None = None) -> Plan:
        """After selection, replace expert e of a layer by ``experts[layer][e]`` (-1: drop it).

        Duplicates merge, and their weights add up.
        """
        return cls._of(kinds.Remap, experts, layers)

    @classmethod
    def _of(cls, kind: type[Rule], experts: Experts | None, layers: Iterable[int] | int | None, **values: Any) -> Plan:
        rule = kind.of(experts, layers, **values)
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
    ) -> Plan:
        """Restrict the plan to tokens, layers and experts that also meet these conditions.

        ``groups``: groups of the token. ``phase``: "prefill" or "decode". ``layers``: indices from 0. ``positions``: of
        the token in its sequence, padding not counted; a number, a range, or several. ``absent``: only experts that the
        router does not choose itself.

        Rules that can then never apply are left out, so ``p.only(phase="prefill").only(phase="decode")`` is the empty
        plan.
        """
        names, at, where = as_groups(groups), as_phase(phase), as_positions(positions)
        numbers = None if layers is None else kinds.Temperature.of(None, layers, value=1).layers
        narrowed = (rule.restricted(names, at, numbers, where, absent) for rule in self.rules)
        return self._with(rule for rule in narrowed if rule is not None)

    def _with(self, rules: Iterable[Rule]) -> Plan:
        return Plan(rules, model=self.model, description=self.description)

    def __add__(self, other: Plan) -> Plan:
        """Combine two plans; raises ``PlanError`` if they were made for different models."""
        if not isinstance(other, Plan):
            return NotImplemented
        texts = [text for text in dict.fromkeys([self.description, other.description]) if text]
        return Plan(
            self._rules + other._rules, model=self.model.merged(other.model), description=" + ".join(sorted(texts))
        )

    def __radd__(self, other: object) -> Plan:
        """Let ``sum`` start from 0."""
        return self if other == 0 and not isinstance(other, Plan) else NotImplemented

    def __mul__(self, factor: float) -> Plan:
        """Multiply every strength by ``factor``; factors of multiplicative rules are raised to that power.

        Raises ``PlanError`` for forced and forbidden experts.
        """
        if isinstance(factor, bool) or not hasattr(factor, "__float__") or isinstance(factor, Plan):
            return NotImplemented
        return self._with(rule.scaled(float(factor)) for rule in self.rules)

    __rmul__ = __mul__

    def __neg__(self) -> Plan:
        """Reverse the plan: strengths are negated, on and off exchanged.

        As a control, this deactivates in place of activating [the ablations of arXiv 2510.04694]. Raises ``PlanError``
        for rules without an opposite, such as ``forbid``.
        """
        return self._derived((rule.opposite() for rule in self.rules), "opposite")

    def __sub__(self, other: Plan) -> Plan:
        """``plan + other * -1``: subtract the strengths of ``other``."""
        return self + other * -1.0 if isinstance(other, Plan) else NotImplemented

    def __bool__(self) -> bool:
        """False for a plan without rules."""
        return bool(self._rules)

    def __eq__(self, other: object) -> bool:
        return self._content() == other._content() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[tuple[Rule, ...], PlanModel]:
        return self.rules, self.model

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the rules and the model, the same for equal plans on any machine.

        A function without a name that can be imported is told from others in this process only.
        Include the hash in the cache key of steered results.
        """
        content = self._content_dict()
        del content["description"]
        return hashlib.sha256(files.canonical_json(content).encode()).hexdigest()

    # -- controls

    def touching(self, experts: Mapping[int, Iterable[int]]) -> ExpertSelection:
        """The part of ``experts`` (layer -> ids) that some rule of the plan names in a layer where it acts.

        Rules of a whole layer, and replays, name no expert.
        """
        whole = experts if isinstance(experts, ExpertSelection) else ExpertSelection(experts)
        acting = [rule for rule in self.rules if rule.experts]
        return whole & {layer: _named([rule for rule in acting if rule.in_layer(layer)], layer) for layer in whole}

    def random(
        self,
        seed: int = 0,
        *,
        num_experts: int | Sequence[int] | None = None,
        exclude: Mapping[int, Iterable[int]] | None = None,
    ) -> Plan:
        """Random control: as many experts in each layer, drawn with ``seed``, under the same rules.

        ``num_experts`` is the number of experts per layer, one int or one per layer, if the plan does not know its
        model. ``exclude`` (layer -> ids) are never drawn: a model fails without its super experts, whatever the plan.
        Raises ``PlanError`` if the number of experts is unknown, or fewer are left in a layer than the plan names.
        """
        shape = num_experts if num_experts is not None else self.model.num_experts
        if shape is None:
            raise PlanError("how many experts the layers have is not known: pass num_experts")

        def order(layer: int, largest: int) -> np.ndarray:
            # a permutation changes which experts are meant, but keeps rules and experts distinct
            size = shape if isinstance(shape, int) else shape[layer] if layer < len(shape) else 0
            if largest >= size:
                raise PlanError(f"layer {layer} has {size} experts, the plan names expert {largest}: check num_experts")
            drawn = random_permutation(seed, layer, size)
            return drawn if exclude is None else self._drawn_outside(drawn, layer, set(exclude.get(layer, ())))

        return self._derived((rule.relabeled(order) for rule in self.rules), f"random {seed}")

    def _drawn_outside(self, drawn: np.ndarray, layer: int, excluded: set[int]) -> np.ndarray:
        """A permutation of the layer's experts that maps those that the plan names to none of ``excluded``."""
        named = sorted(_named(self.rules, layer))
        rest = [expert for expert in range(len(drawn)) if expert not in set(named)]
        free = [expert for expert in drawn.tolist() if expert not in excluded]
        if len(named) > len(free):
            raise PlanError(f"layer {layer} has {len(free)} experts outside exclude, and the plan names {len(named)}")
        kept = [expert for expert in drawn.tolist() if expert in excluded]
        order = np.empty_like(drawn)
        order[named + rest] = free + kept
        return order

    def random_per_token(self, seed: int = 0) -> Plan:
        """Random control with a new draw per token: as many experts, but other ones for each token.

        The draw depends on ``seed``, layer, and the token's position and id, not on the batch. Raises ``PlanError`` for
        rules without experts.
        """
        return self._derived(
            (replace(rule, draw=index(seed)).checked() for rule in self.rules), f"random {seed}, per token"
        )

    def in_layers(self, layers: Iterable[int] | int) -> Plan:
        """Control in other layers: the same rules there, on the experts that the selection has in those layers.

        A plan keeps those experts. Raises ``PlanError`` for layers in which the selection has no expert.
        """
        return self._derived((rule.moved(layers) for rule in self.rules), "other layers")

    def with_experts(self, experts: Experts) -> Plan:
        """Control with other experts (a mapping from layer to ids) under the same rules; rules of whole layers stay.

        Raises ``PlanError`` for rules with a coefficient per expert.
        """
        return self._derived((rule.with_experts(experts) for rule in self.rules), "other experts")

    def all_random(self, limit: int = 1000, *, num_experts: int | Sequence[int] | None = None) -> list[Plan]:
        """All random controls: the same rules on every other set of as many experts of each layer.

        With them, ``analysis.random_control(..., enumerated=True)`` compares with every set there is, not with draws.

        Raises ``PlanError`` if there are more than ``limit`` sets, if the rules name different experts or give single
        experts coefficients of their own, and if the number of experts is not known (pass ``num_experts``).
        """
        shape = num_experts if num_experts is not None else self.model.num_experts
        if shape is None:
            raise PlanError("how many experts the layers have is not known: pass num_experts")
        named = {
            tuple((layer, tuple(expert for expert, _ in rule.in_layer(layer))) for layer in rule.touched_layers or ())
            for rule in self.rules
            if rule.experts
        }
        if len(named) != 1:
            raise PlanError("all sets are told apart only for rules on the same experts: draw some with random(seed)")
        layers, own = zip(*named.pop(), strict=True)
        sizes = [shape if isinstance(shape, int) else shape[layer] for layer in layers]
        number = prod(comb(size, len(experts)) for size, experts in zip(sizes, own, strict=True)) - 1
        if number > limit:
            raise PlanError(f"there are {number} other sets, the limit is {limit}: draw some of them with random(seed)")
        sets = product(*(combinations(range(size), len(experts)) for size, experts in zip(sizes, own, strict=True)))
        others = (dict(zip(layers, experts, strict=True)) for experts in sets if experts != own)
        return [
            self._derived((rule.with_experts(experts) for rule in self.rules), f"set {place} of {number}")
            for place, experts in enumerate(others, 1)
        ]

    def _derived(self, rules: Iterable[Rule], what: str) -> Plan:
        return Plan(rules, model=self.model, description=f"control ({what}) of {self.description or 'a plan'}")

    # -- the model, tables, files

    def for_model(
        self,
        name: str | None = None,
        *,
        config_hash: str | None = None,
        num_experts: Sequence[int] | None = None,
        router_hash: str | None = None,
        weights_hash: str | None = None,
    ) -> Plan:
        """Mark the plan as made for this model; without arguments, for any model."""
        shape = None if num_experts is None else tuple(num_experts)
        model = PlanModel(name, config_hash, shape, router_hash, weights_hash)
        return Plan(self.rules, model=model, description=self.description)

    def check_model(
        self,
        name: str | None = None,
        *,
        config_hash: str | None = None,
        num_experts: Sequence[int] | None = None,
        router_hash: str | None = None,
        weights_hash: str | None = None,
    ) -> None:
        """Raise ``PlanError`` if the plan was made for another model. Unknown properties are not compared."""
        shape = None if num_experts is None else tuple(num_experts)
        # the same weights may have several names (a hub id, a local folder), so an equal configuration decides over the
        # name
        same = self.model.config_hash is not None and self.model.config_hash == config_hash
        self.model.merged(PlanModel(None if same else name, config_hash, shape, router_hash, weights_hash))

    def check_groups(
        self, groups: Iterable[str], mend: str = "choose other texts, or name these groups by only()"
    ) -> None:
        """Raise ``PlanError`` for a rule that names a group of which no text is, where ``groups`` are those of all.

        Of several groups that a rule names, each has to be there: a misspelt one would count as unsteered in silence.
        """
        known = list(dict.fromkeys(groups))
        for rule in self.rules:
            for name in rule.groups or ():
                if name not in known:
                    raise PlanError(
                        f'the plan steers group "{name}", of which no text is: {meant(name, known)}; {mend}'
                    )

    def compile(self, routers: Sequence[HasExperts], groups: Sequence[str] = ()) -> CompiledPlan:
        """Compile the plan to steering tables, one per layer, and the row of each (phase, group, position).

        ``routers`` gives number of experts and top-k of each MoE layer in order (``RouterInfo`` or ``LayerShape``).
        ``groups`` are the names of the groups, by index. Raises ``PlanError`` for layers, experts or groups that do not
        exist, and for rules that contradict each other.
        """
        self.check_model(num_experts=[router.num_experts for router in routers])
        parts = [part for rule in self.rules for part in rule.parts]
        return compile_rules(parts, routers, tuple(groups), self.hash)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content, from which ``from_dict`` makes an equal plan.

        Raises ``PlanError`` for a function that cannot be imported by its name.
        """
        self._require_names()
        tables = {name: {**table.header(), table.field: table.to_list()} for name, table in self._tables().items()}
        return self._content_dict() | ({"tables": tables} if tables else {})

    def _require_names(self) -> None:
        for rule in self._rules:
            if rule.function is not None:
                rule.function.require_name()

    def _content_dict(self) -> dict[str, Any]:
        """``to_dict`` without the tables of values per token, which rules name by digest."""
        return {
            "rules": [rule.to_dict() for rule in self.rules],
            "model": self.model.to_dict(),
            "description": self.description,
        }

    def _tables(self) -> dict[str, PlanTable]:
        """The tables of values per token and of directions, by digest."""
        return {rule.table.digest: rule.table for rule in self.rules if rule.table is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from ``to_dict``; raises ``PlanError`` for anything else."""
        return cls._of_content(content, "the plan", PlanError)

    @classmethod
    def _of_content(cls, content: Any, source: str, error: type[PlanError]) -> Plan:
        said = PLAN.read(content, source, error)
        try:
            tables = {name: table_of(table) for name, table in said.tables.items()}
        except PlanError as problem:
            raise error(f"{source}: {problem}") from problem
        rules = []
        for number, (given, rule) in enumerate(zip(content["rules"], said.rules, strict=True)):
            try:
                rules.append(rule_of(given, rule, tables))
            except PlanError as problem:
                raise error(f"{source}: rules[{number}]: {problem}") from problem
        return cls(rules, model=said.model, description=said.description)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to ``path``, whole or not at all.

        A name that ends in ".json" gives JSON, to read, compare and edit; any other name gives safetensors. Raises
        ``PlanError`` for a function that cannot be imported by its name.
        """
        if files.is_json(path):
            files.write_json(path, {"hash": self.hash, **self.to_dict()}, _KIND)
            return
        self._require_names()
        tables = self._tables()
        headers = {name: {**table.header(), "field": table.field} for name, table in tables.items()}
        header = {**self._content_dict(), "tables": headers, "hash": self.hash}
        files.write(path, {name: table.values for name, table in tables.items()}, header, _KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a file that ``save`` wrote; its name tells the format.

        JSON that was edited is accepted, and the log reports it. Raises ``files.FileRefusedError`` for a file that is
        not a plan, and ``PlanFileError``, which is also a ``PlanError``, for one with keys or values that no plan has.
        """
        if files.is_json(path):
            return cls._load_json(path)
        tensors, header = files.read(path, _KIND)
        headers = header.get("tables", {})
        tables = {name: {**table, table.get("field", "ids"): tensors[name]} for name, table in headers.items()}
        return cls._of_content({**header, "tables": tables}, os.fspath(path), PlanFileError)

    @classmethod
    def _load_json(cls, path: str | os.PathLike[str]) -> Plan:
        content = files.read_json(path, _KIND)
        plan = cls._of_content(content, os.fspath(path), PlanFileError)
        if content.get("hash") != plan.hash:
            _log.warning("%s was edited since it was saved: its hash is now %s", path, plan.hash)
        return plan

    def push_to_hub(self, repo_id: str, filename: str = "plan.safetensors", **options: Any) -> str:
        """Save the plan in a repository of the Hugging Face hub, and return its address there.

        A repository without README gets one with metadata and the plan in words. ``options`` are those of
        ``hub.publish``: private, revision, token, commit_message, repo_type. Raises ``hub.HubError``.
        """
        use = f'import moe_route as mr\n\nplan = mr.Plan.from_hub("{repo_id}", "{filename}")'
        readme = hub.card(
            "Steering plan", self.describe(), use, base_model=self.model.name, tags=("mixture-of-experts", "steering")
        )
        return hub.publish(self.save, repo_id, filename, readme, **options)

    @classmethod
    def from_hub(cls, repo_id: str, filename: str = "plan.safetensors", **options: Any) -> Plan:
        """Load a plan from the Hugging Face hub, or from the client's cache.

        ``options`` are those of ``hub.fetch``: revision, token, local_files_only, repo_type. Raises ``hub.HubError``,
        and the errors of ``load``.
        """
        return cls.load(hub.fetch(repo_id, filename, **options))

    def diff(self, other: Plan) -> PlanDifference:
        """Compare with another plan, expert by expert; the result is false if both do the same."""
        return compare(self.rules, other.rules, (self.model, other.model))

    def explain(self, given: Any, groups: Sequence[str] | str | None = None) -> PlanExplanation:
        """Tell what the plan will do to tokens whose natural routing was recorded, without running them.

        For each rule, group and layer: how many choices it changes, which of its experts are saturated (nearly all
        tokens choose them already, or nearly none where it takes them away), and which rules will do nothing. Each rule
        and each layer is looked at by itself.

        Forced, forbidden, fixed, reserved and remapped experts are counted exactly. Soft activation is estimated from
        the experts' frequencies: ``Phi(Phi^-1(f) + strength)`` tokens choose an expert afterwards, if its distance from
        being chosen is normal with variance 1 (in standard deviations of a token's logits). For other rules only a
        bound is known ("at most").

        Args:
            given: ``RoutingStatistics``, or a ``Trace``, which also says how many tokens are touched, and at which
                positions.
            groups: explain these groups only.

        Raises ``PlanError`` for a group that was not recorded, and for a recording of another model.
        """
        return explain(self.rules, self.model, given, groups)

    def describe(self) -> str:
        """Describe the rules in words, one line each."""
        note = [f"  {self.description}"] if self.description else []
        rules = [f"  {number}. {rule}" for number, rule in enumerate(self.rules, 1)]
        return printable("\n".join([self._title(), *note, *rules]))

    def _title(self) -> str:
        count = f"{len(self.rules)} rule{'' if len(self.rules) == 1 else 's'}"
        return f"Plan of {count} for {self.model}, hash {self.hash[:12]}"

    def _repr_html_(self) -> str:
        """The rules as an HTML table, for notebooks."""
        rows = [(number, *rule.shown) for number, rule in enumerate(self.rules[:_SHOWN_IN_HTML], 1)]
        more = len(self.rules) - len(rows)
        notes = [self.description, f"and {more} more rules: plan.describe()" if more else ""]
        table = Table(("", "rule", "does", "where"), rows, self._title(), "\n".join(note for note in notes if note))
        return table._repr_html_()

    def __repr__(self) -> str:
        shown = "; ".join(map(str, self.rules[:_SHOWN])) or "nothing"
        more = len(self.rules) - _SHOWN
        return printable(f"Plan({shown}{f'; and {more} more rules' if more > 0 else ''})")


def _named(rules: Iterable[Rule], layer: int) -> set[int]:
    """The experts of one layer that the rules name, targets of "remap" included."""
    return {expert for rule in rules for expert in rule.named(layer)}


def _named_layers(layers: Iterable[int] | int | None) -> list[int] | None:
    return None if layers is None else [layers] if isinstance(layers, int) else list(layers)

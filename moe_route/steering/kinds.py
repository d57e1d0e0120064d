"""The kinds of rules, one class each: what a rule does to a row of tables, what it will do, and how it is shown.

A new kind is one class here: ``rule.py`` says what its attributes mean, and ``Cell`` how values of several rules meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np

from moe_route.contract.limits import MAX_CHOSEN
from moe_route.contract.tables import Force
from moe_route.contract.token_tables import stream_of
from moe_route.steering.cell import LAYER, PLAIN, Cell, Direction, Plane
from moe_route.steering.model import PlanError
from moe_route.steering.rule import GAINS, LOSES, Entry, Experts, Forecast, Pairs, Rule, Seen, power
from moe_route.steering.tables import DirectionTable, ReplayTable, ScoreTable, SequenceTable

# ---- families


class ExpertRule(Rule):
    """Acts on each of its experts by itself, so that single ones can be left out, or drawn for each token."""

    fields = frozenset(("experts", "absent", "draw"))


class PlaneRule(ExpertRule):
    """A number per expert in a plane of ``SteeringTables``; by mode, the plane."""

    fields = ExpertRule.fields | {"strength"}
    modes: ClassVar[Mapping[str, Plane]]
    neutral: ClassVar[float] = 0.0

    def write(self, cell: Cell, pairs: Pairs) -> None:
        values = {expert: self.effective(coefficient) for expert, coefficient in pairs}
        cell.add_plane(self.modes[self.mode], values, (self.absent, self.draw), (self.kind, self.mode))

    def forecast(self, seen: Seen) -> Forecast:
        """A bound: as many choices as its experts may gain or lose."""
        if self.draw is not None:
            return _drawn(seen, self.effective(1.0) > self.neutral)
        effects = np.array([self.effective(coefficient) for _, coefficient in seen.pairs])
        up = effects > self.neutral
        still = (effects == self.neutral) | (~up & self.absent)
        side = GAINS if up.all() else LOSES if not up.any() else ""
        return Forecast(np.where(still, 0, self._bound(up, seen.tokens, seen.chosen)), "at most", side)

    def _bound(self, up: np.ndarray, tokens: int, chosen: np.ndarray) -> np.ndarray:
        """The most choices that may move, of experts that go up or down."""
        return np.where(up, tokens - chosen, chosen)


class Additive(PlaneRule):
    """Adds strength * coefficient."""

    def effective(self, coefficient: float) -> float:
        return self.strength * coefficient


class Power(Rule):
    """Multiplies, or divides, by coefficient ** strength."""

    multiplies = True
    neutral: ClassVar[float] = 1.0

    def effective(self, coefficient: float) -> float:
        return power(coefficient, self.strength, self.kind)

    def joined(self, one: float, other: float) -> float:
        return one * other


class Factor(Power, PlaneRule):
    """Multiplies by coefficient ** strength."""


class Forced(ExpertRule):
    """By mode, a code of ``Force`` for each of its experts."""

    modes: ClassVar[Mapping[str, Force]]

    def write(self, cell: Cell, pairs: Pairs) -> None:
        codes = dict.fromkeys((expert for expert, _ in pairs), self.modes[self.mode])
        cell.add_plane(Plane("force"), codes, (self.absent, self.draw), (self.kind, self.mode))

    def _as(self, kind: type[Forced]) -> Rule:
        return kind(**vars(self))


class Off(Forced):
    """Takes experts away."""

    def forecast(self, seen: Seen) -> Forecast:
        if self.draw is not None:
            return _drawn(seen, False)
        return Forecast(np.where(self.absent, 0, seen.chosen), self._certainty(seen), LOSES)

    def _certainty(self, seen: Seen) -> str:
        """Whether enough other experts are left to choose."""
        return "exact" if len(seen.counts) - len(seen.pairs) >= seen.top_k else "at most"


class LayerRule(Rule):
    """One value for a whole layer."""

    fields = frozenset(("value",))

    def entries(self) -> Iterator[Entry]:
        for layer in self.layers or (None,):
            yield Entry(layer, None, float(self.effective(self.value or 0.0)))

    def with_experts(self, experts: Experts) -> Rule:
        return self


class NamedChoice(Rule):
    """Scores, or experts chosen by id: a token can have one of a ``what``, and that in a table of ``NAMED``."""

    fields = frozenset(("experts", "draw"))
    what: ClassVar[str] = "fixed, replayed or drawn choices"

    def row(self, cell: Cell, pairs: Pairs) -> Any:
        """The row of its table in the layer of a cell."""
        assert isinstance(self.table, SequenceTable)
        return cell.sources.index(self.table)

    def write(self, cell: Cell, pairs: Pairs) -> None:
        by = (self.kind, self.draw, pairs, self.table)
        cell.put(self._name, self.row(cell, pairs), self.what, by, (False, self.draw))

    @property
    def _name(self) -> str:
        """Its table."""
        return self.kind

    def entries(self) -> Iterator[Entry]:
        if self.table is None:
            yield from super().entries()
            return
        of = self.touched_layers
        for layer in of if of is not None else (None,):
            yield Entry(layer, None, f"{self.table}, {self.table.digest[:12]}")

    def forecast(self, seen: Seen) -> Forecast:
        return Forecast(np.array([seen.tokens * seen.top_k]), "at most")


def _drawn(seen: Seen, gains: bool) -> Forecast:
    """The forecast for as many experts, uniformly drawn for each token, that are added or taken away."""
    share = np.full(len(seen.pairs), seen.top_k / len(seen.counts))
    return Forecast(seen.tokens * (1 - share if gains else share), "estimate")


def _taken(rule: Rule, seen: Seen) -> Forecast:
    """The forecast for experts that every token chooses then."""
    if rule.draw is not None:
        return _drawn(seen, True)
    free = seen.tokens - seen.chosen
    return Forecast(free, "exact" if len(free) <= seen.top_k else "at most", GAINS)


# ---- soft rules


class Activate(Additive):
    """``z_e += strength * c_e * std(z)``; a negative strength deactivates."""

    kind = "activate"
    shows = "logit + {x} * std(logits)"
    modes: ClassVar = {
        "population": Plane("std", "std_correction", 0.0),
        "sample": Plane("std", "std_correction", 1.0),
    }

    @property
    def title(self) -> str:
        return "deactivate" if max(self.by_position or (self.strength,)) < 0 else "activate"

    def _how(self) -> str:
        return super()._how() + (" (sample std)" if self.modes[self.mode].value else "")

    def forecast(self, seen: Seen) -> Forecast:
        """``Phi(Phi^-1(f) + strength)`` tokens choose an expert that f of them chose."""
        bound = super().forecast(seen)
        if self.draw is not None:
            return bound
        normal, moved = NormalDist(), bound.moved.astype(float)
        shares = (seen.chosen + 0.5) / (seen.tokens + 1)  # never 0 or 1, which no finite strength would change
        for place, (share, (_, c)) in enumerate(zip(shares.tolist(), seen.pairs, strict=True)):
            after = normal.cdf(normal.inv_cdf(share) + self.effective(c))
            moved[place] = min(abs(after - share) * seen.tokens, moved[place])
        note = (
            "estimates: an expert's distance from being chosen, in standard deviations of a token's logits, is taken "
            "as normal with variance 1 over tokens; the share is Phi(Phi^-1(frequency) + strength)"
        )
        return Forecast(moved, "estimate", bound.side, note)


class Bias(Additive):
    """Adds to the logit, to the score, or to the score for the choice only."""

    kind = "bias"
    shows = "{mode} + {x}"
    modes: ClassVar = {
        "logit": Plane("bias"),
        "score": Plane("score_bias", "score_bias_weighs", 1.0),
        "choice": Plane("score_bias", "score_bias_weighs", 0.0),
    }


class Magnitude(Additive):
    """``z_e += strength * c_e * |z_e|``."""

    kind = "magnitude"
    shows = "logit + {x} * |logit|"
    modes: ClassVar = {"": Plane("magnitude")}


class ScaleLogits(Factor):
    """``z_e *= c_e ** strength``."""

    kind = "scale_logits"
    shows = "logit * {x}"
    modes: ClassVar = {"": Plane("scale")}

    def forecast(self, seen: Seen) -> Forecast:
        return super().forecast(seen)._replace(side="")

    def _bound(self, up: np.ndarray, tokens: int, chosen: np.ndarray) -> np.ndarray:
        """A positive logit rises with a factor above 1, a negative one falls."""
        return np.maximum(tokens - chosen, chosen)


class ScaleWeights(Factor):
    """``w_e *= c_e ** strength``, before or after renormalization."""

    kind = "scale_weights"
    shows = "weight * {x} ({mode} renormalization)"
    modes: ClassVar = {
        "before": Plane("weight_scale", "weight_scale_after", 0.0),
        "after": Plane("weight_scale", "weight_scale_after", 1.0),
    }
    unmoved = "it changes weights, not the choice"

    def forecast(self, seen: Seen) -> Forecast:
        return Forecast(np.zeros(1), "exact")


class Temperature(Power, LayerRule):
    """``z /= value ** strength`` in a whole layer."""

    kind = "temperature"
    shows = "logits / {x}"
    fields = LayerRule.fields | {"strength"}
    unmoved = "it changes weights, and the choice only of routers with a correction bias"

    def check(self) -> None:
        _check_temperature(self)
        self.effective(self.value or 0.0)

    def write(self, cell: Cell, pairs: Pairs) -> None:
        cell.add("temperature", {LAYER: self.effective(self.value or 0.0)})

    def forecast(self, seen: Seen) -> Forecast:
        return Forecast(np.zeros(1), "estimate")


def _check_temperature(rule: Rule) -> None:
    if rule.value is None or rule.value <= 0:
        raise PlanError(f"temperature must be above 0, not {rule.value}")


# ---- hard rules


_ON = {"paper": Force.ON_PAPER, "steermoe": Force.ON_STEERMOE, "natural": Force.ON_NATURAL}
_OFF = {"paper": Force.OFF_PAPER, "steermoe": Force.OFF_STEERMOE, "natural": Force.OFF_NATURAL}


class ForceOn(Forced):
    """Chosen before all others."""

    kind = "force_on"
    shows = "chosen first, weight as {mode}"
    modes = _ON

    def opposite(self) -> Rule:
        return self._as(ForceOff)

    def forecast(self, seen: Seen) -> Forecast:
        return _taken(self, seen)


class ForceOff(Off):
    """Chosen after all others."""

    kind = "force_off"
    shows = "chosen last, weight as {mode}"
    modes = _OFF

    def opposite(self) -> Rule:
        return self._as(ForceOn)


class Forbid(Off):
    """Never chosen."""

    kind = "forbid"
    shows = "never chosen"
    modes: ClassVar = {"": Force.FORBID}

    def _certainty(self, seen: Seen) -> str:
        return "exact"


class TopK(LayerRule):
    """Another number of experts per token."""

    kind = "top_k"
    shows = "{x} experts per token"

    def check(self) -> None:
        if self.value is None or self.value < 1 or self.value != int(self.value):
            raise PlanError(
                f"top_k must be a whole number from 1 to the experts of the layer (at most {MAX_CHOSEN}), not "
                f"{self.value}"
            )

    def write(self, cell: Cell, pairs: Pairs) -> None:
        cell.add("top_k", {LAYER: self.value or 0})

    def forecast(self, seen: Seen) -> Forecast:
        return Forecast(np.array([seen.tokens * abs(int(self.value or 0) - seen.top_k)]), "exact")


class Remap(Rule):
    """A chosen expert is replaced by another, its coefficient (-1: dropped)."""

    kind = "remap"
    shows = "chosen expert replaced"
    fields = frozenset(("experts",))

    def write(self, cell: Cell, pairs: Pairs) -> None:
        cell.add("remap", dict(pairs))

    def named(self, layer: int) -> list[int]:
        return super().named(layer) + [int(to) for _, to in dict(self.experts).get(layer, ()) if to >= 0]

    def entries(self) -> Iterator[Entry]:
        for layer in self.touched_layers or ():
            yield from (Entry(layer, expert, float(target)) for expert, target in self.in_layer(layer))

    def _renamed(self, coefficient: float, to: np.ndarray) -> float:
        return float(to[int(coefficient)]) if coefficient >= 0 else coefficient

    def with_experts(self, experts: Experts) -> Rule:
        return self

    def forecast(self, seen: Seen) -> Forecast:
        others = tuple(expert for expert, target in seen.pairs if expert != int(target))
        moved = np.where([expert in others for expert, _ in seen.pairs], seen.chosen, 0)
        return Forecast(moved, "exact", LOSES, experts=others)


# ---- rules by expert id, and given scores


class ReplaceScores(NamedChoice):
    """Scores in place of the router's own: of all tokens of a layer, or (in a table) of each token."""

    kind = "replace_scores"
    shows = "router scores replaced by {x}"
    fields = NamedChoice.fields | {"table"}
    table_type = ScoreTable
    valued = True
    what = "replaced scores"

    def check(self) -> None:
        for layer, pairs in self.experts:
            values = sorted(value for _, value in pairs)
            if values[0] < 0 or values[-1] <= 0:
                raise PlanError(f"the scores of layer {layer} must be 0 or more, and one of them above 0")

    @property
    def _name(self) -> str:
        return "replace_scores" if self.table is None else "score_table"

    def row(self, cell: Cell, pairs: Pairs) -> Any:
        if self.table is not None:
            return super().row(cell, pairs)
        scores = np.zeros(cell.router.num_experts, dtype=np.float32)
        for expert, score in pairs:
            scores[expert] = score
        return scores

    def _how(self) -> str:
        return super()._how() if self.table is None else self.shows.format(x=f"those of {self.table}")


class ReserveSlot(NamedChoice):
    """The last slot, unless the router chose the expert."""

    kind = "reserve_slot"
    shows = "takes the last slot where not chosen"
    what = "own experts"

    def write(self, cell: Cell, pairs: Pairs) -> None:
        for expert, _ in pairs:
            cell.put(self.kind, expert, self.what, (self.kind, self.draw, expert), (False, self.draw))

    def forecast(self, seen: Seen) -> Forecast:
        return _taken(self, seen)


class FixChoice(NamedChoice):
    """Exactly these experts; a coefficient is the slot, from 0."""

    kind = "fix_choice"
    shows = "exactly these experts chosen, in this order"
    valued = True

    def check(self) -> None:
        for layer, pairs in self.experts:
            slots = sorted(slot for _, slot in pairs)
            if slots != list(range(len(slots))):
                raise PlanError(f"the fixed experts of layer {layer} need the slots 0 to {len(slots) - 1}, one each")

    def row(self, cell: Cell, pairs: Pairs) -> Any:
        slots = cell.router.top_k
        if len(pairs) > slots:
            raise PlanError(f"{len(pairs)} experts are fixed in layer {cell.layer}, which has {slots} slots")
        ids = np.full(slots, -1)
        for expert, slot in pairs:
            ids[int(slot)] = expert
        return ids

    def forecast(self, seen: Seen) -> Forecast:
        return _taken(self, seen)


class Replay(NamedChoice):
    """The recorded experts of each token."""

    kind = "replay"
    shows = "exactly the recorded experts of {x}"
    fields = frozenset(("table", "draw"))
    table_type = ReplayTable

    def _how(self) -> str:
        return self.shows.format(x=f"{self.table}")


class Apply(LayerRule):
    """A user's own function of the natural logits, before every other rule."""

    kind = "apply"
    shows = "logits = {x}(logits)"
    fields = frozenset(("function",))
    ordered = True
    served = False

    def write(self, cell: Cell, pairs: Pairs) -> None:
        assert self.function is not None
        cell.apply(self.function)

    def entries(self) -> Iterator[Entry]:
        for layer in self.layers or (None,):
            yield Entry(layer, None, f"{self.function}")

    def joined(self, one: Any, other: Any) -> Any:
        return f"{one}, then {other}"

    def _how(self) -> str:
        return self.shows.format(x=self.function)

    def forecast(self, seen: Seen) -> Forecast:
        return Forecast(np.array([seen.tokens * seen.top_k]), "at most")


class AddOutput(Rule):
    """A direction added to the output of an expert: weighed by the model's weight, or by the full softmax."""

    kind = "add_output"
    shows = "output + {x} * weight ({mode}) * direction"
    fields = frozenset(("table", "strength"))
    modes: ClassVar = {"model": False, "full": True}
    table_type = DirectionTable
    unmoved = "it changes outputs of experts, and choices of later layers only"
    served = False

    def write(self, cell: Cell, pairs: Pairs) -> None:
        assert isinstance(self.table, DirectionTable)
        for expert, vector in self.table.in_layer(cell.layer) or ():
            cell.add_direction(Direction(expert, self.modes[self.mode], tuple(vector.tolist())), self.strength)

    def entries(self) -> Iterator[Entry]:
        assert isinstance(self.table, DirectionTable)
        for layer in self.touched_layers or ():
            for expert, _ in self.table.in_layer(layer) or ():
                yield Entry(layer, expert, f"{self.strength:g} * {self.mode} of {self.table.digest[:12]}")

    def joined(self, one: Any, other: Any) -> Any:
        return f"{one} + {other}"

    def named(self, layer: int) -> list[int]:
        assert isinstance(self.table, DirectionTable)
        return [expert for expert, _ in self.table.in_layer(layer) or ()]

    def _what(self) -> str:
        return f"{super()._what()} for {self.table}"

    def _how(self) -> str:
        of = self.by_position or (self.strength,)
        ends = dict.fromkeys((min(of), max(of)))
        return self.shows.format(x=" to ".join(f"{end:g}" for end in ends), mode=self.mode)

    def forecast(self, seen: Seen) -> Forecast:
        return Forecast(np.zeros(1), "exact")


class Gumbel(LayerRule):
    """The experts of the largest ``z + value * Gumbel noise``; ``draw`` seeds the noise."""

    kind = "gumbel"
    shows = "chosen by logit + {x} * Gumbel noise"
    fields = LayerRule.fields | {"draw"}
    drawn = "drawn for each token"

    def check(self) -> None:
        _check_temperature(self)
        if self.draw is None:
            raise PlanError("a gumbel rule needs the seed of its noise: Plan.gumbel(seed)")

    def write(self, cell: Cell, pairs: Pairs) -> None:  # tokens with other seeds share one part, which draws once
        assert self.draw is not None
        by = (self.kind, self.draw, self.value)
        cell.put("gumbel", self.value, NamedChoice.what, by, PLAIN)
        cell.put("gumbel_stream", stream_of(self.draw, cell.layer), NamedChoice.what, by, PLAIN)

    def forecast(self, seen: Seen) -> Forecast:
        return Forecast(np.array([seen.tokens * seen.top_k]), "at most")

"""Per-token steering, for rules that per-row tables cannot express; computed in torch before and after ``route``.

Five kinds of rules need more than a token's row: rules that depend on the router's own choice (only if absent), random
draws per token, replaced scores, choices by expert id (fixed, replayed or drawn, the reserved slot), and more experts
than the router has slots. The first three become tables with a row for each token. One ``route`` call then steers,
chooses and weighs with them, and counts the tokens whose choice it makes. Tokens whose choice is made here, or that are
routed again whatever their own choice, are excluded from that count. They are counted separately into the same tables.
Nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_route import ops, reference
from moe_route.base.devices import upload
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import NEUTRAL, STEERING_PLANES, Force, StatisticsTables, SteeringTables
from moe_route.steering.draw import gumbel_noise, permutations

__all__ = ["Part", "Steered", "TokenSteering", "logits_of_scores"]

_FACTORS = ("scale", "weight_scale")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rules of one layer that depend on a token in the same way, by row of the plan.

    Attributes:
        absent: whether to leave out experts that the router chose itself.
        seed: seed of the random experts that are drawn per token, or None.
        planes: float32 [rows, E] by name.
        named: by kind of rule. "replace_scores": float32 [rows, E], NaN in rows without it. "reserve_slot": int64
            [rows], an expert, or -1. "fix_choice": int64 [rows, k], -1 in empty slots, and in all slots of rows without
            it. "replay" and "score_table": int64 [rows], the index of a table of values per token, or -1. "gumbel":
            float64 [rows], the temperature of the noise, or 0, with "gumbel_stream": int64 [rows], the numbers that
            seed it.
    """

    absent: bool = False
    seed: int | None = None
    planes: Mapping[str, Tensor] = field(default_factory=dict)
    named: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Part:
        planes, named = (
            {name: upload(table, device) for name, table in of.items()} for of in (self.planes, self.named)
        )
        return replace(self, planes=planes, named=named)


class Steered(NamedTuple):
    """Inputs of ``route`` in place of a layer's logits, tables and token table; the tables have a row per token."""

    logits: Tensor
    tables: SteeringTables
    tokens: Tensor


class TokenSteering:
    """The steering of one layer in which some rule depends on more than a token's row.

    Args:
        layer: index of the MoE layer, used in random draws.
        num_experts: E.
        base: the rules that depend on the row only, and the row parameters.
        parts: the other rules.
        recorded: by index of the table, int16 [n, k], the choices of n tokens in this layer. -1 in the first slot: no
            choice; a later -1: an empty slot.
        scored: by index of the table, float32 [n, E], scores of n tokens in this layer; a row of NaN: none. ``fitted``
            turns them into logits.
        anew: bool [rows], rows whose tokens are routed again although no plane changes their logits; None for no row.
        by_token_only: bool [rows], rows that have no effect on a token that no table names; None for no row.
        wide: number of slots, if some row has more than the router; else 0.
    """

    trained = False
    is_null = False

    def __init__(
        self,
        layer: int,
        num_experts: int,
        base: SteeringTables,
        parts: Sequence[Part],
        *,
        recorded: Mapping[int, Tensor],
        scored: Mapping[int, Tensor],
        anew: Tensor | None,
        by_token_only: Tensor | None,
        wide: int,
    ) -> None:
        self.layer, self.rows, self.num_experts, self.wide = layer, base.rows, num_experts, wide
        self.base, self.parts = base, tuple(parts)
        self.recorded, self.scored = dict(recorded), dict(scored)
        self.anew, self.by_token_only = anew, by_token_only

    @property
    def tables(self) -> Mapping[str, None]:
        """Names of the tables in use. Choices by expert id may leave slots empty, so they count as ``top_k``."""
        names = set(self.base.tables).union(*(part.planes.keys() | part.named.keys() for part in self.parts))
        empty = {"top_k"} if self.wide or names & {"fix_choice", "replay"} else set()
        return dict.fromkeys(names | empty)

    @property
    def replays(self) -> bool:
        """Whether a table names values of single tokens: recorded experts, or scores."""
        return bool(self.recorded or self.scored)

    @property
    def device(self) -> torch.device:
        return self.base.device

    def to(self, device: torch.device) -> TokenSteering:
        """Copy the steering to another device, without waiting for it."""
        anew, only = (None if rows is None else upload(rows, device) for rows in (self.anew, self.by_token_only))
        recorded, scored = (
            {number: upload(values, device) for number, values in of.items()} for of in (self.recorded, self.scored)
        )
        parts = [part.to(device) for part in self.parts]
        tables = {"recorded": recorded, "scored": scored}
        return self._with(base=self.base.to(device), parts=parts, anew=anew, by_token_only=only, **tables)

    def fitted(self, name: str, spec: RouterSpec) -> TokenSteering:
        """Fit the steering to a router that scores by ``spec``; ``ValueError`` naming the router if it cannot be."""

        def fit(part: Part) -> Part:
            scores = part.named.get("replace_scores")
            if scores is None:
                return part
            return replace(part, named={**part.named, "replace_scores": logits_of_scores(scores, name, spec)})

        scored = {number: logits_of_scores(scores, name, spec) for number, scores in self.scored.items()}
        return self._with(parts=[fit(part) for part in self.parts], scored=scored)

    def _with(self, **changed: Any) -> TokenSteering:
        names = ("layer", "num_experts", "base", "parts", "recorded", "scored", "anew", "by_token_only", "wide")
        return TokenSteering(**{name: getattr(self, name) for name in names} | changed)

    def route(
        self,
        logits: Tensor,
        k: int,
        spec: RouterSpec,
        *,
        tokens: Tensor,
        counter: Tensor | None,
        entries: Tensor | None = None,
        choice: Tensor,
        choice_weights: Tensor | None = None,
        correction_bias: Tensor | None = None,
        expert_scale: Tensor | None = None,
        statistics: StatisticsTables | None = None,
    ) -> tuple[Tensor, Tensor, Steered]:
        """Run ``ops.route`` with these rules.

        Args:
            choice: the router's own choice.
            counter: [T], a number per token that seeds its random draws.
            entries: int64 [T, M], each token's row in each table of values per token (-1: none).

        Returns:
            weights and ids [T, k] (wider if rows have more slots), and the inputs that ``ops.route`` was given.
        """
        row = _rows(tokens, self.rows)
        replayed = self._choice(row, entries, counter, k)
        given = self._given_scores(row, entries, counter)
        scored = None if given is None else ~torch.isnan(given[:, 0])
        if self.by_token_only is not None:
            found = _either(None if replayed is None else replayed[:, 0] >= 0, scored)
            assert found is not None  # a row of tables alone has one
            row = torch.where(self.by_token_only[row.clamp(min=0)] & ~found, -1, row)
        steered = self.steer(logits, tokens, row, choice, counter, given)
        replayed = self._drawn_choice(replayed, row, steered, k, spec, counter, correction_bias)
        more = self._holds(row, self.base.tables["top_k"] > k) if self.wide else None
        anew = _either(None if self.anew is None else self._holds(row, self.anew), scored)
        named = self._named(row, replayed)
        apart = _either(named, anew)
        own = choice if anew is None else torch.where(anew[:, None], -1, choice)  # -1: no choice to keep

        def routed(slots: int, table: Tensor, statistics: StatisticsTables | None = None) -> tuple[Tensor, Tensor]:
            return ops.route(
                steered.logits,
                slots,
                spec,
                correction_bias=correction_bias,
                expert_scale=expert_scale,
                steering=steered.tables,
                tokens=table,
                choice=_padded(own, slots, -1),
                choice_weights=None if choice_weights is None else _padded(choice_weights, slots, 0),
                statistics=statistics,
            )

        weights, ids = routed(k, steered.tokens if apart is None else _only(steered.tokens, ~apart), statistics)
        if more is not None:
            wider_weights, wider_ids = routed(self.wide, steered.tokens)
            ids = torch.where(more[:, None], wider_ids, _padded(ids, self.wide, -1))
            weights = torch.where(more[:, None], wider_weights, _padded(weights, self.wide, 0))
        if named is not None:
            ids, weights = self._choose(ids, weights, replayed, named, row, steered, spec, counter, expert_scale)
        if statistics is not None and apart is not None:
            usual = apart if more is None else apart & ~more
            for counted, slots in ((usual, k), (more, self.wide)):
                if counted is not None:
                    reference.observe_steered(
                        steered.logits,
                        ids[:, :slots],
                        weights[:, :slots].detach(),
                        spec,
                        natural_ids=_padded(choice, slots, -1),
                        steering=steered.tables,
                        tokens=_only(steered.tokens, counted),
                        statistics=statistics,
                    )
        return weights, ids, steered

    def _holds(self, row: Tensor, rows: Tensor) -> Tensor:
        """bool [T]: the flag of each token's row, False for tokens without a row."""
        return (row >= 0) & rows[row.clamp(min=0)]

    # ---- rules that become tables

    def steer(
        self,
        logits: Tensor,
        tokens: Tensor,
        row: Tensor,
        chosen: Tensor,
        counter: Tensor | None,
        given: Tensor | None = None,
    ) -> Steered:
        """Logits, and tables with a row per token. ``given``: logits [T, E] of given scores, NaN rows for none."""
        steered, at = row >= 0, row.clamp(min=0)
        planes, row_params, remap = _gathered(self.base, at)
        own = _marked(chosen, self.num_experts)
        if given is not None:
            logits = _with_scores(logits, given, steered)
        for part in self.parts:
            order = self._order(part, counter)
            scores = part.named.get("replace_scores")
            if scores is not None:
                logits = _with_scores(logits, _drawn(scores[at], order), steered)
            for name, plane in part.planes.items():
                found = _drawn(plane[at], order)
                if part.absent:
                    found = torch.where(own, NEUTRAL[name], found)
                planes[name] = _joined(name, planes[name], found) if name in planes else found
        names = [name for name in STEERING_PLANES if name in planes]
        bits = sum(1 << STEERING_PLANES.index(name) for name in names)
        packed = torch.stack([planes[name] for name in names], 1).contiguous() if names else None
        tables = SteeringTables.from_packed(packed, bits, row_params, remap, self.num_experts)
        numbers = torch.arange(len(row), device=row.device)
        table = torch.cat([torch.where(steered, numbers, -1).to(torch.int32)[:, None], tokens[:, 1:]], 1)
        return Steered(logits, tables, table)

    def _order(self, part: Part, counter: Tensor | None) -> Tensor | None:
        """A permutation of the experts per token, or None if this part is not drawn."""
        if part.seed is None:
            return None
        return permutations(part.seed, self.layer, _counted(counter), self.num_experts)

    # ---- choices by expert id

    def _choice(self, row: Tensor, entries: Tensor | None, counter: Tensor | None, k: int) -> Tensor | None:
        """int64 [T, k]: the experts of a fixed choice or a replay, -1 in the first slot for none.

        None if there is no such rule.
        """
        found = None
        at = row.clamp(min=0)
        for part in self.parts:
            for named in self._named_choices(part, at, entries):
                ids = self._drawn_ids(part, torch.where((row >= 0)[:, None], named.to(torch.int64), -1), counter)
                ids = _padded(ids, k, -1)
                found = ids if found is None else torch.where(ids[:, :1] >= 0, ids, found)
        return found

    def _named_choices(self, part: Part, at: Tensor, entries: Tensor | None) -> Iterator[Tensor]:
        """Ids [T, k] of a part's fixed choices and of each of its recorded tables, -1 in the first slot for none."""
        if "fix_choice" in part.named:
            yield part.named["fix_choice"][at]
        if "replay" in part.named:
            for number, recorded in self.recorded.items():
                entry = _entry(part.named["replay"][at], number, entries)
                yield torch.where((entry >= 0)[:, None], recorded[entry.clamp(min=0)], -1)

    def _given_scores(self, row: Tensor, entries: Tensor | None, counter: Tensor | None) -> Tensor | None:
        """float32 [T, E]: logits of the scores that tables give, a row of NaN for none; None without such a table."""
        found = None
        at = row.clamp(min=0)
        for part in self.parts:
            for number, scores in self.scored.items() if "score_table" in part.named else ():
                entry = torch.where(row >= 0, _entry(part.named["score_table"][at], number, entries), -1)
                given = torch.where((entry >= 0)[:, None], scores[entry.clamp(min=0)], torch.nan)
                given = _drawn(given, self._order(part, counter))
                found = given if found is None else torch.where(torch.isnan(given), found, given)
        return found

    def _drawn_choice(
        self,
        found: Tensor | None,
        row: Tensor,
        steered: Steered,
        k: int,
        spec: RouterSpec,
        counter: Tensor | None,
        correction_bias: Tensor | None,
    ) -> Tensor | None:
        """``found``, int64 [T, k], with the experts drawn by Gumbel noise for the tokens of such rules."""
        for part in self.parts:
            if "gumbel" not in part.named:
                continue
            at = row.clamp(min=0)
            temperature = torch.where(row >= 0, part.named["gumbel"][at], 0.0)[:, None]
            noise = gumbel_noise(part.named["gumbel_stream"][at], _counted(counter), self.num_experts)
            noisy = steered.logits.detach() + (temperature * noise).to(
                torch.promote_types(steered.logits.dtype, torch.float32)
            )
            natural = torch.full((len(row), k), -1, dtype=torch.int32, device=row.device)  # -1: no choice to keep
            _, ids = ops.route(
                noisy,
                k,
                spec,
                correction_bias=correction_bias,
                steering=steered.tables,
                tokens=_only(steered.tokens, torch.zeros_like(row, dtype=torch.bool)),
                choice=natural,
            )
            ids = torch.where(temperature > 0, ids.to(torch.int64), -1)
            found = ids if found is None else torch.where(ids[:, :1] >= 0, ids, found)
        return found

    def _named(self, row: Tensor, choice: Tensor | None) -> Tensor | None:
        """bool [T]: tokens whose choice is made by expert id; None if there is no such rule."""
        found = None if choice is None else choice[:, 0] >= 0
        for part in self.parts:
            if "reserve_slot" in part.named:
                found = _either(found, self._holds(row, part.named["reserve_slot"] >= 0))
        return found

    def _choose(
        self,
        ids: Tensor,
        weights: Tensor,
        choice: Tensor | None,
        named: Tensor,
        row: Tensor,
        steered: Steered,
        spec: RouterSpec,
        counter: Tensor | None,
        expert_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Put the named experts into their slots, and weigh them by the steered scores."""
        wanted = ids
        if choice is not None:
            wanted = torch.where(choice[:, :1] >= 0, _padded(choice, ids.shape[1], -1).to(ids.dtype), ids)
        for part in self.parts:
            if "reserve_slot" in part.named:
                reserved = torch.where(row >= 0, part.named["reserve_slot"][row.clamp(min=0)], -1)[:, None]
                expert = self._drawn_ids(part, reserved, counter).to(ids.dtype)
                wanted = _last_slot(wanted, expert, _off(steered, expert, self.num_experts))
        found = ops.route_weights(
            steered.logits, wanted, spec, expert_scale=expert_scale, steering=steered.tables, tokens=steered.tokens
        )
        moved = named[:, None] & (wanted != ids).any(1, keepdim=True)  # other tokens keep their weights
        return torch.where(moved, wanted, ids), torch.where(moved, found, weights)

    def _drawn_ids(self, part: Part, ids: Tensor, counter: Tensor | None) -> Tensor:
        """Apply the part's permutation of each token's experts to ids [T, n]; -1 stays."""
        order = self._order(part, counter)
        if order is None:
            return ids
        return torch.where(ids >= 0, order.argsort(dim=1).gather(1, ids.clamp(min=0)), -1)


def logits_of_scores(scores: Tensor, name: str, spec: RouterSpec) -> Tensor:
    """Logits [rows, E] from which the router ``name`` computes ``scores``; NaN rows stay."""
    if spec.score == "sparsemixer":
        raise ValueError(
            f"router {name!r} cannot take replaced scores: SparseMixer weighs by distances between logits, which "
            "scores do not give back. Use bias or force_on there, or leave the layer out: plan.only(layers=[...])"
        )
    p = scores.double()
    if spec.score == "sigmoid" and bool((p > 1).any()):
        raise ValueError(f"router {name!r} scores by a sigmoid: replaced scores must be between 0 and 1")
    inverse: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": torch.log,
        "sigmoid": torch.logit,
        "sqrt_softplus": lambda p: torch.where(p > 5, p**2 + torch.log(-torch.expm1(-(p**2))), torch.expm1(p**2).log()),
        "identity": lambda p: p,
    }
    return inverse[spec.score](p).float()


def _counted(counter: Tensor | None) -> Tensor:
    """The counter that random draws need."""
    if counter is None:
        raise RuntimeError(
            "a plan draws experts for each token, but the call does not say which token is where: steer with "
            "RoutedModel.steer, which counts positions"
        )
    return counter


def _rows(tokens: Tensor, rows: int) -> Tensor:
    """int64 [T]: each token's row of the plan, or -1."""
    row = tokens[:, 0].to(torch.int64)
    return torch.where((row >= 0) & (row < rows) & (tokens[:, 3] != 0), row, -1)


def _gathered(base: SteeringTables, at: Tensor) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Planes [T, E] by name, row parameters [T, 5] and remap [T, E] of each token's row."""
    tables, _, row_params, remap = base.packed
    present = [name for name in STEERING_PLANES if name in base.tables]
    planes = {} if tables is None else dict(zip(present, tables[at].unbind(1), strict=True))
    return planes, None if row_params is None else row_params[at], None if remap is None else remap[at]


def _marked(ids: Tensor, num_experts: int) -> Tensor:
    """bool [T, E]: whether an expert is among ids [T, k]."""
    slots = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(torch.int64)
    marks = torch.zeros(len(ids), num_experts + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, slots, True)[:, :num_experts]


def _drawn(plane: Tensor, order: Tensor | None) -> Tensor:
    return plane if order is None else plane.gather(1, order)


def _joined(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Combine two planes: strengths add, factors multiply; forbid wins over off, and off over on."""
    if name == "force":
        return torch.where((a < 0) | (b < 0), torch.minimum(a, b), torch.maximum(a, b))
    return a * b if name in _FACTORS else a + b


def _with_scores(logits: Tensor, replaced: Tensor, steered: Tensor) -> Tensor:
    """Replace the logits in rows with replaced scores; the other rows of ``replaced`` are NaN."""
    wide = logits if logits.dtype is torch.float64 else logits.float()
    here = steered[:, None] & ~torch.isnan(replaced[:, :1])
    return torch.where(here, replaced.to(wide.dtype), wide)


def _entry(table: Tensor, number: int, entries: Tensor | None) -> Tensor:
    """int64 [T]: each token's row in table ``number``, -1 for none; ``table`` is the number of its own table."""
    if entries is None:
        raise RuntimeError(
            "a plan names values of single tokens, but the call does not say which token is where: steer with "
            "RoutedModel.steer, which knows the sequences"
        )
    return torch.where(table == number, entries[:, number], -1)


def _padded(table: Tensor, width: int, value: float) -> Tensor:
    missing = width - table.shape[1]
    return table if missing <= 0 else torch.nn.functional.pad(table, (0, missing), value=value)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a | b


def _only(tokens: Tensor, counted: Tensor) -> Tensor:
    """The token table, with only the tokens ``counted`` in any statistic."""
    statistics = torch.where(counted[:, None], tokens[:, 1:3], -1)
    return torch.cat([tokens[:, :1], statistics, tokens[:, 3:]], 1)


def _off(steered: Steered, expert: Tensor, num_experts: int) -> Tensor:
    """bool [T, 1]: whether the token's steering excludes this expert."""
    force = steered.tables.tables.get("force")
    if force is None:
        return torch.zeros_like(expert, dtype=torch.bool)
    return force.gather(1, expert.clamp(0, num_experts - 1).to(torch.int64)) < Force.NONE


def _last_slot(ids: Tensor, expert: Tensor, off: Tensor) -> Tensor:
    """Put ``expert`` [T, 1] into the last filled slot, unless it is -1, is excluded, or has a slot already."""
    last = (ids >= 0).sum(1, keepdim=True) - 1
    takes = (expert >= 0) & ~off & ~(ids == expert).any(1, keepdim=True) & (last >= 0)
    slots = torch.arange(ids.shape[1], device=ids.device)
    return torch.where(takes & (slots == last), expert, ids)

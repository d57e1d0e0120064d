"""Steering that a table of rows cannot hold: worked out for each token, in torch operations around ``route``.

Four kinds of rules need more than their token's row: those that ask what the router chose by itself (only-if-absent),
those drawn anew for each token, scores put in the place of the router's, and choices that are made by name (replay, the
last slot), besides more experts than the router has slots. The first three become tables with a row for each token, so
that one ``route`` steers, chooses, weighs and counts as ever. Tokens whose choice is made here are left out of that
count and counted by themselves, into the same tables. Nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe_route import ops, reference
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import NEUTRAL, STEERING_PLANES, Force, StatisticsTables, SteeringTables
from moe_route.devices import upload
from moe_route.steering.draw import permutations

__all__ = ["MARK", "Part", "Steered", "TokenSteering", "logits_of_scores"]

# A bias too small to change any logit: it says that a row is to be routed anew.
MARK = 2.0**-120
_FACTORS = ("scale", "weight_scale")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rules of one layer that look at a token in the same way, by row of the plan.

    ``planes``: float32 [rows, E] by name; ``scores``: float32 [rows, E], NaN in rows that replace none; ``slot``: int64
    [rows], -1 for none; ``replay``: int64 [rows, k], -1 where a slot stays empty, in every slot for none.
    ``absent`` leaves out what the router chose by itself, ``seed`` draws other experts for each token.
    """

    absent: bool = False
    seed: int | None = None
    planes: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    slot: Tensor | None = None
    replay: Tensor | None = None

    def to(self, device: torch.device) -> Part:
        planes = {name: upload(plane, device) for name, plane in self.planes.items()}
        moved = {name: getattr(self, name) for name in ("scores", "slot", "replay")}
        moved = {name: None if table is None else upload(table, device) for name, table in moved.items()}
        return replace(self, planes=planes, **moved)


class Steered(NamedTuple):
    """What ``route`` is given in place of a layer's logits, tables and token table; the tables have a row a token."""

    logits: Tensor
    tables: SteeringTables
    tokens: Tensor


class TokenSteering:
    """The steering of one layer where some rule looks at more than its token's row.

    ``base`` holds the other rules and the rows' parameters; ``wide`` is the number of slots where a row has more than
    the router (else 0).
    """

    trained = False
    is_null = False

    def __init__(
        self,
        layer: int,
        rows: int,
        num_experts: int,
        base: SteeringTables,
        parts: Sequence[Part],
        wide: int = 0,
    ) -> None:
        self.layer, self.rows, self.num_experts, self.wide = layer, rows, num_experts, wide
        self.base, self.parts = base, tuple(parts)
        self.names = self._used_names()

    def _used_names(self) -> frozenset[str]:
        names = set(self.base.tables)
        for part in self.parts:
            names |= part.planes.keys()
            names |= {name for name in ("scores", "slot", "replay") if getattr(part, name) is not None}
        return frozenset(names)

    @property
    def tables(self) -> Mapping[str, None]:
        """Names of what steers; slots may stay empty under ``top_k`` and ``replay``, which counts as such."""
        empty = {"top_k"} if self.wide or "replay" in self.names else set()
        return dict.fromkeys(self.names | empty)

    @property
    def device(self) -> torch.device:
        return self.base.device

    def to(self, device: torch.device) -> TokenSteering:
        """The same on another device, which the host does not wait for."""
        return self._with(self.base.to(device), [part.to(device) for part in self.parts])

    def fitted(self, name: str, spec: RouterSpec) -> TokenSteering:
        """The same for a router that scores by ``spec``; ``ValueError`` naming the router where it cannot be done."""
        parts = [
            part if part.scores is None else replace(part, scores=logits_of_scores(part.scores, name, spec))
            for part in self.parts
        ]
        return self._with(self.base, parts)

    def _with(self, base: SteeringTables, parts: Sequence[Part]) -> TokenSteering:
        return TokenSteering(self.layer, self.rows, self.num_experts, base, parts, self.wide)

    def route(
        self,
        logits: Tensor,
        k: int,
        spec: RouterSpec,
        *,
        tokens: Tensor,
        counter: Tensor | None,
        choice: Tensor,
        choice_weights: Tensor | None = None,
        correction_bias: Tensor | None = None,
        expert_scale: Tensor | None = None,
        statistics: StatisticsTables | None = None,
    ) -> tuple[Tensor, Tensor, Steered]:
        """``ops.route`` with these rules: weights and ids [T, k] (wider where rows have more slots), and what it was
        given. ``choice`` is the router's own choice; ``counter`` [T] tells tokens apart for what is drawn."""
        steered = self.steer(logits, tokens, choice, counter)
        row = _rows(tokens, self.rows)
        named = self._named(row)
        more = self._more(row, k)

        def routed(slots: int, counted: Tensor | None) -> tuple[Tensor, Tensor]:
            return ops.route(
                steered.logits,
                slots,
                spec,
                correction_bias=correction_bias,
                expert_scale=expert_scale,
                steering=steered.tables,
                tokens=steered.tokens if counted is None else _only(steered.tokens, counted),
                choice=_padded(choice, slots, -1),
                choice_weights=None if choice_weights is None else _padded(choice_weights, slots, 0),
                statistics=statistics,
            )

        weights, ids = routed(k, _neither(named, more))
        if more is not None:
            wider_weights, wider_ids = routed(self.wide, more)
            ids = torch.where(more[:, None], wider_ids, _padded(ids, self.wide, -1))
            weights = torch.where(more[:, None], wider_weights, _padded(weights, self.wide, 0))
        if named is not None:
            ids, weights = self._choose(ids, weights, named, row, steered, spec, counter, expert_scale)
            if statistics is not None:
                reference.observe_steered(
                    steered.logits,
                    ids[:, :k],
                    weights[:, :k].detach(),
                    spec,
                    natural_ids=choice,
                    steering=steered.tables,
                    tokens=_only(steered.tokens, named),
                    statistics=statistics,
                )
        return weights, ids, steered

    # ---- what is asked for in tables

    def steer(self, logits: Tensor, tokens: Tensor, chosen: Tensor, counter: Tensor | None) -> Steered:
        """Logits, and a table with a row for each token."""
        row = _rows(tokens, self.rows)
        steered, at = row >= 0, row.clamp(min=0)
        planes, row_params, remap = _gathered(self.base, at)
        own = _marked(chosen, self.num_experts)
        for part in self.parts:
            order = self._order(part, counter)
            if part.scores is not None:
                logits = _with_scores(logits, _drawn(part.scores[at], order), steered)
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
        """The permutation of each token's experts, where this part is drawn."""
        if part.seed is None:
            return None
        if counter is None:
            raise RuntimeError(
                "a plan draws experts for each token, but the call does not say which token is where: steer with "
                "RoutedModel.steer, which counts positions"
            )
        return permutations(part.seed, self.layer, counter, self.num_experts)

    # ---- what is chosen by name

    def _named(self, row: Tensor) -> Tensor | None:
        """bool [T]: tokens whose choice a replay or a slot makes; None where there is no such rule."""
        found = None
        for part in self.parts:
            for table in (part.slot if part.slot is None else part.slot[:, None], part.replay):
                if table is not None:
                    here = (row >= 0) & (table >= 0).any(1)[row.clamp(min=0)]
                    found = here if found is None else found | here
        return found

    def _more(self, row: Tensor, k: int) -> Tensor | None:
        """bool [T]: tokens with more slots than the router's; None where no row has."""
        if not self.wide:
            return None
        return (row >= 0) & (self.base.tables["top_k"] > k)[row.clamp(min=0)]

    def _choose(
        self,
        ids: Tensor,
        weights: Tensor,
        named: Tensor,
        row: Tensor,
        steered: Steered,
        spec: RouterSpec,
        counter: Tensor | None,
        expert_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Ids with the named experts in their slots, and the weights that the steered scores give them."""
        at = row.clamp(min=0)
        wanted = ids
        for part in self.parts:
            if part.replay is not None:
                replay = _padded(self._drawn_ids(part, part.replay[at], counter), ids.shape[1], -1).to(ids.dtype)
                wanted = torch.where((row >= 0)[:, None] & (replay >= 0).any(1, keepdim=True), replay, wanted)
        for part in self.parts:
            if part.slot is not None:
                expert = self._drawn_ids(part, part.slot[at][:, None], counter).to(ids.dtype)
                expert = torch.where((row >= 0)[:, None], expert, -1)
                wanted = _last_slot(wanted, expert, _off(steered, expert, self.num_experts))
        found = ops.route_weights(
            steered.logits, wanted, spec, expert_scale=expert_scale, steering=steered.tables, tokens=steered.tokens
        )
        moved = named[:, None] & (wanted != ids).any(1, keepdim=True)  # the others keep the weights they have
        return torch.where(moved, wanted, ids), torch.where(moved, found, weights)

    def _drawn_ids(self, part: Part, ids: Tensor, counter: Tensor | None) -> Tensor:
        """Ids [T, n] (-1 stays) under the part's permutation of each token's experts."""
        order = self._order(part, counter)
        if order is None:
            return ids
        return torch.where(ids >= 0, order.argsort(dim=1).gather(1, ids.clamp(min=0)), -1)


def logits_of_scores(scores: Tensor, name: str, spec: RouterSpec) -> Tensor:
    """Logits [rows, E] that the router ``name`` scores as ``scores`` says; NaN rows stay."""
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


def _rows(tokens: Tensor, rows: int) -> Tensor:
    """int64 [T]: each token's row of the plan, -1 where it has none."""
    row = tokens[:, 0].to(torch.int64)
    return torch.where((row >= 0) & (row < rows) & (tokens[:, 3] != 0), row, -1)


def _gathered(base: SteeringTables, at: Tensor) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Planes [T, E] by name, row parameters [T, 5] and remap [T, E] of each token's row."""
    tables, _, row_params, remap = base.packed
    present = [name for name in STEERING_PLANES if name in base.tables]
    planes = {} if tables is None else dict(zip(present, tables[at].unbind(1), strict=True))
    return planes, None if row_params is None else row_params[at], None if remap is None else remap[at]


def _marked(ids: Tensor, num_experts: int) -> Tensor:
    """bool [T, E]: the experts among ids [T, k]."""
    slots = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(torch.int64)
    marks = torch.zeros(len(ids), num_experts + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, slots, True)[:, :num_experts]


def _drawn(plane: Tensor, order: Tensor | None) -> Tensor:
    return plane if order is None else plane.gather(1, order)


def _joined(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Two planes as one: strengths add, factors multiply, forbid over off over on."""
    if name == "force":
        return torch.where((a < 0) | (b < 0), torch.minimum(a, b), torch.maximum(a, b))
    return a * b if name in _FACTORS else a + b


def _with_scores(logits: Tensor, replaced: Tensor, steered: Tensor) -> Tensor:
    """Logits with those of replaced scores in the rows that have them (the others are NaN)."""
    wide = logits if logits.dtype is torch.float64 else logits.float()
    here = steered[:, None] & ~torch.isnan(replaced[:, :1])
    return torch.where(here, replaced.to(wide.dtype), wide)


def _padded(table: Tensor, width: int, value: float) -> Tensor:
    missing = width - table.shape[1]
    return table if missing <= 0 else torch.nn.functional.pad(table, (0, missing), value=value)


def _neither(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        only = a if b is None else b
        return None if only is None else ~only
    return ~(a | b)


def _only(tokens: Tensor, counted: Tensor) -> Tensor:
    """The token table with only some of the tokens in a statistic."""
    statistics = torch.where(counted[:, None], tokens[:, 1:3], -1)
    return torch.cat([tokens[:, :1], statistics, tokens[:, 3:]], 1)


def _off(steered: Steered, expert: Tensor, num_experts: int) -> Tensor:
    """bool [T, 1]: the token's steering keeps this expert out."""
    force = steered.tables.tables.get("force")
    if force is None:
        return torch.zeros_like(expert, dtype=torch.bool)
    return force.gather(1, expert.clamp(0, num_experts - 1).to(torch.int64)) < Force.NONE


def _last_slot(ids: Tensor, expert: Tensor, off: Tensor) -> Tensor:
    """Ids with ``expert`` [T, 1] in the last slot that is filled, where it is in none (-1, or kept out: nothing)."""
    last = (ids >= 0).sum(1, keepdim=True) - 1
    takes = (expert >= 0) & ~off & ~(ids == expert).any(1, keepdim=True) & (last >= 0)
    slots = torch.arange(ids.shape[1], device=ids.device)
    return torch.where(takes & (slots == last), expert, ids)

"""Tables of rules that need more than a token's steering row, as data; `ops.token_rules` routes by them.

A plan compiles to ``TokenTables`` in layers where a rule depends on the router's own choice, draws experts, gives
scores, or chooses experts by id. ``join`` puts those of several plans into one. ``starts`` and ``entries`` find a
token's row in tables of values per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_route.base.devices import upload
from moe_route.contract.tables import NEUTRAL, SteeringTables


class Named(NamedTuple):
    """One table of ``Part.named``: its dtype, what a row holds ("E" and "k": one number per expert or slot, "": a
    number), and the value of rows without such a rule."""

    dtype: type[np.generic]
    width: str
    neutral: float


NAMED: Mapping[str, Named] = MappingProxyType(
    {
        "replace_scores": Named(np.float32, "E", float("nan")),
        "reserve_slot": Named(np.int64, "", -1),
        "fix_choice": Named(np.int64, "k", -1),
        "replay": Named(np.int64, "", -1),
        "score_table": Named(np.int64, "", -1),
        "gumbel": Named(np.float64, "", 0),
        "gumbel_stream": Named(np.int64, "", 0),
    }
)
"""Tables by name of what replaces scores or chooses experts by id."""
BY_TOKEN = ("replay", "score_table")
"""Those that hold the index of a table of values per token; they do nothing to a token without an entry there."""


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


@dataclass(frozen=True, slots=True, eq=False)
class Where:
    """The n tokens that a function of a plan is given, all of one call and layer.

    Attributes:
        layer: index of the MoE layer.
        sequence: int64 [n], row of the batch.
        position: int64 [n], place in the sequence, padding not counted.
        token: int64 [n], token id; -1 where the model was called with embeddings.
        decode: bool [n], whether the token was generated.
    """

    layer: int
    sequence: Tensor
    position: Tensor
    token: Tensor
    decode: Tensor

    @classmethod
    def of(cls, layer: int, told: Tensor) -> Where:
        """From the columns sequence, position, token and decode, int64 [n, 4]."""
        sequence, position, token, decode = told.unbind(1)
        return cls(layer, sequence, position, token, decode.bool())


class Applied(NamedTuple):
    """A function of the logits [n, E] of some tokens, and bool [rows], the rows that it acts on."""

    function: Callable[[Tensor, Where], Tensor]
    rows: Tensor


class TokenTables:
    """Tables of one layer in which some rule depends on more than a token's row; `ops.token_rules` routes by them.

    Args:
        layer: index of the MoE layer, used in random draws.
        num_experts: E.
        base: the rules that depend on the row only, and the row parameters.
        parts: the other rules.
        recorded: by index of the table, int16 [n, k], the choices of n tokens in this layer. -1 in the first slot: no
            choice; a later -1: an empty slot.
        scored: by index of the table, float32 [n, E], scores of n tokens in this layer; a row of NaN: none.
            ``token_rules.fitted`` turns them into logits.
        anew: bool [rows], rows whose tokens are routed again although no plane changes their logits; None for no row.
        by_token_only: bool [rows], rows that have no effect on a token that no table names; None for no row.
        wide: number of slots, if some row has more than the router; else 0.
        functions: functions of the logits, in the order in which they run.
        functions_only: bool [rows], rows that hold functions and nothing else; None for no row.
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
        functions: Sequence[Applied] = (),
        functions_only: Tensor | None = None,
    ) -> None:
        self.layer, self.rows, self.num_experts, self.wide = layer, base.rows, num_experts, wide
        self.base, self.parts = base, tuple(parts)
        self.recorded, self.scored = dict(recorded), dict(scored)
        self.anew, self.by_token_only = anew, by_token_only
        self.functions, self.functions_only = tuple(functions), functions_only

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

    def to(self, device: torch.device) -> TokenTables:
        """Copy the tables to another device, without waiting for it."""
        flags = (self.anew, self.by_token_only, self.functions_only)
        anew, only, alone = (None if rows is None else upload(rows, device) for rows in flags)
        recorded, scored = (
            {number: upload(values, device) for number, values in of.items()} for of in (self.recorded, self.scored)
        )
        parts = [part.to(device) for part in self.parts]
        functions = [applied._replace(rows=upload(applied.rows, device)) for applied in self.functions]
        tables = {"recorded": recorded, "scored": scored, "functions": functions, "functions_only": alone}
        return self.replaced(base=self.base.to(device), parts=parts, anew=anew, by_token_only=only, **tables)

    def replaced(self, **changed: Any) -> TokenTables:
        """The same tables but for these attributes, by name."""
        tables = ("base", "parts", "recorded", "scored", "anew", "by_token_only", "functions", "functions_only")
        names = ("layer", "num_experts", *tables, "wide")
        return TokenTables(**{name: getattr(self, name) for name in names} | changed)


class Placed(NamedTuple):
    """The steering of one plan in one layer, its first row, and the index of its first table of values per token."""

    steering: TokenTables
    row: int
    table: int


def join(base: SteeringTables, plans: Sequence[Placed]) -> TokenTables:
    """One steering for all plans of a layer.

    ``base`` holds what depends on the row alone, at the rows that the plans take. That of each plan is not read.
    Raises ``ValueError`` for a plan with more slots than the router has.
    """
    first = plans[0].steering
    if any(plan.steering.wide for plan in plans):
        raise ValueError(f"a top_k above the router's own (layer {first.layer}) cannot be joined with other plans")
    device = base.device
    parts = [_moved(part, plan, base.rows).to(device) for plan in plans for part in plan.steering.parts]
    recorded, scored = (
        {
            number + plan.table: values.to(device)
            for plan in plans
            for number, values in getattr(plan.steering, name).items()
        }
        for name in ("recorded", "scored")
    )
    anew, by_token_only = (
        _flags([(plan, getattr(plan.steering, name)) for plan in plans], base.rows, device)
        for name in ("anew", "by_token_only")
    )
    return TokenTables(
        first.layer,
        first.num_experts,
        base,
        parts,
        recorded=recorded,
        scored=scored,
        anew=anew,
        by_token_only=by_token_only,
        wide=0,
    )


def _moved(part: Part, plan: Placed, rows: int) -> Part:
    planes = {name: _in_rows(table, plan, rows, NEUTRAL[name]) for name, table in part.planes.items()}
    named = {name: _in_rows(table, plan, rows, NAMED[name].neutral) for name, table in part.named.items()}
    for name in BY_TOKEN:
        if name in named:
            named[name] = torch.where(named[name] >= 0, named[name] + plan.table, -1)
    return replace(part, planes=planes, named=named)


def _flags(of_plans: Sequence[tuple[Placed, Tensor | None]], rows: int, device: torch.device) -> Tensor | None:
    """bool [rows]: the flags of every plan in its rows; None if no plan has any."""
    of_plan = [_in_rows(flags, plan, rows, False) for plan, flags in of_plans if flags is not None]
    return torch.stack(of_plan).any(0).to(device) if of_plan else None


def _in_rows(table: Tensor, plan: Placed, rows: int, value: float) -> Tensor:
    """The rows of a plan's table at their place among ``rows``, and ``value`` in all others."""
    made = torch.full((rows, *table.shape[1:]), value, dtype=table.dtype, device=table.device)
    made[plan.row : plan.row + len(table)] = table
    return made


class ValuesByToken(Protocol):
    """The part of a table of values per token that a look-up uses (`steering.tables.SequenceTable`)."""

    @property
    def first(self) -> np.ndarray: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def constant(self) -> bool: ...
    def sequences(
        self, batch: int, items: Sequence[str | int] | None, groups: Sequence[str | None] | None
    ) -> np.ndarray: ...


def starts(
    tables: Sequence[ValuesByToken],
    batch: int,
    items: Sequence[str | int] | None,
    groups: Sequence[str | None] | None,
) -> np.ndarray:
    """int64 [3, batch, M]: where the values of each sequence of a batch begin in each of M tables, how many there are,
    and the number of rows from one token to the next (0 if one row stands for all tokens of a sequence).

    ``items`` and ``groups`` are those of the sequences, or None. Raises ``PlanError`` for a sequence without values.
    """
    places = np.zeros((3, batch, len(tables)), np.int64)
    for number, table in enumerate(tables):
        row = table.sequences(batch, items, groups)
        places[:, :, number] = table.first[row], np.asarray(table.lengths)[row], np.full(batch, not table.constant)
    return places


def entries(places: Tensor, positions: Tensor) -> Tensor:
    """int64 [..., M]: row of each token in each of M tables, -1 for none.

    ``places`` [3, ..., M] are those of ``starts`` for each token's sequence, ``positions`` [...] count from 0, padding
    not counted.
    """
    first, length, step = places
    place = positions[..., None] * step
    return torch.where(place < length, first + place, -1)


def stream_of(seed: int, layer: int) -> int:
    """Seed and layer mixed into 64 bits, as a signed number."""
    bits = (seed * 0xD1342543DE82EF95 + (layer + 1) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    return bits - (1 << 64) if bits >> 63 else bits

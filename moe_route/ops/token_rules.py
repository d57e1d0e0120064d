"""Per-token steering, for rules that per-row tables cannot express; computed in torch before and after `route`.

Six kinds of rules need more than a token's row: a user's own functions of the logits, rules that depend on the router's
own choice (only if absent), random draws per token, replaced scores, choices by expert id (fixed, replayed or drawn,
the reserved slot), and more experts than the router has slots. Functions run first, on the model's own logits: all that
follows sees what they return. The next three become tables with a row for each token. One `route` call then steers,
chooses and weighs with them, and counts the tokens whose choice it makes. Tokens that are routed again whatever their
own choice are counted by a second call, which compares with the choice of the model. Tokens whose experts are named
here are counted in torch. All add to the same tables.
Nothing here waits for a device, except functions, which are given the rows of their tokens alone.

Random draws are counter-based (SplitMix64), reproducible across devices and batch splits. A draw depends on the seed,
the layer, and the token (its position in the sequence and its id). It depends neither on the state of a generator nor
on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe_route import reference
from moe_route.base.devices import CaptureRefusedError, capturing, widest
from moe_route.contract.spec import ChoiceMode, RouterSpec
from moe_route.contract.tables import NEUTRAL, STEERING_PLANES, Force, StatisticsTables, SteeringTables
from moe_route.contract.token_tables import Part, TokenTables, Where, stream_of
from moe_route.modules.intercept import untraced
from moe_route.ops.gate import route, route_weights

_FACTORS = ("scale", "weight_scale")

# constants of SplitMix64, as signed numbers
_FIRST, _SECOND, _STEP = (c - (1 << 64) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))


class Steered(NamedTuple):
    """Inputs of ``route`` in place of a layer's logits, tables and token table; the tables have a row per token."""

    logits: Tensor
    tables: SteeringTables
    tokens: Tensor


def fitted(tables: TokenTables, name: str, spec: RouterSpec) -> TokenTables:
    """Fit the steering to a router that scores by ``spec``; ``ValueError`` naming the router if it cannot be."""

    def fit(part: Part) -> Part:
        scores = part.named.get("replace_scores")
        if scores is None:
            return part
        return replace(part, named={**part.named, "replace_scores": logits_of_scores(scores, name, spec)})

    scored = {number: logits_of_scores(scores, name, spec) for number, scores in tables.scored.items()}
    return tables.replaced(parts=[fit(part) for part in tables.parts], scored=scored)


def route_tokens(
    tables: TokenTables,
    logits: Tensor,
    k: int,
    spec: RouterSpec,
    *,
    tokens: Tensor,
    counter: Tensor | None,
    entries: Tensor | None = None,
    told: Tensor | None = None,
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
        told: int64 [T, 4], what functions are told of each token (`Where.of`).

    Returns:
        weights and ids [T, k] (wider if rows have more slots), and the inputs that ``ops.route`` was given.
    """
    logits, spec = reference.capped(logits, spec), replace(spec, softcap=0.0)
    row = _rows(tokens, tables.rows)
    applied = None
    if tables.functions:
        logits, applied = _applied(tables, logits, row, told)
    replayed = _choice(tables, row, entries, counter, k)
    given = _given_scores(tables, row, entries, counter)
    scored = None if given is None else ~torch.isnan(given[:, 0])
    if tables.by_token_only is not None:
        has_entry = _either(None if replayed is None else replayed[:, 0] >= 0, scored)
        assert has_entry is not None  # a row of tables alone has one
        row = torch.where(tables.by_token_only[row.clamp(min=0)] & ~has_entry, -1, row)
    steered = steer(tables, logits, tokens, row, choice, counter, given)
    replayed = _drawn_choice(tables, replayed, row, steered, k, spec, counter, correction_bias)
    more = _holds(row, tables.base.tables["top_k"] > k) if tables.wide else None
    anew = _either(_either(None if tables.anew is None else _holds(row, tables.anew), scored), applied)
    named = _named(tables, row, replayed)
    apart = _either(named, anew)
    own = choice if anew is None else torch.where(anew[:, None], -1, choice)  # -1: no choice to keep

    def routed(slots: int, offered: Tensor, mode: ChoiceMode, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        return route(
            steered.logits,
            slots,
            spec,
            correction_bias=correction_bias,
            expert_scale=expert_scale,
            steering=steered.tables,
            tokens=steered.tokens if counted is None else _only(steered.tokens, counted),
            choice=_padded(offered, slots, -1),
            choice_weights=None if choice_weights is None else _padded(choice_weights, slots, 0),
            choice_mode=mode,
            statistics=statistics,
        )

    # counts compare these tokens with the choice of the model, which their logits do not give any more
    baseline = torch.where(choice < 0, -2, choice)  # -2: no expert, where -1 in front would mean no choice
    usual = anew if named is None or anew is None else anew & ~named
    if more is not None and usual is not None:
        usual = usual & ~more
    weights, ids = routed(k, own, "natural", None if apart is None else ~apart)
    if statistics is not None and usual is not None:
        with torch.no_grad():
            routed(k, baseline, "baseline", usual)
    if applied is not None and tables.functions_only is not None and choice_weights is not None:
        unchanged = _holds(row, tables.functions_only) & ~applied  # the model's own weights, with the same gradient
        own_weights = choice_weights.detach().to(weights.dtype) + (weights - weights.detach())
        weights = torch.where(unchanged[:, None], own_weights, weights)
    if more is not None:
        wider_weights, wider_ids = routed(tables.wide, baseline, "baseline", more if named is None else more & ~named)
        ids = torch.where(more[:, None], wider_ids, _padded(ids, tables.wide, -1))
        weights = torch.where(more[:, None], wider_weights, _padded(weights, tables.wide, 0))
    if named is not None:
        ids, weights = _choose(tables, ids, weights, replayed, named, row, steered, spec, counter, expert_scale)
    if statistics is not None and named is not None:
        for counted, slots in ((named, k),) if more is None else ((named & ~more, k), (named & more, tables.wide)):
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


def _holds(row: Tensor, rows: Tensor) -> Tensor:
    """bool [T]: the flag of each token's row, False for tokens without a row."""
    return (row >= 0) & rows[row.clamp(min=0)]


# ---- a user's own functions


@untraced  # Python that torch.compile cannot see into: the graph ends here, and fullgraph=True is refused
def _applied(tables: TokenTables, logits: Tensor, row: Tensor, told: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits [T, E] after the functions of the plan, and bool [T], the tokens whose logits are others now."""
    if capturing(logits.device):
        raise CaptureRefusedError(
            "a CUDA graph is being captured, and a plan applies a function to logits, whose Python would not run again "
            "in its replays: run without CUDA graphs, or steer by rules without Plan.apply"
        )
    natural = logits if logits.dtype is torch.float64 else logits.float()
    made = natural
    for function, rows in tables.functions:
        places = _holds(row, rows).nonzero()[:, 0]
        if not len(places):
            continue
        if told is None:
            raise RuntimeError(
                "a plan applies a function, but the call does not say which token is where: steer with "
                "RoutedModel.steer, which counts positions"
            )
        before = made[places]
        after = _checked(function, before.float(), Where.of(tables.layer, told[places]))
        if made.dtype is not torch.float32:  # what a function leaves alone keeps its own precision
            after = torch.where(_differs(before.float(), after)[:, None], after.to(made.dtype), before)
        made = made.index_copy(0, places, after)
    return made, _differs(natural, made)


def _checked(function: Callable[[Tensor, Where], Tensor], logits: Tensor, where: Where) -> Tensor:
    """What a function makes of float32 logits [n, E]; raises an error naming it for anything but such logits."""
    name = getattr(function, "__qualname__", type(function).__name__)
    made = function(logits.clone(), where)
    if not isinstance(made, Tensor):
        raise TypeError(f"{name} returned {type(made).__name__} in layer {where.layer}: return the logits, a tensor")
    if made.shape != logits.shape or made.dtype is not torch.float32 or made.device != logits.device:
        raise ValueError(
            f"{name} returned {made.dtype} {list(made.shape)} on {made.device} in layer {where.layer}: return float32 "
            f"{list(logits.shape)} on {logits.device}, as it was given"
        )
    if bool((torch.isnan(made) & ~torch.isnan(logits)).any()):
        raise ValueError(
            f"{name} returned NaN in layer {where.layer} where the logit was a number: -inf chooses an expert last"
        )
    return made


def _differs(one: Tensor, other: Tensor) -> Tensor:
    """bool [T]: rows of [T, E] that are not equal, NaN being equal to NaN."""
    return ((one != other) & ~(torch.isnan(one) & torch.isnan(other))).any(1)


# ---- rules that become tables


def steer(
    tables: TokenTables,
    logits: Tensor,
    tokens: Tensor,
    row: Tensor,
    chosen: Tensor,
    counter: Tensor | None,
    given: Tensor | None = None,
) -> Steered:
    """Logits, and tables with a row per token. ``given``: logits [T, E] of given scores, NaN rows for none."""
    steered, at = row >= 0, row.clamp(min=0)
    planes, row_params, remap = _gathered(tables.base, at)
    own = _marked(chosen, tables.num_experts)
    if given is not None:
        logits = _with_scores(logits, given, steered)
    for part in tables.parts:
        order = _order(tables, part, counter)
        scores = part.named.get("replace_scores")
        if scores is not None:
            logits = _with_scores(logits, _drawn(scores[at], order), steered)
        for name, plane in part.planes.items():
            mine = _drawn(plane[at], order)
            if part.absent:
                mine = torch.where(own, NEUTRAL[name], mine)
            planes[name] = _joined(name, planes[name], mine) if name in planes else mine
    names = [name for name in STEERING_PLANES if name in planes]
    bits = sum(1 << STEERING_PLANES.index(name) for name in names)
    packed = torch.stack([planes[name] for name in names], 1).contiguous() if names else None
    by_token = SteeringTables.from_packed(packed, bits, row_params, remap, tables.num_experts)
    numbers = torch.arange(len(row), device=row.device)
    table = torch.cat([torch.where(steered, numbers, -1).to(torch.int32)[:, None], tokens[:, 1:]], 1)
    return Steered(logits, by_token, table)


def _order(tables: TokenTables, part: Part, counter: Tensor | None) -> Tensor | None:
    """A permutation of the experts per token, or None if this part is not drawn."""
    if part.seed is None:
        return None
    return permutations(part.seed, tables.layer, _counted(counter), tables.num_experts)


# ---- choices by expert id


def _choice(tables: TokenTables, row: Tensor, entries: Tensor | None, counter: Tensor | None, k: int) -> Tensor | None:
    """int64 [T, k]: the experts of a fixed choice or a replay, -1 in the first slot for none.

    None if there is no such rule.
    """
    chosen = None
    at = row.clamp(min=0)
    for part in tables.parts:
        for named in _named_choices(tables, part, at, entries):
            ids = _drawn_ids(tables, part, torch.where((row >= 0)[:, None], named.to(torch.int64), -1), counter)
            ids = _padded(ids, k, -1)
            chosen = ids if chosen is None else torch.where(ids[:, :1] >= 0, ids, chosen)
    return chosen


def _named_choices(tables: TokenTables, part: Part, at: Tensor, entries: Tensor | None) -> Iterator[Tensor]:
    """Ids [T, k] of a part's fixed choices and of each of its recorded tables, -1 in the first slot for none."""
    if "fix_choice" in part.named:
        yield part.named["fix_choice"][at]
    if "replay" in part.named:
        for number, recorded in tables.recorded.items():
            entry = _entry(part.named["replay"][at], number, entries)
            yield torch.where((entry >= 0)[:, None], recorded[entry.clamp(min=0)], -1)


def _given_scores(tables: TokenTables, row: Tensor, entries: Tensor | None, counter: Tensor | None) -> Tensor | None:
    """float32 [T, E]: logits of the scores that tables give, a row of NaN for none; None without such a table."""
    logits = None
    at = row.clamp(min=0)
    for part in tables.parts:
        for number, scores in tables.scored.items() if "score_table" in part.named else ():
            entry = torch.where(row >= 0, _entry(part.named["score_table"][at], number, entries), -1)
            given = torch.where((entry >= 0)[:, None], scores[entry.clamp(min=0)], torch.nan)
            given = _drawn(given, _order(tables, part, counter))
            logits = given if logits is None else torch.where(torch.isnan(given), logits, given)
    return logits


def _drawn_choice(
    tables: TokenTables,
    choice: Tensor | None,
    row: Tensor,
    steered: Steered,
    k: int,
    spec: RouterSpec,
    counter: Tensor | None,
    correction_bias: Tensor | None,
) -> Tensor | None:
    """``choice``, int64 [T, k], with the experts drawn by Gumbel noise for the tokens of such rules."""
    for part in tables.parts:
        if "gumbel" not in part.named:
            continue
        at = row.clamp(min=0)
        temperature = torch.where(row >= 0, part.named["gumbel"][at], 0.0)[:, None]
        noise = gumbel_noise(part.named["gumbel_stream"][at], _counted(counter), tables.num_experts)
        noisy = steered.logits.detach() + (temperature * noise).to(
            torch.promote_types(steered.logits.dtype, torch.float32)
        )
        natural = torch.full((len(row), k), -1, dtype=torch.int32, device=row.device)  # -1: no choice to keep
        _, ids = route(
            noisy,
            k,
            spec,
            correction_bias=correction_bias,
            steering=steered.tables,
            tokens=_only(steered.tokens, torch.zeros_like(row, dtype=torch.bool)),
            choice=natural,
        )
        ids = torch.where(temperature > 0, ids.to(torch.int64), -1)
        choice = ids if choice is None else torch.where(ids[:, :1] >= 0, ids, choice)
    return choice


def _named(tables: TokenTables, row: Tensor, choice: Tensor | None) -> Tensor | None:
    """bool [T]: tokens whose choice is made by expert id; None if there is no such rule."""
    by_id = None if choice is None else choice[:, 0] >= 0
    for part in tables.parts:
        if "reserve_slot" in part.named:
            by_id = _either(by_id, _holds(row, part.named["reserve_slot"] >= 0))
    return by_id


def _choose(
    tables: TokenTables,
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
    for part in tables.parts:
        if "reserve_slot" in part.named:
            reserved = torch.where(row >= 0, part.named["reserve_slot"][row.clamp(min=0)], -1)[:, None]
            expert = _drawn_ids(tables, part, reserved, counter).to(ids.dtype)
            wanted = _last_slot(wanted, expert, _off(steered, expert, tables.num_experts))
    new_weights = route_weights(
        steered.logits, wanted, spec, expert_scale=expert_scale, steering=steered.tables, tokens=steered.tokens
    )
    moved = named[:, None] & (wanted != ids).any(1, keepdim=True)  # other tokens keep their weights
    return torch.where(moved, wanted, ids), torch.where(moved, new_weights, weights)


def _drawn_ids(tables: TokenTables, part: Part, ids: Tensor, counter: Tensor | None) -> Tensor:
    """Apply the part's permutation of each token's experts to ids [T, n]; -1 stays."""
    order = _order(tables, part, counter)
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
    p = scores.to(widest(scores.device))
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


# ---- random draws


def token_counter(position: Tensor, token_ids: Tensor | None) -> Tensor:
    """int64: a number per token, made of its position and, if known, its id. The two shapes must broadcast."""
    counter = position.to(torch.int64) << 32
    return counter if token_ids is None else counter | (token_ids.to(torch.int64) & 0xFFFFFFFF)


def permutations(seed: int, layer: int, counter: Tensor, num_experts: int) -> Tensor:
    """int64 [T, E]: a permutation of the experts for each token of ``counter`` [T].

    Indexing a table by it moves any set of n experts onto a uniformly random set of n experts.
    """
    return _random_bits(stream_of(seed, layer), counter, num_experts).argsort(dim=1, stable=True)


def gumbel_noise(stream: Tensor, counter: Tensor, num_experts: int) -> Tensor:
    """float64 [T, E]: independent draws of the standard Gumbel distribution, ``-log(-log(u))``.

    ``stream`` int64 [T] is each token's ``stream_of(seed, layer)``, and ``counter`` int64 [T] its number. On a device
    without float64 they are float32, of the first 23 bits of the same draws.
    """
    wide = widest(counter.device)
    kept = 52 if wide == torch.float64 else 23
    # so many random bits and a half are such a number without rounding, strictly between 0 and 1 after scaling
    bits = _shifted(_random_bits(stream, counter, num_experts), 64 - kept)
    return -(-((bits.to(wide) + 0.5) * 2.0**-kept).log()).log()


def _random_bits(stream: int | Tensor, counter: Tensor, num_experts: int) -> Tensor:
    """int64 [T, E]: 64 random bits for each token and expert."""
    experts = torch.arange(1, num_experts + 1, device=counter.device) * _STEP
    return _mixed(_mixed(counter ^ stream)[:, None] + experts)


def _mixed(bits: Tensor) -> Tensor:
    """The final step of SplitMix64; int64 wraps around like its unsigned counterpart."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift to the right, filling with zeros."""
    return (bits >> by) & ((1 << (64 - by)) - 1)

"""Files of SteerMoE (arXiv 2509.09660, github.com/adobe-research/SteerMoE) and of EasySteer's router steering.

SteerMoE's ``activations_[model]_[task].pkl`` is a pandas table with a row per expert: layer, expert, tokens that chose
it in the first and second texts (a1, a2) and that did not (d1, d2), and risk_diff = a1/(a1+d1) - a2/(a2+d2). EasySteer
(arXiv 2509.25175) takes {"layer_configs": {layer: {"mode", "expert_ids", "activate_ids", "deactivate_ids", "lambda"}}}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_route.convert.source import Source, as_array
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection, Plan

__all__ = [
    "easysteer_of",
    "is_easysteer",
    "is_table",
    "read_easysteer",
    "read_plan",
    "read_selection",
    "read_statistics",
]

_MODES = {  # deprecated names of EasySteer's modes
    "boost": "activate",
    "soft_hard": "activate",
    "suppress": "deactivate",
    "steermoe": "activate",
}


def is_table(source: Source) -> bool:
    wanted = {"layer", "expert", "risk_diff"}
    return (
        source.form in ("objects", "arrays") and isinstance(source.content, Mapping) and wanted <= set(source.content)
    )


def is_easysteer(source: Source) -> bool:
    return source.form == "json" and isinstance(source.content, dict) and "layer_configs" in source.content


def _by_expert(source: Source, names: tuple[str, ...]) -> list[np.ndarray]:
    """Columns of the table as ``[layer, expert]``."""
    missing = [name for name in names if name not in source.content]
    if missing:
        raise source.refused(f"it has no column {missing[0]}", "make the table with SteerMoE's demo")
    try:
        layer, expert = (as_array(source.content[name]).astype(np.int64) for name in ("layer", "expert"))
        columns = [as_array(source.content[name]).astype(np.float64) for name in names]
    except ValueError as error:
        raise source.refused(f"its columns are not numbers ({error})", "make the table again") from error
    if not len(layer) or min(layer.min(), expert.min()) < 0:
        raise source.refused("it has no rows, or negative layers or experts", "make the table again")
    shape = (int(layer.max()) + 1, int(expert.max()) + 1)
    tables = [np.full(shape, np.nan) for _ in columns]
    for table, column in zip(tables, columns, strict=True):
        table[layer, expert] = column
    if len(layer) != shape[0] * shape[1] or any(not np.isfinite(table).all() for table in tables):
        raise source.refused(f"it is not a row for each of {shape[0]} x {shape[1]} experts", "make the table again")
    return tables


def read_statistics(source: Source, *, groups: tuple[str, str] = ("first", "second")) -> RoutingStatistics:
    """Statistics of the two sets of texts, as two groups; ``top_k`` is the number of choices per token."""
    a1, a2, d1, d2 = _by_expert(source, ("a1", "a2", "d1", "d2"))
    counts, rest = np.stack([a1, a2]), np.stack([d1, d2])
    tokens = (counts + rest)[:, :, 0]
    if (counts + rest != tokens[:, :, None]).any() or (tokens <= 0).any():
        raise source.refused("its experts saw different numbers of tokens, or none", "make the table again")
    top_k = counts.sum(axis=2) / tokens
    if (top_k != np.rint(top_k)).any() or (top_k != top_k[0]).any():
        raise source.refused("its tokens chose different numbers of experts", "make the table again")
    return RoutingStatistics.from_token_sums(
        groups,
        counts=counts,
        tokens=tokens.astype(np.int64),
        top_k=[int(k) for k in top_k[0]],
        num_experts=counts.shape[2],
        tolerance=0.0,
        metadata={"format": "steermoe"},
    )


def _ranked(source: Source, activate: int, deactivate: int, reverse: bool) -> tuple[ExpertSelection, ExpertSelection]:
    """The experts with the largest positive and the largest negative risk differences."""
    if activate < 0 or deactivate < 0 or not activate + deactivate:
        raise ValueError("say how many experts to take: activate (--activate), deactivate (--deactivate), or both")
    (risk,) = _by_expert(source, ("risk_diff",))
    risk = -risk if reverse else risk
    order = np.argsort(-np.abs(risk), axis=None, kind="stable")
    chosen = []
    for number, sign in ((activate, 1), (deactivate, -1)):
        right = order[np.sign(risk.reshape(-1)[order]) == sign]
        if len(right) < number:
            raise source.refused(f"{len(right)} experts have such a risk difference, {number} were asked", "take fewer")
        pairs: dict[int, dict[int, float]] = {}
        for layer, expert in zip(*np.unravel_index(right[:number], risk.shape), strict=True):
            pairs.setdefault(int(layer), {})[int(expert)] = float(risk[layer, expert])
        chosen.append(
            ExpertSelection(pairs, scores=pairs, num_experts=[risk.shape[1]] * len(risk), description=source.name)
        )
    return chosen[0], chosen[1]


def read_selection(source: Source, *, activate: int = 0, deactivate: int = 0, reverse: bool = False) -> ExpertSelection:
    """The experts with the largest risk differences by absolute value; the scores are the (signed) differences.

    ``activate`` and ``deactivate`` are the numbers of positive and of negative ones; ``reverse`` changes the signs.
    """
    on, off = _ranked(source, activate, deactivate, reverse)
    return on | off


def read_plan(
    source: Source, *, activate: int = 0, deactivate: int = 0, reverse: bool = False, top_k: int | None = None
) -> Plan:
    """SteerMoE's plan: activated experts get the largest log-softmax plus 0.01, others the smallest minus 0.01.

    As there, at most ``top_k`` experts of a layer are activated, the largest first. It is taken from the counts of the
    table if it is not given.
    """
    on, off = _ranked(source, activate, deactivate, reverse)
    limit = max(read_statistics(source).top_k) if top_k is None else top_k
    kept = {layer: sorted(of, key=lambda expert: -of[expert])[:limit] for layer, of in on.scores.items()}
    plan = Plan(description=f"SteerMoE, {source.name}")
    if kept:
        plan = plan + Plan.force_on(ExpertSelection(kept, model=on.model), weight="steermoe")
    return plan + Plan.force_off(off, weight="steermoe") if off else plan


def read_easysteer(source: Source, *, first_layer: int = 0) -> Plan:
    """EasySteer's configuration as a plan; its layers are those of the model, ``first_layer`` the first MoE layer."""
    rules: dict[tuple[str, float], dict[int, list[int]]] = {}  # (what is done, strength) -> experts by layer
    for layer, of in source.content["layer_configs"].items():
        number = int(layer) - first_layer
        if number < 0:
            raise source.refused(f"layer {layer} lies before the first MoE layer {first_layer}", "check first_layer")
        for rule, ids in _layer_rules(source, layer, of).items():
            if ids:
                rules.setdefault(rule, {})[number] = ids
    if not rules:
        raise source.refused("it steers no expert", "give a configuration with layers and experts")
    plan = Plan(description=f"EasySteer, {source.name}")
    for (what, strength), experts in rules.items():
        if what in ("force_on", "force_off"):
            plan = plan + getattr(Plan, what)(experts, weight="steermoe")
        else:
            soft = Plan.activate(experts, strength=strength, correction=1)
            plan = plan + (soft.only(absent=True) if what == "soft_topk" else soft)
    return plan


def _layer_rules(source: Source, layer: str, of: Mapping[str, Any]) -> dict[tuple[str, float], list[int]]:
    mode = _MODES.get(of.get("mode", "activate"), of.get("mode", "activate"))
    ids = list(of.get("expert_ids") or ())
    if mode in ("soft", "soft_topk"):
        return {(mode, float(of.get("lambda", 0.5))): ids}
    if mode not in ("activate", "deactivate"):
        fix = "use plan.random() on a plan of its experts" if mode == "soft_random" else "correct the mode"
        raise source.refused(f"mode {mode!r} of layer {layer} has no rule here", fix)
    if of.get("epsilon", 0.01) != 0.01:
        raise source.refused(f"epsilon {of['epsilon']} of layer {layer} is not SteerMoE's 0.01", "take 0.01")
    on = [*(of.get("activate_ids") or ()), *(ids if mode == "activate" else ())]
    off = [*(of.get("deactivate_ids") or ()), *(ids if mode == "deactivate" else ())]
    # deactivation wins there
    return {("force_on", 0.0): [expert for expert in on if expert not in off], ("force_off", 0.0): off}


def easysteer_of(plan: Plan, first_layer: int = 0) -> dict[str, Any]:
    """A plan as EasySteer's configuration; ``ValueError`` for a rule that it does not have."""
    layers: dict[int, dict[str, Any]] = {}
    for rule in plan.rules:
        conditions = (rule.groups, rule.phase, rule.positions, rule.draw)
        hard = rule.kind in ("force_on", "force_off") and rule.mode == "steermoe" and not rule.absent
        soft = rule.kind == "activate" and rule.mode == "sample" and not rule.absent
        if any(condition is not None for condition in conditions) or not (hard or soft):
            raise ValueError(
                f"EasySteer has no rule such as {str(rule)!r}: it takes force_on and force_off with weight='steermoe', "
                "and activate with correction=1, for all tokens"
            )
        for layer, _ in rule.experts:
            pairs = rule.in_layer(layer)
            if pairs:
                _add_rule(layers.setdefault(layer + first_layer, {}), rule, pairs, layer)
    return {"layer_configs": {str(layer): layers[layer] for layer in sorted(layers)}}


def _add_rule(config: dict[str, Any], rule: Any, pairs: tuple[tuple[int, float], ...], layer: int) -> None:
    ids = [expert for expert, _ in pairs]
    if rule.kind == "activate":
        strengths = {rule.effective(coefficient) for _, coefficient in pairs}
        if config or len(strengths) > 1:
            raise ValueError(f"EasySteer takes one rule and one strength in a layer, layer {layer} has more: split it")
        config.update({"mode": "soft", "expert_ids": ids, "lambda": strengths.pop()})
        return
    if config.get("mode", "activate") != "activate":
        raise ValueError(f"EasySteer takes soft or hard rules in a layer, layer {layer} has both: split it")
    config["mode"] = "activate"
    key = "activate_ids" if rule.kind == "force_on" else "deactivate_ids"
    config[key] = sorted({*config.get(key, ()), *ids})

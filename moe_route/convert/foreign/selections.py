"""Chosen experts: files of ESFT, SteerMoE, EasySteer's router steering, and of programs that prune inside vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_route.analysis import esft_experts
from moe_route.convert.formats import reads, writes
from moe_route.convert.source import Source, number_table, whole_numbers
from moe_route.convert.traces import RoutedSequence, trace_of
from moe_route.convert.writers import write_json
from moe_route.recording import RoutingStatistics, Trace
from moe_route.steering import ExpertSelection, Plan, Rule
from moe_route.steering.kinds import Activate, ForceOff, ForceOn

_FILE = "expert_weights_"
_SCORES = {"token": "token_scores", "gate": "gate_scores"}
_MODES = {  # deprecated names of EasySteer's modes
    "boost": "activate",
    "soft_hard": "activate",
    "suppress": "deactivate",
    "steermoe": "activate",
}


# ---- files of ESFT (arXiv 2407.01906, github.com/deepseek-ai/ESFT).
#
# ``expert_scores/<task>/expert_weights_<layer>.txt`` has a line per training sample: the expert ids of all its tokens,
# separated by tabs, two tabs, and their gate weights. ``summary.json`` has the scores made from them, and
# ``expert_configs/<task>.json`` the experts that were trained. Layers are those of the model; layer 0 of
# DeepSeek-V2-Lite is dense, so layer 1 is the first MoE layer.


def _is_choices(source: Source) -> bool:
    if source.form == "folder":
        return any(source.path.glob(f"{_FILE}*.txt"))
    return source.form == "text" and source.name.startswith(_FILE)


@reads(
    "esft-choices",
    "experts and gate weights per token (ESFT), folder of expert_weights_<layer>.txt",
    gives="trace",
    when=_is_choices,
    defaults={"num_experts": 64},
)
def read_choices(source: Source, *, top_k: int = 6, first_layer: int = 1, group: str | None = None) -> Trace:
    """A trace of every training sample of a task: a folder of files, one per layer, or one such file.

    The group is named after the folder. Layers are numbered from ``first_layer``, the first MoE layer.
    """
    paths = [source.path] if source.form != "folder" else list(source.path.glob(f"{_FILE}*.txt"))
    by_layer = {}
    for path in paths:
        number = path.stem.removeprefix(_FILE)
        if not number.isdecimal() or int(number) < first_layer:
            raise source.refused(f"{path.name} names no MoE layer from {first_layer} on", "check first_layer")
        by_layer[int(number)] = path
    layers = sorted(by_layer)
    columns = [_layer(source, by_layer[layer], top_k) for layer in layers]
    lengths = [[len(ids) for ids, _ in column] for column in columns]
    for layer, lengths_there in zip(layers, lengths, strict=True):
        if lengths_there != lengths[0]:
            raise source.refused(f"layers {layers[0]} and {layer} are of other samples", "give files of one task")
    task = group or (source.path if source.form == "folder" else source.path.parent).resolve().name
    sequences = [
        RoutedSequence(
            np.stack([column[i][0] for column in columns], axis=1),
            i,
            task,
            np.stack([column[i][1] for column in columns], axis=1),
        )
        for i in range(len(lengths[0]))
    ]
    return trace_of(sequences, [str(layer) for layer in layers], [layer - first_layer for layer in layers])


def _layer(source: Source, path: Path, top_k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and weights ``[T, top_k]`` of each sample in one layer."""
    samples = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                ids, weights = line.rstrip("\n").split("\t\t")
                chosen = np.array(ids.split("\t"), np.int64).astype(np.int16).reshape(-1, top_k)
                samples.append((chosen, np.array(weights.split("\t"), np.float32).reshape(chosen.shape)))
            except (ValueError, OverflowError) as error:
                raise source.refused(
                    f"line {number} of {path.name} is not ids and weights of {top_k} experts per token ({error})",
                    "check top_k, or get it again",
                ) from error
    return samples


@reads(
    "esft-experts",
    "experts of a task (ESFT), expert_configs",
    gives="selection",
    # a selection of moe-route has experts too, and its layers count otherwise
    when=lambda source: source.json_with("experts") and "moe_route" not in source.content,
)
def read_config(source: Source, *, num_experts: int | None = None, first_layer: int = 1) -> ExpertSelection:
    """The experts of ``expert_configs/<task>.json``."""
    try:
        experts = {int(layer) - first_layer: ids for layer, ids in source.content["experts"].items()}
        return ExpertSelection(experts, num_experts=num_experts, description=f"ESFT experts, {source.name}")
    except (TypeError, ValueError, AttributeError) as error:
        raise source.refused(f"its experts do not fit ({error})", "check first_layer and num_experts") from error


@reads(
    "esft-scores",
    "scores of a task (ESFT), summary.json",
    gives="selection",
    when=lambda source: source.json_with("token_scores"),
)
def read_summary(source: Source, *, top_p: float = 0.2, score: str = "token", first_layer: int = 1) -> ExpertSelection:
    """The experts that the scores of ``summary.json`` choose: per layer the fewest whose scores add up to ``top_p``.

    ``score`` is "token" (selections / (k * tokens)) or "gate" (sum of gate weights / tokens).
    """
    if score not in _SCORES:
        raise ValueError(f'score must be "token" or "gate", not {score!r}')
    table = source.content[_SCORES[score]]
    layers = whole_numbers(source, table)
    experts = whole_numbers(source, table[str(layers[0])])
    rows = [[table[str(layer)][str(expert)] for expert in experts] for layer in layers]
    scores = np.stack([number_table(source, row, "expert") for row in rows])
    if layers[0] < first_layer:
        raise source.refused(f"its layers count from {layers[0]}", f"pass first_layer={layers[0]}")
    found = esft_experts(scores, top_p=top_p)
    numbers = [layer - first_layer for layer in layers]
    return ExpertSelection(
        {numbers[row]: ids for row, ids in found.items()},
        scores={numbers[row]: of for row, of in found.scores.items()},
        threshold=top_p,
        num_experts=len(experts),
        description=f"ESFT experts by {score} scores, top_p {top_p:g}",
    )


# ---- experts to prune in vLLM, as two open pull requests take them.
#
# RIY (vllm-project/vllm pull request 37824): {"version": 1, "model", "workload", "pruned_experts": [[layer, expert]]}.
# vLLM-Ascend (vllm-project/vllm-ascend pull request 12525): a line {layer: [experts, the best first]} per layer, of
# which the first are kept. Layers are those of the model.


@reads(
    "riy",
    "experts that RIY prunes in vLLM, profile",
    gives="selection",
    when=lambda source: source.json_with("pruned_experts"),
)
def read_riy(source: Source, *, num_experts: int | None = None, first_layer: int = 0) -> ExpertSelection:
    """The pruned experts of a profile. Layers are numbered from ``first_layer``, the first MoE layer."""
    if source.content.get("version") != 1:
        raise source.refused(f"its version is {source.content.get('version')!r}", "version 1 is read")
    pairs = source.content["pruned_experts"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise source.refused("its pruned_experts are no pairs of layer and expert", "get it again")
    experts: dict[int, list[int]] = {}
    try:
        for layer, expert in pairs:
            experts.setdefault(layer - first_layer, []).append(expert)
        return ExpertSelection(experts, num_experts=num_experts, description=f"experts pruned by RIY, {source.name}")
    except (TypeError, ValueError) as error:
        raise source.refused(f"its experts do not fit ({error})", "check first_layer and num_experts") from error


def _is_ranking(source: Source) -> bool:
    """Whether every line ranks the experts of one layer."""
    return source.form == "lines" and all(
        isinstance(one, dict) and len(one) == 1 and all(isinstance(ids, list) for ids in one.values())
        for one in source.content
    )


@reads("ascend", "ranked experts per layer, pruned by vLLM-Ascend, .jsonl", gives="selection", when=_is_ranking)
def read_ascend(source: Source, *, deactivate: int, first_layer: int = 0) -> ExpertSelection:
    """The last ``deactivate`` experts of every layer's ranking, which a server prunes that keeps the others.

    A prune ratio of .5 is half of the experts. Layers are numbered from ``first_layer``, the first MoE layer.
    """
    ranked: dict[int, list[int]] = {}
    for document in source.documents():
        (layer,) = whole_numbers(source, document)
        (ids,) = document.values()
        if layer in ranked:
            raise source.refused(f"layer {layer} has two lines", "get it again")
        if not isinstance(ids, list) or not all(type(one) is int for one in ids) or sorted(ids) != [*range(len(ids))]:
            raise source.refused(f"layer {layer} does not rank each of its experts once", "get it again")
        if not 0 < deactivate < len(ids):
            raise source.refused(
                f"layer {layer} has {len(ids)} experts", f"deactivate={deactivate} leaves none, or takes none"
            )
        ranked[layer - first_layer] = ids
    sizes = {len(ids) for ids in ranked.values()}
    try:
        return ExpertSelection(
            {layer: ids[-deactivate:] for layer, ids in ranked.items()},
            num_experts=sizes.pop() if len(sizes) == 1 else None,
            description=f"the last {deactivate} experts of each layer, {source.name}",
        )
    except (TypeError, ValueError) as error:
        raise source.refused(f"its experts do not fit ({error})", "check first_layer") from error


# ---- files of SteerMoE (arXiv 2509.09660, github.com/adobe-research/SteerMoE) and of EasySteer's router steering.
#
# SteerMoE's ``activations_[model]_[task].pkl`` is a pandas table with a row per expert: layer, expert, tokens that
# chose it in the first and second texts (a1, a2) and that did not (d1, d2), and risk_diff = a1/(a1+d1) - a2/(a2+d2).
# EasySteer (arXiv 2509.25175) takes {"layer_configs": {layer: {"mode", "expert_ids", "activate_ids", "deactivate_ids",
# "lambda"}}}.


def _is_table(source: Source) -> bool:
    wanted = {"layer", "expert", "risk_diff"}
    return (
        source.form in ("objects", "arrays") and isinstance(source.content, Mapping) and wanted <= set(source.content)
    )


def _by_expert(source: Source, names: tuple[str, ...]) -> list[np.ndarray]:
    """Columns of the table as ``[layer, expert]``."""
    missing = [name for name in names if name not in source.content]
    if missing:
        raise source.refused(f"it has no column {missing[0]}", "make the table with SteerMoE's demo")
    try:
        layer, expert = (source.array(source.content[name]).astype(np.int64) for name in ("layer", "expert"))
        columns = [source.array(source.content[name]).astype(np.float64) for name in names]
    except ValueError as error:
        raise source.refused(f"its columns are not numbers ({error})", "make the table again") from error
    if not len(layer) or min(layer.min(), expert.min()) < 0:
        raise source.refused("it has no rows, or negative layers or experts", "make the table again")
    shape = (int(layer.max()) + 1, int(expert.max()) + 1)
    tables = [np.full(source.room(*shape), np.nan) for _ in columns]
    for table, column in zip(tables, columns, strict=True):
        table[layer, expert] = column
    if len(layer) != shape[0] * shape[1] or any(not np.isfinite(table).all() for table in tables):
        raise source.refused(f"it is not a row for each of {shape[0]} x {shape[1]} experts", "make the table again")
    return tables


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


@reads("steermoe", "SteerMoE's table of risk differences, .pkl", gives="selection", when=_is_table)
def read_selection(source: Source, *, activate: int = 0, deactivate: int = 0, reverse: bool = False) -> ExpertSelection:
    """The experts with the largest risk differences by absolute value; the scores are the (signed) differences.

    ``activate`` and ``deactivate`` are the numbers of positive and of negative ones; ``reverse`` changes the signs.
    """
    on, off = _ranked(source, activate, deactivate, reverse)
    return on | off


@reads("steermoe", gives="plan")
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


@reads("steermoe", gives="statistics")
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


@reads(
    "easysteer",
    "EasySteer's configuration of router steering, .json",
    gives="plan",
    when=lambda source: source.json_with("layer_configs"),
)
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


@writes("easysteer", "EasySteer's configuration of router steering", takes=["plan"], suffixes=[".json"])
def write_easysteer(plan: Plan, path: Path, *, first_layer: int = 0) -> None:
    """Write a plan as EasySteer's configuration; ``ValueError`` for a rule that it does not have."""
    layers: dict[int, dict[str, Any]] = {}
    for rule in plan.rules:
        conditions = (rule.groups, rule.phase, rule.spans, rule.draw)
        hard = isinstance(rule, (ForceOn, ForceOff)) and rule.mode == "steermoe" and not rule.absent
        soft = isinstance(rule, Activate) and rule.mode == "sample" and not rule.absent
        if any(condition is not None for condition in conditions) or not (hard or soft):
            raise ValueError(
                f"EasySteer has no rule such as {str(rule)!r}: it takes force_on and force_off with weight='steermoe', "
                "and activate with correction=1, for all tokens"
            )
        for layer, _ in rule.experts:
            pairs = rule.in_layer(layer)
            if pairs:
                _add_rule(layers.setdefault(layer + first_layer, {}), rule, pairs, layer)
    write_json(path, {"layer_configs": {str(layer): layers[layer] for layer in sorted(layers)}})


def _add_rule(config: dict[str, Any], rule: Rule, pairs: tuple[tuple[int, float], ...], layer: int) -> None:
    ids = [expert for expert, _ in pairs]
    if isinstance(rule, Activate):
        strengths = {rule.effective(coefficient) for _, coefficient in pairs}
        if config or len(strengths) > 1:
            raise ValueError(f"EasySteer takes one rule and one strength in a layer, layer {layer} has more: split it")
        config.update({"mode": "soft", "expert_ids": ids, "lambda": strengths.pop()})
        return
    if config.get("mode", "activate") != "activate":
        raise ValueError(f"EasySteer takes soft or hard rules in a layer, layer {layer} has both: split it")
    config["mode"] = "activate"
    key = "activate_ids" if isinstance(rule, ForceOn) else "deactivate_ids"
    config[key] = sorted({*config.get(key, ()), *ids})

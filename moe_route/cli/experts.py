"""`moe-route analyze experts`: find experts by one of several rules; write a selection, a plan or a table of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import moe_route as mr
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import is_selection, merged_statistics, output, save_plan, token_texts
from moe_route.cli.options import (
    TABLES,
    Parser,
    add,
    existing,
    level,
    names,
    numbers,
    out_argument,
    positive,
    writable,
)

KINDS = ("activate", "deactivate", "force-on", "force-off", "forbid")
_OPPOSITE = {"activate": "deactivate", "deactivate": "activate", "force-on": "force-off", "force-off": "force-on"}


@dataclass(frozen=True)
class Rule:
    """A rule of the library: its function, and which options it takes as which arguments.

    Attributes:
        function: name in ``moe_route.analysis``.
        takes: option -> argument.
        defaults: option -> value, where the function has none.
        baseline: whether it compares with other statistics.
        by_language: whether it finds experts of every group.
    """

    function: str
    takes: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    baseline: bool = False
    by_language: bool = False


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


RULES = {
    "task": Rule(
        "task_experts",
        _same("threshold", "group", "baseline_group", "by", "phase", "lower", "matched") | {"per_layer": "top"},
        {"threshold": 0.3},
        baseline=True,
    ),
    "multilingual": Rule(
        "multilingual_experts",
        _same("threshold", "reference", "by", "phase") | {"per_layer": "top", "group": "groups"},
        {"threshold": 0.3, "reference": "eng_Latn"},
    ),
    "difference": Rule(
        "expert_difference_interval",
        _same("group", "baseline_group", "by", "resamples") | {"interval": "level"},
        baseline=True,
    ),
    "risk": Rule(
        "risk_experts",
        _same("top_n", "activations", "deactivations", "per_layer", "group", "baseline_group", "phase"),
        baseline=True,
    ),
    "share": Rule(
        "frequency_share_experts",
        _same("threshold", "by", "phase") | {"per_layer": "top"},
        {"threshold": 0.5, "per_layer": 8},
        by_language=True,
    ),
    "entropy": Rule("entropy_experts", _same("top_n", "percentile", "by", "phase"), {"top_n": 20}, by_language=True),
    "esft": Rule("esft_experts", _same("top_p", "group") | {"scores": "kind"}),
    "rise": Rule("rise_experts", _same("top_n", "alpha", "by", "phase"), {"top_n": 20}, by_language=True),
    "committee": Rule("committee", _same("by", "phase") | {"per_layer": "top", "group": "groups"}),
    "super": Rule("super_experts", _same("quantile", "share") | {"group": "groups"}),
}
_OPTIONS = tuple(dict.fromkeys(option for rule in RULES.values() for option in rule.takes if option != "group"))
SWEPT = ("task", "multilingual")


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "files",
        type=existing,
        nargs="*",
        metavar="FILE",
        help="statistics of the texts whose experts are sought (or --task), or a selection, which may be edited",
    )
    add(parser, "task", "baseline", "group", "baseline_group", "layers", task="statistics, instead of FILE")
    parser.add_argument("--rule", default="task", choices=tuple(RULES), help="how experts are found (default: task)")
    rules = parser.add_argument_group("rules")
    rules.add_argument(
        "--threshold",
        type=numbers,
        metavar="X[,Y]",
        help="task, multilingual: difference of frequency (default: 0.3), several of them for numbers of experts and "
        "their overlap by threshold; share: share of a language (default: 0.5)",
    )
    rules.add_argument(
        "--lower",
        action="store_true",
        default=None,
        help="task: ask that the lower end of the joint 95%% interval passes the threshold",
    )
    rules.add_argument(
        "--matched",
        choices=("digits",),
        help="task: compare digits with digits only, in traces of both (record --trace); needs --tokenizer",
    )
    rules.add_argument(
        "--answers", type=existing, metavar="FILE", help="risk: answers of moe-route eval; FILE holds the questions"
    )
    rules.add_argument(
        "--outcomes",
        type=names,
        metavar="A,B",
        help="risk: outcomes in English and in --group to compare, c right, i wrong (default: cc,ci)",
    )
    add(rules, "tokenizer", "reference", reference="multilingual: group to compare with (default: eng_Latn)")
    rules.add_argument(
        "--top-n", type=positive, metavar="N", help="risk, entropy, rise: number of experts (entropy, rise: 20)"
    )
    rules.add_argument("--activations", type=int, metavar="N", help="risk: number of experts used more")
    rules.add_argument("--deactivations", type=int, metavar="N", help="risk: number of experts used less")
    rules.add_argument(
        "--per-layer",
        type=positive,
        metavar="N",
        help="largest number of experts per layer (share: 8 by default; committee: those that count as most used, the "
        "top-k by default)",
    )
    rules.add_argument("--percentile", type=float, metavar="X", help="entropy: of candidates (default: 95)")
    add(rules, "top_p", "by", "phase", "resamples", top_p="esft: sum of scores to reach (default: 0.2)")
    rules.add_argument("--scores", choices=("token", "gate"), help="esft: kind of scores (default: token)")
    rules.add_argument("--alpha", type=float, metavar="X", help="rise: weight of the frequency (default: 10)")
    rules.add_argument(
        "--interval", type=level, metavar="LEVEL", help="difference: level of the intervals (default: 0.95)"
    )
    rules.add_argument(
        "--quantile", type=float, metavar="X", help="super: of the peaks of all experts (default: 0.995)"
    )
    rules.add_argument("--share", type=float, metavar="X", help="super: of the largest peak (default: 0.1)")
    rules.add_argument(
        "--stability",
        type=positive,
        metavar="N",
        help="keep experts that are found in most of N resamples of the items",
    )
    rules.add_argument("--keep", type=float, metavar="X", help="share of the resamples of --stability (default: 0.8)")
    _add_outputs(parser)


def _add_outputs(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    out_argument(
        group,
        "write the selection of these experts (.json can be edited), or their table (.csv, .parquet)",
        suffixes=(".json", ".safetensors", ".csv", ".parquet"),
    )
    group.add_argument("--table", type=partial(writable, suffixes=TABLES), metavar="FILE", help="write their table")
    group.add_argument("--plan", metavar="PLAN", help="write a plan for these experts: a file, or hub:OWNER/NAME/FILE")
    group.add_argument("--kind", choices=KINDS, help="what the plan does to them (default: activate)")
    group.add_argument(
        "--strength", type=float, metavar="X", help="in standard deviations of the logits (default: 0.5)"
    )
    group.add_argument(
        "--ids",
        type=writable,
        metavar="FILE",
        help="share, entropy, rise: write the ids of every language as JSON",
    )
    add(group, "picture", picture="several thresholds: also draw the overlap, .png, .svg or .pdf")


def run(options: argparse.Namespace) -> Answer:
    output(options.out, options.plan, options.ids, options.table, options.picture)
    for name in ("kind", "strength"):
        if getattr(options, name) is not None and options.plan is None:
            raise ValueError(f"--{name} is for the plan of --plan: add that, or leave it out")
    if options.keep is not None and options.stability is None:
        raise ValueError("--keep is for --stability: add that, or leave it out")
    if options.files and options.task:
        raise ValueError("the statistics are named twice (FILE and --task): leave one out")
    files = options.files or options.task
    if not files:
        raise ValueError("there is nothing to find experts in: give a file of statistics, or a selection")
    if len(options.threshold or ()) > 1:
        return _swept(options, files)
    if options.picture is not None:
        raise ValueError("--picture draws the overlap by threshold: give several, as --threshold 0.1,0.2,0.3")
    result = _read_selection(options, files[0]) if is_selection(files) else _found(options, files)
    return _written(options, result)


def _read_selection(options: argparse.Namespace, path: Path) -> Any:
    _refuse(options, "a selection from a file", frozenset())
    if options.group is not None or options.baseline is not None or options.stability is not None:
        raise ValueError("a selection from a file takes no --group, --baseline and --stability: leave them out")
    selection = mr.ExpertSelection.load(path)
    return selection if options.layers is None else selection.restrict(options.layers)


def _written(options: argparse.Namespace, result: Any) -> Answer:
    """Show a result, and write what was asked for of it."""
    data, text = result.to_dict(), repr(result)
    if options.ids is not None:
        if not hasattr(result, "save_ids"):
            raise ValueError("--ids is for rules that find experts of every language: use --out, without --stability")
        result.save_ids(options.ids)
        data, text = {**data, "ids": options.ids}, f"{text}\nids written to {options.ids}"
    tables = [path for path in (options.table, options.out) if path is not None]
    tables = [path for path in tables if path == options.table or path.suffix in (".csv", ".parquet")]
    for path in tables:
        text = Answer(data, text, frame=lambda: result.to_pandas()).kept(path).text
        data = {**data, "table": path}
    if options.out is not None and options.out not in tables:
        _selection(*_signed(result, options)).save(options.out)
        data, text = {**data, "out": options.out}, f"{text}\nwritten to {options.out}"
    if options.plan is not None:
        plan = _plan(options, *_signed(result, options))
        place = save_plan(plan, options.plan)
        data |= {"plan": place, "plan_hash": plan.hash}
        text = f"{text}\n{plan.describe()}\nwritten to {place}"
    return Answer(data, text)


def _swept(options: argparse.Namespace, files: list[Path]) -> Answer:
    """Numbers of task experts and of multilingual experts by threshold."""
    takes = frozenset({"threshold", "reference", "by", "phase"})
    _refuse(options, "a list of thresholds", takes)
    if options.rule not in SWEPT:
        raise ValueError(f"several thresholds are for the rules {' and '.join(SWEPT)}: give one of them")
    if options.baseline is None:
        raise ValueError("several thresholds need --baseline, the statistics of general texts")
    unused = [name for name in ("plan", "ids", "stability", "baseline_group") if getattr(options, name) is not None]
    if unused:
        raise ValueError(f"--{unused[0].replace('_', '-')} is for one threshold: leave it out, or give one")
    result = mr.analysis.sweep(
        merged_statistics(files),
        merged_statistics(options.baseline),
        reference=options.reference or "eng_Latn",
        group=options.group,
        layers=options.layers,
        phase=options.phase,
        by=options.by or "sequence",
        thresholds=options.threshold,
    )
    answer = Answer.of(result)
    if options.picture is not None:
        mr.plots.save(mr.plots.sweep_overlap(result), options.picture)
        data, text = {**answer.data, "picture": options.picture}, f"{answer.text}\nwritten to {options.picture}"
        answer = replace(answer, data=data, text=text)
    for path in dict.fromkeys(path for path in (options.out, options.table) if path is not None):
        if path.suffix not in TABLES:
            raise ValueError(f"a table by threshold is kept as {', '.join(TABLES)}, not {path.suffix}: rename {path}")
        answer = answer.kept(path)
    return replace(answer, frame=None)


def _refuse(options: argparse.Namespace, what: str, takes: frozenset[str]) -> None:
    """Refuse options that a rule does not take."""
    for name in _OPTIONS:
        if name not in takes and getattr(options, name) is not None:
            raise ValueError(f"{what} takes no --{name.replace('_', '-')}: leave it out")


def _found(options: argparse.Namespace, files: list[Path]) -> Any:
    """The result of the rule, as the library gives it."""
    rule = RULES[options.rule]
    _refuse(options, f"the rule {options.rule}", frozenset(rule.takes))
    if options.answers is not None:
        return _by_outcome(options, files)
    if options.outcomes is not None:
        raise ValueError("--outcomes are those of --answers: add that, or leave it out")
    if rule.baseline != (options.baseline is not None):
        need = "needs" if rule.baseline else "takes no"
        raise ValueError(f"the rule {options.rule} {need} --baseline, the statistics to compare with")
    read = merged_statistics if options.matched is None else _trace
    task = read(files)
    if options.group is None and len(task.groups) != 1 and rule.takes.get("group") == "group":
        raise ValueError(f"the task statistics hold {len(task.groups)} groups ({', '.join(task.groups)}): pass --group")
    if options.layers is not None and options.layers[-1] >= len(task.layers):
        raise ValueError(f"--layers must name some of the {len(task.layers)} layers, counted from 0")
    statistics = (task, *((read(options.baseline),) if rule.baseline else ()))
    values = {name: getattr(options, name) for name in rule.takes}
    values["threshold"] = None if values.get("threshold") is None else values["threshold"][0]
    given = {name: rule.defaults.get(name) if value is None else value for name, value in values.items()}
    arguments = {rule.takes[name]: value for name, value in given.items() if value is not None}
    if rule.takes.get("group") == "groups" and options.group is not None and rule.function != "multilingual_experts":
        arguments["groups"] = [options.group]
    if (options.matched is None) != (options.tokenizer is None):
        raise ValueError("--matched and --tokenizer belong together: digits are told from the texts of tokens")
    if options.tokenizer is not None:
        texts, special = token_texts(options.tokenizer)
        arguments["classes"] = mr.analysis.token_classes(texts, special=special)
    function = getattr(mr.analysis, rule.function)
    keep = 0.8 if options.keep is None else options.keep
    if options.rule == "risk" and options.stability is not None:
        arguments |= {"resamples": options.stability, "keep": keep}

    def find(*drawn: Any) -> Any:
        return _in_layers(function(*drawn, **arguments), options.layers)

    if options.stability is None or options.rule == "risk":
        return find(*statistics)
    one: Callable[..., mr.ExpertSelection] = (
        (lambda *drawn: find(*drawn)[_language(options)])
        if rule.by_language
        else lambda *drawn: _signed(find(*drawn), options)[0]
    )
    return mr.analysis.stability_selection(one, *statistics, resamples=options.stability, keep=keep)


def _by_outcome(options: argparse.Namespace, files: list[Path]) -> Any:
    """Risk experts of the items of one language that have one outcome, against those that have another."""
    if options.rule != "risk" or options.group is None or options.baseline is not None or options.stability is not None:
        raise ValueError("--answers is for --rule risk with --group LANGUAGE, without --baseline and --stability")
    chosen = options.outcomes or ("cc", "ci")
    table = mr.analysis.outcomes(mr.analysis.read_answers(options.answers))
    apart = mr.analysis.by_outcome(merged_statistics(files), table, options.group)
    takes = ("top_n", "activations", "deactivations", "per_layer")
    given = {name: value for name in takes if (value := getattr(options, name)) is not None}
    if len(chosen) != 2:
        raise ValueError("--outcomes names two, such as cc,ci")
    result = mr.analysis.risk_experts(apart, apart, group=chosen[0], baseline_group=chosen[1], **given)
    return _in_layers(result, options.layers)


def _trace(paths: list[Path]) -> mr.Trace:
    if len(paths) > 1:
        raise ValueError("traces are not added up: give one for the task, and one for --baseline")
    return mr.Trace.load(paths[0])


def _in_layers(result: Any, kept: tuple[int, ...] | None) -> Any:
    """The part of a result in these layers."""
    if kept is None:
        return result
    if isinstance(result, mr.ExpertSelection):
        return result.restrict(kept)
    if isinstance(result, mr.analysis.RiskExperts):
        return replace(result, activate=result.activate.restrict(kept), deactivate=result.deactivate.restrict(kept))
    if not hasattr(result, "by_group"):
        raise ValueError("this rule looks at all layers: leave --layers out")
    return replace(result, by_group={group: experts.restrict(kept) for group, experts in result.items()})


def _language(options: argparse.Namespace) -> str:
    if options.group is None:
        raise ValueError("this rule finds experts of every language: pass --group, the language whose experts to take")
    group: str = options.group
    return group


def _signed(result: Any, options: argparse.Namespace) -> tuple[mr.ExpertSelection, mr.ExpertSelection | None]:
    """The experts to write, and for risk those of the opposite sign."""
    if isinstance(result, mr.ExpertSelection):
        return result, None
    if isinstance(result, mr.analysis.RiskExperts):
        return result.activate, result.deactivate
    if isinstance(result, mr.analysis.Committee):
        return result.experts, None
    if hasattr(result, "selection"):
        return result.selection, None
    if not hasattr(result, "by_group"):
        raise ValueError(
            f"the rule {options.rule} compares all experts and selects none: keep its table (--table FILE)"
        )
    if _language(options) not in result:
        raise ValueError(f"no group {options.group!r} was recorded: there are {', '.join(result)}")
    return result[options.group], None


def _selection(used: mr.ExpertSelection, unused: mr.ExpertSelection | None) -> mr.ExpertSelection:
    if used and unused:
        raise ValueError("a selection is of one sign: pass --activations or --deactivations alone, or write a --plan")
    return used or unused or used


def _plan(options: argparse.Namespace, used: mr.ExpertSelection, unused: mr.ExpertSelection | None) -> mr.Plan:
    """The plan of --kind for these experts, and of its opposite for those used less."""
    kind, strength = options.kind or "activate", 0.5 if options.strength is None else options.strength
    if not used and not unused:
        raise ValueError("no expert was found, so there is no plan to write: take a smaller --threshold or --keep")
    if options.strength is not None and kind not in ("activate", "deactivate"):
        raise ValueError(f"--kind {kind} has no --strength: leave it out")
    plans = [_plan_of_kind(kind, used, strength)] if used else []
    if unused:
        opposite = _OPPOSITE.get(kind)
        if opposite is None:
            raise ValueError(f"--kind {kind} has no opposite for experts used less: take --deactivations 0")
        plans.append(_plan_of_kind(opposite, unused, strength))
    return sum(plans[1:], plans[0])


def _plan_of_kind(kind: str, selection: mr.ExpertSelection, strength: float) -> mr.Plan:
    make = getattr(mr.Plan, kind.replace("-", "_"))
    plan: mr.Plan = make(selection, strength=strength) if kind in ("activate", "deactivate") else make(selection)
    return plan.for_model(**{name: of for name, of in selection.model.to_dict().items() if name != "name"})

"""`moe-route analyze experts`: find experts by one of several rules, and write a plan or a selection of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_route.cli.analyze.arguments import baseline_group_argument, phase_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers_argument, merged_statistics, output, positive

if TYPE_CHECKING:
    from moe_route.steering import ExpertSelection, Plan

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
        _same("threshold", "group", "baseline_group", "by", "phase") | {"per_layer": "top", "lower": "lower"},
        {"threshold": 0.3},
        baseline=True,
    ),
    "multilingual": Rule(
        "multilingual_experts",
        _same("threshold", "reference", "by", "phase") | {"per_layer": "top", "group": "groups"},
        {"threshold": 0.3, "reference": "eng_Latn"},
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
}
_OPTIONS = (
    "threshold", "lower", "reference", "baseline_group", "top_n", "activations", "deactivations", "per_layer",
    "percentile", "top_p", "scores", "alpha", "by", "phase",
)  # fmt: skip


def add(questions: Any) -> None:
    parser = command(
        questions,
        "experts",
        run,
        "experts of a task, a language or a behavior, by one of several rules",
        "moe-route analyze experts --task task.safetensors --baseline general.safetensors \\\n"
        "    --group eng_Latn --layers 2-5 --plan plan.safetensors",
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--task", type=Path, nargs="+", metavar="FILE", help="statistics of the texts whose experts are sought"
    )
    given.add_argument("--selection", type=Path, metavar="FILE", help="take the experts of this file; it may be edited")
    parser.add_argument(
        "--baseline", type=Path, nargs="+", metavar="FILE", help="task, risk: statistics of texts to compare with"
    )
    parser.add_argument("--rule", default="task", choices=tuple(RULES), help="how experts are found (default: task)")
    parser.add_argument(
        "--group",
        metavar="GROUP",
        help="group whose experts are sought, such as eng_Latn (default: the only one; multilingual: any other)",
    )
    baseline_group_argument(parser)
    layers_argument(parser)
    _rule_arguments(parser)
    _output_arguments(parser)


def _rule_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rules")
    group.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="task, multilingual: difference of frequency (default: 0.3); share: share of a language (default: 0.5)",
    )
    group.add_argument(
        "--lower",
        action="store_true",
        default=None,
        help="task: ask that the lower end of the joint 95%% interval passes the threshold",
    )
    group.add_argument("--reference", metavar="GROUP", help="multilingual: group to compare with (default: eng_Latn)")
    group.add_argument(
        "--top-n", type=positive, metavar="N", help="risk, entropy, rise: number of experts (entropy, rise: 20)"
    )
    group.add_argument("--activations", type=int, metavar="N", help="risk: number of experts used more")
    group.add_argument("--deactivations", type=int, metavar="N", help="risk: number of experts used less")
    group.add_argument(
        "--per-layer", type=positive, metavar="N", help="largest number of experts per layer (share: 8 by default)"
    )
    group.add_argument("--percentile", type=float, metavar="X", help="entropy: of candidates (default: 95)")
    group.add_argument("--top-p", type=float, metavar="X", help="esft: sum of scores to reach (default: 0.2)")
    group.add_argument("--scores", choices=("token", "gate"), help="esft: kind of scores (default: token)")
    group.add_argument("--alpha", type=float, metavar="X", help="rise: weight of the frequency (default: 10)")
    group.add_argument(
        "--by", choices=("sequence", "token"), help="mean over sequences or tokens (default: that of the rule)"
    )
    phase_argument(group)
    group.add_argument(
        "--stability",
        type=positive,
        metavar="N",
        help="keep experts that are found in most of N resamples of the items",
    )
    group.add_argument("--keep", type=float, default=0.8, metavar="X", help="share of the resamples (default: 0.8)")


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="FILE", help="write the selection of these experts")
    group.add_argument("--plan", type=Path, metavar="FILE", help="write a plan for these experts")
    group.add_argument(
        "--kind", default="activate", choices=KINDS, help="what the plan does to them (default: activate)"
    )
    group.add_argument(
        "--strength", type=float, default=0.5, metavar="X", help="in standard deviations of the logits (default: 0.5)"
    )
    group.add_argument(
        "--ids", type=Path, metavar="FILE", help="share, entropy, rise: write the ids of every language as JSON"
    )


def run(options: argparse.Namespace) -> Answer:
    from moe_route.steering import ExpertSelection

    output(options.out, options.plan, options.ids)
    if options.selection is not None:
        _refuse(options, "a selection from a file", frozenset())
        if options.group is not None or options.baseline is not None:
            raise ValueError("a selection from a file takes no --group and no --baseline: leave them out")
        found: Any = ExpertSelection.load(options.selection)
        if options.layers is not None:
            found = found.restrict(options.layers)
    else:
        found = _found(options)
    data, text = found.to_dict(), repr(found)
    if options.ids is not None:
        if not hasattr(found, "save_ids"):
            raise ValueError("--ids is for rules that find experts of every language: use --out, without --stability")
        found.save_ids(options.ids)
        data, text = {**data, "ids": options.ids}, f"{text}\nids written to {options.ids}"
    if options.out is not None:
        _selection(*_signed(found, options)).save(options.out)
        data, text = {**data, "out": options.out}, f"{text}\nwritten to {options.out}"
    if options.plan is not None:
        plan = _plan(options, *_signed(found, options))
        plan.save(options.plan)
        data |= {"plan": options.plan, "plan_hash": plan.hash}
        text = f"{text}\n{plan.describe()}\nwritten to {options.plan}"
    return Answer(data, text)


def _refuse(options: argparse.Namespace, what: str, takes: frozenset[str]) -> None:
    """Refuse options that a rule does not take."""
    for name in _OPTIONS:
        if name not in takes and getattr(options, name) is not None:
            raise ValueError(f"{what} takes no --{name.replace('_', '-')}: leave it out")


def _found(options: argparse.Namespace) -> Any:
    """The result of the rule, as the library gives it."""
    from moe_route import analysis

    rule = RULES[options.rule]
    _refuse(options, f"the rule {options.rule}", frozenset(rule.takes))
    if rule.baseline != (options.baseline is not None):
        need = "needs" if rule.baseline else "takes no"
        raise ValueError(f"the rule {options.rule} {need} --baseline, the statistics to compare with")
    task = merged_statistics(options.task)
    if options.group is None and len(task.groups) != 1 and rule.takes.get("group") == "group":
        raise ValueError(f"the task statistics hold {len(task.groups)} groups ({', '.join(task.groups)}): pass --group")
    if options.layers is not None and options.layers[-1] >= len(task.layers):
        raise ValueError(f"--layers must name some of the {len(task.layers)} layers, counted from 0")
    statistics = (task, *((merged_statistics(options.baseline),) if rule.baseline else ()))
    values = {name: getattr(options, name) for name in rule.takes}
    given = {name: rule.defaults.get(name) if value is None else value for name, value in values.items()}
    arguments = {rule.takes[name]: value for name, value in given.items() if value is not None}
    function = getattr(analysis, rule.function)
    if options.rule == "risk" and options.stability is not None:
        arguments |= {"resamples": options.stability, "keep": options.keep}

    def find(*drawn: Any) -> Any:
        return _in_layers(function(*drawn, **arguments), options.layers)

    if options.stability is None or options.rule == "risk":
        return find(*statistics)
    one: Callable[..., ExpertSelection] = (
        (lambda *drawn: find(*drawn)[_language(options)]) if rule.by_language else find
    )
    return analysis.stability_selection(one, *statistics, resamples=options.stability, keep=options.keep)


def _in_layers(found: Any, kept: tuple[int, ...] | None) -> Any:
    """The part of a result in these layers."""
    from dataclasses import replace

    from moe_route.analysis import RiskExperts
    from moe_route.steering import ExpertSelection

    if kept is None:
        return found
    if isinstance(found, ExpertSelection):
        return found.restrict(kept)
    if isinstance(found, RiskExperts):
        return replace(found, activate=found.activate.restrict(kept), deactivate=found.deactivate.restrict(kept))
    return replace(found, by_group={group: experts.restrict(kept) for group, experts in found.items()})


def _language(options: argparse.Namespace) -> str:
    if options.group is None:
        raise ValueError("this rule finds experts of every language: pass --group, the language whose experts to take")
    group: str = options.group
    return group


def _signed(found: Any, options: argparse.Namespace) -> tuple[ExpertSelection, ExpertSelection | None]:
    """The experts to write, and for risk those of the opposite sign."""
    from moe_route.analysis import RiskExperts
    from moe_route.steering import ExpertSelection

    if isinstance(found, ExpertSelection):
        return found, None
    if isinstance(found, RiskExperts):
        return found.activate, found.deactivate
    if hasattr(found, "selection"):
        return found.selection, None
    if _language(options) not in found:
        raise ValueError(f"no group {options.group!r} was recorded: there are {', '.join(found)}")
    return found[options.group], None


def _selection(used: ExpertSelection, unused: ExpertSelection | None) -> ExpertSelection:
    if used and unused:
        raise ValueError("a selection is of one sign: pass --activations or --deactivations alone, or write a --plan")
    return used or unused or used


def _plan(options: argparse.Namespace, used: ExpertSelection, unused: ExpertSelection | None) -> Plan:
    """The plan of --kind for these experts, and of its opposite for those used less."""
    if not used and not unused:
        raise ValueError("no expert was found, so there is no plan to write: take a smaller --threshold or --keep")
    plans = [_plan_of_kind(options.kind, used, options.strength)] if used else []
    if unused:
        opposite = _OPPOSITE.get(options.kind)
        if opposite is None:
            raise ValueError(f"--kind {options.kind} has no opposite for experts used less: take --deactivations 0")
        plans.append(_plan_of_kind(opposite, unused, options.strength))
    return sum(plans[1:], plans[0])


def _plan_of_kind(kind: str, selection: ExpertSelection, strength: float) -> Plan:
    from moe_route.steering import Plan

    make = getattr(Plan, kind.replace("-", "_"))
    plan: Plan = make(selection, strength=strength) if kind in ("activate", "deactivate") else make(selection)
    return plan.for_model(config_hash=selection.model.config_hash, num_experts=selection.model.num_experts)

"""`moe-route plan activate | deactivate | ... | recipe | recipes`: write a plan from experts, or from a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers, layers_argument, merged_statistics, names, output

# verb -> (method of Plan, what it does)
EXPERT_VERBS = {
    "activate": "raise the logits of experts, in standard deviations",
    "deactivate": "lower the logits of experts, in standard deviations",
    "force-on": "choose experts before all others",
    "force-off": "choose experts last",
    "forbid": "never choose experts",
    "bias": "add a number to the logits of experts",
    "magnitude": "add a multiple of the logits' size to them",
    "scale-logits": "multiply the logits of experts",
    "scale-weights": "multiply the weights of experts",
}
_SOFT = {"activate": 0.5, "deactivate": 0.5, "bias": 1.0, "magnitude": 0.5, "scale-logits": None, "scale-weights": None}
_HELP = "LAYER:EXPERT,..., such as 5:3,17 or 8:0-3, counted from 0; 5:3=0.5 gives expert 3 a factor of its own"


def add(parts: Any) -> None:
    for verb, what in EXPERT_VERBS.items():
        parser = command(parts, verb, run_experts, what, f"moe-route plan {verb} 5:3,17 8:1 --out plan.json")
        parser.add_argument("experts", nargs="+", type=experts_of, metavar="LAYER:EXPERTS", help=_HELP)
        if verb in _SOFT:
            default = _SOFT[verb]
            shown = "" if default is None else f" (default: {default:g})"
            parser.add_argument(
                "--strength", type=float, default=default, required=default is None, metavar="X", help=f"size{shown}"
            )
        if verb.startswith("force"):
            parser.add_argument(
                "--weight", default="paper", choices=("paper", "steermoe", "natural"), help="how they are weighed"
            )
        parser.set_defaults(method=verb.replace("-", "_"))
        _conditions(parser)
    for verb, kind, what in (
        ("temperature", float, "divide all logits of layers"),
        ("top-k", int, "choose so many experts per token"),
    ):
        example = f"moe-route plan {verb} 2 --layers 4-7 --out plan.json"
        parser = command(parts, verb, run_layers, what, example)
        parser.add_argument("value", type=kind, metavar="X", help="the temperature, or the number of experts")
        parser.set_defaults(method=verb.replace("-", "_"))
        layers_argument(parser)
        _conditions(parser)
    parser = command(
        parts,
        "recipe",
        run_recipe,
        "write the plan of a published setting from statistics of its model",
        "moe-route plan recipe paper/qwen3-30b-a3b/mgsm --task math.safetensors \\\n"
        "    --baseline general.safetensors --group eng_Latn --out plan.json",
    )
    parser.add_argument("name", metavar="NAME", help="as `plan recipes` lists them")
    parser.add_argument("--task", type=Path, nargs="+", required=True, metavar="FILE", help="statistics of task texts")
    parser.add_argument(
        "--baseline", type=Path, nargs="+", required=True, metavar="FILE", help="statistics to compare with"
    )
    parser.add_argument("--group", metavar="GROUP", help="group to compare (default: the only one)")
    parser.add_argument("--baseline-group", metavar="GROUP", help="that of the baseline (default: the same)")
    parser.add_argument(
        "--layer-base", type=int, default=0, choices=(0, 1), help="number of the first layer in the publication"
    )
    out_argument(parser)
    command(parts, "recipes", run_recipes, "list published settings", "moe-route plan recipes")


def out_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="plan file to write; .json can be edited")


def _conditions(parser: argparse.ArgumentParser) -> None:
    out_argument(parser)
    group = parser.add_argument_group("where and when")
    group.add_argument("--groups", type=names, metavar="A,B", help="tokens of these groups only")
    group.add_argument("--phase", choices=("prefill", "decode"), help="tokens of this phase only")
    group.add_argument("--positions", type=layers, metavar="A-B", help="tokens at these positions only, from 0")
    group.add_argument("--absent", action="store_true", help="only experts that the router does not choose itself")


def experts_of(text: str) -> tuple[int, dict[int, float]]:
    """Parse "5:3,17", "8:0-3" or "5:3=0.5": the layer, and its experts with their factors."""
    layer, colon, listed = text.partition(":")
    found: dict[int, float] = {}
    try:
        if not colon or not listed:
            raise ValueError
        for part in listed.split(","):
            expert, given, factor = part.partition("=")
            first, dash, last = expert.partition("-")
            numbers = range(int(first), int(last if dash else first) + 1)
            if not numbers:
                raise ValueError
            found |= dict.fromkeys(numbers, float(factor) if given else 1.0)
        return int(layer), found
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no experts of a layer: write LAYER:EXPERT,EXPERT such as 5:3,17 or 8:0-3"
        ) from None


def written(plan: Any, out: Path | None) -> Answer:
    """Save a plan, and show it."""
    data, text = plan.to_dict() | {"hash": plan.hash}, plan.describe()
    if out is not None:
        plan.save(out)
        data, text = data | {"out": out}, f"{text}\nwritten to {out}"
    return Answer(data, text)


def run_experts(options: argparse.Namespace) -> Answer:
    from moe_route.steering import Plan

    output(options.out)
    experts = _united(options.experts)
    given = {name: getattr(options, name) for name in ("strength", "weight") if hasattr(options, name)}
    return written(_narrowed(getattr(Plan, options.method)(experts, **given), options), options.out)


def run_layers(options: argparse.Namespace) -> Answer:
    from moe_route.steering import Plan

    output(options.out)
    return written(_narrowed(getattr(Plan, options.method)(options.value, options.layers), options), options.out)


def _united(parts: Sequence[tuple[int, dict[int, float]]]) -> dict[int, dict[int, float]]:
    experts: dict[int, dict[int, float]] = {}
    for layer, of_layer in parts:
        experts.setdefault(layer, {}).update(of_layer)
    return experts


def _narrowed(plan: Any, options: argparse.Namespace) -> Any:
    return plan.only(options.groups, options.phase, positions=options.positions, absent=options.absent)


def run_recipe(options: argparse.Namespace) -> Answer:
    from moe_route.analysis.recipes import recipe

    output(options.out)
    chosen = recipe(options.name)
    plan = chosen(
        merged_statistics(options.task),
        merged_statistics(options.baseline),
        group=options.group,
        baseline_group=options.baseline_group,
        layer_base=options.layer_base,
    )
    answer = written(plan, options.out)
    return Answer({**answer.data, "recipe": chosen.to_dict()}, answer.text)


def run_recipes(options: argparse.Namespace) -> Answer:
    from moe_route.analysis.recipes import RECIPES

    return Answer(RECIPES.to_dict(), repr(RECIPES))

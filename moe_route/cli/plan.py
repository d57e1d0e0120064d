"""`moe-route plan make | show | add | learn | neighbors`: make, read and add up plans of steering.

A plan is a file, or lies on the Hugging Face hub: hub:OWNER/NAME/FILE.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moe_route as mr
from moe_route.base.schema import read_text
from moe_route.base.table import table
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    HUB,
    attached_model,
    load_plan,
    merged_statistics,
    output,
    save_plan,
    text_options,
    texts,
)
from moe_route.cli.options import (
    Parser,
    add,
    command,
    existing,
    layers,
    meant,
    model_arguments,
    numbers,
    out_argument,
    positive,
    refuse,
    text_arguments,
    verbs_of,
    writable,
)

# Kind of plan -> what it does, and the options that only some kinds take. Kinds of which a rule holds tables (replay,
# scores, remap, ...) have no words on a command line: `steering/kinds.py` has all.
KINDS: Mapping[str, tuple[str, frozenset[str]]] = {
    "activate": ("raise the logits of experts, in standard deviations", frozenset({"experts", "strength", "absent"})),
    "deactivate": ("lower the logits of experts, in standard deviations", frozenset({"experts", "strength", "absent"})),
    "force-on": ("choose experts before all others", frozenset({"experts", "weight", "absent"})),
    "force-off": ("choose experts last", frozenset({"experts", "weight", "absent"})),
    "forbid": ("never choose experts", frozenset({"experts", "absent"})),
    "bias": ("add a number to the logits of experts", frozenset({"experts", "strength", "absent"})),
    "magnitude": ("add a multiple of the logits' size to them", frozenset({"experts", "strength", "absent"})),
    "scale-logits": ("multiply the logits of experts", frozenset({"experts", "strength", "absent"})),
    "scale-weights": ("multiply the weights of experts", frozenset({"experts", "strength", "absent"})),
    "temperature": ("divide all logits of layers by --value", frozenset({"value", "layers", "absent"})),
    "top-k": ("choose --value experts per token", frozenset({"value", "layers", "absent"})),
}
_OF_RECIPE = frozenset({"task", "baseline", "group", "baseline_group", "layer_base"})
_CHOICES = ("strength", "weight", "value", "layers", "absent", *sorted(_OF_RECIPE))
_CONDITIONS = ("groups", "phase", "positions", "absent")
_STRENGTHS = {"activate": 0.5, "deactivate": 0.5, "bias": 1.0, "magnitude": 0.5}
_EXPERTS = (
    "LAYER:EXPERT,..., such as 5:3,17 or 8:0-3, counted from 0 (5:3=0.5 gives expert 3 a factor of its own), or a "
)
_EXPERTS += "file with a selection"


def add_plan(verbs: Any) -> None:
    below = verbs_of(verbs, "plan", "make, read, add up and learn steering plans", title="verbs")
    _add_make(below)
    _add_show(below)
    _add_sum(below)
    _add_learn(below)
    _add_neighbors(below)


def plan_file(text: str) -> str:
    """Parse the name of a plan that must be there, as a file, or lies on the hub."""
    return text if text.startswith(HUB) else str(existing(text))


def _plan_to_write(text: str) -> str:
    return text if text.startswith(HUB) else str(writable(text))


def _out(parser: Parser) -> None:
    out_argument(
        parser,
        "plan to write: a file (.json can be edited), or hub:OWNER/NAME/FILE",
        metavar="PLAN",
        type=_plan_to_write,
    )
    parser.add_argument("--private", action="store_true", help="make the repository of --out private, if it is made")


def written(plan: Any, options: argparse.Namespace, **more: Any) -> Answer:
    """Save a plan where `--out` says, and show it; ``more`` is added to the data."""
    data, text = plan.to_dict() | {"hash": plan.hash} | more, plan.describe()
    if getattr(options, "out", None) is None:
        return Answer(data, text)
    place = save_plan(plan, options.out, private=options.private)
    return Answer(data | {"out": place}, f"{text}\nwritten to {place}")


# ---- make


def _add_make(below: Any) -> None:
    parser = command(
        below,
        "make",
        run_make,
        "write a plan of one kind, or of a published setting; alone, list both",
        "moe-route plan make activate 5:3,17 8:1 --strength 0.5 --out plan.json\n"
        "moe-route plan make activate 5:3 --strength 1,0.5,0.25 --out decay.json\n"
        "moe-route plan make forbid dropped.json --groups swh_Latn --out plan.json\n"
        "moe-route plan make temperature --value 2 --layers 4-7 --out plan.json\n"
        "moe-route plan make paper/qwen3-30b-a3b/mgsm --task math.safetensors \\\n"
        "    --baseline general.safetensors --group eng_Latn --out plan.json",
    )
    parser.add_argument("kind", nargs="?", metavar="KIND|RECIPE", help=f"{', '.join(KINDS)}, or a recipe")
    parser.add_argument("experts", nargs="*", metavar="EXPERTS", help=_EXPERTS)
    parser.add_argument(
        "--strength",
        type=numbers,
        metavar="X[,Y..]",
        help="size of the change (default: 0.5; bias 1; scale-logits and scale-weights have none); several: at "
        "positions 0, 1, ..., and none after them",
    )
    add(parser, "layers", layers="temperature, top-k: MoE layers, counted from 0 (default: all)")
    parser.add_argument(
        "--weight", choices=("paper", "steermoe", "natural"), help="force-on, force-off: how they are weighed"
    )
    parser.add_argument("--value", type=float, metavar="X", help="of temperature, or the number of experts of top-k")
    where = parser.add_argument_group("where and when")
    add(where, "groups", "phase", groups="tokens of these groups only", phase="tokens of this phase only")
    where.add_argument("--positions", type=layers, metavar="A-B", help="tokens at these positions only, from 0")
    where.add_argument("--absent", action="store_true", help="only experts that the router does not choose itself")
    recipe = parser.add_argument_group("recipes")
    add(recipe, "task", "baseline", "group", "baseline_group")
    recipe.add_argument(
        "--layer-base", type=int, choices=(0, 1), help="number of the first layer in the publication (default: 0)"
    )
    _out(parser)


def run_make(options: argparse.Namespace) -> Answer:
    if options.kind is None:
        return _kinds_and_recipes()
    if options.kind in KINDS:
        return _make_kind(options)
    return _make_recipe(options)


def _kinds_and_recipes() -> Answer:
    from moe_route.analysis.recipes import RECIPES

    rows = [(kind, what) for kind, (what, _) in KINDS.items()]
    data = {"kinds": {kind: what for kind, (what, _) in KINDS.items()}, "recipes": RECIPES.to_dict()}
    return Answer(data, f"{table(('kind', 'what it does'), rows)}\n\n{RECIPES!r}")


def _make_kind(options: argparse.Namespace) -> Answer:
    _, takes = KINDS[options.kind]
    refuse(options, [name for name in _CHOICES if name not in takes], f"is not for {options.kind}")
    method = getattr(mr.Plan, options.kind.replace("-", "_"))
    if "experts" in takes:
        if not options.experts:
            raise ValueError(f"{options.kind} needs experts: {_EXPERTS}")
        given: dict[str, Any] = {} if options.weight is None else {"weight": options.weight}
        if "strength" in takes:
            strength = _STRENGTHS.get(options.kind) if options.strength is None else options.strength
            if strength is None:
                raise ValueError(f"{options.kind} needs --strength X, the factor")
            given["strength"] = strength if isinstance(strength, float) or len(strength) > 1 else strength[0]
        plan = method(experts_of(options.experts), **given)
    else:
        if options.experts:
            raise ValueError(f"{options.kind} changes whole layers: write --layers, and leave {options.experts[0]} out")
        if options.value is None:
            raise ValueError(f"{options.kind} needs --value X")
        whole = options.kind == "top-k"
        if whole and options.value != int(options.value):
            raise ValueError(f"--value {options.value:g} is not a number of experts")
        plan = method(int(options.value) if whole else options.value, options.layers)
    output(options.out)
    narrow = {name: getattr(options, name) for name in _CONDITIONS}
    return written(plan.only(narrow.pop("groups"), narrow.pop("phase"), **narrow), options)


def experts_of(words: list[str]) -> Any:
    """A selection from a file, or {layer: {expert: factor}} from "5:3,17", "8:0-3" or "5:3=0.5"."""
    if len(words) == 1 and Path(words[0]).is_file():
        return mr.ExpertSelection.load(words[0])
    experts: dict[int, dict[int, float]] = {}
    for word in words:
        layer, of_layer = _experts_of_layer(word)
        experts.setdefault(layer, {}).update(of_layer)
    return experts


def _experts_of_layer(word: str) -> tuple[int, dict[int, float]]:
    layer, colon, listed = word.partition(":")
    experts: dict[int, float] = {}
    try:
        if not colon or not listed:
            raise ValueError
        for part in listed.split(","):
            expert, given, factor = part.partition("=")
            first, dash, last = expert.partition("-")
            numbers = range(int(first), int(last if dash else first) + 1)
            if not numbers:
                raise ValueError
            experts |= dict.fromkeys(numbers, float(factor) if given else 1.0)
        return int(layer), experts
    except ValueError:
        raise ValueError(
            f"{word!r} names no experts of a layer and no file: write LAYER:EXPERT,EXPERT such as 5:3,17 or 8:0-3"
        ) from None


def _make_recipe(options: argparse.Namespace) -> Answer:
    from moe_route.analysis.recipes import RECIPES

    if options.kind not in RECIPES and "/" not in options.kind:
        known = [*KINDS, *RECIPES]
        raise ValueError(f"{options.kind!r} is neither a kind of plan nor a recipe{meant([options.kind], known)}")
    chosen = mr.recipe(options.kind)
    refuse(options, [*(name for name in _CHOICES if name not in _OF_RECIPE), *_CONDITIONS], "is not for a recipe")
    if options.experts:
        raise ValueError(f"a recipe finds its experts: leave {options.experts[0]} out")
    missing = [name for name in ("task", "baseline") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"the recipe {options.kind} needs --{' and --'.join(missing)}, statistics of its model")
    output(options.out)
    plan = chosen(
        merged_statistics(options.task),
        merged_statistics(options.baseline),
        group=options.group,
        baseline_group=options.baseline_group,
        layer_base=options.layer_base or 0,
    )
    return written(plan, options, recipe=chosen.to_dict())


# ---- show, add


def _add_show(below: Any) -> None:
    parser = command(
        below,
        "show",
        run_show,
        "show what a plan does, how it differs from another, or what it will do to recorded tokens",
        "moe-route plan show plan.json\nmoe-route plan show before.json after.json\n"
        "moe-route plan show plan.json --on general.safetensors --groups eng_Latn",
    )
    parser.add_argument("plan", type=plan_file, metavar="PLAN", help="plan: a file, or hub:OWNER/NAME/FILE")
    parser.add_argument("other", type=plan_file, nargs="?", metavar="OTHER", help="compare with this plan")
    parser.add_argument(
        "--on", type=existing, nargs="+", metavar="FILE", help="explain it on statistics (added up), or on one trace"
    )
    add(parser, "groups", groups="--on: explain these groups (default: all)")


def run_show(options: argparse.Namespace) -> Answer:
    if options.on is None:
        refuse(options, ("groups",), "is for --on")
    elif options.other is not None:
        raise ValueError("--on explains one plan: leave the other out")
    plan = load_plan(options.plan)
    if options.other is not None:
        difference = plan.diff(load_plan(options.other))
        return Answer(difference.to_dict(), repr(difference))
    if options.on is None:
        return written(plan, argparse.Namespace())
    from moe_route.base import files

    traced = len(options.on) == 1 and files.read_header(options.on[0])["kind"] == "trace"
    explanation = plan.explain(
        mr.Trace.load(options.on[0]) if traced else merged_statistics(options.on), options.groups
    )
    return Answer(explanation.to_dict(), repr(explanation))


def _add_sum(below: Any) -> None:
    parser = command(
        below,
        "add",
        run_sum,
        "add plans up, or copy one to or from the hub",
        "moe-route plan add first.json second.safetensors --out both.json\n"
        "moe-route plan add plan.json --out hub:owner/plans/plan.json",
    )
    parser.add_argument("plans", type=plan_file, nargs="+", metavar="PLAN", help="plans: files, or hub:OWNER/NAME/FILE")
    parser.add_argument("--times", type=float, default=1.0, metavar="X", help="multiply the sum by X (default: 1)")
    parser.add_argument("--any-model", action="store_true", help="the sum may steer any model, whatever they are for")
    _out(parser)


def run_sum(options: argparse.Namespace) -> Answer:
    output(options.out)
    plans = [load_plan(path) for path in options.plans]
    plan = sum((plan.for_model() for plan in plans) if options.any_model else plans, mr.Plan())
    return written(plan if options.times == 1 else plan * options.times, options)


# ---- learn, neighbors


def _add_learn(below: Any) -> None:
    parser = command(
        below,
        "learn",
        run_learn,
        "train a bias on the routers by the loss of texts, with the model frozen",
        "moe-route plan learn --languages swh_Latn --limit 60 --steps 20 --out learned.json",
    )
    parser.add_argument(
        "--what", default="bias", choices=("bias", "scale", "temperature"), help="what is trained (default: bias)"
    )
    add(parser, "layers", layers="MoE layers to train, counted from 0 (default: all)")
    parser.add_argument("--by-group", action="store_true", help="train each language apart")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="updates (default: 20)")
    parser.add_argument("--lr", type=float, default=0.01, metavar="X", help="learning rate of Adam (default: 0.01)")
    _out(parser)
    model_arguments(parser)
    text_arguments(parser)


def run_learn(options: argparse.Namespace) -> Answer:
    output(options.out)
    work = texts(options)
    with attached_model(options) as (language_model, routed):
        learned = mr.experiments.learn_routing(
            language_model,
            work,
            routed=routed,
            layers=options.layers,
            what=options.what,
            by_group=options.by_group,
            steps=options.steps,
            lr=options.lr,
            **text_options(options),
        )
    text = repr(learned)
    if options.out is not None:
        text = f"{text}\nwritten to {save_plan(learned.plan, options.out, private=options.private)}"
    return Answer({**learned.to_dict(), "out": options.out}, text)


def _add_neighbors(below: Any) -> None:
    parser = command(
        below,
        "neighbors",
        run_neighbors,
        "route new items like the most similar solved items",
        "moe-route plan neighbors --solved solved.safetensors --new new.safetensors \\\n"
        "    --group eng_Latn --layers 11-15 --out plan.safetensors",
    )
    for name, what in (("solved", "statistics of reference items"), ("new", "statistics of items to answer")):
        parser.add_argument(f"--{name}", type=existing, nargs="+", required=True, metavar="FILE", help=what)
    parser.add_argument("--successful", type=existing, metavar="FILE", help="solved items to use, one per line (all)")
    add(parser, "group", "neighbors", "layers", neighbors="number of nearest items (default: 3)")
    parser.add_argument("--new-group", metavar="GROUP", help="that of the new items (default: the same)")
    parser.add_argument(
        "--space", default="routing", choices=("routing", "hidden"), help="what makes items similar (default: routing)"
    )
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the neighbors' routing (default: 1)")
    _out(parser)


def run_neighbors(options: argparse.Namespace) -> Answer:
    output(options.out)
    listed = None if options.successful is None else read_text(options.successful).split("\n")
    scores = mr.experiments.neighbor_scores(
        merged_statistics(options.solved),
        merged_statistics(options.new),
        successful=None if listed is None else [line.strip() for line in listed if line.strip()],
        group=options.group,
        new_group=options.new_group,
        space=options.space,
        neighbors=options.neighbors or 3,
        share=options.share,
    )
    plan = scores.plan(options.layers)
    data, text = {**scores.to_dict(), "plan": plan.hash}, repr(scores)
    if options.out is not None:
        saved = written(plan, options)
        data, text = {**data, "out": options.out}, f"{text}\n{saved.text}"
    return Answer(data, text)

"""`moe-route plan sweep | learn | neighbors`: try a plan at several strengths, or learn one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    attached_model,
    command,
    layers_argument,
    merged_statistics,
    model_arguments,
    numbers,
    output,
    positive,
    seed_argument,
    shown_options,
    text_arguments,
    text_options,
    texts,
)
from moe_route.cli.plan.make import out_argument, written


def add(parts: Any) -> None:
    _add_sweep(parts)
    _add_learn(parts)
    _add_neighbors(parts)


def _add_sweep(parts: Any) -> None:
    parser = command(
        parts,
        "sweep",
        run_sweep,
        "loss of texts under a plan at several strengths",
        "moe-route plan sweep plan.json --strengths 0.5,1,2 --languages eng_Latn,deu_Latn --limit 30",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan file")
    parser.add_argument(
        "--strengths", type=numbers, default=(0.5, 1.0, 2.0), metavar="A,B", help="factors (default: 0.5,1,2)"
    )
    parser.add_argument(
        "--controls", type=int, default=0, metavar="N", help="random sets of experts per strength (default: none)"
    )
    seed_argument(parser)
    model_arguments(parser)
    text_arguments(parser)


def _add_learn(parts: Any) -> None:
    parser = command(
        parts,
        "learn",
        run_learn,
        "train a bias on the routers by the loss of texts, with the model frozen",
        "moe-route plan learn --languages swh_Latn --limit 60 --steps 20 --out learned.json",
    )
    parser.add_argument(
        "--what", default="bias", choices=("bias", "scale", "temperature"), help="what is trained (default: bias)"
    )
    layers_argument(parser, "MoE layers to train, counted from 0 (default: all)")
    parser.add_argument("--by-group", action="store_true", help="train each language apart")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="updates (default: 20)")
    parser.add_argument("--lr", type=float, default=0.01, metavar="X", help="learning rate of Adam (default: 0.01)")
    out_argument(parser)
    model_arguments(parser)
    text_arguments(parser)


def _add_neighbors(parts: Any) -> None:
    parser = command(
        parts,
        "neighbors",
        run_neighbors,
        "route new items like the most similar solved items",
        "moe-route plan neighbors --solved solved.safetensors --new new.safetensors \\\n"
        "    --group eng_Latn --layers 11-15 --out plan.safetensors",
    )
    for name, what in (("solved", "statistics of reference items"), ("new", "statistics of items to answer")):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True, metavar="FILE", help=what)
    parser.add_argument("--successful", type=Path, metavar="FILE", help="solved items to use, one per line (all)")
    parser.add_argument("--group", metavar="GROUP", help="group to take (default: the only one)")
    parser.add_argument("--new-group", metavar="GROUP", help="that of the new items (default: the same)")
    parser.add_argument(
        "--space", default="routing", choices=("routing", "hidden"), help="what makes items similar (default: routing)"
    )
    parser.add_argument("--neighbors", type=positive, default=3, metavar="N", help="nearest items (default: 3)")
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the neighbors' routing (default: 1)")
    layers_argument(parser, "MoE layers to change, counted from 0 (default: all)")
    out_argument(parser)


def run_sweep(options: argparse.Namespace) -> Answer:
    from moe_route.experiments import strength_sweep
    from moe_route.steering import Plan

    plan, work = Plan.load(options.plan), texts(options)
    with attached_model(options) as (language_model, routed):
        found = strength_sweep(
            language_model,
            work,
            plan,
            options.strengths,
            routed=routed,
            controls=options.controls,
            seed=options.seed,
            **shown_options(options, "sweep"),
        )
    return Answer(found.to_dict(), repr(found))


def run_learn(options: argparse.Namespace) -> Answer:
    from moe_route.experiments import learn_routing

    output(options.out)
    work = texts(options)
    with attached_model(options) as (language_model, routed):
        found = learn_routing(
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
    text = repr(found)
    if options.out is not None:
        found.plan.save(options.out)
        text = f"{text}\nwritten to {options.out}"
    return Answer({**found.to_dict(), "out": options.out}, text)


def run_neighbors(options: argparse.Namespace) -> Answer:
    from moe_route.experiments import neighbor_scores

    output(options.out)
    listed = None if options.successful is None else options.successful.read_text("utf-8").split("\n")
    found = neighbor_scores(
        merged_statistics(options.solved),
        merged_statistics(options.new),
        successful=None if listed is None else [line.strip() for line in listed if line.strip()],
        group=options.group,
        new_group=options.new_group,
        space=options.space,
        neighbors=options.neighbors,
        share=options.share,
    )
    plan = found.plan(options.layers)
    data, text = {**found.to_dict(), "plan": plan.hash}, repr(found)
    if options.out is not None:
        saved = written(plan, options.out)
        data, text = {**data, "out": options.out}, f"{text}\n{saved.text}"
    return Answer(data, text)

"""`moe-route analyze prune`: the experts to drop."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.analyze.arguments import statistics_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics, output, positive, seed_argument

CRITERIA = ("reap", "frequency", "difference", "random")


def add(questions: Any) -> None:
    parser = command(
        questions,
        "prune",
        run,
        "choose the experts to drop",
        "moe-route record --expert-outputs --out general.safetensors\n"
        "moe-route analyze prune general.safetensors --keep 0.5 --out dropped.safetensors\n"
        "moe-route prune --selection dropped.safetensors --out smaller",
    )
    statistics_argument(parser)
    prune_arguments(parser)
    parser.add_argument("--keep", type=float, required=True, metavar="X", help="share of the experts to keep")
    parser.add_argument("--criterion", default="reap", choices=CRITERIA, help="what an expert is worth (default: reap)")
    parser.add_argument("--n-group", type=positive, default=1, metavar="N", help="router groups of the model")
    parser.add_argument("--topk-group", type=positive, default=1, metavar="N", help="router groups per token")
    parser.add_argument(
        "--resamples", type=positive, metavar="N", help="also draw the sentences anew N times, and compare (frequency)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the selection of experts to drop")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="write a plan that forbids them")


def prune_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of choosing that `analyze prune` and `experiment pruning` share."""
    parser.add_argument("--group", metavar="GROUP", help="tokens that count (default: those of all groups)")
    parser.add_argument("--reference", metavar="GROUP", help="group to subtract, for the criterion difference")
    parser.add_argument(
        "--allocation",
        default="uniform",
        choices=("uniform", "global"),
        help="the same share in every layer, or one ranking of all layers (default: uniform)",
    )
    seed_argument(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis
    from moe_route.steering import Plan

    output(options.out, options.plan)
    statistics = merged_statistics(options.files)
    shared = {name: getattr(options, name) for name in ("keep", "group", "allocation", "seed", "n_group", "topk_group")}
    found = analysis.prune(statistics, criterion=options.criterion, reference=options.reference, **shared)
    data, text = {"dropped": found.to_dict()}, [repr(found)]
    if options.resamples is not None:
        stability = analysis.pruning_stability(statistics, resamples=options.resamples, **shared)
        data["stability"] = stability.to_dict()
        text.append(repr(stability))
    if options.out is not None:
        found.save(options.out)
        text.append(f"written to {options.out}")
    if options.plan is not None:
        plan = Plan.forbid(found)
        plan.save(options.plan)
        text.append(f"plan {plan.hash[:12]} written to {options.plan}")
    return Answer(data, "\n".join(text))

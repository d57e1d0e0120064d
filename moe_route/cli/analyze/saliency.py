"""`moe-route analyze saliency` and `moe-route analyze super-experts`: sizes of the outputs of experts."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.analyze.arguments import groups_argument, saved, selection_argument, statistics_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics, output


def add(questions: Any) -> None:
    parser = command(
        questions,
        "saliency",
        saliency,
        "how much each expert adds to the tokens routed to it (REAP)",
        "moe-route record --expert-outputs --out general.safetensors\n"
        "moe-route analyze saliency general.safetensors --pool",
    )
    statistics_argument(parser)
    groups_argument(parser)
    parser.add_argument("--pool", action="store_true", help="join the groups into one")
    parser = command(
        questions,
        "super-experts",
        super_experts,
        "experts whose outputs hold the largest activations",
        "moe-route record --expert-outputs --out general.safetensors\n"
        "moe-route analyze super-experts general.safetensors",
    )
    statistics_argument(parser)
    groups_argument(parser)
    selection_argument(parser)
    parser.add_argument(
        "--quantile", type=float, default=0.995, metavar="X", help="of the peaks of all experts (default: 0.995)"
    )
    parser.add_argument("--share", type=float, default=0.1, metavar="X", help="of the largest peak (default: 0.1)")


def saliency(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    found = analysis.saliency(merged_statistics(options.files), groups=options.groups, pool=options.pool)
    return Answer(found.to_dict(), repr(found))


def super_experts(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    output(options.out)
    statistics = merged_statistics(options.files)
    found = analysis.super_experts(statistics, groups=options.groups, quantile=options.quantile, share=options.share)
    return saved(found, found.selection, options.out)

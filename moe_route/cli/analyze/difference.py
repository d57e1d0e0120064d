"""`moe-route analyze difference`."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.analyze.arguments import baseline_group_argument, by_argument, compared_arguments, level
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics, positive


def add(questions: Any) -> None:
    parser = command(
        questions,
        "difference",
        run,
        "how much more often a task uses each expert than a baseline does, with intervals",
        "moe-route analyze difference --task task.safetensors --baseline general.safetensors --group eng_Latn",
    )
    compared_arguments(parser)
    baseline_group_argument(parser)
    by_argument(parser)
    parser.add_argument(
        "--interval", type=level, default=0.95, metavar="LEVEL", help="level of the intervals (default: 0.95)"
    )
    parser.add_argument(
        "--resamples", type=positive, default=4000, metavar="N", help="resamples of the items (default: 4000)"
    )


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    found = analysis.expert_difference_interval(
        merged_statistics(options.task),
        merged_statistics(options.baseline),
        group=options.group,
        baseline_group=options.baseline_group,
        by=options.by,
        level=options.interval,
        resamples=options.resamples,
    )
    return Answer(found.to_dict(), repr(found))

"""`moe-route analyze difference`."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.analyze.arguments import by_argument, compared_arguments
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
    parser.add_argument("--baseline-group", metavar="GROUP", help="group of the baseline (default: that of the task)")
    by_argument(parser)
    parser.add_argument("--level", type=float, default=0.95, metavar="X", help="of the intervals (default: 0.95)")
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
        level=options.level,
        resamples=options.resamples,
    )
    return Answer(found.to_dict(), repr(found))

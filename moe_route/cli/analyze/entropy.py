"""`moe-route analyze entropy`."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.analyze.arguments import phase_argument, statistics_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics


def add(questions: Any) -> None:
    parser = command(
        questions,
        "entropy",
        run,
        "how spread the routing is, by group and layer",
        "moe-route analyze entropy general.safetensors",
    )
    statistics_argument(parser)
    phase_argument(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    found = analysis.entropy(merged_statistics(options.files), phase=options.phase)
    return Answer(found.to_dict(), repr(found))

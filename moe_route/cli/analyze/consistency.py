"""`moe-route analyze consistency`."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.analyze.arguments import groups_argument, statistics_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics


def add(questions: Any) -> None:
    parser = command(
        questions,
        "consistency",
        run,
        "how alike the tokens of a sequence route, by group and layer",
        "moe-route record --consistency --out general.safetensors\nmoe-route analyze consistency general.safetensors",
    )
    statistics_argument(parser)
    groups_argument(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    found = analysis.consistency(merged_statistics(options.files), groups=options.groups)
    return Answer(found.to_dict(), repr(found))

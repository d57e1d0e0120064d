"""`moe-route analyze coactivation` and `transitions`: experts chosen together, and one after the other."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.analyze.arguments import groups_argument, statistics_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics


def add(questions: Any) -> None:
    for name, run, help in (
        ("coactivation", run_coactivation, "experts that tokens choose together in a layer"),
        ("transitions", run_transitions, "how the expert of a layer determines the expert of the next"),
    ):
        parser = command(questions, name, run, help, f"moe-route analyze {name} pairs.safetensors --groups eng_Latn")
        statistics_argument(parser)
        groups_argument(parser)


def run_coactivation(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    found = analysis.coactivation(merged_statistics(options.files), groups=options.groups)
    return Answer(found.to_dict(), repr(found))


def run_transitions(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    found = analysis.transitions(merged_statistics(options.files), groups=options.groups)
    return Answer(found.to_dict(), repr(found))

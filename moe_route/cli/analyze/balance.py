"""`moe-route analyze balance` and `committee`: how the load is spread over experts."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.analyze.arguments import (
    groups_argument,
    phase_argument,
    saved,
    selection_argument,
    statistics_argument,
)
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics, output, positive


def add(questions: Any) -> None:
    balance = command(
        questions,
        "balance",
        run_balance,
        "how evenly the choices are spread over the experts, by group and layer",
        "moe-route analyze balance general.safetensors --pool",
    )
    committee = command(
        questions,
        "committee",
        run_committee,
        "the experts that every group uses most",
        "moe-route analyze committee general.safetensors --top 4",
    )
    for parser in (balance, committee):
        statistics_argument(parser)
        groups_argument(parser)
        phase_argument(parser)
        parser.add_argument(
            "--by", default="token", choices=("token", "sequence"), help="mean over these (default: token)"
        )
    balance.add_argument("--pool", action="store_true", help="join the groups into one")
    selection_argument(committee)
    committee.add_argument(
        "--top", type=positive, metavar="N", help="experts per layer that count as most used (default: the top-k)"
    )


def run_balance(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    found = analysis.load_balance(
        merged_statistics(options.files),
        groups=options.groups,
        phase=options.phase,
        by=options.by,
        pool=options.pool,
    )
    return Answer(found.to_dict(), repr(found))


def run_committee(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    output(options.out)
    found = analysis.committee(
        merged_statistics(options.files), top=options.top, groups=options.groups, phase=options.phase, by=options.by
    )
    return saved(found, found.experts, options.out)

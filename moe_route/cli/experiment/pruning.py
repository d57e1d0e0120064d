"""`moe-route experiment pruning`: measure what pruning costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.analyze.pruning import CRITERIA, prune_arguments
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    command,
    load_language_model,
    merged_statistics,
    model_arguments,
    names,
    numbers,
    shown_options,
    text_arguments,
    texts,
)


def add(experiments: Any) -> None:
    parser = command(
        experiments,
        "pruning",
        run,
        "loss of texts against the share of experts kept",
        "moe-route experiment pruning --statistics general.safetensors --data arithmetic --keep 0.75,0.5",
    )
    parser.add_argument(
        "--statistics", type=Path, nargs="+", required=True, metavar="FILE", help="by which the experts are chosen"
    )
    parser.add_argument(
        "--criteria",
        type=_criteria,
        default=("reap", "frequency", "random"),
        metavar="A,B",
        help=f"some of {', '.join(CRITERIA)} (default: reap,frequency,random)",
    )
    parser.add_argument(
        "--keep", type=numbers, default=(0.75, 0.5, 0.25), metavar="X,Y", help="shares (default: 0.75,0.5,0.25)"
    )
    prune_arguments(parser)
    model_arguments(parser)
    text_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.experiments import pruning_curve

    statistics, chosen = merged_statistics(options.statistics), texts(options)
    found = pruning_curve(
        load_language_model(options),
        chosen,
        statistics,
        criteria=options.criteria,
        keep=options.keep,
        group=options.group,
        reference=options.reference,
        allocation=options.allocation,
        seed=options.seed,
        **shown_options(options),
    )
    return Answer(found.to_dict(), repr(found))


def _criteria(text: str) -> tuple[str, ...]:
    found = names(text)
    if not set(found) <= set(CRITERIA):
        raise argparse.ArgumentTypeError(f"{text!r}: write some of {', '.join(CRITERIA)}")
    return found

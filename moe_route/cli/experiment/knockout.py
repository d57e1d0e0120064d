"""`moe-route experiment knockout`."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.experiment.arguments import attached_model, options_of, seed_argument
from moe_route.cli.inputs import command, layers, model_arguments, text_arguments, texts


def add(experiments: Any) -> None:
    parser = command(
        experiments,
        "knockout",
        run,
        "change of the loss when one expert is switched off, for every expert",
        "moe-route experiment knockout --languages eng_Latn,swh_Latn --limit 20 --layers 5",
    )
    parser.add_argument("--layers", type=layers, metavar="A-B", help="MoE layers, counted from 0 (default: all)")
    seed_argument(parser)
    model_arguments(parser)
    text_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.experiments import knockout

    work = texts(options)
    with attached_model(options) as (spoken, routed):
        found = knockout(spoken, work, layers=options.layers, routed=routed, **options_of(options))
    agreement = found.agreement()
    return Answer({**found.to_dict(), "agreement": agreement.to_dict()}, f"{found!r}\n{agreement!r}")

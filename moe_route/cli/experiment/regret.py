"""`moe-route experiment regret`."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    attached_model,
    command,
    layers_argument,
    model_arguments,
    positive,
    seed_argument,
    shown_options,
    text_arguments,
    texts,
)


def add(experiments: Any) -> None:
    parser = command(
        experiments,
        "regret",
        run,
        "how much better the best of several drawn routes predicts each token",
        "moe-route experiment regret --languages eng_Latn,swh_Latn --limit 20 --temperature 0.2",
    )
    parser.add_argument("--routes", type=positive, default=8, metavar="N", help="routes to draw (default: 8)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="size of the noise on the logits (default: 1)"
    )
    layers_argument(parser)
    seed_argument(parser)
    model_arguments(parser)
    text_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.experiments import regret

    work = texts(options)
    with attached_model(options) as (language_model, routed):
        found = regret(
            language_model,
            work,
            routes=options.routes,
            temperature=options.temperature,
            layers=options.layers,
            routed=routed,
            seed=options.seed,
            **shown_options(options),
        )
    return Answer(found.to_dict(), repr(found))

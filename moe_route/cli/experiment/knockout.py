"""`moe-route experiment knockout`."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    attached_model,
    command,
    layers_argument,
    model_arguments,
    seed_argument,
    shown_options,
    text_arguments,
    texts,
)


def add(experiments: Any) -> None:
    parser = command(
        experiments,
        "knockout",
        run,
        "change of the loss when one expert is switched off, for every expert",
        "moe-route experiment knockout --languages eng_Latn,swh_Latn --limit 20 --layers 5",
    )
    layers_argument(parser)
    seed_argument(parser)
    model_arguments(parser)
    text_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.experiments import knockout

    work = texts(options)
    with attached_model(options) as (language_model, routed):
        found = knockout(
            language_model,
            work,
            layers=options.layers,
            routed=routed,
            seed=options.seed,
            **shown_options(options),
        )
    agreement = found.agreement()
    return Answer({**found.to_dict(), "agreement": agreement.to_dict()}, f"{found!r}\n{agreement!r}")

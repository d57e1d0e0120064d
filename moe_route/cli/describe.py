"""`moe-route describe` shows the routers of a model, and `moe-route doctor` the installation."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import load_language_model, quiet_libraries
from moe_route.cli.options import command, model_arguments, refuse


def add_describe(verbs: Any) -> None:
    parser = command(
        verbs,
        "describe",
        run_describe,
        "show a model's routers and how they are attached to",
        "moe-route describe Qwen/Qwen3-30B-A3B",
    )
    parser.add_argument(
        "--load", action="store_true", help="load the weights, and check every router on random hidden states"
    )
    model_arguments(parser)


def run_describe(options: argparse.Namespace) -> Answer:
    if not options.load:
        refuse(options, ("device", "device_map", "dtype"), "places weights, and describe reads none without --load")
    from moe_route.description import describe
    from moe_route.routed import attach
    from moe_route.runs.language_model import model_without_weights

    if options.load:
        model = load_language_model(options).model
    else:
        quiet_libraries()
        model = model_without_weights(options.model)
    with attach(model, engine=options.engine) as routed:
        description = describe(routed.model)
    return Answer(description.to_dict(), str(description))


def add_doctor(verbs: Any) -> None:
    command(verbs, "doctor", run_doctor, "say which kernels are at work and why, and check them", "moe-route doctor")


def run_doctor(options: argparse.Namespace) -> Answer:
    from moe_route.description import doctor

    diagnosis = doctor()
    return Answer(diagnosis.to_dict(), str(diagnosis), code=0 if diagnosis.ok else 1)

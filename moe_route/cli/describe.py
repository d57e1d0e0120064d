"""`moe-route describe`: show the routers of a model, how each one decides, and how moe-route would attach to it."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, load_language_model, model_arguments, quiet_libraries


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "describe",
        run,
        "show a model's routers and how they are attached to",
        "moe-route describe --model Qwen/Qwen3-30B-A3B",
    )
    parser.add_argument(
        "--load", action="store_true", help="load the weights, and check every router on random hidden states"
    )
    model_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.description import describe
    from moe_route.routed import attach

    with attach(_model(options), engine=options.engine) as routed:
        description = describe(routed.model)
    return Answer(description.to_dict(), str(description))


def _model(options: argparse.Namespace) -> Any:
    """The model of the options, with weights or, by default, from its configuration alone."""
    from moe_route.runs.language_model import model_without_weights

    if options.load:
        return load_language_model(options).model
    if options.device is not None or options.device_map is not None or options.dtype != "auto":
        raise ValueError("--device, --device-map and --dtype place weights, and describe reads none: add --load")
    quiet_libraries()
    return model_without_weights(options.model)

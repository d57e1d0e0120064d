"""`moe-route describe`: show the routers of a model, how each one decides, and how moe-route would attach to it."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, load_language_model, model_arguments


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "describe",
        run,
        "show a model's routers and how they are attached to",
        "moe-route describe --model Qwen/Qwen3-30B-A3B",
    )
    model_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.description import describe
    from moe_route.routed import attach

    model = load_language_model(options).model
    with attach(model, engine=options.engine):  # attaching checks every router, so the result is reliable
        description = describe(model)
    return Answer(description.to_dict(), str(description))

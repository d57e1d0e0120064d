"""`moe-route analyze geometry`: hidden states of parallel sentences beside the divergence of their routing."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.analyze.arguments import reference_argument, statistics_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, load_language_model, merged_statistics, model_arguments


def add(questions: Any) -> None:
    parser = command(
        questions,
        "geometry",
        run,
        "similarity of hidden states beside the divergence of routing",
        "moe-route record --hidden --out general.safetensors\n"
        "moe-route analyze geometry general.safetensors --reference eng_Latn --weights",
    )
    statistics_argument(parser)
    reference_argument(parser)
    parser.add_argument(
        "--weights", action="store_true", help="load the model, and split hidden states by what its routers see"
    )
    model_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    statistics = merged_statistics(options.files)
    weights = _weights(options) if options.weights else None
    found = analysis.geometry(statistics, options.reference, weights=weights)
    return Answer(found.to_dict(), repr(found))


def _weights(options: argparse.Namespace) -> Any:
    from moe_route.experiments import router_weights

    with load_language_model(options).attach(options.engine) as routed:
        return router_weights(routed)

"""`moe-route analyze divergence`."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.analyze.arguments import phase_argument, reference_argument, statistics_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics


def add(questions: Any) -> None:
    parser = command(
        questions,
        "divergence",
        run,
        "how far each group's routing is from a reference, by layer",
        "moe-route analyze divergence general.safetensors --reference eng_Latn",
    )
    statistics_argument(parser)
    reference_argument(parser)
    parser.add_argument(
        "--measure",
        default="normalized_jsd",
        choices=("normalized_jsd", "jsd", "cosine", "jaccard"),
        help="how two distributions over experts are compared (default: normalized_jsd)",
    )
    parser.add_argument(
        "--pairing",
        default="paired",
        choices=("paired", "pooled", "auto"),
        help="compare each text with its translation, or whole groups; auto: paired where that can be done "
        "(default: paired)",
    )
    phase_argument(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    found = analysis.divergence(
        merged_statistics(options.files),
        options.reference,
        pairing=options.pairing,
        measure=options.measure,
        phase=options.phase,
    )
    return Answer(found.to_dict(), repr(found))

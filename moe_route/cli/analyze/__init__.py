"""`moe-route analyze`: compute numbers from statistics files. Each module here holds one question or several."""

from __future__ import annotations

import argparse
from typing import Any


def add(verbs: Any) -> None:
    from moe_route.cli.analyze import (
        alignment,
        balance,
        coactivation,
        consistency,
        correlate,
        difference,
        divergence,
        entropy,
        experts,
        geometry,
        overlap,
        pruning,
        saliency,
        similarity,
        sweep,
        tokens,
    )

    verb = verbs.add_parser(
        "analyze",
        help="turn statistics into numbers and plans",
        description="Turn statistics into numbers and plans.",
        epilog="example:\n  moe-route analyze divergence general.safetensors --reference eng_Latn",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    questions = verb.add_subparsers(title="questions", metavar="QUESTION", required=True)
    for module in (
        divergence,
        entropy,
        consistency,
        experts,
        balance,
        coactivation,
        tokens,
        saliency,
        pruning,
        geometry,
        difference,
        overlap,
        sweep,
        correlate,
        similarity,
        alignment,
    ):
        module.add(questions)

"""`moe-route experiment patch`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers_argument, load_language_model, model_arguments, positive, seed_argument

if TYPE_CHECKING:
    from moe_route.experiments import PromptPair


def add(experiments: Any) -> None:
    parser = command(
        experiments,
        "patch",
        run,
        "what the output of single experts of a clean run restores in a corrupted run",
        "moe-route experiment patch --pairs pairs.tsv --positions last",
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        required=True,
        metavar="FILE",
        help="tab-separated lines: clean prompt, corrupted prompt, answer, other answer, and optionally a group",
    )
    layers_argument(parser)
    parser.add_argument(
        "--weight",
        default="clean",
        choices=("clean", "own"),
        help="weights of the clean run, or the corrupted run's own (default: clean)",
    )
    parser.add_argument(
        "--positions", default="all", choices=("all", "last"), help="tokens that are patched (default: all)"
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="patches a batch (default: 32)")
    seed_argument(parser)
    model_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.experiments import patch_experts

    pairs = _pairs(options.pairs)
    found = patch_experts(
        load_language_model(options),
        pairs,
        layers=options.layers,
        weight=options.weight,
        positions=options.positions,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    return Answer(found.to_dict(), repr(found))


def _pairs(path: Path) -> list[PromptPair]:
    from moe_route.experiments import PromptPair

    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split("\t")  # answers may begin with a space
        if line.strip() and len(cells) not in (4, 5):
            raise ValueError(
                f"line {number} of {path} has {len(cells)} cells: write clean prompt, corrupted prompt, answer, other "
                "answer and, if wanted, a group, with tabs between"
            )
        if line.strip():
            found.append(PromptPair(*cells))
    return found

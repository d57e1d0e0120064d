"""`moe-route bench`: race the operators against what one would write in torch."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from moe_route.bench.sections import SECTIONS
from moe_route.cli.answer import Answer
from moe_route.cli.options import command, existing, out_argument, positive

ROUNDS, QUICK_ROUNDS = 60, 5


def add_bench(verbs: Any) -> None:
    parser = command(
        verbs,
        "bench",
        run,
        "race the gate against torch on this machine",
        "moe-route bench --out results\nmoe-route bench --sections gate --compare results/cpu-avx512.json",
    )
    sections = ", ".join(SECTIONS)
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="NAME",
        help=f"what to measure: {sections} (default: all)",
    )
    parser.add_argument(
        "--rounds", type=rounds, metavar="N", help=f"calls of each contender (default: {ROUNDS}, quick {QUICK_ROUNDS})"
    )
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="threads of torch (default: 1)")
    parser.add_argument("--quick", action="store_true", help="few rounds, no large case: seconds")
    out_argument(parser, "folder for the results as JSON files", metavar="FOLDER")
    parser.add_argument(
        "--compare",
        type=existing,
        nargs="+",
        default=[],
        metavar="FILE",
        help="results of earlier runs on this machine; exit code 1 if a ratio regressed: if its upper quartile lies "
        "more than 10 %% below the lower quartile of before",
    )


def rounds(text: str) -> int:
    number = positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError("quartiles need 2 rounds or more")
    return number


def run(options: argparse.Namespace) -> Answer:
    # Before torch starts its threads: a spinning OpenMP team would be timed too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from moe_route.bench.sections import run_sections
    from moe_route.bench.timing import Effort

    logging.getLogger("moe_route.bench").setLevel(logging.INFO)
    torch.set_num_threads(options.threads)
    effort = Effort(options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS), options.quick)
    outcome = run_sections(options.sections, effort, out=options.out, earlier=options.compare)
    return Answer(outcome.data, outcome.text, code=0 if outcome.passed else 1)

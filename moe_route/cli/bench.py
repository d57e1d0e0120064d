"""`moe-route bench`: race the operators against what one would write in torch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, positive

SECTIONS = ("gate", "one-row", "dispatch", "recording", "experts", "models", "growth")


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "bench",
        run,
        "race the operators against torch on this machine",
        "moe-route bench --sections gate --out results",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure")
    parser.add_argument(
        "--rounds", type=positive, default=60, metavar="N", help="calls of each contender (default: 60)"
    )
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="threads of torch (default: 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the files")


def run(options: argparse.Namespace) -> Answer:
    # Before torch starts its threads: a spinning OpenMP team would be timed too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from moe_route.bench import sections

    torch.set_num_threads(options.threads)
    files = [str(path) for path in sections.measure(options.sections, options.rounds, options.out)]
    return Answer({"files": files}, "\n".join(files))

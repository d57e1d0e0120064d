"""`python -m bench.cpu`: every benchmark of the CPU, with options and results as those of `moe-route bench`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.cpu import SECTIONS
from moe_route.bench.sections import run_sections

PROGRAM = "python -m bench.cpu"
ROUNDS, QUICK_ROUNDS = 60, 5


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="NAME",
        help="; ".join(f"{name}: {section.about}" for name, section in SECTIONS.items()),
    )
    parser.add_argument("--rounds", type=int, metavar="N", help=f"calls of each contender ({ROUNDS}, {QUICK_ROUNDS})")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (1)")
    parser.add_argument("--quick", action="store_true", help="two minutes: every section, few rounds, no large case")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the results as JSON files")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="FILE", help="results of earlier runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(given)
    if options.rounds is not None and options.rounds < 2:
        parser.error("quartiles need 2 rounds or more")
    if options.threads < 1:
        parser.error(f"--threads takes a number from 1, not {options.threads}")
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    # Before torch starts its threads: a spinning OpenMP team would be timed too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from moe_route.base.files import FileRefusedError
    from moe_route.bench.timing import Effort

    logging.basicConfig(format="%(message)s")
    logging.getLogger("moe_route.bench").setLevel(logging.INFO)
    torch.set_num_threads(options.threads)
    effort = Effort(options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS), options.quick)
    try:
        outcome = run_sections(
            options.sections, effort, out=options.out, earlier=options.compare, sections=SECTIONS, program=PROGRAM
        )
    except (FileRefusedError, ImportError) as refused:
        print(f"{PROGRAM}: {refused}", file=sys.stderr)
        return 2
    print(json.dumps(outcome.data, indent=1) if options.json else outcome.text)
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main())

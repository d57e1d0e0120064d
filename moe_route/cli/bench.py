"""`moe-route bench`: race the operators against what one would write in torch."""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moe_route.bench.sections import SECTIONS
from moe_route.cli.answer import Answer
from moe_route.cli.options import command, existing, out_argument, positive

if TYPE_CHECKING:
    from moe_route.bench.timing import Shape

ROUNDS, QUICK_ROUNDS = 60, 5
DTYPES = ("float32", "bfloat16", "float16")
SECONDS = 20.0  # of a section of one shape


def add_bench(verbs: Any) -> None:
    parser = command(
        verbs,
        "bench",
        run,
        "race the gate against torch on this machine",
        "moe-route bench --out results\nmoe-route bench --sections gate --compare results/cpu-avx512.json\n"
        "moe-route bench --experts 96 --top-k 6 --tokens 2048 --dtype bfloat16",
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
    shape_arguments(
        parser.add_argument_group("one shape, within a minute, in the place of those of public models").add_argument
    )
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


def shape_arguments(add: Callable[..., object]) -> None:
    """The options of a gate of one's own; `add` declares one as argparse's `add_argument` does."""
    add("--experts", type=positive, metavar="N", help="experts (default: 128)")
    add("--top-k", type=positive, metavar="N", help="experts chosen (default: 8, or all if fewer)")
    add("--tokens", type=positive, metavar="N", help="rows of a call (default: 4096)")
    add("--dtype", choices=DTYPES, help="dtype of the logits (default: float32)")


def shape_of(options: argparse.Namespace) -> Shape | None:
    """The shape that the options describe, or None where none of them is given. Raises ValueError if none can be it."""
    given = (options.experts, options.top_k, options.tokens, options.dtype)
    if all(value is None for value in given):
        return None
    import torch

    from moe_route.bench.timing import Shape
    from moe_route.contract.limits import MAX_CHOSEN, MAX_EXPERTS

    experts = options.experts or Shape.experts
    k = options.top_k or min(Shape.k, experts)
    if experts > MAX_EXPERTS:
        raise ValueError(f"--experts {experts} is above {MAX_EXPERTS}, the most that the gate takes")
    if k > min(experts, MAX_CHOSEN):
        raise ValueError(f"--top-k {k} is above {min(experts, MAX_CHOSEN)}, the most of {experts} experts")
    return Shape(experts, k, getattr(torch, options.dtype or "float32"), options.tokens or Shape.tokens)


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
    shape = shape_of(options)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    within = SECONDS if shape is not None and options.rounds is None else math.inf
    effort = Effort(rounds, options.quick, shape, within)
    outcome = run_sections(options.sections, effort, out=options.out, earlier=options.compare)
    return Answer(outcome.data, outcome.text, code=0 if outcome.passed else 1)

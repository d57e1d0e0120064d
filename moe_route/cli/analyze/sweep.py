"""`moe-route analyze sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.analyze.arguments import by_argument, compared_arguments, phase_argument, reference_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers_argument, merged_statistics, numbers, output


def add(questions: Any) -> None:
    parser = command(
        questions,
        "sweep",
        run,
        "number of task experts and of multilingual experts by threshold, and how far they overlap",
        "moe-route analyze sweep --task task.safetensors --baseline general.safetensors --thresholds 0.1,0.2,0.3",
    )
    compared_arguments(parser)
    reference_argument(parser)
    parser.add_argument("--thresholds", type=numbers, metavar="X,Y", help="(default: 0.05 to 0.6 in steps of 0.05)")
    layers_argument(parser)
    by_argument(parser)
    phase_argument(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the overlap: .png, .svg or .pdf")


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis, plots

    output(options.plot)
    thresholds = {} if options.thresholds is None else {"thresholds": options.thresholds}
    found = analysis.sweep(
        merged_statistics(options.task),
        merged_statistics(options.baseline),
        reference=options.reference,
        group=options.group,
        layers=options.layers,
        phase=options.phase,
        by=options.by,
        **thresholds,
    )
    data, text = found.to_dict(), repr(found)
    if options.plot is not None:
        plots.save(plots.sweep_overlap(found), options.plot)
        data, text = {**data, "plot": options.plot}, f"{text}\nwritten to {options.plot}"
    return Answer(data, text)

"""`moe-route analyze overlap`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers_argument, output, positive


def add(questions: Any) -> None:
    parser = command(
        questions,
        "overlap",
        run,
        "how far selections of experts overlap, against chance",
        "moe-route analyze overlap task.json multilingual.json --layers 2-5",
    )
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="selections, as `analyze experts --out NAME.json` writes"
    )
    layers_argument(parser)
    parser.add_argument(
        "--num-experts", type=positive, metavar="N", help="experts per layer, if the selections do not say so"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the Jaccard indices: .png, .svg or .pdf")


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis, plots
    from moe_route.steering import ExpertSelection

    output(options.plot)
    stems = [path.stem for path in options.files]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in options.files]
    if len(set(names)) < len(names):
        raise ValueError("a selection is named twice: name each file once")
    selections = {name: ExpertSelection.load(path) for name, path in zip(names, options.files, strict=True)}
    found = analysis.overlap(selections, layers=options.layers, num_experts=options.num_experts)
    data, text = found.to_dict(), repr(found)
    if options.plot is not None:
        plots.save(plots.overlap(found), options.plot)
        data, text = {**data, "plot": options.plot}, f"{text}\nwritten to {options.plot}"
    return Answer(data, text)

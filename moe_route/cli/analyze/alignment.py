"""`moe-route analyze alignment`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.analyze.arguments import groups_argument, parallel_arguments, parallel_options, reference_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, parallel_source


def add(questions: Any) -> None:
    parser = command(
        questions,
        "alignment",
        run,
        "how well sentences find their translation in a pivot language, by layer",
        "moe-route vectors --out vectors.safetensors\nmoe-route analyze alignment vectors.safetensors --rule mexa",
    )
    parallel_arguments(parser, default="mexa")
    reference_argument(parser)
    groups_argument(parser)
    parser.add_argument(
        "--accuracy", type=float, metavar="X", help="mexa: estimate accuracies from that of the reference on a task"
    )
    parser.add_argument(
        "--scores", type=Path, metavar="FILE", help="correlate with a score per group, as for analyze correlate"
    )


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis
    from moe_route.analysis.inputs import read_scores
    from moe_route.base.table import Table

    source = parallel_source(options.files, options.layers)
    found = analysis.alignment(source, options.reference, groups=options.groups, **parallel_options(options))
    data, parts = found.to_dict() | {"ranking": list(found.ranking())}, [repr(found)]
    if options.accuracy is not None:
        data["estimates"] = found.estimate(options.accuracy)
        rows = [[name, value] for name, value in data["estimates"].items()]
        title = f"Estimated accuracy: {options.accuracy:g} in {found.reference}, times the mean over layers"
        parts.append(str(Table(("group", "estimate"), rows, title)))
    if options.scores is not None:
        result = analysis.correlation(found, read_scores(options.scores))
        data["correlation"] = result.to_dict()
        parts.append(repr(result))
    return Answer(data, "\n".join(parts))

"""`moe-route analyze similarity`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.analyze.arguments import groups_argument, statistics_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers_argument, merged_statistics, positive


def add(questions: Any) -> None:
    parser = command(
        questions,
        "similarity",
        run,
        "how alike languages are routed, and which of them cluster",
        "moe-route analyze similarity general.safetensors --layers 2-5 --clusters 3",
    )
    statistics_argument(parser)
    groups_argument(parser)
    parser.add_argument(
        "--rule",
        default="cosine",
        choices=("cosine", "mexa", "retrieval", "margin"),
        help="mean cosine of translations, or share of sentences nearest to their translation (default: cosine)",
    )
    parser.add_argument(
        "--kind", default="full", choices=("full", "topk", "count"), help="router scores used (default: full)"
    )
    parser.add_argument(
        "--no-center", dest="center", action="store_false", help="do not subtract the mean of each group"
    )
    layers_argument(parser)
    parser.add_argument("--clusters", type=positive, metavar="N", help="cut the tree of languages into N clusters")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="correlate with a tab-separated matrix, such as published ones"
    )


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    statistics = merged_statistics(options.files)
    if options.layers is not None:
        statistics = statistics.select(layers=options.layers)
    found = analysis.similarity(
        statistics, groups=options.groups, rule=options.rule, kind=options.kind, center=options.center
    )
    data, parts = found.to_dict() | {"order": found.order()}, [repr(found)]
    if options.clusters is not None:
        data["clusters"] = found.clusters(options.clusters)
        parts += [f"cluster {number}: {', '.join(one)}" for number, one in enumerate(data["clusters"], 1)]
    if options.compare is not None:
        other = analysis.read_matrix(options.compare, found.groups)
        result = analysis.matrix_correlation(found.mean(), other)
        data["compared"] = result.to_dict()
        parts.append(f"correlation with {options.compare.name}: {result}")
    return Answer(data, "\n".join(parts))

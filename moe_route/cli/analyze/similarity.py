"""`moe-route analyze similarity`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.analyze.arguments import groups_argument, parallel_arguments, parallel_options
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, parallel_source, positive


def add(questions: Any) -> None:
    parser = command(
        questions,
        "similarity",
        run,
        "how alike languages are, by the routing or the vectors of their sentences, and which of them cluster",
        "moe-route analyze similarity general.safetensors --layers 2-5 --clusters 3",
    )
    parallel_arguments(parser, default="cosine")
    groups_argument(parser)
    parser.add_argument("--clusters", type=positive, metavar="N", help="cut the tree of languages into N clusters")
    parser.add_argument(
        "--linkage",
        default="complete",
        choices=("complete", "average", "single"),
        help="distance of two clusters in the tree (default: complete)",
    )
    parser.add_argument("--target", metavar="GROUP", help="name the language that is most similar to this one")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="correlate with a tab-separated matrix, such as published ones"
    )


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    source = parallel_source(options.files, options.layers)
    found = analysis.similarity(source, groups=options.groups, **parallel_options(options))
    data, parts = found.to_dict() | {"order": found.order(method=options.linkage)}, [repr(found)]
    if options.clusters is not None:
        data["clusters"] = found.clusters(options.clusters, method=options.linkage)
        parts += [f"cluster {number}: {', '.join(one)}" for number, one in enumerate(data["clusters"], 1)]
    if options.target is not None:
        data["source"] = found.best_source(options.target)
        parts.append(f"most similar to {options.target}: {data['source']}")
    if options.compare is not None:
        result = found.compare(options.compare)
        data["compared"] = result.to_dict()
        parts.append(repr(result))
    return Answer(data, "\n".join(parts))

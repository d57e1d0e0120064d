"""`moe-route analyze divergence`, `u-shape` and `matrix`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from moe_route.cli.analyze.arguments import (
    divergence_arguments,
    divergence_options,
    interval_argument,
    reference_argument,
    statistics_argument,
)
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers, layers_argument, merged_statistics, positive

if TYPE_CHECKING:
    from moe_route.analysis import Divergence


def add(questions: Any) -> None:
    parser = command(
        questions,
        "divergence",
        run,
        "how far each group's routing is from a reference, by layer",
        "moe-route analyze divergence general.safetensors --reference eng_Latn --correct floor --interval 0.95",
    )
    statistics_argument(parser)
    reference_argument(parser)
    divergence_arguments(parser)
    interval_argument(parser, "items")

    parser = command(
        questions,
        "u-shape",
        run_u_shape,
        "whether divergence is lower in the middle layers",
        "moe-route analyze u-shape general.safetensors --reference eng_Latn",
    )
    statistics_argument(parser)
    reference_argument(parser)
    divergence_arguments(parser)
    parser.add_argument("--edge", type=positive, metavar="N", help="layers at each end (default: a twelfth)")
    parser.add_argument("--middle", type=layers, metavar="A-B", help="layers of the middle (default: the middle third)")

    parser = command(
        questions,
        "matrix",
        run_matrix,
        "divergence of all pairs of groups",
        "moe-route analyze matrix general.safetensors --layers 2-5",
    )
    statistics_argument(parser)
    divergence_arguments(parser)
    layers_argument(parser)
    interval_argument(parser, "items")


def run(options: argparse.Namespace) -> Answer:
    from moe_route.analysis.result import by_depth, plain

    found = _divergence(options)
    data, text = found.to_dict(), repr(found)
    if options.interval is not None:
        low, high = found.interval(options.interval)
        data |= {"level": options.interval, "low": plain(low), "high": plain(high)}
        for name, ends in (("low", low), ("high", high)):
            title = f"{name} end of the {options.interval * 100:g} % interval"
            text += f"\n{by_depth(found.groups, ends, title=title)}"
    return Answer(data, text)


def run_u_shape(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    found = analysis.u_shape(_divergence(options), edge=options.edge, middle=options.middle)
    return Answer(found.to_dict(), repr(found))


def run_matrix(options: argparse.Namespace) -> Answer:
    from moe_route import analysis
    from moe_route.analysis.result import plain
    from moe_route.base.table import Table

    statistics = merged_statistics(options.files)
    if options.layers is not None:
        statistics = statistics.select(layers=options.layers)
    found = analysis.divergence_matrix(statistics, **divergence_options(options))
    data, text = found.to_dict() | {"mean": plain(found.mean())}, repr(found)
    if options.interval is not None:
        low, high = found.interval(options.interval)
        data |= {"level": options.interval, "low": plain(low), "high": plain(high)}
        for name, ends in (("low", low), ("high", high)):
            rows = [[group, *row] for group, row in zip(found.groups, ends.tolist(), strict=True)]
            title = f"{name} end of the {options.interval * 100:g} % interval"
            text += f"\n{Table(['', *found.groups], rows, title)}"
    return Answer(data, text)


def _divergence(options: argparse.Namespace) -> Divergence:
    from moe_route import analysis

    return analysis.divergence(merged_statistics(options.files), options.reference, **divergence_options(options))

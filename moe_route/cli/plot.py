"""`moe-route plot`: draw figures from statistics files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_route.cli.analyze.arguments import level
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers, merged_statistics, output

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moe_route.recording import RoutingStatistics


def add(verbs: Any) -> None:
    parser = command(
        verbs, "plot", run, "draw statistics", "moe-route plot divergence general.safetensors --out divergence.png"
    )
    parser.add_argument("what", choices=tuple(PICTURES), metavar="|".join(PICTURES), help="the picture to draw")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="statistics; several are added up")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    parser.add_argument(
        "--reference",
        metavar="GROUP",
        help="divergence, experts: group to compare with (divergence: eng_Latn by default)",
    )
    parser.add_argument("--group", metavar="GROUP", help="experts: the group to draw (default: the first)")
    parser.add_argument(
        "--layers", type=layers, metavar="A-B", help="divergence: layers to shade; matrix: layers to average over"
    )
    parser.add_argument(
        "--interval", type=level, metavar="LEVEL", help="divergence: bands of bootstrap intervals, such as 0.95"
    )
    parser.add_argument(
        "--floor", action="store_true", default=None, help="divergence: also what unrelated sentences give"
    )
    parser.add_argument("--cluster", action="store_true", default=None, help="matrix: similar groups side by side")
    parser.add_argument("--title", help="title of the picture (default: none)")


def run(options: argparse.Namespace) -> Answer:
    from moe_route import plots

    draw, takes = PICTURES[options.what]
    for name in sorted({"reference", "group", "layers", "interval", "floor", "cluster"} - takes):
        if getattr(options, name) is not None:
            raise ValueError(f"the picture {options.what} takes no --{name}: leave it out")
    output(options.out)
    statistics = merged_statistics(options.files)
    if options.layers is not None and options.layers[-1] >= len(statistics.layers):
        raise ValueError(f"--layers must name some of the {len(statistics.layers)} layers, counted from 0")
    ax = draw(statistics, options)
    plots.save(ax, options.out)
    return Answer({"out": options.out, "picture": options.what}, f"written to {options.out}")


def _divergence(statistics: RoutingStatistics, options: argparse.Namespace) -> Axes:
    from moe_route import analysis, plots

    found = analysis.divergence(statistics, options.reference or "eng_Latn")
    return plots.divergence(
        found, middle=options.layers, interval=options.interval, floor=bool(options.floor), title=options.title
    )


def _entropy(statistics: RoutingStatistics, options: argparse.Namespace) -> Axes:
    from moe_route import analysis, plots

    return plots.entropy(analysis.entropy(statistics), title=options.title)


def _consistency(statistics: RoutingStatistics, options: argparse.Namespace) -> Axes:
    from moe_route import analysis, plots

    interval = None if statistics.store is None else 0.95
    return plots.consistency(analysis.consistency(statistics), interval=interval, title=options.title)


def _experts(statistics: RoutingStatistics, options: argparse.Namespace) -> Axes:
    from moe_route import plots

    group = options.group or statistics.groups[0]
    return plots.heat_map(statistics, group, reference=options.reference, title=options.title)


def _matrix(statistics: RoutingStatistics, options: argparse.Namespace) -> Axes:
    from moe_route import analysis, plots

    groups = analysis.similarity(statistics).order(options.layers) if options.cluster else None
    found = analysis.divergence_matrix(statistics)
    return plots.divergence_matrix(found, layers=options.layers, groups=groups, title=options.title)


def _balance(statistics: RoutingStatistics, options: argparse.Namespace) -> Axes:
    from moe_route import analysis, plots

    return plots.load_balance(analysis.load_balance(statistics), title=options.title)


# Name of the figure -> how it is drawn, and which of the options it accepts.
PICTURES = {
    "divergence": (_divergence, {"reference", "layers", "interval", "floor"}),
    "entropy": (_entropy, set[str]()),
    "consistency": (_consistency, set[str]()),
    "experts": (_experts, {"reference", "group"}),
    "matrix": (_matrix, {"layers", "cluster"}),
    "balance": (_balance, set[str]()),
}

"""`moe-route plot`: draw figures from statistics files."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import moe_route as mr
from moe_route.base.schema import FileRefusedError, Kind, load_json, read_text
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import merged_statistics, output, sentences
from moe_route.cli.options import Parser, add, command, existing, out_argument

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moe_route.recording import SentenceVectors


@dataclass(frozen=True)
class _Change:
    """A change of the loss of a group, in nats per token."""

    value: float | None
    low: float | None
    high: float | None
    p_value: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class _Sweep:
    """What ``moe-route steer --strengths --json`` prints."""

    groups: tuple[str, ...]
    strengths: tuple[float, ...]
    change: tuple[tuple[_Change, ...], ...]
    texts: tuple[int, ...]
    unit: str = ""
    loss: Any = None
    natural: Any = None
    control: Any = None
    plan: str = ""
    note: str = ""


SWEEP = Kind("strengths-answer", _Sweep, mark="")


def add_plot(verbs: Any) -> None:
    parser = command(
        verbs,
        "plot",
        run,
        "draw recordings, selections and sweeps",
        "moe-route plot divergence general.safetensors --out divergence.png",
    )
    parser.add_argument("what", choices=tuple(PICTURES), metavar="PICTURE", help=f"one of {', '.join(PICTURES)}")
    parser.add_argument(
        "files",
        type=existing,
        nargs="+",
        metavar="FILE",
        help="statistics; several are added up (alignment, similarity, tree: or vectors; steering-table, strengths: "
        "what `steer --strengths --json` printed)",
    )
    out_argument(parser, "picture to write: .png, .svg or .pdf", required=True, suffixes=(".png", ".svg", ".pdf"))
    add(parser, "title")
    parser.add_argument("--column", type=float, metavar="INCHES", help="width for a column of a paper, such as 3.3")
    parser.add_argument("--size", type=float, metavar="POINTS", help="size of the text (default with --column: 8)")
    add(
        parser,
        "reference",
        "group",
        "layers",
        "rule",
        "interval",
        "scores",
        "task",
        reference="group to compare with (divergence, alignment, correlation, sweep, sweep-overlap: eng_Latn by "
        "default; heat-map, heat-maps, expert-flow)",
        group="heat-map: the group to draw (default: the first); sweep, sweep-overlap: of the task",
        layers="divergence: layers to shade; divergence-matrix, similarity, tree: to average over; sweep, "
        "sweep-overlap: to look at",
        rule="alignment, similarity, tree: how sentences are compared (default: mexa; similarity, tree: cosine)",
        interval="divergence, alignment, entropy, consistency, correlation: bands of bootstrap intervals, such as 0.95",
        scores="correlation: a score per group, as for `analyze correlation`",
        task="sweep, sweep-overlap: statistics of task texts",
    )
    _add_contents(parser)


def _add_contents(parser: Parser) -> None:
    parser.add_argument(
        "--of",
        metavar="MEASURE",
        help="entropy: token, sequence or gap; load-balance: entropy, max_share, max_violation, variation, dead, rare "
        "or effective; sweep: task, multilingual or both",
    )
    parser.add_argument(
        "--floor",
        action="store_true",
        default=None,
        help="divergence: also that of unrelated sentences of one language",
    )
    parser.add_argument(
        "--cluster", action="store_true", default=None, help="divergence-matrix: order by similarity of routing"
    )
    parser.add_argument(
        "--by-script", action="store_true", default=None, help="pictures by layer: a panel per script, the rest in grey"
    )
    parser.add_argument(
        "--levels",
        type=existing,
        metavar="FILE",
        help="pictures by layer, steering-table: tab-separated lines of group and level of resources, such as high",
    )
    parser.add_argument(
        "--selected", type=existing, metavar="FILE", help="heat-map, heat-maps: selection of experts to mark"
    )
    parser.add_argument(
        "--intervals", action="store_true", default=None, help="steering-table: write the ends of intervals"
    )


def run(options: argparse.Namespace) -> Answer:
    draw, takes = PICTURES[options.what]
    for name in sorted(_OPTIONS - takes):
        if getattr(options, name) is not None:
            raise ValueError(f"the picture {options.what} takes no --{name.replace('_', '-')}: leave it out")
    output(options.out)
    source: Any
    if options.what in _OF_JSON:
        source = options.files
    elif options.what in _OF_SENTENCES:
        source = sentences(options.files)
    else:
        source = merged_statistics(options.files)
    if options.layers is not None and options.layers[-1] >= len(source.layers):
        raise ValueError(f"--layers must name some of the {len(source.layers)} layers, counted from 0")
    with contextlib.ExitStack() as stack:
        if options.column is not None or options.size is not None:
            column = 6.4 if options.column is None else options.column
            size = (10 if options.column is None else 8) if options.size is None else options.size
            stack.enter_context(mr.plots.style(column, size))
        mr.plots.save(draw(source, options), options.out)
    return Answer({"out": options.out, "picture": options.what}, f"written to {options.out}")


def _divergence(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    if options.by_script and (options.layers is not None or options.floor):
        raise ValueError("--by-script draws neither --layers nor --floor: leave them out")
    result = mr.analysis.divergence(statistics, options.reference or "eng_Latn")
    look = {"middle": options.layers, "floor": bool(options.floor), "interval": options.interval}
    return _by_layer(result, options, mr.plots.divergence, **look)


def _alignment(source: mr.RoutingStatistics | SentenceVectors, options: argparse.Namespace) -> Axes:
    result = mr.analysis.alignment(source, options.reference or "eng_Latn", rule=options.rule or "mexa")
    return _by_layer(result, options, mr.plots.alignment, interval=options.interval)


def _similarity(source: mr.RoutingStatistics | SentenceVectors, options: argparse.Namespace) -> Axes:
    result = mr.analysis.similarity(source, rule=options.rule or "cosine")
    draw = mr.plots.similarity if options.what == "similarity" else mr.plots.tree
    return draw(result, layers=options.layers, title=options.title)


def _entropy(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    look = {"of": options.of or "token", "interval": options.interval}
    return _by_layer(mr.analysis.entropy(statistics), options, mr.plots.entropy, **look)


def _consistency(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    interval = options.interval or (None if statistics.store is None else 0.95)
    return _by_layer(mr.analysis.consistency(statistics), options, mr.plots.consistency, interval=interval)


def _balance(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    return _by_layer(mr.analysis.load_balance(statistics), options, mr.plots.load_balance, of=options.of or "entropy")


def _by_layer(result: Any, options: argparse.Namespace, draw: Any, **look: Any) -> Axes:
    """A line per group, as ``draw`` draws them, or a panel per script."""
    if not options.by_script:
        axes: Axes = draw(result, levels=_levels(options, result.groups), title=options.title, **look)
        return axes
    if options.levels is not None:
        raise ValueError("--by-script colors languages, not --levels: leave one out")
    return mr.plots.by_script(result, of=options.of, interval=options.interval, title=options.title)[0]


def _correlation(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    from moe_route.analysis.inputs import read_scores

    if options.scores is None:
        raise ValueError("the picture correlation needs --scores FILE: a score per group")
    divergence = mr.analysis.divergence(statistics, options.reference or "eng_Latn")
    result = mr.analysis.correlation(divergence, read_scores(options.scores))
    return mr.plots.correlation(result, interval=options.interval, title=options.title)


def _experts(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    group = options.group or statistics.groups[0]
    look = {"selected": _selected(options), "title": options.title}
    return mr.plots.heat_map(statistics, group, reference=options.reference, **look)


def _groups(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    look: dict[str, Any] = {"selected": _selected(options), "title": options.title}
    return mr.plots.heat_maps(statistics, reference=options.reference, **look)[0]


def _expert_flow(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    return mr.plots.expert_flow(statistics, reference=options.reference, title=options.title)[0]


def _matrix(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    groups = mr.analysis.similarity(statistics).order(options.layers) if options.cluster else None
    matrix = mr.analysis.divergence_matrix(statistics)
    return mr.plots.divergence_matrix(matrix, layers=options.layers, groups=groups, title=options.title)


def _sweep(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    return mr.plots.sweep(_swept(statistics, options), of=options.of or "task", title=options.title)


def _overlap(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Axes:
    return mr.plots.sweep_overlap(_swept(statistics, options), title=options.title)


def _swept(statistics: mr.RoutingStatistics, options: argparse.Namespace) -> Any:
    if options.task is None:
        raise ValueError(f"the picture {options.what} needs --task FILE: statistics of task texts")
    reference, task = options.reference or "eng_Latn", merged_statistics(options.task)
    return mr.analysis.sweep(task, statistics, reference=reference, group=options.group, layers=options.layers)


def _steering(paths: list[Path], options: argparse.Namespace) -> Axes:
    look: dict[str, Any] = {"intervals": bool(options.intervals), "title": options.title}
    sweep = _read_sweep(paths)
    return mr.plots.steering_table(sweep, levels=_levels(options, sweep.groups), **look)


def _strengths(paths: list[Path], options: argparse.Namespace) -> Axes:
    return mr.plots.strengths(_read_sweep(paths), title=options.title)


def _read_sweep(paths: list[Path]) -> Any:
    """The changes of a strength sweep, as `moe-route steer --strengths --json` prints them."""
    if len(paths) > 1:
        raise ValueError("give one file: changes of different runs cannot be added up")
    try:
        sweep = SWEEP.read(load_json(paths[0]), str(paths[0]))
    except FileRefusedError as error:
        raise FileRefusedError(f"{error} (what `moe-route steer --strengths --json` prints is read)") from error
    change = tuple(tuple(_difference(cell) for cell in row) for row in sweep.change)
    return SimpleNamespace(change=change, groups=sweep.groups, strengths=sweep.strengths, texts=sweep.texts)


def _difference(cell: _Change) -> mr.analysis.Difference:
    ends = (cell.value, cell.low, cell.high)
    return mr.analysis.Difference(*(float("nan") if end is None else end for end in ends))


def _levels(options: argparse.Namespace, groups: Sequence[str]) -> dict[str, str] | None:
    """group -> level of resources, of tab-separated lines; other languages and a heading are left out."""
    if options.levels is None:
        return None
    rows = [line.split("\t") for line in read_text(options.levels).splitlines() if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise ValueError(f"{options.levels} must have lines of a group, a tab and a level")
    levels = {group: level for group, level, *_ in rows if group in groups}
    if not levels:
        raise ValueError(f"{options.levels} names the level of none of the groups: {', '.join(groups)}")
    return levels


def _selected(options: argparse.Namespace) -> Any:
    return None if options.selected is None else mr.ExpertSelection.load(options.selected)


# Name of the figure -> how it is drawn, and which of the options it accepts.
PICTURES: dict[str, tuple[Any, set[str]]] = {
    "divergence": (_divergence, {"reference", "layers", "interval", "floor", "by_script", "levels"}),
    "alignment": (_alignment, {"reference", "rule", "interval", "by_script", "levels"}),
    "correlation": (_correlation, {"reference", "scores", "interval"}),
    "entropy": (_entropy, {"of", "interval", "by_script", "levels"}),
    "consistency": (_consistency, {"interval", "by_script", "levels"}),
    "load-balance": (_balance, {"of", "by_script", "levels"}),
    "heat-map": (_experts, {"reference", "group", "selected"}),
    "heat-maps": (_groups, {"reference", "selected"}),
    "expert-flow": (_expert_flow, {"reference"}),
    "divergence-matrix": (_matrix, {"layers", "cluster"}),
    "similarity": (_similarity, {"rule", "layers"}),
    "tree": (_similarity, {"rule", "layers"}),
    "sweep": (_sweep, {"reference", "group", "task", "layers", "of"}),
    "sweep-overlap": (_overlap, {"reference", "group", "task", "layers"}),
    "steering-table": (_steering, {"levels", "intervals"}),
    "strengths": (_strengths, set[str]()),
}
_OF_JSON = {"steering-table", "strengths"}
_OF_SENTENCES = {"alignment", "similarity", "tree"}
_OPTIONS = set[str]().union(*(takes for _, takes in PICTURES.values()))

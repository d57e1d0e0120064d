"""Draw docs/images/growth.png from a results file of `python -m bench.cpu --sections growth`.

`python docs/growth_picture.py` takes bench/results/cpu-avx512-growth.json; another file may be named.
Needs `pip install 'moe-route[plot]'`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moe_route.bench.results import BenchmarkResults
from moe_route.plots import frame
from moe_route.plots.frame import INK, legend_above, line_width, new_figure, plain_frame, save

HERE = Path(__file__).parent
COMMITTED = HERE.parent / "bench" / "results" / "cpu-avx512-growth.json"
IMAGE = HERE / "images" / "growth.png"
Series = dict[str, dict[str, tuple[list[float], list[float]]]]


def series(results: BenchmarkResults) -> Series:
    """Case -> name -> (x, y), of the facts whose name ends with "something = x"."""
    found: Series = {}
    for fact in results.measured.facts:
        what, equals, number = fact.what.rpartition(" = ")
        if equals:
            x, y = found.setdefault(fact.case, {}).setdefault(what.rpartition(", ")[0], ([], []))
            x.append(float(number))
            y.append(fact.value)
    return found


def draw(results: BenchmarkResults, path: Path) -> Path:
    """Memory and disk of a million tokens; seconds per million tokens and layer against T, E, k and layers."""
    found = series(results)
    figure = new_figure(10.0, 5.6)
    grid = figure.add_gridspec(2, 3)
    kept = [case for case in found if "groups," in case and "decode" not in case]
    memory = figure.add_subplot(grid[0, 0])
    for color, case in zip(frame.COLORS, kept, strict=False):
        for what, dash in (("memory since all groups were seen", "-"), ("on disk", "--")):
            x, y = found[case][what]
            name = f"{case.split(',')[0]}: {what.split(' since')[0]}"
            memory.plot([v / 1e6 for v in x], y, dash, color=color, label=name, linewidth=line_width())
    finish(memory, "million tokens", "MB", "200 groups")
    curves = [case for case in found if " against " in case]
    for place, case in enumerate(curves, start=1):
        curve(figure.add_subplot(grid[place // 3, place % 3]), found[case], case.rpartition(" ")[2], case)
    groups = figure.add_subplot(grid[1, 2])
    x, y = found["groups, at batch-1 decode"]["tables"]
    groups.loglog(x, y, "o-", color=frame.COLORS[2], label="tables", linewidth=line_width())
    whole_numbers(groups, x)
    finish(groups, "groups", "MB", "memory of the tables")
    return save(groups, path, dpi=110)


def curve(ax: Any, lines: dict[str, tuple[list[float], list[float]]], name: str, case: str) -> None:
    for color, (what, (x, y)) in zip((frame.COLORS[0], INK), lines.items(), strict=False):
        dash = "o-" if what == "recording" else "--"
        ax.loglog(x, y, dash, color=color, label=what.split(":")[0], linewidth=line_width(), markersize=3)
    whole_numbers(ax, x)
    finish(ax, name, "s per million tokens", f"time per layer against {name}")


def whole_numbers(ax: Any, x: list[float]) -> None:
    ax.set_xticks(x, [f"{value:g}" for value in x])
    ax.set_xticks([], minor=True)


def finish(ax: Any, x: str, y: str, title: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    plain_frame(ax, title)
    legend_above(ax)


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else COMMITTED
    sys.stdout.write(f"{draw(BenchmarkResults.load(source), IMAGE)}\n")

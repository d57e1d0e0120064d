"""Effects of steering by language: tables of changes with intervals, and changes by strength."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from moe_route.plots import frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moe_route.analysis import Difference


class Sweep(Protocol):
    """What is read of ``experiments.StrengthSweep``, in nats per token."""

    @property
    def groups(self) -> tuple[str, ...]: ...
    @property
    def strengths(self) -> tuple[float, ...]: ...
    @property
    def change(self) -> tuple[tuple[Difference, ...], ...]: ...
    @property
    def texts(self) -> tuple[int, ...]: ...


def steering_table(
    changes: Sweep | Mapping[str, Mapping[str, Any]],
    *,
    ax: Axes | None = None,
    groups: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    levels: Mapping[str, str] | None = None,
    mean: bool = True,
    better: str = "lower",
    unit: str = "nats per token",
    level: float = 0.95,
    intervals: bool = False,
    title: str | None = None,
) -> Axes:
    """Draw changes by language (rows) and intervention (columns), in color and number.

    A number is bold where its interval excludes zero. Blue is better. The colors of one large column do not use up the
    range: it ends at twice the median of the columns' largest changes, and the text below the title says which share
    of the cells lies beyond.

    Args:
        changes: an ``experiments.StrengthSweep``; or name of the intervention -> group -> change, each an
            ``analysis.Difference`` or (value, low, high).
        groups: the rows, in this order; by default all, in the order of ``levels`` if these are given.
        labels: group -> label; by default the English name of the language.
        levels: group -> level of resources, such as "high"; rows are ordered by level, with a line between levels.
        mean: add the mean of the rows, without an interval, which the single ones do not determine.
        better: "lower" (losses) or "higher" (accuracies).
        unit: unit of the changes.
        level: level of the intervals, for the title.
        intervals: also write the ends of the intervals.
        title: title above the axes.
    """
    if better not in ("lower", "higher"):
        raise ValueError(f'better must be "lower" or "higher", not {better!r}')
    columns = _columns(changes)
    rows = _rows(columns, groups, levels)
    frame.refuse_misspelt((group for column in columns.values() for group in column), labels=labels, levels=levels)
    cells = np.array([[_cell(columns[name][row]) for name in columns] for row in rows])  # [row, column, 3]
    values = cells[:, :, 0]
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"the change of {rows[row]} in {list(columns)[column]!r} is no number: leave it out by groups="
        )
    if mean and len(rows) > 1:
        values = np.concatenate([values, values.mean(0, keepdims=True)])
    limit = _limit(values)
    width = 1.5 + (1.25 if intervals else 0.85) * len(columns)
    narrow = (frame.column() or width) < width
    high = (0.62 if narrow else 0.36) if intervals else 0.27
    ax = frame.new_axes(ax, (max(width, 3.2), 1.2 + high * len(values)))
    color = "RdBu_r" if better == "lower" else "RdBu"
    ax.imshow(values, cmap=color, vmin=-limit, vmax=limit, aspect="auto", alpha=0.85)
    _write(ax, values, cells, limit, intervals)
    names = frame.labels_of(rows, labels) + ["mean"] * (len(values) - len(rows))
    ax.set_yticks(range(len(names)), names)
    letters = max(int(_cell_width(ax, len(columns)) / (0.58 * frame.points("small"))), 6)
    heads = ["\n".join(textwrap.wrap(name, letters, break_long_words=False)) for name in columns]
    beyond = float((np.abs(values) > limit).mean())
    note = f"change in {unit}; bold: {level * 100:g} % interval excludes 0"
    if beyond:
        note += f"; color ends at ±{limit:.2g}, {beyond * 100:.0f} % of cells beyond"
    frame.titled(ax, title, note)
    ax.set_xticks(range(len(columns)), heads, fontsize="small")
    frame.frameless(ax)
    _separate(ax, rows, levels, len(values) - len(rows))
    return ax


def strengths(
    sweep: Sweep,
    *,
    ax: Axes | None = None,
    groups: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    styles: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the change of the loss by the strength of a plan, a line per language, with bands of 95 % intervals.

    ``sweep`` is an ``experiments.StrengthSweep``. Strength 0 is the model without the plan. The other arguments are
    those of ``divergence``.
    """
    names = frame.known(sweep.groups, groups)
    frame.refuse_misspelt(sweep.groups, labels=labels, styles=styles)
    ax = frame.new_axes(ax, (6.4, 3.6), len(names))
    order = np.argsort([*sweep.strengths, 0.0] if 0.0 not in sweep.strengths else sweep.strengths)
    places = np.array([*sweep.strengths, 0.0] if 0.0 not in sweep.strengths else sweep.strengths)[order]
    chosen = frame.chosen_styles(sweep.groups, styles)
    for name, label in zip(names, frame.labels_of(names, labels), strict=True):
        cells = [_cell(cell) for cell in sweep.change[sweep.groups.index(name)]]
        if len(cells) < len(places):
            cells.append((0.0, 0.0, 0.0))
        value, low, high = np.array(cells)[order].T
        ax.plot(places, value, label=label, **chosen[name])
        ax.fill_between(places, low, high, color=chosen[name]["color"], alpha=0.1, linewidth=0)
    ax.axhline(0, color=frame.INK, linewidth=0.8, zorder=1)
    ax.set_xlabel("strength of the plan")
    ax.set_ylabel("change of the loss\n(nats per token)")
    texts = sorted({sweep.texts[sweep.groups.index(name)] for name in names})
    n = f"{texts[0]}" if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"
    frame.plain_frame(ax, title, f"bands: 95 % interval, paired bootstrap over {n} texts per language")
    frame.name_lines(ax)
    return ax


def _columns(changes: Any) -> dict[str, dict[str, Any]]:
    """Intervention -> group -> change."""
    if isinstance(changes, Mapping):
        columns = {str(name): dict(column) for name, column in changes.items()}
    else:
        columns = {
            f"× {strength:g}": {group: changes.change[g][s] for g, group in enumerate(changes.groups)}
            for s, strength in enumerate(changes.strengths)
        }
    if not columns or not all(columns.values()):
        raise ValueError("there is no change to draw: give at least one intervention with one group")
    return columns


def _rows(
    columns: Mapping[str, Mapping[str, Any]], groups: Sequence[str] | None, levels: Mapping[str, str] | None
) -> list[str]:
    every = list(dict.fromkeys(group for column in columns.values() for group in column))
    rows = frame.known(every, groups)
    for name, column in columns.items():
        missing = [row for row in rows if row not in column]
        if missing:
            raise ValueError(f"the column {name!r} lacks {', '.join(missing)}: name the groups that all columns have")
    if groups is None and levels is not None:
        missing = [row for row in rows if row not in levels]
        if missing:
            raise ValueError(f"levels lack {', '.join(missing)}: give a level for each group")
        order = frame.level_order(levels)
        rows.sort(key=lambda row: order.index(levels[row]))
    return rows


def _cell(given: Any) -> tuple[float, float, float]:
    """value, low and high of a change; no interval is NaN."""
    if isinstance(given, (int, float)):
        return float(given), float("nan"), float("nan")
    value, low, high = (given.value, given.low, given.high) if hasattr(given, "value") else given
    return float(value), float(low), float(high)


def _cell_width(ax: Axes, columns: int) -> float:
    """Width of a cell in points, about: the names of the rows take a quarter of the figure."""
    figure = frame.figure_of(ax)
    return 72 * 0.93 * float(figure.get_figwidth()) * float(ax.get_position().width) / columns


def _limit(values: np.ndarray) -> float:
    """End of the color range: the largest change, but not over twice the median of the columns' largest ones."""
    largest = np.abs(values).max(0)
    return min(float(largest.max()), 2 * float(np.median(largest))) or float(largest.max()) or 1.0


def _write(ax: Axes, values: np.ndarray, cells: np.ndarray, limit: float, intervals: bool) -> None:
    digits = int(np.clip(1 - np.floor(np.log10(limit)), 1, 4))
    # both ends of an interval in one line if there is room
    wide = _cell_width(ax, values.shape[1]) > 0.62 * (2 * digits + 10) * frame.points("x-small")
    between = " " if wide else "\n"
    for (row, column), value in np.ndenumerate(values):
        text, bold = f"{round(float(value), digits) + 0.0:+.{digits}f}", False  # + 0.0 avoids a minus zero
        if row < len(cells):
            low, high = cells[row, column, 1:]
            bold = bool(low > 0 or high < 0)
            if intervals and not np.isnan(low):
                text += f"\n[{low:+.{digits}f},{between}{high:+.{digits}f}]"
        look = {"fontsize": "x-small" if intervals else "small", "fontweight": "bold" if bold else "normal"}
        frame.write_cell(ax, row, column, text, dark=abs(value) > 0.7 * limit, **look)


def _separate(ax: Axes, rows: Sequence[str], levels: Mapping[str, str] | None, means: int) -> None:
    """Lines between the levels, whose names stand at the right, and before the mean."""
    if means:
        ax.axhline(len(rows) - 0.5, color="black", linewidth=0.8)
    if levels is None:
        return
    starts = [0, *(i for i in range(1, len(rows)) if levels[rows[i]] != levels[rows[i - 1]]), len(rows)]
    for start, end in itertools.pairwise(starts):
        if start:
            ax.axhline(start - 0.5, color="black", linewidth=0.8, linestyle=(0, (2, 2)))
        look: dict[str, Any] = {"rotation": 270, "ha": "left", "va": "center", "fontsize": "small", "color": frame.INK}
        ax.annotate(levels[rows[start]], (1.015, (start + end - 1) / 2), xycoords=("axes fraction", "data"), **look)

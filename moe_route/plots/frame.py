"""What all figures share: axes outside matplotlib's global state, sizes for a column of a paper, titles and legends."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from moe_route.base import files
from moe_route.base.schema import misspelt
from moe_route.base.table import printable
from moe_route.data.languages import codes, flores_code, language_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Colors, dashes and markers: a language looks the same in every figure, whatever else is drawn there.

# Okabe and Ito's set for every color vision (2008), without its yellow, which is too light for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_BLUE, _RED, _GREEN, _PINK, _SKY, _ORANGE, _BLACK = range(7)
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (6, 1.4, 1.2, 1.4)),
    (0, (9, 1.6)),
    (0, (6, 1.2, 1.2, 1.2, 1.2, 1.2)),
)
_MARKERS = ("", "o", "s", "^", "D", "v")
# Scripts that share dashes -> the order of their colors, and the languages that come first, by frequency in corpora.
# The others follow in the order of the table of languages. The seven colors repeat with the next marker.
_FAMILIES: tuple[tuple[str, tuple[int, ...], str], ...] = (
    (
        "Latn",
        (_BLACK, _RED, _GREEN, _BLUE, _PINK, _ORANGE, _SKY),
        "eng swh deu fra ind spa por ita nld pol tur vie fin yor ces swe hun ron dan nob cat afr zsm tgl hau ibo "
        "zul xho sna som wol bam est lit lvs hrv slk slv",
    ),
    ("Cyrl Grek Armn Geor", (_GREEN, _RED, _BLUE, _PINK, _ORANGE, _SKY, _BLACK), "rus ukr ell kat bul srp hye kaz"),
    ("Arab Hebr Ethi Tfng", (_ORANGE, _BLUE, _RED, _GREEN, _PINK, _SKY, _BLACK), "arb heb amh pes urd tir"),
    ("Hans Hant Jpan Hang", (_BLUE, _PINK, _RED, _GREEN, _SKY, _ORANGE, _BLACK), "zho_Hans jpn kor zho_Hant yue"),
    (
        "Deva Beng Gujr Guru Knda Mlym Orya Sinh Taml Telu Olck",
        (_SKY, _RED, _GREEN, _BLUE, _PINK, _ORANGE, _BLACK),
        "hin ben tam tel npi mar pan guj kan mal",
    ),
    ("Thai Khmr Laoo Mymr Tibt", (_PINK, _BLUE, _GREEN, _ORANGE, _RED, _SKY, _BLACK), "tha khm lao mya bod"),
)
_LEVELS = ("high", "medium", "mid", "middle", "low")  # resource levels by their usual names, in order


class Lines(TypedDict, total=False):
    """What every figure with a line per group takes.

    groups: the groups to draw; by default all.
    labels: group -> label; by default the English name of the language (``moe_route.data.languages``).
    styles: group -> a color, or keyword arguments of ``Axes.plot``, in place of the default from ``styles``.
    levels: group -> level, such as "high", "medium" and "low" resources; lines are colored by level, from dark to
        light, and a legend explains the colors.
    depth: show relative depth (0: first layer, 1: last) in place of layers, to compare models.
    title: title above the axes; none by default.
    """

    groups: Sequence[str] | None
    labels: Mapping[str, str] | None
    styles: Mapping[str, Any] | None
    levels: Mapping[str, str] | None
    depth: bool
    title: str | None


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Assign a line style to each name, as keyword arguments of ``Axes.plot``.

    A language by any of its codes ("swh_Latn", "swh", "sw") has one color, one marker and the dashes of its script, the
    same in every figure, whatever other names there are. Other names take the remaining styles in alphabetical order,
    so these depend on the set of names: pass ``styles=styles(names)`` to draw results with other groups in the same
    styles. The first seven languages of a script, and the first 42 other names, have no marker.
    """
    wanted = sorted(set(names))
    places: dict[str, tuple[int, int, int]] = {}
    seen: set[str] = set()
    for name in wanted:
        code = flores_code(name)
        if code is not None and code not in seen:  # a second code of one language counts as another name
            seen.add(code)
            places[name] = _places()[code]
    others = [name for name in wanted if name not in places]
    every = [(color, dash, marker) for marker, dash, color in product(*map(range, (len(_MARKERS), len(DASHES), 7)))]
    free = [place for place in every if place not in places.values()]
    places |= {name: free[i % len(free)] for i, name in enumerate(others)}
    return {name: _style(*places[name]) for name in wanted}


def chosen_styles(
    groups: Sequence[str], given: Mapping[str, Any] | None, levels: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """The style of each group of a result; colors of ``levels`` and then ``given`` styles take precedence."""
    chosen = styles(groups)
    if levels is not None:
        shades = level_colors(levels)
        for group in groups:
            if group in levels:
                chosen[group]["color"] = shades[levels[group]]
    for group, style in (given or {}).items():
        if group in chosen:
            chosen[group] |= {"color": style} if isinstance(style, str) else dict(style)
    return chosen


def numbered(number: int) -> dict[str, Any]:
    """The style with this number: first all colors, then the same colors with other dashes."""
    return _style(number % len(COLORS), (number // len(COLORS)) % len(DASHES), 0)


def ordered_colors(number: int) -> list[str]:
    """Colors of an ordered quantity, from dark to light, in order of lightness for any color vision."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.8 * i / max(number - 1, 1))) for i in range(number)]


def level_order(levels: Mapping[str, str]) -> list[str]:
    """The levels in order: high, medium, low by these names, others in the order in which they first occur."""
    names = list(dict.fromkeys(levels.values()))
    return sorted(names, key=lambda name: _LEVELS.index(name.lower()) if name.lower() in _LEVELS else len(_LEVELS))


def level_colors(levels: Mapping[str, str]) -> dict[str, str]:
    """A color for each level, the darkest for the highest."""
    names = level_order(levels)
    return dict(zip(names, ordered_colors(len(names)), strict=True))


def _style(color: int, dash: int, marker: int) -> dict[str, Any]:
    look: dict[str, Any] = {
        "color": COLORS[color],
        "linestyle": DASHES[dash],
        "linewidth": line_width(),
        "solid_capstyle": "round",
    }
    if marker:
        look |= {"marker": _MARKERS[marker], "markersize": 2.6 * line_width(), "markevery": 0.15}
    return look


@cache
def _places() -> dict[str, tuple[int, int, int]]:
    """Code of a language as in FLORES -> color, dashes and marker."""
    places: dict[str, tuple[int, int, int]] = {}
    for dash, (scripts, colors, first) in enumerate(_FAMILIES):
        of_family = [code for code in codes() if code.split("_")[1] in scripts.split()]
        common = {code: place for place, code in enumerate(first.split())}
        of_family.sort(key=lambda code: common.get(code, common.get(code.split("_")[0], len(common))))
        for place, code in enumerate(of_family):
            places[code] = (colors[place % 7], dash, place // 7 % len(_MARKERS))
    return places


GRID = "#d9d9d9"
INK = "#333333"
_MISSING = "plots need matplotlib: pip install 'moe-route[plot]'"
_LONGEST_LABEL = 80  # characters
_COLUMN: ContextVar[float | None] = ContextVar("column", default=None)
# Text stays text in vector files, so that it can be searched, copied and edited.
_AS_TEXT: Any = {"svg.fonttype": "none", "pdf.fonttype": 42, "ps.fonttype": 42}


@contextmanager
def style(column: float = 3.3, size: float = 8.0) -> Iterator[dict[str, Any]]:
    """Draw for a column of a paper: figures ``column`` inches wide, with text of ``size`` points.

    Figures that are made inside the block have these sizes, also if they are saved later. matplotlib's settings are
    those of before after the block. Yields the settings, for ``matplotlib.rc_context``.
    """
    if not 1 <= column <= 40 or not 3 <= size <= 40:
        raise ValueError(f"column must be 1 to 40 inches and size 3 to 40 points, not {column:g} and {size:g}")
    needs_matplotlib()
    import matplotlib as mpl

    settings: Any = {
        "font.size": size,
        "figure.figsize": (column, 0.62 * column),
        "lines.linewidth": _width(column),
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        **_AS_TEXT,
    }
    token = _COLUMN.set(float(column))
    try:
        with mpl.rc_context(settings):
            yield settings
    finally:
        _COLUMN.reset(token)


def save(ax: Axes, path: str | os.PathLike[str], *, dpi: int = 160) -> Path:
    """Write the figure of `ax` to `path`, whole or not at all; the suffix (png, svg, pdf) is the format.

    Text of svg and pdf stays text. ``dpi`` is the number of pixels per inch of a png.
    """
    path = Path(path)
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in ("png", "svg", "pdf"):
        raise ValueError(f"{path} has no suffix of a picture: name it .png, .svg or .pdf")
    import matplotlib as mpl

    figure = figure_of(ax)
    # The layout of a figure of ours keeps its width; other figures may have a legend outside.
    box = None if figure.get_layout_engine() is not None else "tight"
    with mpl.rc_context(_AS_TEXT), files.replacing(path) as stream:
        figure.savefig(stream, format=suffix, dpi=dpi, bbox_inches=box)
    return path


def needs_matplotlib() -> None:
    """Raise ``ImportError`` that names the extra if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING) from error


def figure_of(ax: Axes) -> Figure:
    """The whole figure that the axes are part of."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def new_figure(width: float, height: float) -> Figure:
    """A figure outside matplotlib's global state; ``style`` scales it to the column, but not less than legible."""
    needs_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    column = _COLUMN.get()
    if column is not None:
        # half of the height is text, which does not shrink with the column
        width, height = column, height * (0.5 + 0.5 * column / width) * (0.9 if column < width else 1.0)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(ax: Axes | None, size: tuple[float, float], labels: int = 0) -> Axes:
    """The given axes, or those of a new figure, high enough for this number of labels one above the other."""
    if ax is not None:
        return ax
    figure = new_figure(*size)
    least = (labels * 1.25 * points("small") + 5 * points("medium")) / 72
    if figure.get_figheight() < least:
        figure.set_figheight(least)
    return figure.add_subplot()


def panels(figure: Figure, number: int, columns: int, **options: Any) -> list[Axes]:
    """So many axes with shared scales, row by row; those in the last row may be fewer. Options are of the grid."""
    cells = figure.add_gridspec(-(-number // columns), columns, **options)
    axes: list[Axes] = []
    for place in range(number):
        first = axes[0] if axes else None
        axes.append(figure.add_subplot(cells[place // columns, place % columns], sharex=first, sharey=first))
    return axes


def label_outer(axes: Sequence[Axes], columns: int) -> None:
    """Keep the names and ticks of the panels at the left, and of those with no panel below them."""
    for place, ax in enumerate(axes):
        if place % columns:
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
        if place + columns < len(axes):
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)


def column() -> float | None:
    """Width of the column that ``style`` draws for, in inches; None outside of it."""
    return _COLUMN.get()


def labels_that_fit(ax: Axes) -> int:
    """How many labels find room one above the other beside the axes."""
    figure = figure_of(ax)
    height = 72 * figure.get_figheight() * ax.get_position().height
    return int(height / (1.05 * points("small")))


def line_width() -> float:
    """Width of a line in points, thinner in a narrow column."""
    return _width(_COLUMN.get() or 6.4)


def _width(column: float) -> float:
    return float(np.clip(0.25 * column, 1.1, 1.6))


def layer_axes(ax: Axes, layers: int, name: str, *titles: str | None, depth: bool = False) -> None:
    """Axes of a quantity by layer, or by relative depth, with the title and notes of `titled`."""
    ax.set_xlabel("relative depth" if depth else "MoE layer")
    ax.set_ylabel(_wrapped(ax, name, vertical=True))
    if depth:
        ax.set_xlim(-0.02, 1.02)
    else:
        ax.set_xlim(-0.5, layers - 0.5)
        whole_ticks(ax.xaxis)
    plain_frame(ax, *titles)


def map_axes(ax: Axes, x: str, y: str, *titles: str | None) -> None:
    """Names and whole numbers along both axes of a map, with the title and notes of `titled`."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    whole_ticks(ax.xaxis)
    whole_ticks(ax.yaxis)
    titled(ax, *titles)


def plain_frame(ax: Axes, *titles: str | None, axis: Literal["y", "both"] = "y") -> None:
    """Faint lines across, no frame at the top and at the right, and the title and notes of `titled`."""
    ax.grid(axis=axis, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    titled(ax, *titles)


def frameless(ax: Axes) -> None:
    """Neither ticks nor lines around the axes, for cells that are named at both sides."""
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def color_bar(image: Any, axes: Axes | Sequence[Axes], label: str, *, pad: float = 0.015, **options: Any) -> Any:
    """A bar of the colors of an image beside its axes, without a frame."""
    figure = figure_of(axes[0] if isinstance(axes, Sequence) else axes)
    bar = figure.colorbar(image, ax=axes, pad=pad, **options)  # type: ignore[arg-type]
    bar.set_label(label)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return bar


def write_cell(ax: Axes, row: float, column: float, text: str, *, dark: bool, **look: Any) -> None:
    """Text in the middle of a cell of an image, white where the cell is dark."""
    ax.text(column, row, text, ha="center", va="center", color="white" if dark else "black", **look)


def titled(ax: Axes, *titles: str | None) -> None:
    """Set the title with notes below it, each in lines no longer than the axes. Ticks keep the size of now."""
    lines = [line for text in titles if text for line in text.splitlines()]
    shown = "\n".join(_wrapped(ax, line) for line in lines)
    ax.set_title(shown, fontsize="medium", color=INK)
    ax.tick_params(labelsize=points("medium"))  # ticks that are made when the figure is drawn, too


def _wrapped(ax: Axes, text: str, vertical: bool = False) -> str:
    figure = figure_of(ax)
    box = ax.get_position()
    inches = figure.get_figheight() * box.height if vertical else figure.get_figwidth() * box.width / 0.775
    return wrapped(text, inches * (1.0 if vertical else 0.8))  # axes need not lie in the middle of the figure


def wrapped(text: str, inches: float) -> str:
    """Text of medium size in lines of this length."""
    letters = max(int(72 * inches / (0.53 * points("medium"))), 12)
    return "\n".join(
        part for line in text.splitlines() for part in textwrap.wrap(line, letters, break_long_words=False)
    )


def points(size: str) -> float:
    """A size of text, such as "small", in points, as matplotlib's settings of now have it."""
    from matplotlib.font_manager import FontProperties

    return float(FontProperties(size=size).get_size_in_points())


def whole_ticks(axis: Axis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def legend_above(ax: Axes, columns: int | None = None, **options: Any) -> None:
    """Place the legend between the axes and the title, where it covers no line."""
    handles, names = options.pop("handles", None), options.pop("labels", None)
    if handles is None:
        handles, names = ax.get_legend_handles_labels()
    if not handles:
        return
    figure = figure_of(ax)
    letters = 0.7 * figure.get_figwidth() * ax.get_position().width / 0.775 * 72 / (0.53 * points("small"))
    if columns is None:
        columns = int(np.clip(letters // (max(map(len, names)) + 8), 1, len(names)))
    rows = -(-len(names) // columns)
    if columns > 1:
        columns = -(-len(names) // rows)
    ax.legend(
        handles,
        names,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize="small",
        handlelength=2.2,
        columnspacing=1.2,
        labelspacing=0.25,
        borderaxespad=0.1,
        **options,
    )
    if ax.get_title():
        ax.set_title(ax.get_title(), fontsize="medium", color=INK, pad=8 + rows * 1.35 * points("small"))


def name_lines(ax: Axes, *, legend: bool | None = None) -> None:
    """Labels at the ends of the lines, or a legend beside the axes; by default labels if there is room for them."""
    from moe_route.plots.end_labels import label_ends

    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    if len(lines) > labels_that_fit(ax) if legend is None else legend:
        legend_beside(ax)
    else:
        label_ends(ax, lines)


def legend_beside(ax: Axes) -> None:
    """Place the legend to the right of the axes, in as many columns as it needs."""
    lines = len(ax.get_legend_handles_labels()[1])
    ax.legend(
        loc="center left",
        ncols=-(-lines // max(labels_that_fit(ax), 1)),
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        handlelength=2.6,
        fontsize="small",
        labelspacing=0.3,
    )


def label_of(group: str, labels: Mapping[str, str] | None) -> str:
    """The label of a group: the one that was given, else the English name of the language, else the group's name.

    It is text that matplotlib draws as it is, and SVG can hold.
    """
    label = printable((labels or {}).get(group) or language_name(group)).replace("\n", " ")
    label = label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 3]}..."
    # not a formula of matplotlib; and a label that begins with an underscore would be left out of legends
    return label.replace("$", r"\$") if not label.startswith("_") else f" {label}".replace("$", r"\$")


def labels_of(groups: Sequence[str], labels: Mapping[str, str] | None) -> list[str]:
    """A label for each group; the group's own name follows where two languages would be shown alike."""
    shown = [label_of(group, labels) for group in groups]
    alike = {label for label in shown if shown.count(label) > 1}
    return [f"{label} [{group}]" if label in alike else label for label, group in zip(shown, groups, strict=True)]


def refuse_misspelt(groups: Iterable[str], **given: Any) -> None:
    """Raise ``ValueError`` for a key of labels, styles or levels that is a letter off a group which has none there.

    Other keys that are no group are let through, so that figures of other groups can share them.
    """
    names = list(groups)
    for what, values in given.items():
        near = misspelt(values or (), names)
        if near is not None:
            raise ValueError(f'{what} names "{near[0]}", which is not drawn: did you mean "{near[1]}"?')


def known(groups: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The wanted groups, by default all. Raises ``ValueError`` for one that the result does not have."""
    for name in wanted or ():
        if name not in groups:
            raise ValueError(f"no group {name!r}: there are {', '.join(groups)}")
    return list(groups if wanted is None else wanted)

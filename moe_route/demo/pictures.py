"""The pictures of the demonstration, one per finding, readable at 800 pixels.

Colors are those of `plots`, which every color vision tells apart; markers differ as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route import plots
from moe_route.base.table import number_of
from moe_route.demo.wording import name, standing, told
from moe_route.plots import frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moe_route.demo.language_experts import LanguageExpertsOff
    from moe_route.demo.task_experts import TaskExpertsOff

WIDTH = 8.0  # inches; 800 pixels are then 100 per inch, and the font has 14
BLUE, RED, GREEN, _, _, ORANGE, _ = frame.COLORS
GREY = "#8c8c8c"


def save(drawn: Mapping[str, Axes | None], folder: Path) -> list[Path]:
    """Save each picture that has something to show as PNG under its name; returns the files in their order."""
    return [plots.save(ax, folder / f"{title}.png") for title, ax in drawn.items() if ax is not None]


def task_experts_off(off: TaskExpertsOff) -> Axes | None:
    """Exact match of each language before and after; beside it the change, in a cloud of the random sets."""
    if not off.task_experts.experts:
        return None
    clouds = len(off.matches) > 1
    rows = np.arange(len(off.languages))
    axes = new_axes(1, 2 if clouds else 1, 1.7 + 0.38 * len(rows), sharey=True)
    ax = axes[0, 0]
    before, after = off.before.correct.mean(0), off.after.correct.mean(0)
    ax.hlines(rows, after, before, color=GREY, linewidth=2.5, zorder=1)
    ax.scatter(before, rows, s=60, color=BLUE, zorder=2, label="model as it is")
    ax.scatter(after, rows, s=60, color=RED, marker="D", zorder=2, label="task experts off")
    language_rows(ax, off.languages)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel(f"exact match ({len(off.before.correct)} held-out problems)")
    legend_below(ax, 2)
    if clouds:
        _cloud(axes[0, 1], off, rows)
    number = len(off.task_experts.experts)
    text = f"general text: {told(off.text_change, 3)} nats per token"
    if off.sets:
        text += f"\nbeside random sets of as many experts: {standing(off.sets['exact match'])}"
    headline(ax, f"{number_of(number, 'task expert')} found in English, off: exact match {told(off.change)}\n{text}")
    return ax


def _cloud(ax: Axes, off: TaskExpertsOff, rows: np.ndarray) -> None:
    """The change of exact match on the sampled items: of the task experts, and of every random set."""
    spread = np.random.default_rng(0).uniform(-0.28, 0.28, off.matches[1:].shape)
    holding = off.shares > 0
    kinds = ((holding, ORANGE, "random set with a task expert"), (~holding, GREY, "without"))
    for at, color, label in kinds:
        if at.any():
            ax.scatter(
                off.matches[1:][at], (rows + spread)[at], s=14, color=color, alpha=0.6, linewidths=0, label=label
            )
    ax.scatter(off.matches[0], rows, s=60, color=RED, marker="D", zorder=3)
    ax.axvline(0, color=frame.INK, linewidth=0.8)
    plain_axes(ax)
    ax.set_xlabel(f"its change ({off.sampled[0]} of the problems)")
    legend_below(ax, 2)


def language_experts_off(off: LanguageExpertsOff) -> Axes | None:
    """The matrix of changes, with a column of the random sets."""
    if not off.experts:
        return None
    values = off.matrix
    limit = float(np.abs(values).max()) or 1.0
    control = off.random is not None
    columns = len(off.languages) + (1.4 if control else 0)
    ax = new_axes(1, 1, 1.9 + 0.4 * len(values))[0, 0]
    options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "aspect": "auto"}
    image = ax.imshow(values, extent=(-0.5, len(off.languages) - 0.5, len(values) - 0.5, -0.5), **options)
    shown = [(x, y, value) for (y, x), value in np.ndenumerate(values)]
    places, labels = list(map(float, range(len(off.languages)))), [name(one) for one in off.languages]
    if off.random is not None:
        own = off.random.mean(0)[:, None]
        left = len(off.languages) - 0.1
        ax.imshow(own, extent=(left, left + 1, len(values) - 0.5, -0.5), **options)
        shown += [(left + 0.5, y, float(value)) for y, value in enumerate(own[:, 0])]
        places, labels = [*places, left + 0.5], [*labels, "random experts,\nown text"]
    for x, y, value in shown:
        own_text = x == (off.languages.index(list(off.experts)[int(y)]))
        look = {"fontsize": "small", "fontweight": "bold" if own_text else "normal"}
        text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0 avoids a minus zero
        frame.write_cell(ax, y, x, text, dark=abs(value) > 0.6 * limit, **look)
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_xticks(places, labels, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(values)), [name(one) for one in off.experts])
    ax.set_ylabel("experts off")
    frame.frameless(ax)
    frame.color_bar(image, ax, "change, nats per token", pad=0.02, fraction=0.04)
    headline(
        ax,
        f"a language's own experts off: its text loses the most in {len(off.hit_first)} of {len(values)}\n"
        f"own minus other languages' text: {told(off.selectivity)} nats per token",
    )
    return ax


def new_axes(rows: int, columns: int, height: float, **options: Any) -> Any:
    """Axes [rows, columns] of a new figure."""
    return frame.new_figure(WIDTH, height).subplots(rows, columns, squeeze=False, **options)


def headline(ax: Axes, text: str) -> None:
    """A title over the whole figure."""
    frame.figure_of(ax).suptitle(text, fontsize="medium", ha="left", x=0.01)


def language_rows(ax: Axes, languages: Sequence[str], after: dict[str, str] | None = None) -> None:
    """A row for each language, the first on top."""
    ax.set_yticks(range(len(languages)), [f"{name(one)}{(after or {}).get(one, '')}" for one in languages])
    ax.set_ylim(len(languages) - 0.5, -0.5)
    plain_axes(ax)


def legend_below(ax: Axes, columns: int) -> None:
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize="small")


def plain_axes(ax: Axes) -> None:
    """Faint lines both ways, and no frame at the top and at the right."""
    frame.plain_frame(ax, axis="both")

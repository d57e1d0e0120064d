"""Numbers of selected experts by layer and by threshold."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis import Sweep
from moe_route.plots import frame
from moe_route.steering import ExpertSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def expert_counts(
    selections: Mapping[str, ExpertSelection] | Sequence[ExpertSelection] | ExpertSelection,
    *,
    ax: Axes | None = None,
    num_layers: int | None = None,
    overlap: bool = False,
    title: str | None = None,
) -> Axes:
    """Draw the number of selected experts by layer.

    Selections that contain each other, such as those of increasing thresholds, are drawn as nested bars, the smallest
    one darkest: the top of a color is the number of experts in that selection. Other selections are step lines, the
    first one widest, so that a line can be seen behind another one.

    Args:
        selections: name -> selection; or selections without names, labeled by description and threshold.
        num_layers: number of layers of the model; by default taken from the selections.
        overlap: with two selections, also fill the number of experts that are in both.
    """
    named = _named(selections)
    ax = frame.new_axes(ax, (6.4, 3.4))
    layers = num_layers if num_layers is not None else max(map(_num_layers, named.values()))
    counts = {name: _counts(selection, layers) for name, selection in named.items()}
    if overlap and len(named) != 2:
        raise ValueError(f"overlap needs two selections, not {len(named)}")
    if _nested(list(named.values())) and not overlap:
        _bars(ax, named, counts)
    else:
        _steps(ax, named, counts)
    if overlap:
        first, second = named.values()
        both = first & second
        edges, values = _outline(_counts(both, layers))
        fill: dict[str, Any] = {"color": frame.INK, "alpha": 0.25, "linewidth": 0}
        ax.fill_between(edges, values, step="post", label=f"in both ({len(both)})", **fill)
    frame.layer_axes(ax, layers, "experts", title)
    ax.set_ylim(bottom=0)
    frame.whole_ticks(ax.yaxis)
    frame.legend_above(ax)
    return ax


def sweep(
    sweep: Sweep, *, of: str = "task", ax: Axes | None = None, title: str | None = None, colorbar: bool = True
) -> Axes:
    """Draw the number of experts by layer and threshold as a heat map: "task", "multilingual" or "both"."""
    names = {"task": "task experts", "multilingual": "multilingual experts", "both": "experts in both sets"}
    if of not in names:
        raise ValueError(f'of must be "task", "multilingual" or "both", not {of!r}')
    values = getattr(sweep, of)[:, list(sweep.layers)].astype(np.float64)
    ax = frame.new_axes(ax, (6.4, 3.4))
    limit = float(values.max()) or 1.0
    shown = np.where(values > 0, values, np.nan)
    look: dict[str, Any] = {"aspect": "auto", "origin": "lower", "interpolation": "nearest", "cmap": "cividis_r"}
    image = ax.imshow(shown, vmin=0.0, vmax=limit, **look)
    ax.set_xlabel("MoE layer")
    ax.set_ylabel("threshold")
    ax.set_xticks(*_few(list(map(str, sweep.layers)), 16))
    ax.set_yticks(*_few([f"{threshold:g}" for threshold in sweep.thresholds], 13))
    frame.titled(ax, title)
    if values.size <= 160 and (frame.column() or 6.4) > 5:
        for row, column in np.argwhere(values > 0):
            value = values[row, column]
            frame.write_cell(ax, row, column, f"{value:.0f}", dark=value > 0.55 * limit, fontsize="small")
    if colorbar:
        frame.whole_ticks(frame.color_bar(image, ax, names[of]).ax.yaxis)
    return ax


def sweep_overlap(sweep: Sweep, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Draw the number of task experts, of multilingual experts and of both by threshold, and what chance would share.

    A vertical line marks the threshold from which on no expert is in both sets. The axis of numbers is logarithmic
    from 1 on.
    """
    from matplotlib.ticker import StrMethodFormatter

    ax = frame.new_axes(ax, (6.4, 3.6))
    both = sweep.both.sum(1)
    lines = (("task experts", sweep.task.sum(1)), ("multilingual experts", sweep.multilingual.sum(1)), ("both", both))
    for number, (name, values) in enumerate(lines):
        ax.plot(sweep.thresholds, values, label=name, marker="o", markersize=3, **frame.numbered(number))
    chance = frame.numbered(2) | {"linestyle": frame.DASHES[2]}
    ax.plot(sweep.thresholds, sweep.expected, label="both, by chance", **chance)
    ax.axvline(sweep.separate_from, color=frame.INK, linewidth=0.8)
    ax.set_yscale("symlog", linthresh=1.0)
    ax.set_ylim(0, 1.4 * max(float(values.max()) for _, values in lines) + 1)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.set_xlabel("threshold")
    ax.set_ylabel("experts")
    from_here_on = np.ceil(round(sweep.separate_from * 1000, 6)) / 1000  # rounded up, else an expert is left in both
    frame.plain_frame(ax, title, f"line: no expert in both sets from {from_here_on:g} on")
    frame.legend_above(ax)
    return ax


def _bars(ax: Axes, named: Mapping[str, ExpertSelection], counts: Mapping[str, np.ndarray]) -> None:
    """Bars from the largest selection to the smallest, one over the other; the legend keeps the order given."""
    colors = dict(zip(sorted(named, key=lambda name: len(named[name])), frame.ordered_colors(len(named)), strict=True))
    bars = {}
    for name in sorted(named, key=lambda name: -len(named[name])):
        edges, values = _outline(counts[name])
        label = f"{name} ({len(named[name])})"
        fill: dict[str, Any] = {"color": colors[name], "linewidth": 0}
        bars[name] = ax.fill_between(edges, values, step="post", label=label, **fill)
        ax.vlines(edges[1:-1], 0, np.minimum(values[1:-1], values[:-2]), color="white", linewidth=0.4)


def _steps(ax: Axes, named: Mapping[str, ExpertSelection], counts: Mapping[str, np.ndarray]) -> None:
    """Step lines, each thinner than the one behind it."""
    for number, name in enumerate(named):
        edges, values = _outline(counts[name])
        style = frame.numbered(number) | {"linewidth": 1.3 + 1.8 * (len(named) - 1 - number)}
        style["solid_capstyle"] = "butt"
        ax.plot(edges, values, drawstyle="steps-post", label=f"{name} ({len(named[name])})", **style)


def _outline(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the layers and values from each edge on, so that all steps are as wide, the first and last too."""
    return np.arange(len(values) + 1) - 0.5, np.append(values, values[-1:])


def _nested(selections: Sequence[ExpertSelection]) -> bool:
    ordered = sorted(selections, key=len)
    return all(not len(small - large) for small, large in itertools.pairwise(ordered))


def _few(names: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Positions and names of at most ``most`` ticks, evenly spaced."""
    step = -(-len(names) // most)
    return list(range(0, len(names), step)), list(names[::step])


def _named(
    selections: Mapping[str, ExpertSelection] | Sequence[ExpertSelection] | ExpertSelection,
) -> dict[str, ExpertSelection]:
    named: dict[str, ExpertSelection] = {}
    if isinstance(selections, Mapping) and not isinstance(selections, ExpertSelection):
        named = dict(selections)
    else:
        alone = [selections] if isinstance(selections, ExpertSelection) else selections
        for number, selection in enumerate(alone, 1):
            threshold = "" if selection.threshold is None else f" > {selection.threshold:g}"
            name = f"{selection.description or f'selection {number}'}{threshold}"
            named[name if name not in named else f"{name} ({number})"] = selection
    if not named:
        raise ValueError("no selection to count: pass at least one")
    return named


def _num_layers(selection: ExpertSelection) -> int:
    if isinstance(selection.num_experts, tuple):
        return len(selection.num_experts)
    if not selection:
        raise ValueError("how many layers the model has is not known: pass num_layers")
    return max(selection.layers) + 1


def _counts(selection: ExpertSelection, layers: int) -> np.ndarray:
    outside = [layer for layer in selection.layers if layer >= layers]
    if outside:
        raise ValueError(f"the selection has experts in layer {outside[0]}, but num_layers is {layers}")
    return np.array([selection.counts.get(layer, 0) for layer in range(layers)])

"""The flow of tokens from the experts of a layer to those of the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.plots import frame
from moe_route.plots.palette import styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_route.recording import RoutingStatistics

__all__ = ["expert_flow"]

_COMMON = "#b8b8b8"
_WIDEST = 7.0  # points, of the largest flow
_CURVE = np.linspace(0.0, 1.0, 24)


def expert_flow(
    found: RoutingStatistics,
    groups: Sequence[str] | None = None,
    *,
    reference: str | None = None,
    flows: int = 20,
    columns: int | None = None,
    labels: Mapping[str, str] | None = None,
    title: str | None = None,
) -> list[Axes]:
    """Draw how tokens flow from the experts of each layer to those of the next, a panel for each group.

    A line joins two experts of neighboring layers. Its width is the share, among all pairs of an expert that a token
    chose in the one layer and an expert that it chose in the other, of this pair. Experts of a layer are sorted by how
    often the reference (without one: all groups together) chooses them, the most frequent at the top, so the main road
    of the reference runs along the top.

    With a reference, each panel shows the difference: gray is the flow that both have in common, a colored rim what the
    group has more, and a rim in the color of the reference what the reference has more. The panel names the common
    share, 1 minus the total variation distance of the pairs, mean over layers.

    Args:
        found: ``RoutingStatistics`` recorded with ``record(pairs=True)``.
        groups: the groups to draw; by default all but the reference.
        reference: the group to compare with.
        flows: number of flows to draw between two layers, the largest of the group or of the reference.
        columns: number of panels side by side.
        labels: other names for groups.
        title: title above the panels; none by default.

    Returns the axes of the panels. Raises ``ValueError`` for statistics without pairs or with a single layer, for
    unknown groups, for groups without tokens, and for fewer than one flow.
    """
    if flows < 1:
        raise ValueError(f"flows must be 1 or more, not {flows}")
    if len(found.layers) < 2:
        raise ValueError("a flow needs two layers or more: leave layers out of select()")
    wanted = [name for name in frame.known(found.groups, groups) if name != reference]
    if not wanted:
        raise ValueError("there is no group to draw besides the reference: name others")
    shares = {name: _shares(found, name) for name in dict.fromkeys([*wanted, *([reference] if reference else [])])}
    places = _places(found, wanted if reference is None else [reference])
    columns = columns or min(len(wanted), 2 if (frame.column() or 6.4) < 5 else 3)
    figure = frame.new_figure(6.4, 0.9 + 1.8 * -(-len(wanted) // columns))
    axes = frame.panels(figure, len(wanted), columns)
    largest = max(float(values.max()) for values in shares.values())
    color = {name: style["color"] for name, style in styles(shares).items()}
    drawn = []
    for ax, name in zip(axes, wanted, strict=True):
        other = shares[name] if reference is None else shares[reference]
        drawn.append(_draw(ax, places, shares[name], other, (color[name], color[reference or name]), flows, largest))
        _frame(ax, places, frame.label_of(name, labels))
        if reference is not None:
            common = float(np.minimum(shares[name], other).sum((1, 2)).mean())
            ax.set_title(f"{frame.label_of(name, labels)}: {common:.0%} in common", fontsize="medium", color=frame.INK)
    frame.label_outer(axes, columns)
    by = "" if reference is None else f" in {frame.label_of(reference, labels)}"
    figure.supylabel(f"experts of a layer, by frequency{by}", fontsize="medium")
    note = f"the {flows} largest flows between two layers, {min(drawn):.0%} to {max(drawn):.0%} of all"
    figure.suptitle("\n".join(filter(None, (title, note))), fontsize="medium", color=frame.INK)
    if reference is not None:
        own = [color[name] for name in wanted]
        _legend(figure, own, color[reference], frame.label_of(reference, labels))
    return axes


def _shares(found: RoutingStatistics, group: str) -> np.ndarray:
    """Share of each pair among all pairs of two layers, float64 [L - 1, E, E]; 0 between layers without tokens."""
    if group not in found.groups:
        raise ValueError(f"name one of the groups: {', '.join(found.groups)}")
    counts = found.transitions[found.groups.index(group)].astype(np.float64)
    if not counts.any():
        raise ValueError(f"no token of {group} was counted: leave it out")
    total = counts.sum((1, 2), keepdims=True)
    return np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)


def _places(found: RoutingStatistics, groups: Sequence[str]) -> list[np.ndarray]:
    """Place of each expert of a layer, 0 for the one that these groups choose most often."""
    rows = [found.groups.index(group) for group in groups]
    frequency = np.nan_to_num(found.frequency(by="token")[rows]).mean(0)
    return [
        np.argsort(np.argsort(-of_layer[:size], kind="stable"), kind="stable")
        for of_layer, size in zip(frequency, found.num_experts, strict=True)
    ]


def _draw(
    ax: Axes,
    places: list[np.ndarray],
    own: np.ndarray,
    other: np.ndarray,
    colors: tuple[str, str],
    flows: int,
    largest: float,
) -> float:
    """Draw the largest flows. Returns the share of all of the group's flow that they are."""
    from matplotlib.collections import LineCollection

    lines: list[tuple[float, np.ndarray, float, str]] = []  # (order, curve, width, color)
    shown = []
    for layer, (mine, theirs) in enumerate(zip(own, other, strict=True)):
        size = np.maximum(mine, theirs)
        strongest = np.argsort(-size, axis=None, kind="stable")[:flows]
        shown.append(float(mine.reshape(-1)[strongest].sum()))
        for e, f in zip(*np.unravel_index(strongest, size.shape), strict=True):
            if not size[e, f]:
                continue
            curve = _curve(layer, places[layer][e], places[layer + 1][f])
            common = min(mine[e, f], theirs[e, f])
            color = colors[0] if mine[e, f] >= theirs[e, f] else colors[1]
            if own is other:
                lines.append((size[e, f], curve, size[e, f], color))
            else:
                lines.append((size[e, f] - common, curve, size[e, f], color))
                lines.append((size[e, f] - common, curve, common, _COMMON))
    lines.sort(key=lambda line: line[0])  # the largest differences on top; a rim before its core
    ax.add_collection(
        LineCollection(
            [line[1] for line in lines],
            linewidths=[_WIDEST * line[2] / largest for line in lines],
            colors=[line[3] for line in lines],
            alpha=0.75 if own is other else None,
            capstyle="butt",
        )
    )
    return float(np.mean(shown))


def _curve(layer: int, start: int, end: int) -> np.ndarray:
    """An S from one expert to the other, float64 [points, 2]."""
    return np.stack([layer + _CURVE, start + (end - start) * _CURVE**2 * (3 - 2 * _CURVE)], axis=1)


def _frame(ax: Axes, places: list[np.ndarray], name: str) -> None:
    most = max(map(len, places))
    x = np.repeat(np.arange(len(places)), [len(of_layer) for of_layer in places])
    ax.scatter(x, np.concatenate(places), s=2.0 if most <= 32 else 0.4, color=frame.INK, linewidths=0, zorder=3)
    ax.set_xlim(-0.15, len(places) - 0.85)
    ax.set_ylim(most - 0.3, -0.7)
    ax.set_yticks([])
    ax.set_xlabel("MoE layer")
    frame.whole_ticks(ax.xaxis)
    frame.frameless(ax)
    ax.set_title(name, fontsize="medium", color=frame.INK)


def _legend(figure: Figure, own: list[str], of_reference: str, reference: str) -> None:
    """Name the three kinds of lines below the panels."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D

    def line(color: str) -> Line2D:
        return Line2D([], [], color=color, linewidth=4)

    several = tuple(line(color) for color in list(dict.fromkeys(own))[:4])
    handles: list[Any] = [line(_COMMON), several, line(of_reference)]
    figure.legend(
        handles,
        ["in common", "more in this group", f"more in {reference}"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.0)},
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize="medium",
    )

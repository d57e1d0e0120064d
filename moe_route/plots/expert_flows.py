"""The flow of tokens from the experts of a layer to those of the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.measures import ratio
from moe_route.plots import frame
from moe_route.plots.frame import styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_route.recording import RoutingStatistics

_COMMON = "#b8b8b8"
_WIDEST = 0.08  # of the height of a panel, the largest flow
_FULLEST = 0.7  # of the height of a panel, all flows between two layers
_MANY = 32  # experts per layer from which on the places of rare ones are closer together
_WIDE = 5.0  # inches, from which on the legend fits into a line
_CURVE = np.linspace(0.0, 1.0, 24)


def expert_flow(
    statistics: RoutingStatistics,
    groups: Sequence[str] | None = None,
    *,
    reference: str | None = None,
    flows: int | None = None,
    columns: int | None = None,
    labels: Mapping[str, str] | None = None,
    title: str | None = None,
) -> list[Axes]:
    """Draw how tokens flow from the experts of each layer to those of the next, a panel for each group.

    A line joins two experts of neighboring layers. Its width is the share, among all pairs of an expert that a token
    chose in the one layer and an expert that it chose in the other, of this pair. Experts of a layer are sorted by how
    often the reference (without one: all groups together) chooses them, the most frequent at the top, so the main road
    of the reference runs along the top. With more than 32 experts, the places of rare ones are closer together.

    With a reference, each panel shows the difference: gray is the flow that both have in common, a colored rim what the
    group has more, and a rim in the color of the reference what the reference has more. The panel names the common
    share, 1 minus the total variation distance of the pairs, mean over layers.

    Args:
        statistics: ``RoutingStatistics`` recorded with ``record(pairs=True)``.
        groups: the groups to draw; by default all but the reference.
        reference: the group to compare with.
        flows: number of flows to draw between two layers, the largest of the group or of the reference; by default 10
            times the number of experts that a token chooses.
        columns: number of panels side by side.
        labels: other names for groups.
        title: title above the panels; none by default.

    Returns the axes of the panels. Raises ``ValueError`` for statistics without pairs or with a single layer, for
    unknown groups, for groups without tokens, and for fewer than one flow.
    """
    flows = 10 * max(statistics.top_k) if flows is None else flows
    if flows < 1:
        raise ValueError(f"flows must be 1 or more, not {flows}")
    if len(statistics.layers) < 2:
        raise ValueError("a flow needs two layers or more: leave layers out of select()")
    frame.refuse_misspelt(statistics.groups, labels=labels)
    wanted = [name for name in frame.known(statistics.groups, groups) if name != reference]
    if not wanted:
        raise ValueError("there is no group to draw besides the reference: name others")
    shares = {name: _shares(statistics, name) for name in dict.fromkeys([*wanted, *([reference] if reference else [])])}
    pairs = [(shares[name], shares[reference or name]) for name in wanted]
    kept = [_largest(np.maximum(*pair), flows) for pair in pairs]
    columns = columns or min(len(wanted), 2 if (frame.column() or 6.4) < 5 else 3)
    axes, height = _panels(len(wanted), columns, reference is not None)
    scale = _points_per_share(pairs, kept, height)
    places = _places(statistics, wanted if reference is None else [reference])
    color = {name: style["color"] for name, style in styles(shares).items()}
    if reference is not None and color[reference] in [color[name] for name in wanted]:
        color[reference] = frame.INK  # languages of two scripts may share a color
    of_all = []
    for ax, name, pair, shown in zip(axes, wanted, pairs, kept, strict=True):
        _draw(ax, places, pair, shown, (color[name], color[reference or name]), scale)
        of_all.append(float((pair[0] * shown).sum((1, 2)).mean()))
        label = frame.label_of(name, labels)
        if reference is not None:
            label += f": {np.minimum(*pair).sum((1, 2)).mean():.0%} in common"
        _frame(ax, places, frame.wrapped(label, 0.8 * frame.figure_of(ax).get_figwidth() / columns))
    frame.label_outer(axes, columns)
    by = None if reference is None else frame.label_of(reference, labels)
    note = f"the {flows} largest flows between two layers, {min(of_all):.0%} to {max(of_all):.0%} of all"
    _explain(frame.figure_of(axes[0]), "\n".join(filter(None, (title, note))), by)
    if by is not None:
        _legend(frame.figure_of(axes[0]), [color[name] for name in wanted], color[reference or ""], by)
    return axes


def _panels(number: int, columns: int, legend: bool) -> tuple[list[Axes], float]:
    """Panels that stay as high in a narrow column, and the height of one in points."""
    rows = -(-number // columns)
    figure = frame.new_figure(6.4, 4.0)
    height = 0.68 * figure.get_figwidth() / max(columns, 2)
    lines = 2 * rows + 4 + (0 if not legend else 1 if figure.get_figwidth() > _WIDE else 3)
    figure.set_figheight(rows * height + lines * 1.4 * frame.points("medium") / 72)
    return frame.panels(figure, number, columns), 72 * height


def _explain(figure: Figure, title: str, reference: str | None) -> None:
    figure.suptitle(frame.wrapped(title, 0.9 * figure.get_figwidth()), fontsize="medium", color=frame.INK)
    side = f"experts of a layer, by frequency{'' if reference is None else f' in {reference}'}"
    side = frame.wrapped(side, 0.75 * figure.get_figheight())
    figure.supylabel(side, fontsize="medium", multialignment="center")


def _shares(statistics: RoutingStatistics, group: str) -> np.ndarray:
    """Share of each pair among all pairs of two layers, float64 [L - 1, E, E]; 0 between layers without tokens."""
    if group not in statistics.groups:
        raise ValueError(f"name one of the groups: {', '.join(statistics.groups)}")
    counts = statistics.transitions[statistics.groups.index(group)].astype(np.float64)
    if not counts.any():
        raise ValueError(f"no token of {group} was counted: leave it out")
    total = counts.sum((1, 2), keepdims=True)
    return ratio(counts, total, empty=0.0)


def _largest(shares: np.ndarray, flows: int) -> np.ndarray:
    """Where the largest flows between two layers are, bool in the shape of ``shares``."""
    flat = shares.reshape(len(shares), -1)
    largest = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(largest, np.argsort(-flat, axis=1, kind="stable")[:, :flows], True, axis=1)
    return (largest & (flat > 0)).reshape(shares.shape)


def _points_per_share(pairs: list[tuple[np.ndarray, np.ndarray]], kept: list[np.ndarray], height: float) -> float:
    """Width of the whole flow in points, so that neither a line nor all of two layers cover too much of a panel."""
    sizes = [np.maximum(*pair) * shown for pair, shown in zip(pairs, kept, strict=True)]
    largest, fullest = max(float(size.max()) for size in sizes), max(float(size.sum((1, 2)).max()) for size in sizes)
    return height * min(_WIDEST / largest, _FULLEST / fullest)


def _places(statistics: RoutingStatistics, groups: Sequence[str]) -> list[np.ndarray]:
    """Place of each expert of a layer, 0 for the one that these groups choose most often."""
    rows = [statistics.groups.index(group) for group in groups]
    frequency = np.nan_to_num(statistics.frequency(by="token")[rows]).mean(0)
    ranks = [
        np.argsort(np.argsort(-of_layer[:size], kind="stable"), kind="stable").astype(float)
        for of_layer, size in zip(frequency, statistics.num_experts, strict=True)
    ]
    return [np.sqrt(rank) for rank in ranks] if max(statistics.num_experts) > _MANY else ranks


def _draw(
    ax: Axes,
    places: list[np.ndarray],
    pair: tuple[np.ndarray, np.ndarray],
    kept: np.ndarray,
    colors: tuple[str, str],
    scale: float,
) -> None:
    """Draw the flows that are kept: of the group, or its difference from the reference, a rim around a gray core."""
    from matplotlib.collections import LineCollection

    own, other = pair
    alone = own is other
    lines: list[tuple[float, np.ndarray, float, str]] = []  # difference, curve, share, color
    for layer, e, f in np.argwhere(kept):
        mine, theirs = float(own[layer, e, f]), float(other[layer, e, f])
        curve = _curve(layer, places[layer][e], places[layer + 1][f])
        difference = mine if alone else abs(mine - theirs)
        lines.append((difference, curve, max(mine, theirs), colors[0 if mine >= theirs else 1]))
        if not alone:
            lines.append((difference, curve, min(mine, theirs), _COMMON))
    lines.sort(key=lambda line: line[0])  # stable: the largest differences on top, and each core on its rim
    ax.add_collection(
        LineCollection(
            [line[1] for line in lines],
            linewidths=[scale * line[2] for line in lines],
            colors=[line[3] for line in lines],
            alpha=0.75 if alone else None,
            capstyle="butt",
        )
    )


def _curve(layer: int, start: float, end: float) -> np.ndarray:
    """An S from one expert to the other, float64 [points, 2]."""
    return np.stack([layer + _CURVE, start + (end - start) * _CURVE**2 * (3 - 2 * _CURVE)], axis=1)


def _frame(ax: Axes, places: list[np.ndarray], title: str) -> None:
    most = max(map(len, places))
    x = np.repeat(np.arange(len(places)), [len(of_layer) for of_layer in places])
    dots = 2.0 if most <= _MANY else 0.3
    ax.scatter(x, np.concatenate(places), s=dots, color=frame.INK, linewidths=0, zorder=3)
    lowest = max(float(of_layer.max()) for of_layer in places)
    ax.set_xlim(-0.15, len(places) - 0.85)
    ax.set_ylim(1.04 * lowest + 0.1, -0.05 * lowest - 0.1)
    ax.set_yticks([])
    ax.set_xlabel("MoE layer")
    frame.whole_ticks(ax.xaxis)
    frame.frameless(ax)
    ax.set_title(title, fontsize="medium", color=frame.INK)


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
        ncols=3 if figure.get_figwidth() > _WIDE else 1,
        frameon=False,
        fontsize="medium",
    )

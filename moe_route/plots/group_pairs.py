"""Values of all pairs: divergence and similarity of groups, their tree, overlap of selections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_route.analysis import DivergenceMatrix, Overlap, Similarity, linkage
from moe_route.analysis.stats import Linkage, leaves
from moe_route.plots import frame
from moe_route.plots.by_layer import MEASURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIMILARITY = "similarity of parallel sentences"


def divergence_matrix(
    matrix: DivergenceMatrix,
    *,
    layers: Sequence[int] | range | None = None,
    groups: Sequence[str] | None = None,
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the divergence of all pairs of groups, the mean over ``layers`` (by default all), each pair once.

    Similar groups lie side by side: the order is that of the leaves of their tree (average linkage). ``groups`` are
    those to draw, in this order. The values are written into the cells if there is room.

    Raises ``ValueError`` for fewer than three groups, whose divergence is one number.
    """
    frame.refuse_misspelt(matrix.groups, labels=labels)
    chosen = frame.known(matrix.groups, groups)
    rows = [matrix.groups.index(group) for group in chosen]
    values = matrix.mean(layers)[np.ix_(rows, rows)]
    if len(chosen) < 3:
        number = f": {values[0, 1]:.4f}" if len(chosen) == 2 else ""
        raise ValueError(
            f"a matrix needs three groups or more, not {', '.join(chosen)}{number}; plots.divergence draws two groups "
            "by layer"
        )
    if groups is None and not np.isnan(values).any():
        order = leaves(linkage(values, "average"))
        chosen, values = [chosen[i] for i in order], values[np.ix_(order, order)]
    limit = float(np.nanmax(values)) or 1.0  # the diagonal is 0, so not all values are NaN
    names = frame.labels_of(chosen, labels)
    note = "" if layers is None else f"mean over {len(list(layers))} layers"
    return _matrix(values, names, limit, MEASURES[matrix.measure], ax, (title, note), once=True)


def similarity(
    similarity: Similarity,
    *,
    layers: Sequence[int] | int | None = None,
    method: Linkage = "complete",
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the similarity of all pairs of groups, the mean over ``layers`` (by default all).

    Similar groups lie side by side, in the order of the leaves of their tree (``method`` as for ``tree``).
    """
    frame.refuse_misspelt(similarity.groups, labels=labels)
    order = similarity.order(layers, method)
    rows = [similarity.groups.index(name) for name in order]
    values = similarity.mean(layers)[np.ix_(rows, rows)]
    limit = float(np.nanmax(np.where(np.eye(len(rows), dtype=bool), np.nan, values))) or 1.0
    return _matrix(
        values,
        frame.labels_of(order, labels),
        limit,
        _SIMILARITY,
        ax,
        (title, _of_layers(layers)),
        once=similarity.rule not in ("retrieval", "margin"),
    )


def tree(
    similarity: Similarity,
    *,
    layers: Sequence[int] | int | None = None,
    method: Linkage = "complete",
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the tree of groups on 1 - similarity, the mean over ``layers`` (by default all).

    Two clusters join where their distance stands on the axis: that of their farthest pair ("complete"), of their
    nearest ("single"), or the mean over pairs ("average").
    """
    frame.refuse_misspelt(similarity.groups, labels=labels)
    merges, order = similarity.tree(layers, method), similarity.order(layers, method)
    ax = frame.new_axes(ax, (5.4, 0.9 + 0.24 * len(order)))
    places = {similarity.groups.index(name): (0.0, float(row)) for row, name in enumerate(order)}
    for number, (one, other, distance, _) in enumerate(merges, start=len(order)):
        (left, low), (right, high) = sorted((places[int(one)], places[int(other)]), key=lambda place: place[1])
        ax.plot(
            [left, distance, distance, right], [low, low, high, high], color="#3b3b3b", linewidth=frame.line_width()
        )
        places[number] = (float(distance), (low + high) / 2)
    ax.set_yticks(range(len(order)), frame.labels_of(order, labels))
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set_xlim(left=0.0)
    ax.set_xlabel(f"1 - {_SIMILARITY}")
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.spines[["left", "right", "top"]].set_visible(False)
    frame.titled(ax, title, _of_layers(layers))
    return ax


def _of_layers(layers: Sequence[int] | int | None) -> str:
    if layers is None:
        return ""
    return f"layer {layers}" if isinstance(layers, int) else f"mean over {len(list(layers))} layers"


def overlap(overlap: Overlap, *, of: str = "jaccard", ax: Axes | None = None, title: str | None = None) -> Axes:
    """Draw the overlap of all pairs of selections over all layers: "jaccard", or "containment" of the row's experts.

    The Jaccard index of a pair is drawn once; containment has two values per pair. The values are written into the
    cells if there is room.
    """
    if of not in ("jaccard", "containment"):
        raise ValueError(f'of must be "jaccard" or "containment", not {of!r}')
    values = overlap.jaccard() if of == "jaccard" else overlap.containment()
    name = "Jaccard index" if of == "jaccard" else "share of the row's experts in the column's"
    names = frame.labels_of(overlap.names, None)
    return _matrix(values, names, 1.0, name, ax, (title, None), once=of == "jaccard")


def _matrix(
    values: np.ndarray,
    names: Sequence[str],
    limit: float,
    name: str,
    ax: Axes | None,
    titles: tuple[str | None, str | None],
    once: bool,
) -> Axes:
    """Draw values of all pairs [row, column] without the diagonal, up to ``limit``; ``once``: below it only."""
    size = len(names)
    ax = frame.new_axes(ax, (1.9 + 0.5 * size, 1.2 + 0.42 * size))
    hidden = np.triu(np.ones((size, size), bool)) if once else np.eye(size, dtype=bool)
    shown = np.where(hidden, np.nan, values)
    rows, columns = (names[1:], names[:-1]) if once and size > 1 else (names, names)
    shown = shown[size - len(rows) :, : len(columns)]
    ax.set_facecolor("white")
    image = ax.imshow(shown, cmap="cividis_r", vmin=min(0.0, float(np.nanmin(shown))), vmax=limit, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)
    frame.titled(ax, *titles)
    frame.frameless(ax)
    _write_values(ax, shown, limit)
    frame.color_bar(image, ax, name, shrink=0.8, pad=0.03)
    return ax


def _write_values(ax: Axes, shown: np.ndarray, limit: float) -> None:
    """The values in the cells, in text that fits into them; none where it would be too small to read."""
    figure = frame.figure_of(ax)
    cell = 72 * 0.75 * figure.get_figwidth() * ax.get_position().width / shown.shape[1]
    size = min(frame.points("small"), cell / 2.3)
    for row, column in np.argwhere(~np.isnan(shown)) if size >= 4.5 else ():
        value = shown[row, column]
        frame.write_cell(ax, row, column, f"{value:.2f}", dark=value > 0.55 * limit, fontsize=size)

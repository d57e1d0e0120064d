"""Labels at the ends of lines that do not overlap. Imports matplotlib, so figures import it where they draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform

_GAP = 9.0  # points between the axes and a label


class EndLabels(Artist):
    """Labels beside the axes, each as near to its point as the others allow, with a line that leads to it.

    Positions are computed when the figure is drawn, from the size that its axes have then.

    Args:
        points: data coordinates [label, 2].
        names, colors: of the labels.
        side: "right", or "top" for labels that read upwards above the axes.
    """

    def __init__(
        self,
        ax: Axes,
        points: Sequence[tuple[float, float]],
        names: Sequence[str],
        colors: Sequence[Any],
        *,
        side: str = "right",
        fontsize: float | str = "small",
    ) -> None:
        super().__init__()
        self.points = np.asarray(points, np.float64).reshape(-1, 2)
        self.top = side == "top"
        align = {"ha": "center", "va": "bottom", "rotation": 90} if self.top else {"ha": "left", "va": "center"}
        self.texts = [
            Text(0, 0, name, color=readable(color), fontsize=fontsize, transform=IdentityTransform(), **align)  # type: ignore[arg-type]
            for name, color in zip(names, colors, strict=True)
        ]
        self.leaders = [
            Line2D([], [], color=color, linewidth=0.5, alpha=0.7, transform=IdentityTransform()) for color in colors
        ]
        self.set_clip_on(False)
        ax.add_artist(self)
        figure = ax.get_figure()
        assert figure is not None
        for artist in (*self.texts, *self.leaders):
            artist.set_figure(figure)

    def get_children(self) -> list[Artist]:
        return [*self.texts, *self.leaders]

    def get_window_extent(self, renderer: Any = None) -> Bbox:
        self._place(renderer)
        return Bbox.union([text.get_window_extent(renderer) for text in self.texts])

    def draw(self, renderer: Any) -> None:
        if not self.get_visible():
            return
        self._place(renderer)
        for artist in self.get_children():
            artist.draw(renderer)
        self.stale = False

    def _place(self, renderer: Any) -> None:
        assert self.axes is not None
        root = self.axes.get_figure(root=True)
        assert root is not None
        gap, box = _GAP * root.dpi / 72, self.axes.bbox
        along, across = (0, 1) if self.top else (1, 0)  # the axis that labels are spread along, and the other
        ends = self.axes.transData.transform(self.points)
        sizes = [text.get_window_extent(renderer) for text in self.texts]
        needed = np.array([size.width if self.top else size.height for size in sizes]) * (0.95 if self.top else 0.9)
        low, high = (box.x0, box.x1) if self.top else (box.y0, box.y1)
        places = spread(ends[:, along], needed, low, high)
        edge = (box.y1 if self.top else box.x1) + gap
        for text, leader, end, place in zip(self.texts, self.leaders, ends, places, strict=True):
            at = np.empty(2)
            at[along], at[across] = place, edge
            text.set_position((float(at[0]), float(at[1])))
            start, stop = end.copy(), at.copy()
            stop[across] -= 0.2 * gap
            if self.top:
                start[1] = box.y1
            leader.set_data([start[0], stop[0]], [start[1], stop[1]])


def spread(wanted: np.ndarray, sizes: np.ndarray, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
    """Centers nearest to the wanted ones (least squares) at which intervals of these sizes do not overlap.

    They stay within ``low`` and ``high`` if there is room. float64 [n], in the order of ``wanted``.
    """
    order = np.argsort(wanted, kind="stable")
    size = sizes[order]
    offset = np.concatenate([[0.0], np.cumsum((size[1:] + size[:-1]) / 2)]) if len(size) else size
    blocks: list[tuple[float, int]] = []  # isotonic regression: means of blocks that would run into each other
    for value in (wanted[order] - offset).tolist():
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (b, m), (a, n) = blocks.pop(), blocks.pop()
            blocks.append(((a * n + b * m) / (n + m), n + m))
    centers = np.concatenate([np.full(n, value) for value, n in blocks]) if blocks else size
    if len(size):
        first, last = low + size[0] / 2, high - size[-1] / 2 - offset[-1]
        centers = np.clip(centers, first, last) if first <= last else np.full(len(size), (first + last) / 2)
    places = np.empty(len(size))
    places[order] = centers + offset
    return places


def label_ends(ax: Axes, lines: Sequence[Line2D]) -> EndLabels | None:
    """Label each line at its last finite point with its label, in its color; None without such a line."""
    named = []
    for line in lines:
        x, y = (np.asarray(values, np.float64) for values in line.get_data())
        seen = np.flatnonzero(np.isfinite(y))
        if len(seen):
            named.append(((x[seen[-1]], y[seen[-1]]), str(line.get_label()), line.get_color()))
    if not named:
        return None
    points, names, colors = zip(*named, strict=True)
    return EndLabels(ax, points, names, colors)


def readable(color: Any) -> tuple[float, float, float]:
    """The color, darkened until text in it can be read on white (contrast of 4 to 1)."""
    rgb = np.asarray(to_rgb(color))
    weights = np.array([0.2126, 0.7152, 0.0722])
    while 1.05 / (float(weights @ rgb**2.2) + 0.05) < 4.0:
        rgb = rgb * 0.95
    r, g, b = rgb.tolist()
    return r, g, b

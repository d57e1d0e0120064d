"""Change of weights by fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_route.merging import Difference
from moe_route.plots import frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["weight_change"]


def weight_change(found: Difference, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Draw how far fine-tuning moved each expert of each layer, in percent of the size of its weights.

    Args:
        found: the result of ``merging.difference``.
        title: title above the axes; none by default.

    Raises ``ValueError`` for a model without experts.
    """
    values = 100.0 * found.experts()
    ax = frame.new_axes(ax, (6.4, 4.0))
    end = float(np.nanmax(values)) or 1.0
    image = ax.imshow(
        values.T, aspect="auto", origin="lower", interpolation="nearest", cmap="Blues", vmin=0.0, vmax=end
    )
    ax.set_facecolor(frame.GRID)  # shows missing experts
    ax.set_xlabel("MoE layer")
    ax.set_ylabel("expert")
    frame.whole_ticks(ax.xaxis)
    frame.whole_ticks(ax.yaxis)
    frame.titled(ax, title)
    frame.color_bar(image, ax, "change of weights (%)")
    return ax

"""The figures of the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moe_route.demo.report import DemoReport

__all__ = ["draw", "steering_table"]


def draw(report: DemoReport, difference: np.ndarray, folder: Path) -> list[Path]:
    """Draw divergence by layer, the task's use of experts, task experts by threshold, and the steering table, as PNG.

    `difference` [layers, experts] is how much more often English task text chooses an expert than general text does.
    """
    from moe_route import plots

    named = {f"above {threshold:g}": selection for threshold, selection in report.all_found.items()}
    pictures = {
        "divergence": plots.divergence(report.divergence, middle=report.middle, interval=0.95),
        "task_experts": plots.heat_map(difference, title="arithmetic - general text, English"),
        "thresholds": plots.expert_counts(named, num_layers=report.layers, title="task experts by threshold"),
    }
    if report.outcomes:
        pictures["steering"] = steering_table(report)
    return [plots.save(ax, folder / f"{name}.png") for name, ax in pictures.items()]


def steering_table(report: DemoReport) -> Axes:
    """Draw the change of the loss by language and plan, in color and number, bold where the interval excludes zero."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from moe_route.demo.report import span

    rows = [*report.base, "mean"]
    cells = [[outcome.by_language.get(row, outcome.mean) for outcome in report.outcomes] for row in rows]
    values = np.array([[cell.value for cell in line] for line in cells])
    limit = float(np.abs(values).max()) or 1.0
    figure = Figure(figsize=(1.6 + 1.25 * len(report.outcomes), 1.2 + 0.36 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    image = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        ax.text(
            column,
            row,
            f"{round(value, 3) + 0.0:+.3f}",  # + 0.0 avoids a minus zero
            ha="center",
            va="center",
            color="white" if abs(value) > 0.6 * limit else "black",
            fontweight="normal" if cells[row][column].verdict == "unclear" else "bold",
        )
    ax.set_xticks(range(len(report.outcomes)), [o.name.replace(" (", "\n(") for o in report.outcomes], fontsize="small")
    ax.set_yticks(range(len(rows)), rows)
    ax.axhline(len(rows) - 1.5, color="black", linewidth=0.8)  # separates the mean
    ax.set_title(
        f"task experts of layers {span(report.middle)}; bold: zero lies outside the 95 % interval", fontsize="medium"
    )
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    figure.colorbar(image, ax=ax, pad=0.02).set_label("change of the loss (nats per token)")
    return ax

"""Experts by layer as heat maps: how often they are chosen, how far fine-tuning moved them; and pairs of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis import Coactivation, Transitions
from moe_route.merging import Difference
from moe_route.plots import frame
from moe_route.steering import ExpertSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moe_route.recording import RoutingStatistics

_LARGE = 32  # experts per layer from which on rows are too thin to be read one by one


def heat_map(
    source: RoutingStatistics | np.ndarray,
    group: str | None = None,
    *,
    reference: str | None = None,
    ax: Axes | None = None,
    phase: str | None = None,
    by: str = "sequence",
    sort: bool | None = None,
    top: int | None = None,
    selected: ExpertSelection | None = None,
    limit: float | None = None,
    title: str | None = None,
    colorbar: bool = True,
) -> Axes:
    """Draw experts by layer as a heat map: how often tokens of a group choose each expert.

    The colors of a difference reach to the 98th percentile of its absolute values, so that single experts do not use up
    the range; the label of the color bar says what share of the cells lies beyond.

    Args:
        source: ``RoutingStatistics``, or an array [layer, expert], such as that of ``analysis.expert_difference``.
            An array with negative values is drawn as a difference.
        group: group of the statistics; by default the only one.
        reference: show the difference from this group.
        phase, by: as in ``RoutingStatistics.frequency``.
        sort: sort the experts of each layer by their value, the largest at the top; by default with more than 32
            experts, whose rows are too thin to be read one by one.
        top: number of experts with the largest values to name by number above a sorted map; by default 10.
        selected: experts to mark, such as those that a plan steers.
        limit: end of the color range, the same for several maps.
        title: title above the axes; none by default.
    """
    values, sizes, name = _heat_values(source, group, reference, phase, by)
    ax = frame.new_axes(ax, (6.4, 4.0))
    values = np.where(np.arange(values.shape[1]) < np.asarray(sizes)[:, None], values, np.nan)
    if np.isnan(values).all():
        raise ValueError("there is nothing to draw: no token of this group was counted")
    ranked = values.shape[1] > _LARGE if sort is None else sort
    rows = _ranks(values) if ranked else np.tile(np.arange(values.shape[1]), (len(values), 1))
    shown = np.full_like(values, np.nan)
    np.put_along_axis(shown, rows, values, axis=1)
    image = _show(ax, shown, name, limit, colorbar, upper=ranked)
    image.set_gid("experts")
    named = (10 if top is None else top) if ranked else 0
    note = f"above: numbers of the {named} experts with the largest values" if named else None
    marks = None if selected is None or not colorbar else f"circles: {len(selected)} selected experts"
    frame.map_axes(ax, "MoE layer", "experts of a layer, by rank" if ranked else "expert", title, marks, note)
    if named:
        _name_top(ax, values, named)
    if selected is not None:
        _mark(ax, selected, rows, values.shape)
    return ax


def heat_maps(
    statistics: RoutingStatistics,
    groups: Sequence[str] | None = None,
    *,
    reference: str | None = None,
    phase: str | None = None,
    by: str = "sequence",
    sort: bool | None = None,
    selected: ExpertSelection | None = None,
    columns: int | None = None,
    title: str | None = None,
) -> list[Axes]:
    """Draw a heat map of experts by layer for each group, with one color range for all of them.

    ``reference`` shows the difference from this group, which is then left out. ``columns`` is the number of maps side
    by side. The other arguments are those of ``heat_map``, whose experts are not named here. Returns the axes of the
    maps.
    """
    wanted = [name for name in frame.known(statistics.groups, groups) if name != reference]
    if not wanted:
        raise ValueError("there is no group to draw besides the reference: name others")
    maps = {name: _heat_values(statistics, name, reference, phase, by)[0] for name in wanted}
    every = np.stack(list(maps.values()))
    if np.isnan(every).all():
        raise ValueError("there is nothing to draw: no token of these groups was counted")
    limit = diverging_limit(every) if reference is not None else float(np.nanmax(every)) or 1.0
    if columns is None:
        columns = min(len(wanted), 2 if (frame.column() or 6.4) < 5 else 3)
    figure = frame.new_figure(6.4, 0.6 + 1.9 * -(-len(wanted) // columns))
    axes = frame.panels(figure, len(wanted), columns)
    look: dict[str, Any] = {"phase": phase, "by": by, "sort": sort, "top": 0, "colorbar": False, "selected": selected}
    for ax, name in zip(axes, wanted, strict=True):
        heat_map(statistics, name, reference=reference, ax=ax, limit=limit, title=frame.label_of(name, None), **look)
    frame.label_outer(axes, columns)
    name = "frequency" if reference is None else f"frequency - that of {frame.label_of(reference, None)}"
    frame.color_bar(axes[0].images[0], axes, f"{name}{_beyond(every, limit)}", extend=_extend(every, limit))
    if selected is not None:
        title = f"{title}\n" if title else ""
        title += f"circles: {len(selected)} selected experts"
    if title is not None:
        figure.suptitle(title, fontsize="medium", color=frame.INK)
    return axes


def pairs(pairs: Coactivation | Transitions, layer: int, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Draw how experts go together in a layer, or from it to the next, as a matrix of P(other | expert).

    Args:
        pairs: the result of ``analysis.coactivation`` or ``analysis.transitions``.
        layer: the layer, as an index from 0.
    """
    after = isinstance(pairs, Transitions)
    values = pairs.conditional if isinstance(pairs, Transitions) else pairs.values("conditional")
    if not 0 <= layer < len(values):
        raise ValueError(f"there is no layer {layer} to draw: 0 to {len(values) - 1}")
    rows, columns = pairs.num_experts[layer], pairs.num_experts[layer + after]
    ax = frame.new_axes(ax, (4.6, 4.0))
    shown = values[layer, :rows, :columns]
    if np.isnan(shown).all():
        raise ValueError("there is nothing to draw: no token of these groups was counted in this layer")
    ax.set_facecolor(frame.GRID)
    image = ax.imshow(shown, origin="lower", interpolation="nearest", cmap="Blues", vmin=0.0)
    frame.map_axes(ax, f"expert of layer {layer + after}", f"expert of layer {layer}", title)
    frame.color_bar(image, ax, "share of the row's tokens")
    return ax


def weight_change(difference: Difference, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Draw how far fine-tuning moved each expert of each layer, in percent of the size of its weights.

    Args:
        difference: the result of ``merging.difference``.
        title: title above the axes; none by default.

    Raises ``ValueError`` for a model without experts.
    """
    values = 100.0 * difference.experts()
    ax = frame.new_axes(ax, (6.4, 4.0))
    _show(ax, values, "change of weights (%)", None, True, upper=False)
    frame.map_axes(ax, "MoE layer", "expert", title)
    return ax


def diverging_limit(values: np.ndarray) -> float:
    """End of a color range on both sides of zero: the 98th percentile of absolute values, 1 if all are zero."""
    sizes = np.abs(values[~np.isnan(values)])
    return float(np.percentile(sizes, 98)) or float(sizes.max()) or 1.0


def _show(ax: Axes, shown: np.ndarray, name: str, limit: float | None, colorbar: bool, upper: bool) -> Any:
    difference = bool(np.nanmin(shown) < 0)
    end = limit or (diverging_limit(shown) if difference else float(np.nanmax(shown)) or 1.0)
    image = ax.imshow(
        shown.T,
        aspect="auto",
        origin="upper" if upper else "lower",
        interpolation="nearest",
        cmap="RdBu_r" if difference else "Blues",
        vmin=-end if difference else 0.0,
        vmax=end,
    )
    ax.set_facecolor(frame.GRID)  # shows missing experts, and layers without tokens
    if colorbar:
        frame.color_bar(image, ax, f"{name}{_beyond(shown, end)}", extend=_extend(shown, end))
    return image


def _extend(values: np.ndarray, limit: float) -> str:
    low, high = bool(np.nanmin(values) < -limit), bool(np.nanmax(values) > limit)
    return "both" if low and high else "max" if high else "min" if low else "neither"


def _beyond(values: np.ndarray, limit: float) -> str:
    seen = values[~np.isnan(values)]
    share = float((np.abs(seen) > limit).mean())
    return f"\n({share * 100:.2g} % of cells beyond ±{limit:.2g})" if share else ""


def _ranks(values: np.ndarray) -> np.ndarray:
    """Place of each expert in its layer, int64 [layer, expert], from the largest value to the smallest; NaN last."""
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values), axis=1, kind="stable")
    return np.argsort(order, axis=1, kind="stable")


def _name_top(ax: Axes, values: np.ndarray, top: int) -> None:
    """Write the numbers of the experts with the largest values above their layers, those of a layer together."""
    from moe_route.plots.end_labels import EndLabels

    largest = np.argsort(-np.where(np.isnan(values), -np.inf, values), axis=None)[:top]
    of_layer: dict[int, list[int]] = {}
    for layer, expert in zip(*np.unravel_index(largest, values.shape), strict=True):
        of_layer.setdefault(int(layer), []).append(int(expert))
    names = [f"{layer}: {', '.join(map(str, experts))}" for layer, experts in of_layer.items()]
    EndLabels(
        ax, [(layer, -0.5) for layer in of_layer], names, [frame.INK] * len(names), side="top", fontsize="x-small"
    )
    longest = max(map(len, names))
    ax.set_title(ax.get_title(), fontsize="medium", color=frame.INK, pad=frame.points("x-small") * 0.62 * longest + 12)


def _mark(ax: Axes, selected: ExpertSelection, rows: np.ndarray, shape: tuple[int, ...]) -> None:
    pairs = [(layer, expert) for layer, expert in selected.pairs if layer < shape[0] and expert < shape[1]]
    if len(pairs) < len(selected):
        raise ValueError(f"the selection has experts outside of the {shape[0]} layers x {shape[1]} experts drawn")
    figure = frame.figure_of(ax)
    box = ax.get_position()
    cell = 72 * min(figure.get_figwidth() * box.width / shape[0], figure.get_figheight() * box.height / shape[1])
    side = float(np.clip(0.55 * cell, 1.6, 7.0))
    x, y = [layer for layer, _ in pairs], [int(rows[pair]) for pair in pairs]
    look: dict[str, Any] = {"marker": "o", "facecolors": "none", "edgecolors": "black", "linewidths": 0.8}
    if side < 3:  # too small for a ring
        look |= {"facecolors": "black", "edgecolors": "white", "linewidths": 0.3}
    ax.scatter(x, y, s=side**2, zorder=3, **look)


def _heat_values(
    source: Any, group: str | None, reference: str | None, phase: str | None, by: str
) -> tuple[np.ndarray, Sequence[int], str]:
    if isinstance(source, np.ndarray):
        if source.ndim != 2 or group is not None or reference is not None:
            raise ValueError("an array must be [layer, expert], without group and reference")
        return source, [source.shape[1]] * len(source), "difference of frequency" if (source < 0).any() else "frequency"
    frequency = source.frequency(phase, by)
    index = [_group_row(source, name) for name in (group, reference) if name is not None or name is group]
    label = frame.label_of(source.groups[index[0]], None)
    if reference is None:
        return frequency[index[0]], source.num_experts, f"frequency ({label})"
    name = f"frequency, {label} - {frame.label_of(reference, None)}"
    return frequency[index[0]] - frequency[index[1]], source.num_experts, name


def _group_row(statistics: Any, group: str | None) -> int:
    if group is None and len(statistics.groups) == 1:
        return 0
    if group not in statistics.groups:
        raise ValueError(f"name one of the groups: {', '.join(statistics.groups)}")
    return int(statistics.groups.index(group))

"""Quantities by layer, a line per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_route.analysis import Alignment, Consistency, Correlation, Divergence, Entropy, LoadBalance
from moe_route.analysis.result import mean_of_seen
from moe_route.data.languages import language
from moe_route.plots import frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["alignment", "by_script", "consistency", "correlation", "divergence", "entropy", "load_balance"]

MEASURES = {
    "normalized_jsd": "routing divergence",
    "jsd": "Jensen-Shannon divergence (nats)",
    "cosine": "cosine distance",
    "jaccard": "Jaccard distance",
}
_LOAD = {
    "entropy": "entropy of the load / log E",
    "max_share": "largest share of the load",
    "max_violation": "largest load / mean load - 1",
    "variation": "coefficient of variation of the load",
    "dead": "share of experts never chosen",
    "rare": "share of rarely chosen experts",
    "effective": "effective number of experts",
}
_FLOOR: dict[str, Any] = {"color": "#777777", "linestyle": (0, (1, 1)), "linewidth": 1.2}
_GREY = "#c4c4c4"
ByLayer = Alignment | Divergence | Entropy | Consistency | LoadBalance


def divergence(
    found: Divergence,
    *,
    ax: Axes | None = None,
    groups: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    styles: Mapping[str, Any] | None = None,
    interval: float | None = None,
    middle: Sequence[int] | range | None = None,
    floor: bool = False,
    order: Mapping[str, float] | None = None,
    levels: Mapping[str, str] | None = None,
    depth: bool = False,
    title: str | None = None,
) -> Axes:
    """Draw divergence by layer, a line per group: the U of multilingual routing [arXiv 2510.04694, fig. 1].

    Each line has its label at its end. Where there is no room for so many labels, a legend beside the axes lists them
    from the most divergent to the least; with ``order``, in that order.

    Args:
        found: the result of ``analysis.divergence``.
        ax: axes to draw on; by default those of a new figure.
        groups: the groups to draw; by default all.
        labels: group -> label; by default the English name of the language (``moe_route.data.languages``).
        styles: group -> a color, or keyword arguments of ``Axes.plot``, in place of the default from ``styles``.
        interval: level of a bootstrap band around each line (such as 0.95), for paired divergence; the title names it.
        middle: layers to shade, such as those that a plan steers.
        floor: also draw the mean over the groups drawn of ``found.expected_floor``: what unrelated sentences give.
        order: group -> number, such as the amount of text in the language; a legend then starts with the largest.
        levels: group -> level, such as "high", "medium" and "low" resources; lines are colored by level, from dark to
            light, and a legend explains the colors.
        depth: show relative depth (0: first layer, 1: last) in place of layers, to compare models.
        title: title above the axes; none by default.
    """
    quantity = _divergence(found, interval, labels)
    names = _by_mean(quantity, groups)
    if order is not None:
        missing = [name for name in names if name not in order]
        if missing:
            raise ValueError(f"order lacks {', '.join(missing)}: give a number for each group")
        names.sort(key=lambda name: -order[name])
    ax = frame.new_axes(ax, (6.4, 3.6), len(names) + floor)
    if middle is not None:
        _shade(ax, middle, len(found.layers) if depth else None)
    _lines(ax, quantity, names, _styles(quantity, styles, levels), labels, depth)
    if floor:
        values = mean_of_seen(found.expected_floor[[found.groups.index(name) for name in names]])[0]
        ax.plot(_places(len(values), depth), values, label="floor", **_FLOOR)
    return _complete(ax, quantity, names, levels, depth, title, legend=None if order is None else True)


def alignment(
    found: Alignment,
    *,
    ax: Axes | None = None,
    groups: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    styles: Mapping[str, Any] | None = None,
    interval: float | None = None,
    chance: bool = True,
    levels: Mapping[str, str] | None = None,
    depth: bool = False,
    title: str | None = None,
) -> Axes:
    """Draw alignment with a reference by layer, a line per group: MEXA, retrieval or cosine.

    ``chance`` also draws what random pairs of the same sentences give, the mean over the groups drawn. ``interval`` is
    the level of a bootstrap band over sentences. The other arguments are those of ``divergence``.
    """
    quantity = _alignment(found, interval, labels)
    names = _by_mean(quantity, groups)
    ax = frame.new_axes(ax, (6.4, 3.6), len(names) + chance)
    _lines(ax, quantity, names, _styles(quantity, styles, levels), labels, depth)
    if chance:
        values = mean_of_seen(found.chance[[found.groups.index(name) for name in names]])[0]
        ax.plot(_places(len(values), depth), values, label="chance", **_FLOOR)
    return _complete(ax, quantity, names, levels, depth, title)


def entropy(
    found: Entropy,
    *,
    of: str = "token",
    ax: Axes | None = None,
    groups: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    styles: Mapping[str, Any] | None = None,
    normalized: bool = True,
    interval: float | None = None,
    levels: Mapping[str, str] | None = None,
    depth: bool = False,
    title: str | None = None,
) -> Axes:
    """Draw routing entropy by layer, a line per group: of tokens, of sequences, or the "gap" between the two.

    ``normalized`` divides by log E, so that uniform routing is 1; the gap is always in nats. ``interval`` is the level
    of a bootstrap band over sequences (``Entropy.interval``). The other arguments are those of ``divergence``.
    """
    return _draw(_entropy(found, of, interval, normalized), ax, groups, labels, styles, levels, depth, title)


def consistency(
    found: Consistency,
    *,
    ax: Axes | None = None,
    groups: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    styles: Mapping[str, Any] | None = None,
    interval: float | None = None,
    levels: Mapping[str, str] | None = None,
    depth: bool = False,
    title: str | None = None,
) -> Axes:
    """Draw the consistency of routing by layer, a line per group [arXiv 2510.04694, section 4].

    ``interval`` is the level of a bootstrap band over sequences around each line, such as 0.95; the title names it. The
    other arguments are those of ``divergence``.
    """
    return _draw(_consistency(found, interval), ax, groups, labels, styles, levels, depth, title)


def load_balance(
    found: LoadBalance,
    *,
    of: str = "entropy",
    ax: Axes | None = None,
    groups: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    styles: Mapping[str, Any] | None = None,
    levels: Mapping[str, str] | None = None,
    depth: bool = False,
    title: str | None = None,
) -> Axes:
    """Draw one measure of the balance of the load by layer, a line per group.

    ``of`` is "entropy", "max_share", "max_violation", "variation", "dead", "rare" or "effective". The other arguments
    are those of ``divergence``.
    """
    ax = _draw(_load(found, of), ax, groups, labels, styles, levels, depth, title)
    ax.set_ylim(bottom=0)
    return ax


def correlation(
    found: Correlation,
    *,
    ax: Axes | None = None,
    alpha: float = 0.05,
    interval: float | None = None,
    depth: bool = False,
    title: str | None = None,
) -> Axes:
    """Draw the correlation of scores with divergence by layer: Pearson r and Spearman rho.

    Points are filled where the permutation p-value of Pearson r, corrected for the number of layers, is below
    ``alpha``; the legend says so. ``interval`` is the level of a bootstrap band around Pearson r
    (``Correlation.interval``).
    """
    ax = frame.new_axes(ax, (6.4, 4.2))
    places = _places(len(found.layers), depth)
    pearson, spearman = frame.numbered(0), frame.numbered(1) | {"linestyle": frame.DASHES[1]}
    ax.axhline(0, color=frame.INK, linewidth=0.8)
    ax.plot(places, found.pearson, label="Pearson r", **pearson)
    ax.plot(places, found.spearman, label="Spearman ρ", **spearman)
    if interval is not None:
        low, high = found.interval(interval)
        label = f"{interval * 100:g} % interval of r"
        ax.fill_between(places, low, high, color=pearson["color"], alpha=0.15, linewidth=0, label=label)
    significant = found.p_corrected < alpha
    others = ~significant & ~np.isnan(found.pearson)
    corrected = f"corrected for {len(found.layers)} layers"
    kinds = (
        (significant, pearson["color"], f"filled: p < {alpha:g}, {corrected}"),
        (others, "white", f"hollow: p ≥ {alpha:g}, {corrected}"),
    )
    points = {"linestyle": "none", "marker": "o", "markersize": 4, "markeredgecolor": pearson["color"]}
    for chosen, fill, label in kinds:
        if chosen.any():
            ax.plot(places[chosen], found.pearson[chosen], markerfacecolor=fill, label=label, **points)
    name = f"correlation with {found.quantity} {frame.label_of(found.reference, None)}"
    frame.layer_axes(ax, len(places), name, title, f"n = {len(found.groups)} groups", depth=depth)
    ax.set_ylim(-1.05, 1.05)
    frame.legend_above(ax)
    return ax


def by_script(
    found: ByLayer,
    *,
    of: str | None = None,
    groups: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    styles: Mapping[str, Any] | None = None,
    interval: float | None = None,
    depth: bool = False,
    columns: int | None = None,
    title: str | None = None,
) -> list[Axes]:
    """Draw small multiples of a quantity by layer: a panel per script, with the other languages in grey.

    It keeps many languages readable. Scripts with one language share the last panel, with groups that are no language.

    Args:
        found: the result of ``analysis.divergence``, ``entropy``, ``consistency`` or ``load_balance``.
        of: what to draw of entropy and load balance, as in ``entropy`` and ``load_balance``.
        columns: panels side by side; by default as many as fit.
        groups, labels, styles, interval, depth, title: as in ``divergence``; load balance has no interval.

    Returns the panels, the one with most languages first.
    """
    quantity = _quantity(found, of, interval, labels)
    chosen = _styles(quantity, styles, None)
    panels = _scripts(_by_mean(quantity, groups))
    columns = columns or (1 if (frame.column() or 6.4) < 5 else min(2, len(panels)))
    axes = _grid([len(mine) for mine in panels.values()], columns)
    drawn = [group for of_panel in panels.values() for group in of_panel]
    layers = quantity.values.shape[1]
    for ax, (script, mine) in zip(axes, panels.items(), strict=True):
        for group in drawn:
            if group not in mine:
                ax.plot(_places(layers, depth), quantity.of(group), color=_GREY, linewidth=0.7, zorder=1)
        _lines(ax, quantity, mine, chosen, labels, depth)
        frame.layer_axes(ax, layers, "", script, depth=depth)
        frame.name_lines(ax, legend=False)
    frame.label_outer(axes, columns)
    figure = frame.figure_of(axes[0])
    figure.supylabel(quantity.name, fontsize="medium")
    if title or quantity.note:
        figure.suptitle("\n".join(filter(None, (title, quantity.note))), fontsize="medium", color=frame.INK)
    if quantity.from_zero:
        axes[0].set_ylim(bottom=0)
    return axes


# -- inside
# --------------------------------------------------------------------------------------------------------------


class _Quantity(NamedTuple):
    """What is drawn by layer, a line per group."""

    values: np.ndarray  # float64 [group, layer]
    groups: tuple[str, ...]
    name: str  # of the values, for their axis
    band: tuple[np.ndarray, np.ndarray] | None = None  # ends of intervals around the values
    note: str | None = None  # what the band is
    from_zero: bool = False  # whether the axis of the values begins at 0
    reference: str | None = None  # a further group with a style of its own
    layers: str | None = None  # name of the axis of the layers, where they are not the MoE layers

    def of(self, group: str) -> np.ndarray:
        """The values of a group."""
        row: np.ndarray = self.values[self.groups.index(group)]
        return row


def _divergence(found: Divergence, interval: float | None, labels: Mapping[str, str] | None) -> _Quantity:
    band = None if interval is None else found.interval(interval)
    note = None if interval is None else f"bands: {interval * 100:g} % interval, bootstrap over {found.pairs} items"
    name = f"{MEASURES[found.measure]} from {frame.label_of(found.reference, labels)}"
    return _Quantity(found.values, found.groups, name, band, note, found.correct is None, found.reference)


def _alignment(found: Alignment, interval: float | None, labels: Mapping[str, str] | None) -> _Quantity:
    band = None if interval is None else found.interval(interval)
    note = None if interval is None else f"bands: {interval * 100:g} % interval, bootstrap over {found.pairs} sentences"
    name = f"{found.quantity} {frame.label_of(found.reference, labels)}"
    layers = "layer (0: embedding)" if found.layers[0] == "embedding" else None
    return _Quantity(found.values, found.groups, name, band, note, found.rule != "cosine", found.reference, layers)


def _entropy(found: Entropy, of: str, interval: float | None, normalized: bool = True) -> _Quantity:
    if of not in ("token", "sequence", "gap"):
        raise ValueError(f'of must be "token", "sequence" or "gap", not {of!r}')
    scale = np.log(found.num_experts) if normalized and of != "gap" else 1.0
    unit = " / log E" if normalized else " (nats)"
    if of == "gap":
        values, name = found.gap, "entropy gap within sequences (nats)"
    else:
        values = found.normalized(of) if normalized else found.values(of)  # type: ignore[arg-type]
        name = f"{of} entropy{unit}"
    band = None
    if interval is not None:
        low, high = found.interval(interval, of=of)  # type: ignore[arg-type]
        band = (low / scale, high / scale)
    return _Quantity(values, tuple(found.groups), name, band, _over_sequences(interval, found.sequence_values))


def _consistency(found: Consistency, interval: float | None) -> _Quantity:
    band = None if interval is None else found.interval(interval)
    note = _over_sequences(interval, found.sequence_values)
    return _Quantity(found.values, found.groups, "Jaccard index of two tokens' experts", band, note, from_zero=True)


def _load(found: LoadBalance, of: str) -> _Quantity:
    if of not in _LOAD:
        raise ValueError(f"of must be one of {', '.join(_LOAD)}, not {of!r}")
    return _Quantity(getattr(found, of), tuple(found.groups), _LOAD[of])


def _quantity(found: ByLayer, of: str | None, interval: float | None, labels: Mapping[str, str] | None) -> _Quantity:
    if isinstance(found, Entropy):
        return _entropy(found, of or "token", interval)
    if isinstance(found, LoadBalance):
        if interval is not None:
            raise ValueError("load balance has no interval: leave interval out")
        return _load(found, of or "entropy")
    if of is not None:
        raise ValueError("of is for entropy and load balance: leave it out")
    if isinstance(found, Alignment):
        return _alignment(found, interval, labels)
    return _consistency(found, interval) if isinstance(found, Consistency) else _divergence(found, interval, labels)


def _over_sequences(interval: float | None, values: Sequence[np.ndarray] | None) -> str | None:
    """Note on a band over sequences, with their number per group."""
    if interval is None:
        return None
    numbers = sorted({len(of_group) for of_group in values or ()})
    n = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"bands: {interval * 100:g} % interval, bootstrap over {n} sequences per group"


def _scripts(names: Sequence[str]) -> dict[str, list[str]]:
    """Script -> groups, the script with most groups first; single ones together at the end."""
    of_script: dict[str, list[str]] = {}
    for name in names:
        found = language(name)
        of_script.setdefault("" if found is None else f"{found.script_name} script", []).append(name)
    many = {script: mine for script, mine in of_script.items() if script and len(mine) > 1}
    found_order = dict(sorted(many.items(), key=lambda item: -len(item[1])))
    rest = [name for name in names if not any(name in mine for mine in many.values())]
    if rest:
        scripted = any(language(name) is not None for name in rest)
        found_order["other scripts" if many and scripted else "groups" if not scripted else "all scripts"] = rest
    return found_order


def _grid(labels: Sequence[int], columns: int) -> list[Axes]:
    """Panels with shared axes, high enough for their numbers of labels."""
    figure = frame.new_figure(6.4, 2.0)
    line = 1.2 * frame.points("small") / 72
    heights = [max(1.2, line * max(labels[start : start + columns])) for start in range(0, len(labels), columns)]
    figure.set_figheight(sum(heights) + 0.35 * len(heights) + 0.9)
    return frame.panels(figure, len(labels), columns, height_ratios=heights)


def _places(layers: int, depth: bool) -> np.ndarray:
    return np.arange(layers) / max(layers - 1, 1) if depth else np.arange(layers)


def _draw(
    quantity: _Quantity,
    ax: Axes | None,
    groups: Sequence[str] | None,
    labels: Mapping[str, str] | None,
    styles: Mapping[str, Any] | None,
    levels: Mapping[str, str] | None,
    depth: bool,
    title: str | None,
) -> Axes:
    """A line per group, with its name."""
    names = _by_mean(quantity, groups)
    ax = frame.new_axes(ax, (6.4, 3.6), len(names))
    _lines(ax, quantity, names, _styles(quantity, styles, levels), labels, depth)
    return _complete(ax, quantity, names, levels, depth, title)


def _styles(
    quantity: _Quantity, given: Mapping[str, Any] | None, levels: Mapping[str, str] | None
) -> dict[str, dict[str, Any]]:
    reference = () if quantity.reference is None else (quantity.reference,)
    return frame.chosen_styles((*quantity.groups, *reference), given, levels)


def _lines(
    ax: Axes,
    quantity: _Quantity,
    names: Sequence[str],
    chosen: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str] | None,
    depth: bool,
) -> None:
    """A line per name, and a band around it."""
    places = _places(quantity.values.shape[1], depth)
    for name, label in zip(names, frame.labels_of(names, labels), strict=True):
        ax.plot(places, quantity.of(name), label=label, **chosen[name])
        if quantity.band is not None:
            low, high = (end[quantity.groups.index(name)] for end in quantity.band)
            ax.fill_between(places, low, high, color=chosen[name]["color"], alpha=0.15, linewidth=0)


def _complete(
    ax: Axes,
    quantity: _Quantity,
    names: Sequence[str],
    levels: Mapping[str, str] | None,
    depth: bool,
    title: str | None,
    *,
    legend: bool | None = None,
) -> Axes:
    """Axes, title and note of a quantity, the names of its lines, and a legend of levels."""
    frame.layer_axes(ax, quantity.values.shape[1], quantity.name, title, quantity.note, depth=depth)
    if quantity.layers is not None and not depth:
        ax.set_xlabel(quantity.layers)
    if quantity.from_zero:
        ax.set_ylim(bottom=0)
    frame.name_lines(ax, legend=legend)
    if levels is not None and not legend:
        _legend_of_levels(ax, levels, names)
    return ax


def _legend_of_levels(ax: Axes, levels: Mapping[str, str], names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    shades, beside = frame.level_colors(levels), ax.get_legend()
    drawn = [levels[name] for name in names if name in levels]
    shown = [level for level in shades if level in drawn]
    handles = [Line2D([], [], color=shades[level], linewidth=2.5) for level in shown]
    frame.legend_above(ax, handles=handles, labels=[f"{level} (n = {drawn.count(level)})" for level in shown])
    if beside is not None:
        ax.add_artist(beside)


def _shade(ax: Axes, layers: Sequence[int] | range, of: int | None) -> None:
    """Shade runs of adjacent layers as gray bands; ``of`` layers if these are shown by relative depth."""
    numbers, scale = sorted(set(layers)), 1 if of is None else max(of - 1, 1)
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    for start, end in zip(starts, ends, strict=True):
        ax.axvspan((start - 0.5) / scale, (end + 0.5) / scale, color="#f0f0f0", linewidth=0, zorder=0)


def _by_mean(quantity: _Quantity, wanted: Sequence[str] | None) -> list[str]:
    """The wanted groups in decreasing order of their mean, so that a legend has the order of the lines."""
    return sorted(frame.known(quantity.groups, wanted), key=lambda group: -_mean(quantity.of(group)))


def _mean(values: np.ndarray) -> float:
    seen = values[~np.isnan(values)]
    return float(seen.mean()) if seen.size else float("-inf")

"""Quantities by layer, a line per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis import Consistency, Correlation, Divergence, Entropy, LoadBalance
from moe_route.analysis.result import mean_of_seen
from moe_route.languages import language
from moe_route.plots import frame, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["by_script", "consistency", "correlation", "divergence", "entropy", "load_balance"]

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
ByLayer = Divergence | Entropy | Consistency | LoadBalance


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
        labels: group -> label; by default the English name of the language (``moe_route.languages``).
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
    names = _by_mean(found.groups, found.values, groups)
    if order is not None:
        missing = [name for name in names if name not in order]
        if missing:
            raise ValueError(f"order lacks {', '.join(missing)}: give a number for each group")
        names.sort(key=lambda name: -order[name])
    ax = frame.new_axes(ax, (6.4, 3.6), len(names) + floor)
    if middle is not None:
        _shade(ax, middle, len(found.layers) if depth else None)
    chosen = palette.chosen_styles((*found.groups, found.reference), styles, levels)
    band = None if interval is None else found.interval(interval)
    _lines(ax, found.values, found.groups, names, chosen, labels, band, depth)
    if floor:
        values = mean_of_seen(found.expected_floor[[found.groups.index(name) for name in names]])[0]
        ax.plot(_places(len(values), depth), values, label="floor", **_FLOOR)
    note = None if interval is None else f"bands: {interval * 100:g} % interval, bootstrap over {found.pairs} items"
    name = f"{MEASURES[found.measure]} from {frame.label_of(found.reference, labels)}"
    _finish(ax, len(found.layers), name, depth, title, note)
    if found.correct is None:
        ax.set_ylim(bottom=0)
    _name_lines(ax, levels, names, legend=order is not None)
    return ax


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
    values, name = _entropy(found, of, normalized)
    names = _by_mean(found.groups, values, groups)
    ax = frame.new_axes(ax, (6.4, 3.6), len(names))
    band = None
    if interval is not None:
        ends = found.interval(interval, of=of)  # type: ignore[arg-type]
        scale = np.log(found.num_experts) if normalized and of != "gap" else 1.0
        band = (ends[0] / scale, ends[1] / scale)
    chosen = palette.chosen_styles(found.groups, styles, levels)
    _lines(ax, values, found.groups, names, chosen, labels, band, depth)
    _finish(ax, len(found.layers), name, depth, title, _over_sequences(interval, found.sequence_values))
    _name_lines(ax, levels, names)
    return ax


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
    names = _by_mean(found.groups, found.values, groups)
    ax = frame.new_axes(ax, (6.4, 3.6), len(names))
    band = None if interval is None else found.interval(interval)
    chosen = palette.chosen_styles(found.groups, styles, levels)
    _lines(ax, found.values, found.groups, names, chosen, labels, band, depth)
    note = _over_sequences(interval, found.sequence_values)
    _finish(ax, len(found.layers), "Jaccard index of two tokens' experts", depth, title, note)
    ax.set_ylim(bottom=0)
    _name_lines(ax, levels, names)
    return ax


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
    values, name = _load(found, of)
    names = _by_mean(found.groups, values, groups)
    ax = frame.new_axes(ax, (6.4, 3.6), len(names))
    _lines(ax, values, found.groups, names, palette.chosen_styles(found.groups, styles, levels), labels, None, depth)
    _finish(ax, values.shape[1], name, depth, title)
    ax.set_ylim(bottom=0)
    _name_lines(ax, levels, names)
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
    pearson, spearman = palette.numbered(0), palette.numbered(1) | {"linestyle": palette.DASHES[1]}
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
    name = f"correlation with divergence from {frame.label_of(found.reference, None)}"
    _finish(ax, len(places), name, depth, title, f"n = {len(found.groups)} groups")
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
        groups, labels, styles, interval, depth, title: as in ``divergence``; entropy and load balance take no interval.

    Returns the panels, the one with most languages first.
    """
    values, name, all_groups, band, note = _any(found, of, interval, labels)
    chosen = palette.chosen_styles(all_groups, styles)
    panels = _scripts(_by_mean(all_groups, values, groups))
    axes = _grid([len(mine) for mine in panels.values()], columns)
    drawn = [group for of_panel in panels.values() for group in of_panel]
    places = _places(values.shape[1], depth)
    for ax, (script, mine) in zip(axes, panels.items(), strict=True):
        for group in drawn:
            if group not in mine:
                ax.plot(places, values[all_groups.index(group)], color=_GREY, linewidth=0.7, zorder=1)
        lines = _lines(ax, values, all_groups, mine, chosen, labels, band, depth)
        _finish(ax, values.shape[1], "", depth, script)
        ax.label_outer()
        _end_labels(ax, lines)
    figure = axes[0].figure
    figure.supylabel(name, fontsize="medium")  # type: ignore[union-attr]
    if title or note:
        figure.suptitle("\n".join(filter(None, (title, note))), fontsize="medium", color=frame.INK)
    if isinstance(found, Consistency) or (isinstance(found, Divergence) and found.correct is None):
        axes[0].set_ylim(bottom=0)
    return axes


# -- inside
# --------------------------------------------------------------------------------------------------------------


def _entropy(found: Entropy, of: str, normalized: bool = True) -> tuple[np.ndarray, str]:
    if of == "gap":
        return found.gap, "entropy gap within sequences (nats)"
    if of in ("token", "sequence"):
        values = found.normalized(of) if normalized else found._values(of)  # type: ignore[arg-type]
        return values, f"{of} entropy / log E" if normalized else f"{of} entropy (nats)"
    raise ValueError(f'of must be "token", "sequence" or "gap", not {of!r}')


def _load(found: LoadBalance, of: str) -> tuple[np.ndarray, str]:
    if of not in _LOAD:
        raise ValueError(f"of must be one of {', '.join(_LOAD)}, not {of!r}")
    return getattr(found, of), _LOAD[of]


Band = tuple[np.ndarray, np.ndarray]


def _any(
    found: ByLayer, of: str | None, interval: float | None, labels: Mapping[str, str] | None
) -> tuple[np.ndarray, str, tuple[str, ...], Band | None, str | None]:
    """Values [G, L], their name, the groups, a band, and a note on the band."""
    if isinstance(found, (Entropy, LoadBalance)):
        if interval is not None:
            raise ValueError("interval is for divergence and consistency: leave it out")
        values, name = _entropy(found, of or "token") if isinstance(found, Entropy) else _load(found, of or "entropy")
        return values, name, tuple(found.groups), None, None
    if of is not None:
        raise ValueError("of is for entropy and load balance: leave it out")
    band = None if interval is None else found.interval(interval)
    if isinstance(found, Consistency):
        note = _over_sequences(interval, found.sequence_values)
        return found.values, "Jaccard index of two tokens' experts", found.groups, band, note
    note = None if interval is None else f"bands: {interval * 100:g} % interval, bootstrap over {found.pairs} items"
    name = f"{MEASURES[found.measure]} from {frame.label_of(found.reference, labels)}"
    return found.values, name, found.groups, band, note


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


def _grid(labels: Sequence[int], columns: int | None) -> list[Axes]:
    """Panels with shared axes, high enough for their numbers of labels; the last row is left-aligned."""
    number = len(labels)
    if columns is None:
        columns = 1 if (frame.column() or 6.4) < 5 else min(2, number)
    figure = frame.new_figure(6.4, 2.0)
    line = 1.2 * frame.points("small") / 72
    heights = [max(1.2, line * max(labels[start : start + columns])) for start in range(0, number, columns)]
    figure.set_figheight(sum(heights) + 0.35 * len(heights) + 0.9)
    cells = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    axes: list[Axes] = []
    for place in range(number):
        first = axes[0] if axes else None
        axes.append(figure.add_subplot(cells[place // columns, place % columns], sharex=first, sharey=first))
    return axes


def _places(layers: int, depth: bool) -> np.ndarray:
    return np.arange(layers) / max(layers - 1, 1) if depth else np.arange(layers)


def _lines(
    ax: Axes,
    values: np.ndarray,
    groups: Sequence[str],
    names: Sequence[str],
    chosen: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str] | None,
    band: Band | None,
    depth: bool,
) -> list[Any]:
    """A line per name, of its row of the values [group, layer], and a band around it."""
    places, lines = _places(values.shape[1], depth), []
    for name, label in zip(names, frame.labels_of(names, labels), strict=True):
        row, style = list(groups).index(name), chosen[name]
        lines += ax.plot(places, values[row], label=label, **style)
        if band is not None:
            ax.fill_between(places, band[0][row], band[1][row], color=style["color"], alpha=0.15, linewidth=0)
    return lines


def _finish(ax: Axes, layers: int, name: str, depth: bool, title: str | None, note: str | None = None) -> None:
    frame.finish(ax, np.arange(layers), name, None, depth)
    frame.titled(ax, title, note)


def _name_lines(ax: Axes, levels: Mapping[str, str] | None, names: Sequence[str], *, legend: bool = False) -> None:
    """Labels at the ends of the lines if there is room for them, else a legend; a legend of levels above."""
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    if legend or len(lines) > frame.labels_that_fit(ax):
        frame.legend_beside(ax)
    else:
        _end_labels(ax, lines)
    if levels is not None and not legend:
        _legend_of_levels(ax, levels, names)


def _legend_of_levels(ax: Axes, levels: Mapping[str, str], names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    shades, beside = palette.level_colors(levels), ax.get_legend()
    drawn = [levels[name] for name in names if name in levels]
    shown = [level for level in shades if level in drawn]
    handles = [Line2D([], [], color=shades[level], linewidth=2.5) for level in shown]
    frame.legend_above(ax, handles=handles, labels=[f"{level} (n = {drawn.count(level)})" for level in shown])
    if beside is not None:
        ax.add_artist(beside)


def _end_labels(ax: Axes, lines: Sequence[Any]) -> None:
    from moe_route.plots.end_labels import label_ends

    label_ends(ax, lines)


def _shade(ax: Axes, layers: Sequence[int] | range, of: int | None) -> None:
    """Shade runs of adjacent layers as gray bands; ``of`` layers if these are shown by relative depth."""
    numbers, scale = sorted(set(layers)), 1 if of is None else max(of - 1, 1)
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    for start, end in zip(starts, ends, strict=True):
        ax.axvspan((start - 0.5) / scale, (end + 0.5) / scale, color="#f0f0f0", linewidth=0, zorder=0)


def _by_mean(groups: Sequence[str], values: np.ndarray, wanted: Sequence[str] | None) -> list[str]:
    """The wanted groups in decreasing order of their mean, so that a legend has the order of the lines."""
    means = dict(zip(groups, map(_mean, values), strict=True))
    return sorted(frame.known(groups, wanted), key=lambda group: -means[group])


def _mean(values: np.ndarray) -> float:
    seen = values[~np.isnan(values)]
    return float(seen.mean()) if seen.size else float("-inf")

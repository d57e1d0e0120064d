"""Quantities by layer, a line per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_route.analysis import (
    Alignment,
    CheckpointSeries,
    Comparison,
    Consistency,
    Correlation,
    Divergence,
    Entropy,
    LoadBalance,
)
from moe_route.analysis.result import mean_of_seen
from moe_route.data.languages import language
from moe_route.plots import frame
from moe_route.plots.frame import Lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from typing_extensions import Unpack

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
_SHADED: dict[str, Any] = {"color": "#f0f0f0", "linewidth": 0}
ByLayer = Alignment | Divergence | Entropy | Consistency | LoadBalance


def divergence(
    divergence: Divergence,
    *,
    ax: Axes | None = None,
    interval: float | None = None,
    middle: Sequence[int] | range | None = None,
    floor: bool = False,
    order: Mapping[str, float] | None = None,
    **look: Unpack[Lines],
) -> Axes:
    """Draw divergence by layer, a line per group: the U of multilingual routing [arXiv 2510.04694, fig. 1].

    Each line has its label at its end. Where there is no room for so many labels, a legend beside the axes lists them
    from the most divergent to the least; with ``order``, in that order.

    Args:
        divergence: the result of ``analysis.divergence``.
        ax: axes to draw on; by default those of a new figure.
        interval: level of a bootstrap band around each line (such as 0.95), for paired divergence; the title names it.
        middle: layers to shade, such as those that a plan steers.
        floor: also draw the mean over the groups drawn of ``expected_floor``: what unrelated sentences give.
            Layers whose load is even (``Divergence.even_layers``) are hatched, since normalization exaggerates there.
        order: group -> number, such as the amount of text in the language; a legend then starts with the largest.
        look: ``groups``, ``labels``, ``styles``, ``levels``, ``depth`` and ``title`` (:class:`Lines`).
    """
    quantity = _divergence(divergence, interval, look.get("labels"))
    names = _by_mean(quantity, look)
    outside = sorted(set(middle or ()) - set(range(len(divergence.layers))))
    if outside:
        raise ValueError(f"middle names layer {outside[0]}: there are {len(divergence.layers)} layers, from 0")
    if order is not None:
        missing = [name for name in names if name not in order]
        if missing:
            raise ValueError(f"order lacks {', '.join(missing)}: give a number for each group")
        names.sort(key=lambda name: -order[name])
    ax = frame.new_axes(ax, (6.4, 3.6), len(names) + floor)
    if middle is not None:
        _shade(ax, middle, len(divergence.layers) if look.get("depth") else None)
    _lines(ax, quantity, names, look)
    if floor:
        _mean_line(ax, "floor", divergence.expected_floor, divergence.groups, names, look)
    return _complete(ax, quantity, names, look, legend=None if order is None else True)


def alignment(
    alignment: Alignment,
    *,
    ax: Axes | None = None,
    interval: float | None = None,
    chance: bool = True,
    **look: Unpack[Lines],
) -> Axes:
    """Draw alignment with a reference by layer, a line per group: MEXA, retrieval or cosine.

    ``chance`` also draws what random pairs of the same sentences give, the mean over the groups drawn. ``interval`` is
    the level of a bootstrap band over sentences. The other arguments are those of ``divergence``.
    """
    quantity = _alignment(alignment, interval, look.get("labels"))
    names = _by_mean(quantity, look)
    ax = frame.new_axes(ax, (6.4, 3.6), len(names) + chance)
    _lines(ax, quantity, names, look)
    if chance:
        _mean_line(ax, "chance", alignment.chance, alignment.groups, names, look)
    return _complete(ax, quantity, names, look)


def entropy(
    entropy: Entropy,
    *,
    of: str = "token",
    ax: Axes | None = None,
    normalized: bool = True,
    interval: float | None = None,
    **look: Unpack[Lines],
) -> Axes:
    """Draw routing entropy by layer, a line per group: of tokens, of sequences, or the "gap" between the two.

    ``normalized`` divides by log E, so that uniform routing is 1; the gap is always in nats. ``interval`` is the level
    of a bootstrap band over sequences (``Entropy.interval``). The other arguments are those of ``divergence``.
    """
    return _draw(_entropy(entropy, of, interval, normalized), ax, look)


def consistency(
    consistency: Consistency, *, ax: Axes | None = None, interval: float | None = None, **look: Unpack[Lines]
) -> Axes:
    """Draw the consistency of routing by layer, a line per group [arXiv 2510.04694, section 4].

    ``interval`` is the level of a bootstrap band over sequences around each line, such as 0.95; the title names it. The
    other arguments are those of ``divergence``.
    """
    return _draw(_consistency(consistency, interval), ax, look)


def load_balance(balance: LoadBalance, *, of: str = "entropy", ax: Axes | None = None, **look: Unpack[Lines]) -> Axes:
    """Draw one measure of the balance of the load by layer, a line per group.

    ``of`` is "entropy", "max_share", "max_violation", "variation", "dead", "rare" or "effective". The other arguments
    are those of ``divergence``.
    """
    ax = _draw(_load(balance, of), ax, look)
    ax.set_ylim(bottom=0)
    return ax


def correlation(
    correlation: Correlation,
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
    places = _places(len(correlation.layers), depth)
    pearson, spearman = frame.numbered(0), frame.numbered(1) | {"linestyle": frame.DASHES[1]}
    ax.axhline(0, color=frame.INK, linewidth=0.8)
    ax.plot(places, correlation.pearson, label="Pearson r", **pearson)
    ax.plot(places, correlation.spearman, label="Spearman ρ", **spearman)
    if interval is not None:
        low, high = correlation.interval(interval)
        label = f"{interval * 100:g} % interval of r"
        ax.fill_between(places, low, high, color=pearson["color"], alpha=0.15, linewidth=0, label=label)
    significant = correlation.p_corrected < alpha
    others = ~significant & ~np.isnan(correlation.pearson)
    corrected = f"corrected for {len(correlation.layers)} layers"
    kinds = (
        (significant, pearson["color"], f"filled: p < {alpha:g}, {corrected}"),
        (others, "white", f"hollow: p ≥ {alpha:g}, {corrected}"),
    )
    points = {"linestyle": "none", "marker": "o", "markersize": 4, "markeredgecolor": pearson["color"]}
    for chosen, fill, label in kinds:
        if chosen.any():
            ax.plot(places[chosen], correlation.pearson[chosen], markerfacecolor=fill, label=label, **points)
    name = f"correlation with {correlation.quantity} {frame.label_of(correlation.reference, None)}"
    frame.layer_axes(ax, len(places), name, title, f"n = {len(correlation.groups)} groups", depth=depth)
    ax.set_ylim(-1.05, 1.05)
    frame.legend_above(ax)
    return ax


def compared(comparison: Comparison, *, ax: Axes | None = None, floor: bool = True, **look: Unpack[Lines]) -> Axes:
    """Draw the divergence of two recordings of the same texts by layer, a line per group with its 95 % band.

    ``floor`` also draws what other texts of this number would give, the mean over the groups drawn. The other arguments
    are those of ``divergence``.
    """
    ends = (comparison.low, comparison.high)
    known = not np.isnan(ends[0]).all()
    note = "bands: 95 % interval, bootstrap over items" if known else None
    name = "divergence of the two recordings"
    quantity = _Quantity(comparison.values, comparison.groups, name, ends if known else None, note, True)
    names = _by_mean(quantity, look)
    ax = frame.new_axes(ax, (6.4, 3.6), len(names) + floor)
    _lines(ax, quantity, names, look)
    if floor and known:
        _mean_line(ax, "floor", comparison.floor, comparison.groups, names, look)
    return _complete(ax, quantity, names, look)


_SERIES = {
    "jsd": "divergence between languages (nats)",
    "jsd_without": "divergence between languages (nats)",
    "specialization": "language specialization",
    "moved": "divergence from the first checkpoint (nats)",
}


def checkpoints(
    series: CheckpointSeries, *, of: str = "specialization", ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Draw a quantity by layer, a line per checkpoint from dark to light [arXiv 2605.29714].

    ``of`` is "specialization", "jsd", "jsd_without" (the reference) or "moved".
    """
    if of not in _SERIES or getattr(series, of) is None:
        raise ValueError(f"of must be one of {', '.join(_SERIES)}, and jsd_without needs a reference; not {of!r}")
    colors = frame.ordered_colors(len(series.checkpoints))
    look: Lines = {"styles": dict(zip(series.checkpoints, colors, strict=True)), "title": title}
    values = getattr(series, of)
    quantity = _Quantity(values, series.checkpoints, _SERIES[of], from_zero=True)
    ax = frame.new_axes(ax, (6.4, 3.6), len(series.checkpoints))
    _lines(ax, quantity, series.checkpoints, look)
    return _complete(ax, quantity, series.checkpoints, look, legend=True)


def by_script(
    result: ByLayer,
    *,
    of: str | None = None,
    interval: float | None = None,
    columns: int | None = None,
    **look: Unpack[Lines],
) -> list[Axes]:
    """Draw small multiples of a quantity by layer: a panel per script, with the other languages in grey.

    It keeps many languages readable. Scripts with one language share the last panel, with groups that are no language.

    Args:
        result: that of ``analysis.divergence``, ``entropy``, ``consistency`` or ``load_balance``.
        of: what to draw of entropy and load balance, as in ``entropy`` and ``load_balance``.
        columns: panels side by side; by default as many as fit.
        interval: as in ``divergence``; load balance has none.
        look: as in ``divergence``; languages are colored as everywhere, not by ``levels``.

    Returns the panels, the one with most languages first.
    """
    if look.get("levels") is not None:
        raise ValueError("panels by script color languages, not levels: leave levels out")
    quantity = _quantity(result, of, interval, look.get("labels"))
    depth, title = look.get("depth", False), look.get("title")
    panels = _scripts(_by_mean(quantity, look))
    columns = columns or (1 if (frame.column() or 6.4) < 5 else min(2, len(panels)))
    axes = _grid([len(mine) for mine in panels.values()], columns)
    drawn = [group for of_panel in panels.values() for group in of_panel]
    layers = quantity.values.shape[1]
    for ax, (script, mine) in zip(axes, panels.items(), strict=True):
        for group in drawn:
            if group not in mine:
                ax.plot(_places(layers, depth), quantity.of(group), color=_GREY, linewidth=0.7, zorder=1)
        _lines(ax, quantity, mine, look)
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


# ---- what is drawn


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
    hatched: tuple[int, ...] = ()  # layers where the values say little

    def of(self, group: str) -> np.ndarray:
        """The values of a group."""
        row: np.ndarray = self.values[self.groups.index(group)]
        return row


def _divergence(away: Divergence, interval: float | None, labels: Mapping[str, str] | None) -> _Quantity:
    band = None if interval is None else away.interval(interval)
    note = None if interval is None else f"bands: {interval * 100:g} % interval, bootstrap over {away.pairs} items"
    name = f"{MEASURES[away.measure]} from {frame.label_of(away.reference, labels)}"
    even = away.even_layers if away.measure == "normalized_jsd" else ()
    if even:
        note = "\n".join(filter(None, (note, "hatched: the load is even, and normalization exaggerates")))
    return _Quantity(away.values, away.groups, name, band, note, away.correct is None, away.reference, hatched=even)


def _alignment(aligned: Alignment, interval: float | None, labels: Mapping[str, str] | None) -> _Quantity:
    band = None if interval is None else aligned.interval(interval)
    note = (
        None if interval is None else f"bands: {interval * 100:g} % interval, bootstrap over {aligned.pairs} sentences"
    )
    name = f"{aligned.quantity} {frame.label_of(aligned.reference, labels)}"
    layers = "layer (0: embedding)" if aligned.layers[0] == "embedding" else None
    return _Quantity(
        aligned.values, aligned.groups, name, band, note, aligned.rule != "cosine", aligned.reference, layers
    )


def _entropy(entropy: Entropy, of: str, interval: float | None, normalized: bool = True) -> _Quantity:
    if of not in ("token", "sequence", "gap"):
        raise ValueError(f'of must be "token", "sequence" or "gap", not {of!r}')
    scale = np.log(entropy.num_experts) if normalized and of != "gap" else 1.0
    unit = " / log E" if normalized else " (nats)"
    if of == "gap":
        values, name = entropy.gap, "entropy gap within sequences (nats)"
    else:
        values = entropy.normalized(of) if normalized else entropy.values(of)  # type: ignore[arg-type]
        name = f"{of} entropy{unit}"
    band = None
    if interval is not None:
        low, high = entropy.interval(interval, of=of)  # type: ignore[arg-type]
        band = (low / scale, high / scale)
    return _Quantity(values, tuple(entropy.groups), name, band, _over_sequences(interval, entropy.sequence_values))


def _consistency(alike: Consistency, interval: float | None) -> _Quantity:
    band = None if interval is None else alike.interval(interval)
    note = _over_sequences(interval, alike.sequence_values)
    return _Quantity(alike.values, alike.groups, "Jaccard index of two tokens' experts", band, note, from_zero=True)


def _load(balance: LoadBalance, of: str) -> _Quantity:
    if of not in _LOAD:
        raise ValueError(f"of must be one of {', '.join(_LOAD)}, not {of!r}")
    return _Quantity(getattr(balance, of), tuple(balance.groups), _LOAD[of])


def _quantity(result: ByLayer, of: str | None, interval: float | None, labels: Mapping[str, str] | None) -> _Quantity:
    if isinstance(result, Entropy):
        return _entropy(result, of or "token", interval)
    if isinstance(result, LoadBalance):
        if interval is not None:
            raise ValueError("load balance has no interval: leave interval out")
        return _load(result, of or "entropy")
    if of is not None:
        raise ValueError("of is for entropy and load balance: leave it out")
    if isinstance(result, Alignment):
        return _alignment(result, interval, labels)
    return _consistency(result, interval) if isinstance(result, Consistency) else _divergence(result, interval, labels)


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
        known = language(name)
        of_script.setdefault("" if known is None else f"{known.script_name} script", []).append(name)
    many = {script: mine for script, mine in of_script.items() if script and len(mine) > 1}
    ordered = dict(sorted(many.items(), key=lambda item: -len(item[1])))
    rest = [name for name in names if not any(name in mine for mine in many.values())]
    if rest:
        scripted = any(language(name) is not None for name in rest)
        ordered["other scripts" if many and scripted else "groups" if not scripted else "all scripts"] = rest
    return ordered


def _grid(labels: Sequence[int], columns: int) -> list[Axes]:
    """Panels with shared axes, high enough for their numbers of labels."""
    figure = frame.new_figure(6.4, 2.0)
    line = 1.2 * frame.points("small") / 72
    heights = [max(1.2, line * max(labels[start : start + columns])) for start in range(0, len(labels), columns)]
    figure.set_figheight(sum(heights) + 0.35 * len(heights) + 0.9)
    return frame.panels(figure, len(labels), columns, height_ratios=heights)


def _places(layers: int, depth: bool) -> np.ndarray:
    return np.arange(layers) / max(layers - 1, 1) if depth else np.arange(layers)


def _draw(quantity: _Quantity, ax: Axes | None, look: Lines) -> Axes:
    """A line per group, with its name."""
    names = _by_mean(quantity, look)
    ax = frame.new_axes(ax, (6.4, 3.6), len(names))
    _lines(ax, quantity, names, look)
    return _complete(ax, quantity, names, look)


def _lines(ax: Axes, quantity: _Quantity, names: Sequence[str], look: Lines) -> None:
    """A line per name, and a band around it."""
    every = quantity.groups if quantity.reference is None else (*quantity.groups, quantity.reference)
    chosen = frame.chosen_styles(every, look.get("styles"), look.get("levels"))
    layers = quantity.values.shape[1]
    places = _places(layers, look.get("depth", False))
    hatches = {"facecolor": "none", "edgecolor": frame.GRID, "hatch": "////", "linewidth": 0}
    _shade(ax, quantity.hatched, layers if look.get("depth") else None, hatches)
    for name, label in zip(names, frame.labels_of(names, look.get("labels")), strict=True):
        ax.plot(places, quantity.of(name), label=label, **chosen[name])
        if quantity.band is not None:
            low, high = (end[quantity.groups.index(name)] for end in quantity.band)
            ax.fill_between(places, low, high, color=chosen[name]["color"], alpha=0.15, linewidth=0)


def _mean_line(
    ax: Axes, label: str, values: np.ndarray, groups: Sequence[str], names: Sequence[str], look: Lines
) -> None:
    """The mean of values [G, L] over the groups drawn, as a grey line."""
    mean = mean_of_seen(values[[groups.index(name) for name in names]])[0]
    ax.plot(_places(len(mean), look.get("depth", False)), mean, label=label, **_FLOOR)


def _complete(ax: Axes, quantity: _Quantity, names: Sequence[str], look: Lines, *, legend: bool | None = None) -> Axes:
    """Axes, title and note of a quantity, the names of its lines, and a legend of levels."""
    depth, levels = look.get("depth", False), look.get("levels")
    frame.layer_axes(ax, quantity.values.shape[1], quantity.name, look.get("title"), quantity.note, depth=depth)
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


def _shade(
    ax: Axes, layers: Sequence[int] | range, of: int | None, how: Mapping[str, Any] = MappingProxyType(_SHADED)
) -> None:
    """Shade runs of adjacent layers as gray bands; ``of`` layers if these are shown by relative depth."""
    numbers, scale = sorted(set(layers)), 1 if of is None else max(of - 1, 1)
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    for start, end in zip(starts, ends, strict=True):
        ax.axvspan((start - 0.5) / scale, (end + 0.5) / scale, zorder=0, **how)


def _by_mean(quantity: _Quantity, look: Lines) -> list[str]:
    """The groups to draw in decreasing order of their mean, so that a legend has the order of the lines."""
    unknown = [name for name in look if name not in Lines.__annotations__]
    if unknown:
        raise TypeError(f"no argument {unknown[0]!r}: lines take {', '.join(Lines.__annotations__)}")
    of_groups = {name: look.get(name) for name in ("labels", "styles", "levels")}
    frame.refuse_misspelt((*quantity.groups, *filter(None, [quantity.reference])), **of_groups)
    return sorted(frame.known(quantity.groups, look.get("groups")), key=lambda group: -_mean(quantity.of(group)))


def _mean(values: np.ndarray) -> float:
    seen = values[~np.isnan(values)]
    return float(seen.mean()) if seen.size else float("-inf")

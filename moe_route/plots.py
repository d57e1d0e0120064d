"""Figures of analysis results, ready for a paper. Each function draws on one matplotlib ``Axes`` and returns it.

No global state changes: no style, no current figure, no ``show``. Colors can be distinguished with any color vision.
Lines that share a color differ in dashes, and every line has a label or a legend in the order of the lines. A language
has the same color in all figures (:func:`styles`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route import files
from moe_route.analysis import (
    Coactivation,
    Consistency,
    Correlation,
    Divergence,
    DivergenceMatrix,
    Entropy,
    LoadBalance,
    Overlap,
    Sweep,
    Transitions,
)
from moe_route.analysis.result import mean_of_seen
from moe_route.steering import ExpertSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from moe_route.recording import RoutingStatistics

__all__ = [
    "consistency",
    "correlation",
    "divergence",
    "divergence_matrix",
    "entropy",
    "expert_counts",
    "expert_pairs",
    "expert_sweep",
    "heat_map",
    "load_balance",
    "overlap",
    "overlap_by_threshold",
    "save",
    "styles",
]

# Okabe and Ito's set for every color vision (2008), without its yellow, which is too light for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.4, 1.2, 1.4)))
# Languages by their codes in ISO 639-3 and 639-1; the index determines the style. The first seven have solid lines.
_LANGUAGES = (
    "zho zh cmn|swh sw swa|deu de|jpn ja|hin hi|arb ar ara|eng en|fra fr|rus ru|ind id|ben bn|spa es|por pt|kor ko|"
    "tha th|tel te|vie vi|tur tr|urd ur|yor yo|ita it|nld nl|pol pl|ukr uk|pes fa fas|tam ta|amh am|ell el"
)
_PLACES = {code: place for place, codes in enumerate(_LANGUAGES.split("|")) for code in codes.split()}
_GRID = "#d9d9d9"
_INK = "#333333"
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
_MEASURES = {
    "normalized_jsd": "routing divergence",
    "jsd": "Jensen-Shannon divergence (nats)",
    "cosine": "cosine distance",
    "jaccard": "Jaccard distance",
}


def save(ax: Axes, path: Path) -> Path:
    """Write the figure of `ax` to `path`, whole or not at all; the suffix (png, svg, pdf) is the format."""
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in ("png", "svg", "pdf"):
        raise ValueError(f"{path} has no suffix of a picture: name it .png, .svg or .pdf")
    with files.replacing(path) as stream:
        ax.figure.savefig(stream, format=suffix, dpi=160, bbox_inches="tight")  # type: ignore[union-attr]
    return path


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Assign a line style to each name, as keyword arguments of ``Axes.plot``; it depends on the set of names only.

    A language with a usual code ("swh_Latn", "swh", "sw") always has the same style. Other names take the remaining
    styles in alphabetical order. Figures call this with all groups of a result; pass ``styles=styles(names)`` to draw
    results with other groups in the same styles. From the 29th name on, styles repeat.
    """
    places: dict[str, int] = {}
    for name in sorted(set(names)):
        place = _PLACES.get(re.split("[_-]", name.lower())[0])
        if place is not None and place not in places.values():
            places[name] = place
    others = [name for name in sorted(set(names)) if name not in places]
    free = [place for place in range(len(_COLOURS) * len(_DASHES)) if place not in places.values()] or [0]
    places |= {name: free[i % len(free)] for i, name in enumerate(others)}
    return {name: _style(places[name]) for name in names}


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
    title: str | None = None,
) -> Axes:
    """Draw divergence by layer, a line per group: the U of multilingual routing [arXiv 2510.04694, fig. 1].

    Args:
        found: the result of ``analysis.divergence``.
        ax: axes to draw on; by default those of a new figure.
        groups: the groups to draw; by default all. The legend lists them from the most divergent to the least.
        labels: group -> label.
        styles: group -> a color, or keyword arguments of ``Axes.plot``, in place of the default from ``styles``.
        interval: level of a bootstrap band around each line (such as 0.95), for paired divergence; the title names it.
        middle: layers to shade, such as those that a plan steers.
        floor: also draw the mean over groups of ``found.expected_floor``: what unrelated sentences give.
        order: group -> number, such as the amount of text in the language; the legend then starts with the largest.
        title: title above the axes; none by default.
    """
    names = _order(found, groups, order)
    ax = _axes(ax, (6.4, 3.6))
    layers = np.arange(found.values.shape[1])
    if middle is not None:
        _shade(ax, middle)
    low, high = found.interval(interval) if interval is not None else (None, None)
    chosen = _chosen_styles((*found.groups, found.reference), styles)
    for name in names:
        style = chosen[name]
        ax.plot(layers, found.of(name), label=_label(name, labels), **style)
        if low is not None and high is not None:
            row = found.groups.index(name)
            ax.fill_between(layers, low[row], high[row], color=style["color"], alpha=0.15, linewidth=0)
    if floor:
        ax.plot(layers, mean_of_seen(found.expected_floor)[0], label="floor", **_FLOOR)
    band = None if interval is None else f"bands: {interval * 100:g} % interval, bootstrap over {found.pairs} items"
    title = "\n".join(line for line in (title, band) if line) or None
    _finish(ax, layers, f"{_MEASURES[found.measure]} from {_label(found.reference, labels)}", title)
    if found.correct is None:
        ax.set_ylim(bottom=0)
    _legend(ax, len(names) + floor)
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
    title: str | None = None,
) -> Axes:
    """Draw routing entropy by layer, a line per group: of tokens, of sequences, or the "gap" between the two.

    ``normalized`` divides by log E, so that uniform routing is 1; the gap is always in nats. The legend is in
    decreasing order of the mean. The other arguments are those of ``divergence``.
    """
    if of == "gap":
        values, name = found.gap, "entropy gap within sequences (nats)"
    elif of in ("token", "sequence"):
        values = found.normalized(of) if normalized else found._values(of)  # type: ignore[arg-type]
        name = f"{of} entropy / log E" if normalized else f"{of} entropy (nats)"
    else:
        raise ValueError(f'of must be "token", "sequence" or "gap", not {of!r}')
    names = _known(found.groups, groups)
    names = sorted(names, key=lambda group: -_mean(values[found.groups.index(group)]))
    ax = _axes(ax, (6.4, 3.6))
    layers = np.arange(values.shape[1])
    chosen = _chosen_styles(found.groups, styles)
    for group in names:
        ax.plot(layers, values[found.groups.index(group)], label=_label(group, labels), **chosen[group])
    _finish(ax, layers, name, title)
    _legend(ax, len(names))
    return ax


def consistency(
    found: Consistency,
    *,
    ax: Axes | None = None,
    groups: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    styles: Mapping[str, Any] | None = None,
    interval: float | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the consistency of routing by layer, a line per group [arXiv 2510.04694, section 4].

    ``interval`` is the level of a bootstrap band over sequences around each line, such as 0.95; the title names it. The
    legend is in decreasing order of the mean. The other arguments are those of ``divergence``.
    """
    names = _known(found.groups, groups)
    names = sorted(names, key=lambda group: -_mean(found.values[found.groups.index(group)]))
    ax = _axes(ax, (6.4, 3.6))
    layers = np.arange(found.values.shape[1])
    low, high = found.interval(interval) if interval is not None else (None, None)
    chosen = _chosen_styles(found.groups, styles)
    for group in names:
        row, style = found.groups.index(group), chosen[group]
        ax.plot(layers, found.values[row], label=_label(group, labels), **style)
        if low is not None and high is not None:
            ax.fill_between(layers, low[row], high[row], color=style["color"], alpha=0.15, linewidth=0)
    band = None if interval is None else f"bands: {interval * 100:g} % interval, bootstrap over sequences"
    title = "\n".join(line for line in (title, band) if line) or None
    _finish(ax, layers, "Jaccard index of two tokens' experts", title)
    ax.set_ylim(bottom=0)
    _legend(ax, len(names))
    return ax


def correlation(
    found: Correlation,
    *,
    ax: Axes | None = None,
    alpha: float = 0.05,
    interval: float | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the correlation of scores with divergence by layer: Pearson r and Spearman rho.

    Points are filled where the permutation p-value of Pearson r, corrected for the number of layers, is below
    ``alpha``. ``interval`` is the level of a bootstrap band around Pearson r (``Correlation.interval``).
    """
    ax = _axes(ax, (6.4, 3.2))
    layers = np.arange(len(found.layers))
    pearson, spearman = _style(0), _style(1)
    ax.axhline(0, color=_INK, linewidth=0.8)
    if interval is not None:
        low, high = found.interval(interval)
        label = f"{interval * 100:g} % interval of r"
        ax.fill_between(layers, low, high, color=pearson["color"], alpha=0.15, linewidth=0, label=label)
    ax.plot(layers, found.pearson, label="Pearson r", **pearson)
    ax.plot(layers, found.spearman, label="Spearman ρ", **(spearman | {"linestyle": _DASHES[1]}))
    significant = found.p_corrected < alpha
    others = ~significant & ~np.isnan(found.pearson)
    kinds = (
        (significant, pearson["color"], f"p < {alpha:g}, all layers"),
        (others, "white", f"p ≥ {alpha:g}"),
    )
    for chosen, fill, label in kinds:
        ax.plot(
            layers[chosen],
            found.pearson[chosen],
            linestyle="none",
            marker="o",
            markersize=4,
            markeredgecolor=pearson["color"],
            markerfacecolor=fill,
            label=label if chosen.any() else None,
        )
    _finish(ax, layers, f"correlation with divergence\nfrom {found.reference} ({len(found.groups)} groups)", title)
    ax.set_ylim(-1.05, 1.05)
    _legend(ax, 4 + (interval is not None))
    return ax


def expert_counts(
    selections: Mapping[str, ExpertSelection] | Sequence[ExpertSelection] | ExpertSelection,
    *,
    ax: Axes | None = None,
    num_layers: int | None = None,
    overlap: bool = False,
    title: str | None = None,
) -> Axes:
    """Draw the number of selected experts by layer, a line per selection.

    Args:
        selections: name -> selection; or selections without names, labeled by description and threshold.
        num_layers: number of layers of the model; by default taken from the selections.
        overlap: with two selections, also fill the number of experts that are in both.
    """
    named = _named(selections)
    ax = _axes(ax, (6.4, 3.2))
    layers = np.arange(num_layers if num_layers is not None else max(map(_num_layers, named.values())))
    for number, (name, found) in enumerate(named.items()):
        counts = _counts(found, len(layers))
        ax.step(layers, counts, where="mid", label=f"{name} ({len(found)})", **_style(number))
    if overlap:
        if len(named) != 2:
            raise ValueError(f"overlap needs two selections, not {len(named)}")
        first, second = named.values()
        both = first & second
        counts = _counts(both, len(layers))
        ax.fill_between(layers, counts, step="mid", color=_INK, alpha=0.3, linewidth=0, label=f"in both ({len(both)})")
    _finish(ax, layers, "experts", title)
    ax.set_ylim(bottom=0)
    _whole_ticks(ax.yaxis)
    _legend(ax, len(named) + overlap)
    return ax


def expert_sweep(
    found: Sweep, *, of: str = "task", ax: Axes | None = None, title: str | None = None, colorbar: bool = True
) -> Axes:
    """Draw the number of experts by layer and threshold as a heat map: "task", "multilingual" or "both"."""
    names = {"task": "task experts", "multilingual": "multilingual experts", "both": "experts in both sets"}
    if of not in names:
        raise ValueError(f'of must be "task", "multilingual" or "both", not {of!r}')
    values = getattr(found, of)[:, list(found.layers)].astype(np.float64)
    ax = _axes(ax, (6.4, 3.2))
    image = ax.imshow(
        np.where(values > 0, values, np.nan),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="cividis_r",
        vmin=0.0,
        vmax=float(values.max()) or 1.0,
    )
    ax.set_xlabel("MoE layer")
    ax.set_ylabel("threshold")
    ax.set_xticks(*_few(list(map(str, found.layers)), 16))
    ax.set_yticks(range(len(found.thresholds)), [f"{threshold:g}" for threshold in found.thresholds])
    ax.set_title(title if title is not None else "", fontsize="medium", color=_INK)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, pad=0.015)
        bar.set_label(names[of])
        bar.outline.set_visible(False)
    return ax


def overlap_by_threshold(found: Sweep, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Draw the number of task experts, of multilingual experts and of both by threshold, and what chance would share.

    A vertical line marks the threshold from which on no expert is in both sets. The axis of numbers is logarithmic
    from 1 on.
    """
    ax = _axes(ax, (6.4, 3.2))
    both = found.both.sum(1)
    lines = (("task experts", found.task.sum(1)), ("multilingual experts", found.multilingual.sum(1)), ("both", both))
    for number, (name, values) in enumerate(lines):
        ax.plot(found.thresholds, values, label=name, marker="o", markersize=3, **_style(number))
    chance = _style(2) | {"linestyle": _DASHES[2]}
    ax.plot(found.thresholds, found.expected, label="both, by chance", **chance)
    ax.axvline(found.separate_from, color=_INK, linewidth=0.8)
    ax.set_yscale("symlog", linthresh=1.0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("threshold")
    ax.set_ylabel("experts")
    _plain_frame(ax, title)
    _legend(ax, 4)
    return ax


def heat_map(
    found: RoutingStatistics | np.ndarray,
    group: str | None = None,
    *,
    reference: str | None = None,
    ax: Axes | None = None,
    phase: str | None = None,
    by: str = "sequence",
    title: str | None = None,
    colorbar: bool = True,
) -> Axes:
    """Draw experts by layer as a heat map: how often tokens of a group choose each expert.

    Args:
        found: ``RoutingStatistics``, or an array [layer, expert], such as the result of ``analysis.expert_difference``.
            An array with negative values is drawn as a difference.
        group: group of the statistics; by default the only one.
        reference: show the difference from this group.
        phase, by: as in ``RoutingStatistics.frequency``.
    """
    values, sizes, name = _heat_values(found, group, reference, phase, by)
    ax = _axes(ax, (6.4, 4.4))
    values = np.where(np.arange(values.shape[1]) < np.asarray(sizes)[:, None], values, np.nan)
    if np.isnan(values).all():
        raise ValueError("there is nothing to draw: no token of this group was counted")
    difference = bool(np.nanmin(values) < 0)
    limit = float(np.nanmax(np.abs(values))) or 1.0
    image = ax.imshow(
        values.T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="RdBu_r" if difference else "Blues",
        vmin=-limit if difference else 0.0,
        vmax=limit,
    )
    ax.set_facecolor(_GRID)  # shows missing experts, and layers without tokens
    ax.set_xlabel("MoE layer")
    ax.set_ylabel("expert")
    ax.set_title(title if title is not None else "", fontsize="medium", color=_INK)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, pad=0.015)
        bar.set_label(name)
        bar.outline.set_visible(False)
    return ax


def divergence_matrix(
    found: DivergenceMatrix,
    *,
    layers: Sequence[int] | range | None = None,
    groups: Sequence[str] | None = None,
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the divergence of all pairs of groups, the mean over ``layers`` (by default all).

    ``groups`` are those to draw, in this order: that of ``analysis.Similarity.order`` puts similar ones side by side.
    The values are written into the cells if there is room.
    """
    chosen = _known(found.groups, groups)
    rows = [found.groups.index(group) for group in chosen]
    values = found.mean(layers)[np.ix_(rows, rows)]
    limit = float(np.nanmax(values)) or 1.0  # the diagonal is 0, so not all values are NaN
    names = [_label(group, labels) for group in chosen]
    return _matrix(values, names, limit, _MEASURES[found.measure], ax, title)


def overlap(found: Overlap, *, of: str = "jaccard", ax: Axes | None = None, title: str | None = None) -> Axes:
    """Draw the overlap of all pairs of selections over all layers: "jaccard", or "containment" of the row's experts.

    The values are written into the cells if there is room.
    """
    if of not in ("jaccard", "containment"):
        raise ValueError(f'of must be "jaccard" or "containment", not {of!r}')
    values = found.jaccard() if of == "jaccard" else found.containment()
    name = "Jaccard index" if of == "jaccard" else "share of the row's experts in the column's"
    return _matrix(values, found.names, 1.0, name, ax, title)


def load_balance(
    found: LoadBalance,
    *,
    of: str = "entropy",
    ax: Axes | None = None,
    groups: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    styles: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Axes:
    """Draw one measure of the balance of the load by layer, a line per group.

    ``of`` is "entropy", "max_share", "max_violation", "variation", "dead", "rare" or "effective". The legend is in
    decreasing order of the mean. The other arguments are those of ``divergence``.
    """
    if of not in _LOAD:
        raise ValueError(f"of must be one of {', '.join(_LOAD)}, not {of!r}")
    values = getattr(found, of)
    names = sorted(_known(found.groups, groups), key=lambda group: -_mean(values[found.groups.index(group)]))
    ax = _axes(ax, (6.4, 3.6))
    layers = np.arange(values.shape[1])
    chosen = _chosen_styles(found.groups, styles)
    for group in names:
        ax.plot(layers, values[found.groups.index(group)], label=_label(group, labels), **chosen[group])
    _finish(ax, layers, _LOAD[of], title)
    ax.set_ylim(bottom=0)
    _legend(ax, len(names))
    return ax


def expert_pairs(
    found: Coactivation | Transitions, layer: int, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Draw how experts go together in a layer, or from it to the next, as a matrix of P(other | expert).

    Args:
        found: the result of ``analysis.coactivation`` or ``analysis.transitions``.
        layer: the layer, as an index from 0.
    """
    after = isinstance(found, Transitions)
    values = found.conditional if isinstance(found, Transitions) else found.values("conditional")
    if not 0 <= layer < len(values):
        raise ValueError(f"there is no layer {layer} to draw: 0 to {len(values) - 1}")
    rows, columns = found.num_experts[layer], found.num_experts[layer + after]
    ax = _axes(ax, (4.6, 4.0))
    shown = values[layer, :rows, :columns]
    if np.isnan(shown).all():
        raise ValueError("there is nothing to draw: no token of these groups was counted in this layer")
    ax.set_facecolor(_GRID)
    image = ax.imshow(shown, origin="lower", interpolation="nearest", cmap="Blues", vmin=0.0)
    ax.set_ylabel(f"expert of layer {layer}")
    ax.set_xlabel(f"expert of layer {layer + after}")
    ax.set_title(title if title is not None else "", fontsize="medium", color=_INK)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.015)
    bar.set_label("share of the row's tokens")
    bar.outline.set_visible(False)
    return ax


# -- inside
# --------------------------------------------------------------------------------------------------------------


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes, or those of a new figure outside matplotlib's global state."""
    if ax is not None:
        return ax
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'moe-route[plot]'") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _matrix(
    values: np.ndarray, names: Sequence[str], limit: float, name: str, ax: Axes | None, title: str | None
) -> Axes:
    """Draw values of all pairs [row, column], from 0 to ``limit``, without the diagonal."""
    size = len(names)
    ax = _axes(ax, (1.6 + 0.5 * size, 1.2 + 0.5 * size))
    shown = np.where(np.eye(size, dtype=bool), np.nan, values)
    ax.set_facecolor("white")
    image = ax.imshow(shown, cmap="cividis_r", vmin=0.0, vmax=limit)
    ax.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(size), names)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    for row, column in np.argwhere(~np.isnan(shown)) if size <= 16 else ():
        dark = shown[row, column] > 0.55 * limit
        text = f"{shown[row, column]:.2f}"
        ax.text(column, row, text, ha="center", va="center", fontsize="small", color="white" if dark else "black")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.03)
    bar.set_label(name)
    bar.outline.set_visible(False)
    ax.set_title(title if title is not None else "", fontsize="medium", color=_INK)
    return ax


def _few(names: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Positions and names of at most ``most`` ticks, evenly spaced."""
    step = -(-len(names) // most)
    return list(range(0, len(names), step)), list(names[::step])


def _style(number: int) -> dict[str, Any]:
    """The style with this number: first all colors, then the same colors with other dashes."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[(number // len(_COLOURS)) % len(_DASHES)],
        "linewidth": 1.6,
        "solid_capstyle": "round",
    }


_default_styles = styles  # some functions have an argument named `styles`


def _chosen_styles(groups: Sequence[str], given: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The style of each group of a result; ``given`` colors or keyword arguments take precedence."""
    chosen = _default_styles(groups)
    for group, style in (given or {}).items():
        if group in chosen:
            chosen[group] |= {"color": style} if isinstance(style, str) else dict(style)
    return chosen


def _finish(ax: Axes, layers: np.ndarray, name: str, title: str | None) -> None:
    ax.set_xlabel("MoE layer")
    ax.set_ylabel(name)
    ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    _whole_ticks(ax.xaxis)
    _plain_frame(ax, title)


def _plain_frame(ax: Axes, title: str | None) -> None:
    """Faint lines across, and no frame at the top and at the right."""
    ax.grid(axis="y", color=_GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if title is not None:
        ax.set_title(title, fontsize="medium", color=_INK)


def _whole_ticks(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _legend(ax: Axes, lines: int) -> None:
    """Place the legend beside the axes if it would cover many lines, inside if there are few."""
    if lines > 4:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=2.6)
    else:
        ax.legend(loc="best", frameon=False, handlelength=2.6)


def _shade(ax: Axes, layers: Sequence[int] | range) -> None:
    """Shade runs of adjacent layers as gray bands."""
    numbers = sorted(set(layers))
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    for start, end in zip(starts, ends, strict=True):
        ax.axvspan(start - 0.5, end + 0.5, color="#f0f0f0", linewidth=0, zorder=0)


def _known(groups: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    for name in wanted or ():
        if name not in groups:
            raise ValueError(f"no group {name!r}: there are {', '.join(groups)}")
    return list(groups if wanted is None else wanted)


def _order(found: Divergence, groups: Sequence[str] | None, order: Mapping[str, float] | None) -> list[str]:
    """Groups from the most divergent to the least, so that the legend has the order of the lines; or by ``order``."""
    names = _known(found.groups, groups)
    missing = [name for name in names if order is not None and name not in order]
    if missing:
        raise ValueError(f"order lacks {', '.join(missing)}: give a number for each group")
    return sorted(names, key=lambda group: -_mean(found.of(group)) if order is None else -order[group])


def _mean(values: np.ndarray) -> float:
    seen = values[~np.isnan(values)]
    return float(seen.mean()) if seen.size else float("-inf")


def _label(group: str, labels: Mapping[str, str] | None) -> str:
    return (labels or {}).get(group, group)


def _named(
    selections: Mapping[str, ExpertSelection] | Sequence[ExpertSelection] | ExpertSelection,
) -> dict[str, ExpertSelection]:
    named: dict[str, ExpertSelection] = {}
    if isinstance(selections, Mapping) and not isinstance(selections, ExpertSelection):
        named = dict(selections)
    else:
        alone = [selections] if isinstance(selections, ExpertSelection) else selections
        for number, found in enumerate(alone, 1):
            threshold = "" if found.threshold is None else f" > {found.threshold:g}"
            name = f"{found.description or f'selection {number}'}{threshold}"
            named[name if name not in named else f"{name} ({number})"] = found
    if not named:
        raise ValueError("no selection to count: pass at least one")
    return named


def _num_layers(found: ExpertSelection) -> int:
    if isinstance(found.num_experts, tuple):
        return len(found.num_experts)
    if not found:
        raise ValueError("how many layers the model has is not known: pass num_layers")
    return max(found.layers) + 1


def _counts(found: ExpertSelection, layers: int) -> np.ndarray:
    outside = [layer for layer in found.layers if layer >= layers]
    if outside:
        raise ValueError(f"the selection has experts in layer {outside[0]}, but num_layers is {layers}")
    return np.array([found.counts.get(layer, 0) for layer in range(layers)])


def _heat_values(
    found: Any, group: str | None, reference: str | None, phase: str | None, by: str
) -> tuple[np.ndarray, Sequence[int], str]:
    if isinstance(found, np.ndarray):
        if found.ndim != 2 or group is not None or reference is not None:
            raise ValueError("an array must be [layer, expert], without group and reference")
        return found, [found.shape[1]] * len(found), "difference of frequency" if (found < 0).any() else "frequency"
    frequency = found.frequency(phase, by)
    index = [_group_row(found, name) for name in (group, reference) if name is not None or name is group]
    if reference is None:
        return frequency[index[0]], found.num_experts, f"frequency ({found.groups[index[0]]})"
    return (
        frequency[index[0]] - frequency[index[1]],
        found.num_experts,
        f"frequency, {found.groups[index[0]]} - {reference}",
    )


def _group_row(found: Any, group: str | None) -> int:
    if group is None and len(found.groups) == 1:
        return 0
    if group not in found.groups:
        raise ValueError(f"name one of the groups: {', '.join(found.groups)}")
    return found.groups.index(group)

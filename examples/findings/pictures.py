"""The pictures of the findings, one each, readable at 800 pixels.

Colors are those of `plots`, which every color vision tells apart; markers differ as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from association import LOSS, SHARE, Association
from control import Control
from depth import Depth, Profile
from matplotlib.axes import Axes
from raising import Raising
from skill import Skill
from switching import LanguageTables, TaskTables
from words import standing

from moe_route import plots
from moe_route.analysis import Difference
from moe_route.base.table import number_of
from moe_route.demo.measurement import PIVOT, SUBSETS
from moe_route.demo.task_experts import CONTROLS, TaskExpertsOff
from moe_route.demo.wording import name, told
from moe_route.plots import frame

WIDTH = 8.0  # inches; 800 pixels are then 100 per inch, and the font has 14
BLUE, RED, GREEN, _, _, ORANGE, _ = frame.COLORS
GREY = "#8c8c8c"
_MARKERS = {"seen": ("s", GREEN), "english_only": ("o", BLUE), "unseen": ("D", RED)}
_LABELS = {"seen": "seen by all", "english_only": "seen in English only", "unseen": "never seen"}


def save(drawn: Mapping[str, Axes | None], folder: Path) -> list[Path]:
    """Save each picture that has something to show as PNG under its name; returns the files in their order."""
    return [plots.save(ax, folder / f"{title}.png") for title, ax in drawn.items() if ax is not None]


def task_experts_off(tables: TaskTables) -> Axes | None:
    """Exact match of each language before and after; beside it the change, in a cloud of the random sets."""
    off = tables.off
    if not off.task_experts.experts:
        return None
    clouds = len(off.matches) > 1
    rows = np.arange(len(off.languages))
    axes = new_axes(1, 2 if clouds else 1, 1.7 + 0.38 * len(rows), sharey=True)
    ax = axes[0, 0]
    before, after = (one.tasks["sums"].correct.mean(0) for one in (off.before, off.after))
    ax.hlines(rows, after, before, color=GREY, linewidth=2.5, zorder=1)
    ax.scatter(before, rows, s=60, color=BLUE, zorder=2, label="model as it is")
    ax.scatter(after, rows, s=60, color=RED, marker="D", zorder=2, label="experts of sums off")
    language_rows(ax, off.languages)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel(f"exact match of sums ({len(off.subsets)} held-out problems)")
    legend_below(ax, 2)
    if clouds:
        _cloud(axes[0, 1], off, rows)
    number = len(off.task_experts.experts)
    others = "".join(f"{one} {told(off.changes[one])}; " for one in CONTROLS if one not in off.unable)
    text = f"{others}general text {told(off.changes['text'], 3)} nats per token"
    if off.sets:
        text += f"\nbeside random sets of as many experts: {standing(off.sets['exact match'])}"
    headline(
        ax, f"{number_of(number, 'expert')} of sums found in English, off: sums {told(off.changes['sums'])}\n{text}"
    )
    return ax


def _cloud(ax: Axes, off: TaskExpertsOff, rows: np.ndarray) -> None:
    """The change of exact match on the sampled items: of the task experts, and of every random set."""
    spread = np.random.default_rng(0).uniform(-0.28, 0.28, off.matches[1:].shape)
    holding = off.shares > 0
    kinds = ((holding, ORANGE, "random set with one of them"), (~holding, GREY, "without"))
    for at, color, label in kinds:
        if at.any():
            ax.scatter(
                off.matches[1:][at], (rows + spread)[at], s=14, color=color, alpha=0.6, linewidths=0, label=label
            )
    ax.scatter(off.matches[0], rows, s=60, color=RED, marker="D", zorder=3)
    ax.axvline(0, color=frame.INK, linewidth=0.8)
    plain_axes(ax)
    ax.set_xlabel(f"its change ({len(off.sampled['sums'])} of the problems)")
    legend_below(ax, 2)


def language_experts_off(tables: LanguageTables) -> Axes | None:
    """The matrix of changes, with a column of the random sets."""
    off = tables.off
    if not off.experts:
        return None
    values = off.matrix
    limit = float(np.abs(values).max()) or 1.0
    control = off.random is not None
    columns = len(off.languages) + (1.4 if control else 0)
    ax = new_axes(1, 1, 1.9 + 0.4 * len(values))[0, 0]
    options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "aspect": "auto"}
    image = ax.imshow(values, extent=(-0.5, len(off.languages) - 0.5, len(values) - 0.5, -0.5), **options)
    shown = [(x, y, value) for (y, x), value in np.ndenumerate(values)]
    places, labels = list(map(float, range(len(off.languages)))), [name(one) for one in off.languages]
    if off.random is not None:
        own = off.random.mean(0)[:, None]
        left = len(off.languages) - 0.1
        ax.imshow(own, extent=(left, left + 1, len(values) - 0.5, -0.5), **options)
        shown += [(left + 0.5, y, float(value)) for y, value in enumerate(own[:, 0])]
        places, labels = [*places, left + 0.5], [*labels, "random experts,\nown text"]
    for x, y, value in shown:
        own_text = x == (off.languages.index(list(off.experts)[int(y)]))
        look = {"fontsize": "small", "fontweight": "bold" if own_text else "normal"}
        text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0 avoids a minus zero
        frame.write_cell(ax, y, x, text, dark=abs(value) > 0.6 * limit, **look)
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_xticks(places, labels, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(values)), [name(one) for one in off.experts])
    ax.set_ylabel("experts off")
    frame.frameless(ax)
    frame.color_bar(image, ax, "change, nats per token", pad=0.02, fraction=0.04)
    headline(
        ax,
        f"a language's own experts off: its text loses the most in {len(off.hit_first)} of {len(values)}\n"
        f"own minus other languages' text: {told(off.selectivity)} nats per token",
    )
    return ax


def new_axes(rows: int, columns: int, height: float, **options: Any) -> Any:
    """Axes [rows, columns] of a new figure."""
    return frame.new_figure(WIDTH, height).subplots(rows, columns, squeeze=False, **options)


def headline(ax: Axes, text: str) -> None:
    """A title over the whole figure."""
    frame.figure_of(ax).suptitle(text, fontsize="medium", ha="left", x=0.01)


def language_rows(ax: Axes, languages: Sequence[str], after: dict[str, str] | None = None) -> None:
    """A row for each language, the first on top."""
    ax.set_yticks(range(len(languages)), [f"{name(one)}{(after or {}).get(one, '')}" for one in languages])
    ax.set_ylim(len(languages) - 0.5, -0.5)
    plain_axes(ax)


def legend_below(ax: Axes, columns: int) -> None:
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize="small")


def plain_axes(ax: Axes) -> None:
    """Faint lines both ways, and no frame at the top and at the right."""
    frame.plain_frame(ax, axis="both")


def skill(ladder: Skill) -> Axes:
    """Exact match of the three kinds of problems by language, with intervals."""
    rows = np.arange(len(ladder.languages))
    ax = new_axes(1, 1, 1.9 + 0.45 * len(rows))[0, 0]
    for offset, subset in zip((-0.25, 0.0, 0.25), SUBSETS, strict=True):
        shares = np.array(list(ladder.match(subset).values()))
        marker, color = _MARKERS[subset]
        reach = np.abs(shares[:, 1:] - shares[:, :1]).T
        ax.errorbar(
            shares[:, 0],
            rows + offset,
            xerr=reach,
            fmt=marker,
            color=color,
            markersize=6,
            linewidth=1.3,
            label=_LABELS[subset],
        )
    labels = {one: f" ({share:.0%} of pairs)" for one, share in ladder.shares.items()}
    language_rows(ax, ladder.languages, labels)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel(f"exact match ({len(ladder.scores[SUBSETS[0]].correct)} problems each, 95 % intervals)")
    legend_below(ax, 3)
    if ladder.others:
        transfer = told(ladder.transfer(*ladder.others))
        headline(ax, f"what English alone saw minus what nobody saw, in other languages: {transfer}")
    return ax


def depth(depths: Depth) -> Axes:
    """Divergence by layer with its floor, and the load below it; the untrained model to the right."""
    profiles = {"trained": depths.trained, "untrained": depths.untrained}
    kept = {title: profile for title, profile in profiles.items() if profile is not None}
    axes = new_axes(2, len(kept), 5.2, sharey="row", sharex=True, height_ratios=(3, 1))
    for column, (title, profile) in enumerate(kept.items()):
        _divergence(axes[0, column], profile)
        _load(axes[1, column], profile.load)
        depth = profile.depth
        text = title if depth is None else f"{title}: depth {told(depth, 3)}"
        axes[0, column].set_title(text, fontsize="medium", loc="left")
    first = axes[0, 0]
    first.set_ylabel(f"divergence from {name(PIVOT)}")
    axes[1, 0].set_ylabel("load entropy\n/ log E")
    handles, labels = first.get_legend_handles_labels()
    frame.figure_of(first).legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return first


def _divergence(ax: Axes, profile: Profile) -> None:
    by_language = profile.divergence
    layers = np.arange(by_language.values.shape[1])
    for group, style in plots.styles((*by_language.groups, by_language.reference)).items():
        if group in by_language.groups:
            ax.plot(layers, by_language.of(group), label=name(group), **{"markersize": 3, "marker": "o", **style})
    if profile.floor is not None:
        ax.plot(
            layers, profile.floor, color=frame.INK, linestyle=":", linewidth=1.5, label="floor (unrelated sentences)"
        )
    ax.set_ylim(bottom=0)
    plain_axes(ax)


def _load(ax: Axes, load: np.ndarray) -> None:
    ax.bar(np.arange(len(load)), np.nan_to_num(load), color=GREY)
    ax.set_ylim(0, 1.05)
    ax.set_xticks(few_layers(len(load)))
    ax.set_xlabel("MoE layer")
    plain_axes(ax)


def association(correlated: Association) -> Axes | None:
    """Exact match over divergence of the layer with the largest |r|; to the right, over what may lie behind it."""
    if correlated.raw is None:
        return None
    at = correlated.strongest
    match = np.array([correlated.match[group] for group in correlated.divergence.groups])
    axes = new_axes(max(1, len(correlated.covariates)), 2, 4.2, sharey=True, width_ratios=(3, 2))
    large: Axes = _joined(axes[:, 0])
    values = correlated.divergence.values[:, at]
    _points(large, values, match, f"divergence of problems from {name(PIVOT)}, layer {at}")
    large.set_ylabel("exact match (pairs seen in English only)")
    large.margins(0.15)
    units = {SHARE: "share of pairs seen in training", LOSS: "general text, nats per sentence"}
    for ax, (covariate, by_language) in zip(axes[:, 1], correlated.covariates.items(), strict=False):
        _points(ax, np.array([by_language[group] for group in correlated.divergence.groups]), match, units[covariate])
        ax.set_title(f"r = {correlated.explained_by(covariate):+.2f}", fontsize="small", loc="left")
    if not correlated.covariates:
        axes[0, 1].set_visible(False)
    r, p = correlated.raw.pearson[at], correlated.raw.p_corrected[at]
    headline(large, f"divergence and exact match: r = {r:+.2f}, p = {p:.3f} over all layers")
    _name_points(large, values, match, [name(group) for group in correlated.divergence.groups])
    return large


def _joined(axes: Sequence[Axes]) -> Axes:
    """One pair of axes in the place of several below one another."""
    figure, places = frame.figure_of(axes[0]), axes[0].get_subplotspec()
    assert places is not None
    for ax in axes:
        ax.remove()
    joined: Axes = figure.add_subplot(places.get_gridspec()[:, 0])
    return joined


def _points(ax: Axes, x: np.ndarray, y: np.ndarray, label: str) -> None:
    ax.scatter(x, y, color=BLUE, s=30)
    ax.set_xlabel(label)
    plain_axes(ax)


def _name_points(ax: Axes, x: np.ndarray, y: np.ndarray, labels: Sequence[str]) -> None:
    """Write each label beside its point, on a side where it covers neither a label nor a point if there is one."""
    figure = frame.figure_of(ax)
    figure.canvas.draw()  # settles the layout, so that sizes are known
    sides = (
        ((7, 0), "left", "center"),
        ((-7, 0), "right", "center"),
        ((0, 6), "center", "bottom"),
        ((0, -6), "center", "top"),
    )
    points = ax.transData.transform(np.column_stack([x, y]))
    placed: list[Any] = []
    for i, label in enumerate(labels):
        best: tuple[float, Any, Any] | None = None
        for offset, across, upright in sides:
            text = ax.annotate(
                label, (x[i], y[i]), offset, textcoords="offset points", ha=across, va=upright, fontsize="small"
            )
            box = text.get_window_extent()
            covered = sum(box.overlaps(other) for other in placed) + box.count_contains(np.delete(points, i, 0))
            covered += not (box.x1 < ax.bbox.x1 and box.x0 > ax.bbox.x0)
            if best is None or covered < best[0]:
                if best is not None:
                    best[1].remove()
                best = (covered, text, box)
            else:
                text.remove()
        assert best is not None
        placed.append(best[2])


def raising(raised: Raising) -> Axes | None:
    """Change of exact match and of nats by plan, with intervals; the random sets as a cloud."""
    if not raised.after:
        return None
    plans = list(raised.after)
    rows = np.arange(len(plans) + bool(raised.sets))
    axes = new_axes(1, 2, 1.5 + 0.42 * len(rows), sharey=True)[0]
    columns = (("exact match", "change of exact match"), ("answer", "change of nats per answer"))
    for ax, (measure, label) in zip(axes, columns, strict=True):
        changes = [
            scores.change_of_match(raised.before) if measure == "exact match" else scores.change_of_nats(raised.before)
            for scores in raised.after.values()
        ]
        _changes(ax, changes)
        if raised.sets:
            random = np.array(raised.sets[measure].random)
            spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(random))
            ax.scatter(random, len(plans) + spread, s=20, color=GREY, alpha=0.8, linewidths=0)
            ax.scatter(raised.sets[measure].plan, len(plans), s=50, marker="D", facecolors="none", edgecolors=RED)
        ax.axvline(0, color=frame.INK, linewidth=0.8)
        ax.set_xlabel(label)
        plain_axes(ax)
    number = len(raised.sets["exact match"].random) if raised.sets else 0
    sets = (
        [f"{plans[0]}, {number_of(number, 'random set')}\n(◇ task experts;\n{raised.sampled} problems)"]
        if number
        else []
    )
    axes[0].set_yticks(rows, [*plans, *sets])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    first: Axes = axes[0]
    change = next(iter(raised.after.values())).change_of_match(raised.before)
    headline(first, f"task experts raised ({plans[0]}): exact match {told(change, 3)}")
    return first


def control(misled: Control) -> Axes:
    """Exact match by damage, with the task experts raised and without, and the change that raising makes."""
    result, (_, strength) = misled.result, misled.result.chosen
    axes = new_axes(1, 2, 3.6)[0]
    damages = range(len(result.damages))
    for at, color, label in ((0, GREY, "misled"), (strength, BLUE, f"task experts +{result.strengths[strength]:g}")):
        values = [result.match(damage, at) for damage in damages]
        axes[0].plot(result.damages, values, marker="o", color=color, label=label)
    axes[0].set_ylabel("exact match")
    legend_below(axes[0], 2)
    repairs = [result.repair(damage, strength) for damage in damages]
    values = np.array([repair.value for repair in repairs])
    reach = np.nan_to_num([[repair.value - repair.low, repair.high - repair.value] for repair in repairs]).T
    axes[1].errorbar(result.damages, values, yerr=reach, fmt="D", color=RED, markersize=6, linewidth=1.5)
    for damage in damages:
        beside = result.beside(damage, strength)
        if beside is not None:
            spread = np.random.default_rng(0).uniform(-0.03, 0.03, len(beside.random))
            axes[1].scatter(result.damages[damage] + spread, beside.random, s=12, color=GREY, alpha=0.6, linewidths=0)
    axes[1].axhline(0, color=frame.INK, linewidth=0.8)
    axes[1].set_ylabel("change by raising (grey: random sets)")
    for ax in axes:
        ax.set_xlabel("share of the shift towards general text")
        plain_axes(ax)
    first: Axes = axes[0]
    repair = told(result.repair(*result.chosen), 3)
    headline(first, f"languages misled towards general text: raising gives back {repair}")
    return first


def _changes(ax: Axes, changes: Sequence[Difference]) -> None:
    values = np.array([change.value for change in changes])
    ends = np.array([(change.low, change.high) for change in changes])
    reach = np.nan_to_num(np.abs(ends - values[:, None])).T
    ax.errorbar(values, np.arange(len(values)), xerr=reach, fmt="D", color=RED, markersize=6, linewidth=1.5)


def few_layers(layers: int) -> list[int]:
    """Layers to name on an axis, at most nine."""
    return list(range(0, layers, max(1, -(-layers // 9))))

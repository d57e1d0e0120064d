"""Divergence from English by layer, with its floor and the load, beside those of a model that has learnt nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from words import span

from moe_route.analysis import Difference, Divergence, UShape, divergence, load_balance, u_shape
from moe_route.analysis.result import mean_of_seen, plain
from moe_route.base.table import table
from moe_route.demo.measurement import PIVOT
from moe_route.demo.wording import name, paragraph, told
from moe_route.recording import RoutingStatistics
from moe_route.runs.language_model import LanguageModel

LARGEST = 500_000_000  # parameters of an untrained model
_COLUMNS = 12  # layers in a table


@dataclass(frozen=True)
class Profile:
    """Routing of one model by layer.

    Attributes:
        divergence: from English.
        floor: float64 [L], divergence of unrelated sentences of one language, mean over languages; None with one item.
        load: float64 [L], entropy of the load over log E, over all languages.
        shape: mean divergence of first, middle and last layers; None if no layer lies outside the middle.
    """

    divergence: Divergence
    floor: np.ndarray | None
    load: np.ndarray
    shape: UShape | None

    @property
    def depth(self) -> Difference | None:
        """Mean over languages of the depth of the U, with its interval for other sentences; None without a shape."""
        return None if self.shape is None else _mean_depth(self.shape)


@dataclass(frozen=True)
class Depth:
    """Divergence by layer of the model, and of an untrained one of the same configuration.

    Attributes:
        trained: the model.
        untrained: the same configuration with random weights; None if there is none.
        reason: why there is none.
    """

    trained: Profile
    untrained: Profile | None
    reason: str = ""

    @property
    def beyond_untrained(self) -> Difference | None:
        """Depth of the U minus that of the untrained model, on the same sentences."""
        if self.untrained is None or self.trained.shape is None or self.untrained.shape is None:
            return None
        return _mean_depth(self.trained.shape, self.untrained.shape)

    @property
    def sentence(self) -> str:
        """What was found, from the intervals."""
        depth, shape = self.trained.depth, self.trained.shape
        if depth is None or shape is None:
            return "The model has too few layers for a U of divergence over depth."
        beyond = self.beyond_untrained
        middle, ends = span(shape.middle_layers), f"layers {span(shape.first_layers)} and {span(shape.last_layers)}"
        where, deep = f"layers {middle} differ from {name(PIVOT)}", f"depth {told(depth, 3)}"
        if depth.verdict == "lower":
            return f"There is no U: {where} more than {ends}, {deep}."
        if depth.verdict == "unclear":
            return f"A U cannot be told from none: {deep}, layers {middle} against {ends}."
        if beyond is None:
            return f"The middle is lower: {where} less than {ends}, {deep}, without an untrained model beside it."
        if beyond.verdict == "higher":
            return f"There is a U: {where} less than {ends}, {deep}, deeper than that of an untrained model."
        return f"A U of {deep} proves nothing: beyond that of an untrained model it is {told(beyond, 3)}."

    def __str__(self) -> str:
        parts = [f"{paragraph(self.sentence)}\n{paragraph(self._beside())}".rstrip()]
        parts += [self._table("trained", self.trained)]
        if self.untrained is not None:
            parts.append(self._table("untrained", self.untrained))
        by_language = self.trained.divergence
        note = paragraph(
            f"Divergence of routing from {name(PIVOT)} (0 the same, 1 disjoint), mean of",
            f"{by_language.pairs} sentences.",
            "floor: of unrelated sentences of one language. load: entropy of the load over log E, 1 is even.",
            "depth: mean of the outer layers minus that of the middle ones.",
        )
        return "\n\n".join([*parts, note])

    def _beside(self) -> str:
        if self.untrained is None:
            return f"There is no untrained model beside it: {self.reason}."
        depth, beyond = self.untrained.depth, self.beyond_untrained
        if depth is None or beyond is None:
            return ""
        return (
            f"An untrained model of the same configuration has depth {told(depth, 3)}; "
            f"that of the model minus it is {told(beyond, 3)}."
        )

    def _table(self, title: str, profile: Profile) -> str:
        by_language, layers = profile.divergence, np.arange(profile.divergence.values.shape[1])
        parts = np.array_split(layers, min(len(layers), _COLUMNS))

        def cells(values: np.ndarray) -> list[float]:
            return [float(mean_of_seen(values[part])[0]) for part in parts]

        rows: list[tuple[object, ...]] = []
        depths = [None] * len(by_language.groups) if profile.shape is None else profile.shape.depth.tolist()
        for group, values, depth in zip(by_language.groups, by_language.values, depths, strict=True):
            rows.append((name(group), *cells(values), "" if depth is None else f"{depth:+.3f}"))
        mean = "" if profile.depth is None else f"{profile.depth.value:+.3f}"
        rows.append(("mean", *cells(mean_of_seen(by_language.values)[0]), mean))
        if profile.floor is not None:
            rows.append(("floor", *cells(profile.floor), ""))
        rows.append(("load", *cells(profile.load), ""))
        return table((title, *(span(part.tolist()) for part in parts), "depth"), rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        beyond = self.beyond_untrained
        return {
            "sentence": self.sentence,
            "trained": _content(self.trained),
            "untrained": None if self.untrained is None else _content(self.untrained),
            "no_untrained_because": self.reason or None,
            "depth_beyond_untrained": None if beyond is None else beyond.to_dict(),
        }


def profile_of(statistics: RoutingStatistics) -> Profile:
    """Measure the divergence of every language from English, its floor, and the load."""
    by_language = divergence(statistics, reference=PIVOT)
    layers = by_language.values.shape[1]
    shape = u_shape(by_language) if layers > 2 else None
    floor = mean_of_seen(by_language.expected_floor)[0] if by_language.pairs > 1 else None
    return Profile(by_language, floor, load_balance(statistics, pool=True).entropy[0], shape)


def untrained_model(language_model: LanguageModel) -> tuple[LanguageModel | None, str]:
    """`LanguageModel.untrained`, or None and the reason why there is none."""
    parameters = sum(parameter.numel() for parameter in language_model.model.parameters())
    if parameters > LARGEST:
        return None, f"{parameters / 1e9:.1f} billion random weights would take too long"
    try:
        return language_model.untrained(), ""
    except ValueError as error:  # no such class for this configuration
        return None, str(error).splitlines()[0].rstrip(".")


def _mean_depth(shape: UShape, other: UShape | None = None) -> Difference:
    """Mean depth over languages, or how much it exceeds that of another model on the same sentences."""
    value = float(mean_of_seen(shape.depth)[0])
    if shape.resampled is None:
        return Difference(value, float("nan"), float("nan"))
    drawn = mean_of_seen(shape.resampled, 1)[0]
    if other is not None and other.resampled is not None:  # the same seed draws the same sentences
        value -= float(mean_of_seen(other.depth)[0])
        drawn = drawn - mean_of_seen(other.resampled, 1)[0]
    return Difference.of(value, drawn, shape.pairs)


def _content(profile: Profile) -> dict[str, Any]:
    depth = profile.depth
    return {
        "divergence": profile.divergence.to_dict(),
        "floor": plain(profile.floor),
        "load_entropy": plain(profile.load),
        "depth": None if depth is None else depth.to_dict(),
    }

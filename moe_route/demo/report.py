"""The results of the demonstration, as text and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis import Difference, RandomControl, holm, u_shape
from moe_route.analysis.result import mean_of_seen, plain
from moe_route.steering import ExpertSelection
from moe_route.texttable import table

if TYPE_CHECKING:
    from moe_route.analysis import Divergence

__all__ = ["DemoReport", "Outcome", "span"]


@dataclass(frozen=True)
class Outcome:
    """The effect of one plan on the task texts: by language, and the mean over languages."""

    name: str
    by_language: Mapping[str, Difference]
    mean: Difference


@dataclass
class DemoReport:
    """All results of the demonstration. `str(report)` is the printed text, `to_dict` the JSON content."""

    model: str
    layers: int
    experts: int
    top_k: int
    languages: tuple[str, ...]
    sentences: int
    divergence: Divergence
    unrelated: np.ndarray  # [layers]: divergence of an English sentence from another one
    all_found: dict[float, ExpertSelection]  # threshold -> task experts of all layers
    threshold: float  # the threshold used for steering
    middle: tuple[int, ...]
    base: dict[str, float]  # loss of the task texts without steering, nats per token
    evaluated: int  # number of task texts per language
    cut: list[str]  # sentences on the texts that were cut
    outcomes: list[Outcome] = field(default_factory=list)
    by_threshold: dict[float, Difference] = field(default_factory=dict)  # the published plan at each threshold
    control: RandomControl | None = None  # the published plan against random experts, mean over languages
    restored: bool = False
    pictures: list[Path] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [self._divergence(), self._experts(), *([self._steering()] if self.outcomes else []), self._end()]
        return "\n\n".join(parts)

    def _divergence(self) -> str:
        values = self.divergence.values
        rows = [(group, *map(float, row)) for group, row in zip(self.divergence.groups, values, strict=True)]
        rows.append(("mean", *map(float, mean_of_seen(values)[0])))
        rows.append(("another sentence", *map(float, self.unrelated)))
        return "\n".join(
            (
                f"Model {self.model}: {self.layers} MoE layers of {self.experts} experts, top-{self.top_k}. "
                f"{self.sentences} sentences in {len(self.languages)} languages.",
                *(f"{note[0].upper()}{note[1:]}." for note in self.cut),
                "",
                f"Divergence of the routing from {self.divergence.reference} by MoE layer (0 the same, 1 disjoint);",
                "last line: of an English sentence from another one.",
                "",
                table(("language", *map(str, range(self.layers))), rows),
                *self._shape(),
            )
        )

    def _shape(self) -> list[str]:
        """Sentences on whether the middle layers differ from the others, if there are others and an interval."""
        outside = self.middle[0]
        if not outside:
            return []
        shape = u_shape(self.divergence, edge=outside, middle=self.middle)
        low, high = shape.mean_interval()
        inner, outer = float(shape.middle.mean()), float((shape.first + shape.last).mean() / 2)
        if not np.isfinite([low, high, inner, outer]).all():
            return []
        says = "lower in the middle, as in large models" if low > 0 else "higher in the middle, unlike large models"
        if low <= 0 <= high:
            says = "no difference that these sentences can show"
        return [
            "",
            f"Mean over layers {span(self.middle)} {inner:.3f}, over the others {outer:.3f}, which is "
            f"{outer - inner:+.3f} [{low:+.3f}, {high:+.3f}]: {says}.",
            "In brackets: 95 % interval for other sentences in these languages (bootstrap over sentences).",
        ]

    @property
    def found(self) -> dict[float, ExpertSelection]:
        """threshold -> task experts of the middle layers."""
        return {threshold: selection.restrict(self.middle) for threshold, selection in self.all_found.items()}

    @property
    def selection(self) -> ExpertSelection:
        """The task experts that are steered."""
        return self.found[self.threshold]

    def _experts(self) -> str:
        counts = ", ".join(f"{len(selection)} above {threshold:g}" for threshold, selection in self.found.items())
        lines = [
            "Task experts: chosen more often in English arithmetic problems than in general English, by this much",
            "(frequency). The problems share a few wordings: these may be experts of the wording, not of arithmetic.",
            f"In layers {span(self.middle)}: {counts}.",
        ]
        if not self.selection:
            return "\n".join([*lines, "There is no task expert in the middle layers, so there is nothing to steer."])
        lines.append(f"Steered are those above {self.threshold:g}, the largest threshold that finds one:")
        lines += [
            f"  layer {layer}: expert {', '.join(map(str, experts))}" for layer, experts in self.selection.items()
        ]
        return "\n".join(lines)

    def _steering(self) -> str:
        cells = {name: [outcome.by_language[name] for outcome in self.outcomes] for name in self.base}
        cells["mean"] = [outcome.mean for outcome in self.outcomes]
        losses = [*self.base.values(), float(np.mean(list(self.base.values())))]
        p_values = holm([[cell.p_value for cell in row] for row in cells.values()])
        rows = [
            (name, loss, *(_marked(cell, p < 0.05) for cell, p in zip(row, of_row, strict=True)))
            for (name, row), loss, of_row in zip(cells.items(), losses, p_values, strict=True)
        ]
        return "\n".join(
            (
                f"Loss of {self.evaluated} other arithmetic problems per language, nats per token, and its changes:",
                "",
                table(("language", "loss", *(outcome.name for outcome in self.outcomes)), rows),
                "",
                "* zero lies outside the 95 % interval (paired bootstrap over problems), each cell by itself;",
                f"** also with Holm's correction for all {p_values.size} cells.",
                "",
                *self._findings(),
            )
        )

    def _findings(self) -> list[str]:
        first = self.outcomes[0]
        verdicts = [difference.verdict for difference in first.by_language.values()]
        lines = [
            f"Task experts raised ({first.name}), mean of the languages: {first.mean}.",
            f"Lower in {verdicts.count('lower')}, higher in {verdicts.count('higher')}, unclear in "
            f"{verdicts.count('unclear')} of {len(verdicts)} languages.",
        ]
        lines += [
            f"The same at threshold {threshold:g} ({_number(self.found[threshold])}): {difference}."
            for threshold, difference in self.by_threshold.items()
            if threshold != self.threshold
        ]
        if self.control is not None:
            lines += self._control(self.control)
        return [*lines, f"So on this model and this task, {self.conclusion}."]

    def _control(self, control: RandomControl) -> list[str]:
        sets = len(control.random)
        what = "all other sets there are" if control.enumerated else "drawn at random"
        over = "problems" if control.enumerated else "problems and for other draws"
        low, high = min(control.random), max(control.random)
        return [
            f"As many other experts of the same layers raised ({sets} sets, {what}): {low:+.4f} to {high:+.4f}.",
            f"Task experts minus the mean of those sets: {control.difference}; the interval holds for other {over}.",
            f"By loss, the lowest first, the task experts come {_ordinal(control.rank)} of {sets + 1}: "
            f"p = {control.p_value:.3f} that as many random experts do as well.",
        ]

    @property
    def conclusion(self) -> str:
        """The conclusion from the first plan and its random control together."""
        raised = self.outcomes[0].mean.verdict
        if raised == "lower":
            return f"raising the task experts lowers the loss, {self._beyond_random()}"
        if raised == "higher":
            return "raising the task experts does not help: the loss rises"
        return "raising the task experts makes no difference that these texts can show"

    def _beyond_random(self) -> str:
        if self.control is None:
            return "and there are no other experts to compare with"
        if self.control.difference.verdict != "lower":
            return "though not clearly more than the mean of as many random experts"
        return f"more than the mean of as many random experts (p = {self.control.p_value:.3f} for one such set)"

    def _end(self) -> str:
        lines = [f"Pictures: {', '.join(map(str, self.pictures))}"] if self.pictures else []
        state = "restored, equal bit for bit" if self.restored else "NOT restored: its tensors or its output changed"
        return "\n".join([*lines, f"The model was {state}. {self.seconds:.0f} s."])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        same = (
            "model",
            "layers",
            "experts",
            "top_k",
            "languages",
            "sentences",
            "threshold",
            "middle",
            "base",
            "evaluated",
            "restored",
            "seconds",
        )
        return {name: getattr(self, name) for name in same} | {
            "divergence": self.divergence.to_dict(),
            "unrelated_divergence": plain(self.unrelated),
            "cut": self.cut,
            "task_experts": {
                f"{threshold:g}": {layer: list(experts) for layer, experts in selection.items()}
                for threshold, selection in self.found.items()
            },
            "outcomes": [plain(asdict(outcome)) for outcome in self.outcomes],
            "by_threshold": {
                f"{threshold:g}": plain(asdict(change)) for threshold, change in self.by_threshold.items()
            },
            "random_control": self.control.to_dict() if self.control is not None else None,
            "conclusion": self.conclusion if self.outcomes else None,
            "pictures": [str(path) for path in self.pictures],
        }


def _number(experts: ExpertSelection) -> str:
    return f"{len(experts)} expert{'' if len(experts) == 1 else 's'}"


def _ordinal(place: int) -> str:
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def _marked(difference: Difference, corrected: bool) -> str:
    stars = "" if difference.verdict == "unclear" else "**" if corrected else "*"
    return f"{difference.value:+.4f}{stars:<2}"


def span(layers: Sequence[int]) -> str:
    """Format adjacent layers, such as "2-5"."""
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"

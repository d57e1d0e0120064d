"""Would raising the task experts have shown a gain if there were one to show? A positive control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_route.base.table import number_of
from moe_route.demo.circle import DemoTexts
from moe_route.demo.measurement import PIVOT, Measurement
from moe_route.demo.wording import paragraph
from moe_route.experiments import PositiveControl, positive_control
from moe_route.steering import ExpertSelection

CHOSEN_ON = ("deu_Latn", "hin_Deva", "swh_Latn")  # damage and strength are chosen there, and told of the others
SAMPLED = 40  # problems of a language on which random sets are measured


@dataclass(frozen=True)
class Control:
    """The positive control as a finding."""

    result: PositiveControl

    @property
    def sentence(self) -> str:
        """What it shows, from the intervals."""
        return self.result.sentence

    def __str__(self) -> str:
        chosen = ", ".join(self.result.chosen_on)
        told = number_of(len(self.result.told), "other language")
        note = f"Damage and strength of the sentence were chosen on {chosen}; it tells of the {told} by themselves."
        return "\n\n".join((paragraph(self.sentence), *map(str, self.result.tables()), paragraph(note)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return self.result.to_dict()


def control(run: Measurement, study: DemoTexts, experts: ExpertSelection, draws: int) -> Control | None:
    """Mislead every language towards its general text, and raise the task experts of English.

    The shift is found in the problems that all languages saw and in half of the sentences, and measured on problems
    with other numbers. None without task experts or a language beside English.
    """
    languages = [language for language in study.problems.languages if language != PIVOT]
    if not experts or not languages:
        return None
    result = positive_control(
        run.language_model,
        study.problems.subset("seen"),
        study.finding,
        study.tasks["sums"],
        experts,
        reference=PIVOT,
        chosen_on=[language for language in CHOSEN_ON if language in languages],
        draws=draws,
        sampled=SAMPLED,
        routed=run.routed,
        batch_size=run.batch_size,
        max_length=run.max_length,
        progress=run.progress,
    )
    return Control(result)

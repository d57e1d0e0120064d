"""The results of the demonstration, as text and as data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moe_route.base import files
from moe_route.base.table import number_of
from moe_route.data import demo_findings
from moe_route.demo.wording import paragraph
from moe_route.runs.language_model import DEMO_MODEL

YOURS = """\
  with routed.record() as sums: model(**tokenizer("21 plus 8 is 29", return_tensors="pt"))
  with routed.record() as text: model(**tokenizer("She left at 8.", return_tensors="pt"))
  experts = mr.analysis.task_experts(sums.statistics(), text.statistics(), threshold=0.3)
  with routed.steer(mr.Plan.forbid(experts)): model.generate(**prompt)"""

if TYPE_CHECKING:
    from moe_route.demo.language_experts import LanguageExpertsOff
    from moe_route.demo.published_u import PublishedU
    from moe_route.demo.task_experts import TaskExpertsOff


class Finding(Protocol):
    """One finding: `str` gives its text for a terminal."""

    @property
    def sentence(self) -> str:
        """What was found, in one plain sentence."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""


@dataclass
class DemoReport:
    """All results of the demonstration. `str(report)` is the printed text, `to_dict` the JSON content.

    Attributes:
        model: its name.
        layers, experts, top_k: number of MoE layers, and the largest number of experts and of chosen ones of a layer.
        languages, sentences: of the general text.
        problems: number of sums per language.
        cut: sentences on the texts that were cut.
        published_u: of another model, from its published routing.
        task_experts_off, language_experts_off: the findings on this model, in the order of the text.
        page: the findings as pictures, to open in a browser; None where no folder was asked for.
        restored: whether the model is the same as before, bit for bit.
        seconds: from beginning to end.
    """

    model: str
    layers: int
    experts: int
    top_k: int
    languages: tuple[str, ...]
    sentences: int
    problems: int
    cut: list[str]
    published_u: PublishedU
    task_experts_off: TaskExpertsOff
    language_experts_off: LanguageExpertsOff
    page: Path | None = None
    restored: bool = False
    seconds: float = 0.0

    def findings(self) -> Iterator[tuple[str, Finding]]:
        """The findings with their names, in the order of the text."""
        yield "published_u", self.published_u
        yield "task_experts_off", self.task_experts_off
        yield "language_experts_off", self.language_experts_off

    def __str__(self) -> str:
        parts = [f"{number}. {finding}" for number, (_, finding) in enumerate(self.findings(), 1)]
        own = f"{self._not_measured()} On your model, after `routed = mr.attach(model)`:"
        return "\n\n".join([*parts, "\n".join((paragraph(own), YOURS, *self._notes(), paragraph(self._state())))])

    def _not_measured(self) -> str:
        """What was measured by `examples/findings`, and shown by it or not."""
        if self.model != DEMO_MODEL:
            return f"Not measured here: a U, transfer, raising (examples/findings/run.py --model {self.model})."
        told: dict[bool, list[str]] = {True: [], False: []}
        for one in demo_findings()["claims"]:
            told[one["shown"]].append(f"{one['claim']} ({one['value']:+.2f})")
        parts = [
            f"{how} at this size: {', '.join(told[shown])}"
            for shown, how in ((True, "Shown"), (False, "Not shown"))
            if told[shown]
        ]
        return f"{'. '.join(parts)}: `make findings`, examples/study/README.md."

    def _notes(self) -> list[str]:
        """What else the numbers depend on: texts that were cut, and languages without problems."""
        asked = len(self.task_experts_off.languages)
        few = [f"2 is on {asked} of {len(self.languages)} languages: the shipped problems have no others."]
        cut = [f"{note[0].upper()}{note[1:]}." for note in self.cut]
        return [paragraph(one) for one in (*cut, *(few if asked < len(self.languages) else []))]

    def _state(self) -> str:
        state = "restored, equal bit for bit" if self.restored else "NOT restored: its tensors or its output changed"
        layers = f"{number_of(self.layers, 'layer')} of {self.experts} experts"
        page = "" if self.page is None else f" Open {self.page}"
        return f"Model {self.model} ({layers}): {state}. {self.seconds:.0f} s.{page}"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        same = ("model", "layers", "experts", "top_k", "sentences", "problems", "cut", "restored", "seconds")
        content = {name: getattr(self, name) for name in same} | {"languages": list(self.languages)}
        content |= {name: finding.to_dict() for name, finding in self.findings()}
        return content | {"page": None if self.page is None else str(self.page)}

    def write(self, folder: Path) -> None:
        """Write the report, as text and as JSON."""
        files.write_text(folder / "report.txt", f"{self}\n")
        files.write_text(folder / "report.json", f"{json.dumps(self.to_dict(), indent=1)}\n")

"""The results of the demonstration, as text and as data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moe_route.base import files
from moe_route.base.table import number_of
from moe_route.demo.wording import paragraph

if TYPE_CHECKING:
    from moe_route.demo.language_experts import LanguageExpertsOff
    from moe_route.demo.task_experts import TaskExpertsOff


class Finding(Protocol):
    """One finding: `str` gives its text, which begins with its sentence."""

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
        problems: number of problems per language.
        cut: sentences on the texts that were cut.
        task_experts_off, language_experts_off: the findings, in the order of the text.
        restored: whether the model is the same as before, bit for bit.
        pictures: files.
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
    task_experts_off: TaskExpertsOff
    language_experts_off: LanguageExpertsOff
    restored: bool = False
    pictures: list[Path] = field(default_factory=list)
    seconds: float = 0.0

    def findings(self) -> Iterator[tuple[str, Finding]]:
        """The findings with their names, in the order of the text."""
        yield "task_experts_off", self.task_experts_off
        yield "language_experts_off", self.language_experts_off

    def __str__(self) -> str:
        parts = [f"{number}. {finding}" for number, (_, finding) in enumerate(self.findings(), 1)]
        return "\n\n".join((self._beginning(), *parts, self._end()))

    def _beginning(self) -> str:
        return paragraph(
            f"Model {self.model}: {number_of(self.layers, 'MoE layer')} of {self.experts} experts, top-{self.top_k}.",
            self._material(),
            *(f"{note[0].upper()}{note[1:]}." for note in self.cut),
        )

    def _material(self) -> str:
        sentences, problems = number_of(self.sentences, "sentence"), number_of(self.problems, "problem")
        asked, languages = len(self.task_experts_off.languages), number_of(len(self.languages), "language")
        if asked == len(self.languages):
            return f"{sentences} and {problems} in {languages}."
        return f"{sentences} in {languages}, {problems} in {asked} of them."

    def _end(self) -> str:
        lines = [paragraph(f"Pictures: {', '.join(map(str, self.pictures))}")] if self.pictures else []
        state = "restored, equal bit for bit" if self.restored else "NOT restored: its tensors or its output changed"
        return "\n".join([*lines, f"The model was {state}. {self.seconds:.0f} s."])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        same = ("model", "layers", "experts", "top_k", "sentences", "problems", "cut", "restored", "seconds")
        content = {name: getattr(self, name) for name in same} | {"languages": list(self.languages)}
        content |= {name: finding.to_dict() for name, finding in self.findings()}
        return content | {"pictures": [str(path) for path in self.pictures]}

    def write(self, folder: Path) -> None:
        """Write the report beside its pictures, as text and as JSON."""
        files.write_text(folder / "report.txt", f"{self}\n")
        files.write_text(folder / "report.json", f"{json.dumps(self.to_dict(), indent=1)}\n")

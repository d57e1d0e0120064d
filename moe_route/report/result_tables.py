"""Tables of results that other commands write, such as the effect of a plan by language.

A file of tables is JSON:

    {"tables": [{"title": "...", "note": "...", "columns": ["language", "change", "low", "high"],
                 "rows": [["eng_Latn", -0.1, -0.2, 0.0]],
                 "effect": {"label": "language", "value": "change", "low": "low", "high": "high"}}]}

``note`` and ``effect`` may be left out. An effect is drawn as a point with its interval; ``label`` may be a list of
columns. Blue is better: "better" in an effect says which changes are, "lower" (losses, the default) or "higher"
(accuracies). ``moe-route steer --json`` is read, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from moe_route.analysis.result import plain
from moe_route.base import schema

TABLES_FILE = "tables.json"
_EFFECT = {"label": "language", "value": "change", "low": "low", "high": "high"}


@dataclass(frozen=True)
class Effect:
    """The columns of a table that make up a figure.

    Attributes:
        label: one column, or several.
        value, low, high: columns of the estimates and of the ends of their intervals.
        better: which changes are drawn in blue: "lower" for losses, "higher" for accuracies.
    """

    label: str | tuple[str, ...]
    value: str
    low: str | None = None
    high: str | None = None
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True)
class ResultTable:
    """A table with a title.

    Attributes:
        title: of the table.
        columns: their names.
        rows: with a cell for each column.
        note: a remark below the table.
        effect: keys of `Effect`: which columns are drawn as points with intervals, if any.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    effect: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"the table {self.title!r} has {len(self.columns)} columns, and a row of {len(row)}")
        if self.effect is None:
            return
        effect = schema.read(Effect, self.effect, f"the effect of the table {self.title!r}", ValueError)
        labels = effect.label if isinstance(effect.label, tuple) else (effect.label,)
        for column in (*labels, effect.value, effect.low, effect.high):
            if column is not None and column not in self.columns:
                raise ValueError(f"the effect of the table {self.title!r} names no column: {column!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {
            "title": self.title,
            "note": self.note,
            "columns": list(self.columns),
            "rows": plain(self.rows),  # no number is shown as none
            "effect": None if self.effect is None else dict(self.effect),
        }


@dataclass(frozen=True)
class ResultsContent:
    """Tables for a report.

    Attributes:
        tables: in the order in which they are shown.
    """

    tables: tuple[ResultTable, ...]


@dataclass(frozen=True)
class _SteeredLoss:
    """The loss of a language, in nats per token."""

    language: str
    texts: int
    loss: float
    steered: float
    change: float
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class _SteeredLosses:
    """What ``moe-route steer --json`` prints."""

    plan: str
    unit: str
    languages: tuple[_SteeredLoss, ...]


RESULTS = schema.Kind("results", ResultsContent, mark="")
"""Files of tables."""
_LOSSES = schema.Kind("steer-answer", _SteeredLosses, mark="")


def is_results(content: Any) -> bool:
    """Whether parsed JSON holds tables of results."""
    return isinstance(content, Mapping) and (
        isinstance(content.get("tables"), list) or (isinstance(content.get("languages"), list) and "unit" in content)
    )


def read_results(path: Path) -> list[ResultTable]:
    """The tables of a file. Raises ``FileRefusedError`` for JSON in another form."""
    content = schema.load_json(path)
    if not is_results(content):
        raise schema.FileRefusedError(f'{path} holds no tables of results: write {{"tables": [...]}}')
    if "tables" in content:
        return list(RESULTS.read(content, str(path)).tables)
    return [_of_steer(_LOSSES.read(content, str(path)), path.stem)]


def _of_steer(content: _SteeredLosses, name: str) -> ResultTable:
    """The answer of ``moe-route steer --json``: the change of the loss by language."""
    columns = tuple(field.name for field in fields(_SteeredLoss)) if content.languages else ("language",)
    return ResultTable(
        f"Loss with and without a plan ({name})",
        columns,
        tuple(tuple(vars(row).values()) for row in content.languages),
        f"In {content.unit}. A negative change is a better prediction. Intervals are paired over texts. Plan "
        f"{content.plan}.",
        _EFFECT if content.languages else None,
    )

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_route.analysis.result import plain
from moe_route.base.budget import json_of

TABLES_FILE = "tables.json"
_EFFECT = {"label": "language", "value": "change", "low": "low", "high": "high"}


@dataclass(frozen=True)
class ResultTable:
    """A table with a title, a note, and the columns that make up a figure, if there are such."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    effect: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"the table {self.title!r} has {len(self.columns)} columns, and a row of {len(row)}")
        effect = dict(self.effect or {})
        better = effect.pop("better", "lower")
        if better not in ("lower", "higher"):
            raise ValueError(f"the effect of the table {self.title!r} is better if {better!r}: write lower or higher")
        for given in effect.values():
            for column in given if isinstance(given, (list, tuple)) else [given]:
                if column not in self.columns:
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


def is_results(content: Any) -> bool:
    """Whether parsed JSON holds tables of results."""
    return isinstance(content, Mapping) and (
        isinstance(content.get("tables"), list) or (isinstance(content.get("languages"), list) and "unit" in content)
    )


def read_results(path: Path) -> list[ResultTable]:
    """The tables of a file. Raises ``ValueError`` for JSON in another form."""
    content = json_of(path)
    if not is_results(content):
        raise ValueError(f'{path} holds no tables of results: write {{"tables": [...]}}')
    try:
        if "tables" in content:
            return [_table(one) for one in content["tables"]]
        return [_of_steer(content, path.stem)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds a table in another form ({error!r}): give title, columns and rows") from error


def _table(content: Mapping[str, Any]) -> ResultTable:
    effect = content.get("effect")
    return ResultTable(
        str(content["title"]),
        tuple(map(str, content["columns"])),
        tuple(tuple(row) for row in content["rows"]),
        str(content.get("note") or ""),
        None if effect is None else dict(effect),
    )


def _of_steer(content: Mapping[str, Any], name: str) -> ResultTable:
    """The answer of ``moe-route steer --json``: the change of the loss by language."""
    rows: Sequence[Mapping[str, Any]] = content["languages"]
    columns = tuple(rows[0]) if rows else ("language",)
    plan = content.get("plan")
    return ResultTable(
        f"Loss with and without a plan ({name})",
        columns,
        tuple(tuple(row[column] for column in columns) for row in rows),
        f"In {content['unit']}. A negative change is a better prediction. Intervals are paired over texts."
        + (f" Plan {plan}." if plan else ""),
        _EFFECT if rows and {"language", "change", "low", "high"} <= set(columns) else None,
    )

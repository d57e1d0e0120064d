"""Tables in plain text, for the command line and the demonstration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = ["number", "number_of", "table"]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns with two spaces between: to the right where every cell is a number or empty, else to the left."""
    raw = [list(row) for row in rows]
    body = [[number(cell) for cell in row] for row in raw]
    columns = range(len(head))
    widths = [max(len(line[column]) for line in [list(head), *body]) for column in columns]
    right = [bool(raw) and all(_numeric(row[column]) for row in raw) for column in columns]
    lines = ["  ".join(_pad(line[c], widths[c], right[c]) for c in columns).rstrip() for line in [list(head), *body]]
    return "\n".join(lines)


def number(value: object) -> str:
    """Three digits after the point for a float, '-' for None and for one that is undefined."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def number_of(count: int, noun: str) -> str:
    """The count with its noun: "1 group", "2 groups"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _numeric(cell: object) -> bool:
    if isinstance(cell, str):
        return not cell or cell[0] in "+-0123456789"
    return cell is None or isinstance(cell, (int, float))


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)

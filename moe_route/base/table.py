"""Tables as plain text, for terminals, as HTML, for notebooks, and as data frames; only this module imports pandas."""

from __future__ import annotations

import math
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 120  # columns of a terminal that text is broken for
_LONGEST_CELL = 500  # characters
# control characters but tabs and line feeds, marks that turn the direction of what follows, and halves of characters
_UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_FORMULA = tuple("=+-@\t\r")  # what begins a formula in programs of tables


@dataclass(frozen=True)
class Table:
    """A table with a line above it and lines below it: ``str`` gives plain text, a notebook shows HTML.

    Attributes:
        head: names of the columns.
        rows: the cells of each row, one for each column; numbers are formatted by :func:`number`.
        title, note: text above and below, "" for none.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    note: str = ""

    def __str__(self) -> str:
        title, note = wrapped(printable(self.title)), wrapped(printable(self.note))
        return "\n".join(part for part in (title, table(self.head, self.rows), note) if part)

    def _repr_html_(self) -> str:
        right = _right_columns(self.head, self.rows)
        lines = [_html_row("th", self.head, right), *(_html_row("td", row, right) for row in self.rows)]
        title = f"<caption>{_html_lines(self.title)}</caption>" if self.title else ""
        note = f"<p>{_html_lines(self.note)}</p>" if self.note else ""
        return f"<table>{title}<thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>{note}"


class ShownAsTables(ABC):
    """Base of results that are shown as tables: ``repr`` gives text, a notebook shows HTML.

    A subclass defines :meth:`tables`. If it is a dataclass, it needs ``repr=False``, since a dataclass otherwise
    generates a ``repr`` of its own.
    """

    __slots__ = ()

    @abstractmethod
    def tables(self) -> Sequence[Table]:
        """The tables to show, from top to bottom."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self.tables()))

    def _repr_html_(self) -> str:
        return "".join(part._repr_html_() for part in self.tables())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format columns with two spaces between; columns of numbers (and empty cells) are aligned to the right."""
    raw = [list(row) for row in rows]
    body = [[_cell(cell) for cell in row] for row in (head, *raw)]
    columns = range(len(head))
    widths = [max(len(line[column]) for line in body) for column in columns]
    right = _right_columns(head, raw)
    lines = ["  ".join(_pad(line[c], widths[c], right[c]) for c in columns).rstrip() for line in body]
    return "\n".join(lines)


def number(value: object) -> str:
    """Format a float with three decimals; None and NaN become '-'."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: what it would not show is escaped, as ``\\u001b``.

    That is also how JSON escapes it, so printed JSON stays the same JSON.
    """
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _cell(value: object) -> str:
    """A cell on one line, in at most 500 characters."""
    text = printable(number(value)).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 3]}..."


def csv_text(frame: pd.DataFrame) -> str:
    """A data frame as CSV, in which no name is a formula: ``=1+1`` is written as ``'=1+1``. Numbers stay numbers."""
    harmless = frame.rename(columns=_no_formula)
    for name in harmless.columns[[dtype.kind not in "biufc" for dtype in harmless.dtypes]]:
        harmless[name] = harmless[name].map(_no_formula)
    return str(harmless.to_csv(index=False))


def _no_formula(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def duration(seconds: float) -> str:
    """Format a time with three digits and its unit: "1.25 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def interval(low: float, high: float, *, digits: int = 3, none: str = "-") -> str:
    """Format the signed ends of an interval: "[-0.012, +0.034]"; ``none`` if an end is NaN."""
    if math.isnan(low) or math.isnan(high):
        return none
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def _right_columns(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[bool]:
    """Whether each column holds numbers, which are aligned to the right."""
    columns = [[row[column] for row in rows if row[column] != ""] for column in range(len(head))]
    return [bool(cells) and all(map(_numeric, cells)) for cells in columns]


def wrapped(text: str, indent: str = "") -> str:
    """Indent lines, and break those that are wider than a terminal; what is broken off is indented by four more."""
    breaker = textwrap.TextWrapper(
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}    ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )
    return "\n".join(part for line in text.splitlines() for part in breaker.wrap(line))


def number_of(count: int, noun: str) -> str:
    """The count with its noun: "1 group", "2 groups"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _numeric(cell: object) -> bool:
    if isinstance(cell, str):  # a sign or a digit begins a number; what has words behind it is text
        return cell[0] in "+-0123456789" and " " not in cell
    return cell is None or isinstance(cell, (int, float))


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def _html_row(tag: str, cells: Sequence[object], right: Sequence[bool]) -> str:
    sides = ["right" if to_right else "left" for to_right in right]
    shown = [
        f'<{tag} style="text-align: {side}">{escape(_cell(cell))}</{tag}>'
        for cell, side in zip(cells, sides, strict=True)
    ]
    return f"<tr>{''.join(shown)}</tr>"


def _html_lines(text: str) -> str:
    return "<br>".join(escape(printable(line)) for line in text.splitlines())


def data_frame(columns: Mapping[str, Any], axes: Mapping[str, Sequence[Any]] | None = None) -> pd.DataFrame:
    """Build a data frame of columns by name.

    With ``axes``, the columns are flattened arrays over those axes, the last axis fastest, and the frame starts with a
    column per axis. Raises ``ImportError`` if pandas is missing, and names the extra to install.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("data frames need pandas: pip install 'moe-route[analysis]'") from error
    if axes is None:
        return pandas.DataFrame(dict(columns))
    index = pandas.MultiIndex.from_product(list(axes.values()), names=list(axes))
    return pandas.DataFrame(dict(columns), index=index).reset_index()

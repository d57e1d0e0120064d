"""Words and numbers of the demonstration's text: lines of one width, changes with their intervals, names."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable

from moe_route.analysis import Difference
from moe_route.base.table import interval
from moe_route.data.languages import language_name

WIDTH = 100  # columns of the text at most
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"  # bars of one to eight steps
_NUMBER = 3  # columns of "1. ", which stands before a finding


def name(language: str) -> str:
    """The name of a language without its script, such as "Chinese"; the code itself if it is none."""
    return language_name(language).partition(" (")[0]


def columns() -> int:
    """Columns of the text: those of the terminal, `WIDTH` at most and where there is none."""
    return max(60, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def paragraph(*sentences: str) -> str:
    """Join sentences, and break the lines."""
    return textwrap.fill(
        " ".join(sentence for sentence in sentences if sentence),
        columns() - _NUMBER,
        break_long_words=False,
        break_on_hyphens=False,
    )


def told(change: Difference, digits: int = 2) -> str:
    """A change with its interval: "-0.53 [-0.56, -0.50]"."""
    ends = interval(change.low, change.high, digits=digits, none="(no interval)")
    return f"{change.value:+.{digits}f} {ends}"


def bars() -> str:
    """Eight characters, from the lowest to the highest bar; ASCII ones where standard output cannot show blocks."""
    try:
        _BLOCKS.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return _ASCII
    return _BLOCKS


def spark(values: Iterable[float], step: float) -> str:
    """A bar for each value from 0, which is higher by one for each `step`; the highest stands for all above it."""
    levels = bars()
    return "".join(levels[min(int(value / step), len(levels) - 1)] for value in values)


def bar(kept: float, before: float, cells: int) -> str:
    """A bar of `cells` characters for 1: what is kept of `before`, and fainter what is lost."""
    full, faint = ("█", "░") if bars() == _BLOCKS else ("#", ".")
    own = round(min(kept, 1) * cells)
    lost = max(round(min(before, 1) * cells) - own, 0)
    return full * own + faint * lost + " " * (cells - own - lost)

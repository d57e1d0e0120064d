"""Words and numbers of the demonstration's text: lines of one width, changes with their intervals, names."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence

from moe_route.analysis import Difference, RandomControl
from moe_route.base.table import interval
from moe_route.data.languages import language_name

WIDTH = 100  # columns of the text
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"  # bars of one to eight steps
_NUMBER = 3  # columns of "1. ", which stands before a finding


def name(language: str) -> str:
    """The name of a language without its script, such as "Chinese"; the code itself if it is none."""
    return language_name(language).partition(" (")[0]


def paragraph(*sentences: str) -> str:
    """Join sentences, and break the lines."""
    return textwrap.fill(
        " ".join(sentence for sentence in sentences if sentence),
        WIDTH - _NUMBER,
        break_long_words=False,
        break_on_hyphens=False,
    )


def told(change: Difference, digits: int = 2) -> str:
    """A change with its interval: "-0.53 [-0.56, -0.50]"."""
    ends = interval(change.low, change.high, digits=digits, none="(no interval)")
    return f"{change.value:+.{digits}f} {ends}"


def starred(change: Difference, digits: int = 2) -> str:
    """A change, with a star if its interval leaves out zero."""
    return f"{change.value:+.{digits}f}{' ' if change.verdict == 'unclear' else '*'}"


def verdicts(changes: Iterable[Difference]) -> str:
    """In how many cases the value is lower, higher, and neither that the interval can show."""
    seen = [change.verdict for change in changes]
    return f"lower in {seen.count('lower')}, higher in {seen.count('higher')}, unclear in {seen.count('unclear')}"


def span(layers: Sequence[int]) -> str:
    """Format adjacent layers, such as "2-5"."""
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"


def standing(control: RandomControl) -> str:
    """What the random sets say of a plan, in words."""
    count = len(control.random)
    if control.rank == 1:
        return f"none of the {count} sets comes as far (p = {control.p_value:.3f})"
    as_far = control.rank - 1
    return f"{as_far} of the {count} sets {'comes' if as_far == 1 else 'come'} as far (p = {control.p_value:.3f})"


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

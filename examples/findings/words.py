"""Words for changes, layers and random sets in the text of the findings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_route.analysis import Difference, RandomControl


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

"""Names of layers: indices from 0 among the MoE layers, published ranges, and short printing ("8-35")."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index


def layers(first: int, last: int | None = None, *, base: int = 0) -> range:
    """Layer indices from a published range, both ends included: ``layers(8, 35)`` is ``range(8, 36)``.

    Args:
        first: the first layer.
        last: the last layer; by default the range is ``first`` alone.
        base: the number that the publication gives the first MoE layer, 0 or 1. ``layers(9, 36, base=1)`` is also
            ``range(8, 36)``.

    Raises ``ValueError`` for another base, a layer below it, and a range that ends before it begins.
    """
    if base not in (0, 1):
        raise ValueError(f"base must be 0 or 1, the number of the first MoE layer, not {base!r}")
    start, end = index(first), index(first if last is None else last)
    if start < base or end < start:
        raise ValueError(f"there are no layers {start} to {end}: they count upwards from {base}, both ends included")
    return range(start - base, end - base + 1)


def as_layers(numbers: Iterable[int] | int) -> tuple[int, ...]:
    """Sort layer indices and remove repeats; a single number may be given alone.

    Raises ``ValueError`` for a number below 0 and ``TypeError`` for anything but whole numbers.
    """
    chosen = sorted({index(number) for number in ([numbers] if isinstance(numbers, int) else numbers)})
    if chosen and chosen[0] < 0:
        raise ValueError(f"there is no layer {chosen[0]}: MoE layers count from 0")
    return tuple(chosen)


def show_numbers(numbers: Iterable[int]) -> str:
    """Print ``[1, 2, 3, 7]`` as ``"1-3, 7"``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)

"""How a user names layers: 0-based MoE layers, a recipe's own base, and short printing ("8-35")."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

__all__ = ["as_layers", "show_numbers"]


def as_layers(layers: Iterable[int] | int, layer_base: int = 0) -> tuple[int, ...]:
    """Sorted 0-based MoE layers from numbers counted from ``layer_base`` (0 or 1).

    Published recipes often do not say whether "layers 8-35" counts from 0 or 1; ``layer_base`` says it. Raises
    ``ValueError`` for a number below the base and ``TypeError`` for what is not a whole number.
    """
    if layer_base not in (0, 1):
        raise ValueError(f"layer_base must be 0 or 1, not {layer_base!r}")
    numbers = [layers] if isinstance(layers, int) else layers
    found = sorted({index(number) for number in numbers})
    if found and found[0] < layer_base:
        raise ValueError(
            f"layer {found[0]} is below layer_base={layer_base}: layers count upwards from the first MoE layer"
        )
    return tuple(number - layer_base for number in found)


def show_numbers(numbers: Iterable[int]) -> str:
    """``[1, 2, 3, 7]`` as ``"1-3, 7"``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)

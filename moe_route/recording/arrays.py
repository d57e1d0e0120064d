"""The arrays that a recording can add up beside the tables of the gate: their axes, and how those of two runs merge."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

# Sizes of hidden states and outputs are added up in multiples of this: a term is rounded by 3e-8, sums may reach 5e11.
SIZE_UNIT = 2.0**-24
logger = logging.getLogger(__name__)
Axis = Literal["layer", "pair", "expert", "hidden"]


class AccumulatedArray(NamedTuple):
    """One array with the groups as axis 0; an entry of `ACCUMULATED`."""

    axes: tuple[Axis, ...]  # the axes after the group; "pair" is layer l with layer l + 1
    option: str  # how `record` is asked for it
    merge: Literal["sum", "max"] = "sum"
    dtype: Literal["int64", "float64"] = "int64"  # sums in int64 merge exactly in any order
    signed: bool = False  # whether an element may be negative

    def rows(self, layers: int) -> int:
        """Length of axis 1."""
        return max(layers - 1, 0) if self.axes[0] == "pair" else layers

    def shape(self, groups: int, layers: int, experts: int, hidden: int) -> tuple[int, ...]:
        """Shape of the whole array; E is that of the widest layer."""
        sizes = {"layer": layers, "pair": self.rows(layers), "expert": experts, "hidden": hidden}
        return (groups, *(sizes[axis] for axis in self.axes))


ACCUMULATED: Mapping[str, AccumulatedArray] = {
    # sums over finished sequences of the mean Jaccard index of their tokens, in multiples of 2^-32, and their number
    "consistency": AccumulatedArray(("layer",), "consistency=True"),
    "consistency_sequences": AccumulatedArray(("layer",), "consistency=True"),
    # tokens that chose both experts; tokens that chose expert e in layer l and e' in layer l + 1
    "co_selection": AccumulatedArray(("layer", "expert", "expert"), "pairs=True"),
    "transitions": AccumulatedArray(("pair", "expert", "expert"), "pairs=True"),
    # over the tokens t that chose expert e with weight g_e(t): sums of g_e(t) * |f_e(x_t)| and of |f_e(x_t)| in
    # multiples of `SIZE_UNIT`, largest absolute element of any f_e(x_t), number of first tokens (position 0)
    "weighted_norm": AccumulatedArray(("layer", "expert"), "expert_outputs=True"),
    "norm": AccumulatedArray(("layer", "expert"), "expert_outputs=True"),
    "peak": AccumulatedArray(("layer", "expert"), "expert_outputs=True", merge="max", dtype="float64"),
    "first": AccumulatedArray(("layer", "expert"), "expert_outputs=True"),
    # sum over finished sequences of the mean router input, in multiples of `SIZE_UNIT`, and the number of sequences
    "hidden": AccumulatedArray(("layer", "hidden"), "hidden=True", signed=True),
    "hidden_sequences": AccumulatedArray(("layer",), "hidden=True"),
}


def checked_array(name: str, array: np.ndarray, groups: int, layers: int, experts: int) -> np.ndarray:
    """A read-only copy of an array. Raises ``ValueError`` for an unknown name, or a wrong shape or dtype."""
    if name not in ACCUMULATED:
        raise ValueError(f"unknown array {name!r}: one of {', '.join(ACCUMULATED)}")
    of = ACCUMULATED[name]
    hidden = array.shape[-1] if of.axes[-1] == "hidden" and array.ndim else 0
    if array.shape != of.shape(groups, layers, experts, hidden):
        raise ValueError(f"{name} has shape {list(array.shape)}, not {list(of.shape(groups, layers, experts, hidden))}")
    if array.dtype != of.dtype:
        raise ValueError(f"{name} must hold {of.dtype}, not {array.dtype}")
    owned = np.array(array)
    owned.setflags(write=False)
    return owned


def selected_array(
    name: str, array: np.ndarray, groups: Sequence[int], layers: Sequence[int], experts: int
) -> np.ndarray | None:
    """The rows of some groups and layers by index, with ``experts`` experts.

    None if the array holds pairs of layers, and two layers that were not neighbors would become neighbors.
    """
    of = ACCUMULATED[name]
    rows = list(layers)
    if of.axes[0] == "pair":
        rows = rows[:-1]
        if any(after != before + 1 for before, after in zip(rows, layers[1:], strict=True)):
            return None
    ends = tuple(slice(experts) if axis == "expert" else slice(None) for axis in of.axes[1:])
    everything: tuple[slice, ...] = (slice(None), slice(None))
    return array[list(groups)][:, rows][everything + ends]


def broken_array(arrays: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with these arrays, or None: a value that is not finite, or negative where it cannot be."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            return f"{name} holds a value that is not finite"
        if not ACCUMULATED[name].signed and (array < 0).any():
            return f"{name} holds a negative sum"
    return None


def frozen(array: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A read-only copy in int64. Raises ``ValueError`` for another shape, or what is no integer."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}, not {list(shape)}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, not {array.dtype}")
    owned = np.array(array, dtype=np.int64)
    owned.setflags(write=False)
    return owned


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide, with NaN and no warning where the denominator is zero."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    out = np.full(shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=np.broadcast_to(denominator, shape) != 0)


def widths_of(counts: np.ndarray, layers: Sequence[str], num_experts: int | Sequence[int] | None) -> list[int]:
    """Number of experts of each layer of ``counts [G, L, E]``."""
    width = counts.shape[-1]
    numbers = np.arange(1, width + 1)
    used = (counts.any(axis=0) * numbers).max(axis=-1, initial=0).tolist()  # up to the last expert that was chosen
    if num_experts is None:
        padded = [f"{name} ({last} of {width})" for name, last in zip(layers, used, strict=True) if 0 < last < width]
        if padded:
            logger.warning(
                "no group chose the last experts of %d of %d layers, such as %s: if that is padding, pass num_experts",
                len(padded),
                len(layers),
                ", ".join(padded[:3]),
            )
        return [width] * len(layers)
    widths = [num_experts] * len(layers) if isinstance(num_experts, int) else [int(n) for n in num_experts]
    if len(widths) != len(layers) or max(widths, default=0) > width:
        raise ValueError(f"num_experts is one number, or one for each of {len(layers)} layers, up to {width}")
    for name, last, experts in zip(layers, used, widths, strict=True):
        if last > experts:
            raise ValueError(f"layer {name} has {experts} experts, and counts of expert {last - 1}: check num_experts")
    return widths

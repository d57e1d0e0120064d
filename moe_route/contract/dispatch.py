"""Where every routed slot goes: what `dispatch` returns and `permute` and `combine` read."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Dispatch"]


class Dispatch(NamedTuple):
    """Where every routed slot goes; int64.

    The number of rows R depends on shapes alone, never on the ids (no host synchronization): T * k with block 1, at
    most E * (block - 1) more with padding. Rows from ``offsets[E]`` on are not in use.
    """

    offsets: Tensor
    """[E + 1]: the row where expert e starts, a multiple of ``block``; offsets[E]: rows in use."""
    counts: Tensor
    """[E]: real rows of expert e."""
    order: Tensor
    """[R]: the slot t * k + j that a row serves, or -1."""
    inverse: Tensor
    """[T, k]: the row of a slot, or -1 if it is skipped."""

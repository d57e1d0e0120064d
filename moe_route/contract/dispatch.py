"""The row assignment that `dispatch` returns and that `permute` and `combine` read."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Dispatch"]


class Dispatch(NamedTuple):
    """Assigns each routed slot (one chosen expert of one token) to a row; rows are grouped by expert.

    All but `ends` are int64. The number of rows R depends on shapes only, never on the ids, so the host does not wait
    for a device. It is T * k with block 1, and at most E * (block - 1) more with larger blocks. Rows from
    ``offsets[E]`` on are unused.
    """

    offsets: Tensor
    """[E + 1]: first row of each expert, a multiple of ``block``; offsets[E] is the number of rows in use."""
    ends: Tensor
    """int32 [E]: ``offsets[1:]``, for `torch.nn.functional.grouped_mm`, which takes it as ``offs``."""
    counts: Tensor
    """[E]: number of rows of each expert that serve a slot."""
    order: Tensor
    """[R]: the slot, t * k + j, that each row serves, or -1."""
    inverse: Tensor
    """[T, k]: the row of each slot, or -1 for a skipped slot."""

"""A copy of expert weights in the order in which a CPU kernel reads them: what `ops.pack_experts` returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["PackedExperts"]


class PackedExperts(NamedTuple):
    """Both weights of experts in panels of 64 rows, see csrc/include/moe_route/experts.h."""

    up: Tensor
    """int32 [E, panels, words of a row, 64]."""
    down: Tensor
    """int32, likewise."""
    pairing: str
    """That of `up`, which decides which of its rows share a panel."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory: those of the weights, with rows rounded up to 64 and columns to 16 bytes."""
        return self.up.nbytes + self.down.nbytes

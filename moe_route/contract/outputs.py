"""Sizes of the outputs of chosen experts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["SeenOutputs"]


class SeenOutputs(NamedTuple):
    """Sizes of the outputs f_e(x_t) of one layer's chosen experts; 0 in empty slots."""

    norms: Tensor  # float32 or float64 [T, k], Euclidean norm
    peaks: Tensor  # float32 or float64 [T, k], largest absolute element

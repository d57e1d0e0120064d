"""What an expert applies between its two products: data that the operators `expert_rows` and
`expert_activation` and their references read."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["KINDS", "PAIRINGS", "Activation"]

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
"""Activation functions, in the order of csrc/include/moe_route/activation.h from 1 on."""

PAIRINGS = ("none", "halves", "alternating")
"""Where the rows of the gate are in the first weight: there is none; they are the first half; every other row, the
first one to begin with."""


@dataclass(frozen=True)
class Activation:
    """An activation function, with the clamps of gpt-oss and its kin.

    Without a gate, an expert applies ``act(min(x, limit))``. With one, it applies ``act(min(gate, limit)) * (clamp(up,
    -limit, limit) + shift)``. gpt-oss is ``Activation("silu", alpha=1.702, limit=7.0, shift=1.0)``.
    """

    kind: str = "silu"
    """One of `KINDS`."""
    alpha: float = 1.0
    """Factor inside the sigmoid of silu: ``x * sigmoid(alpha * x)``."""
    limit: float = math.inf
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown activation {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.alpha != 1.0 and self.kind != "silu":
            raise ValueError(f"alpha belongs to silu, and the activation is {self.kind!r}: leave it at 1")
        if not self.limit > 0:
            raise ValueError(f"limit must be above 0, got {self.limit}; math.inf is no limit")

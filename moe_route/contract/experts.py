"""Data of a call of the experts: activation, slots sorted by expert (`Dispatch`), packed weights, outputs seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_route.base.devices import upload

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
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
    """One of `ACTIVATIONS`."""
    alpha: float = 1.0
    """Factor inside the sigmoid of silu: ``x * sigmoid(alpha * x)``."""
    limit: float = math.inf
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.kind!r}; choose one of {', '.join(ACTIVATIONS)}")
        if self.alpha != 1.0 and self.kind != "silu":
            raise ValueError(f"alpha belongs to silu, and the activation is {self.kind!r}: leave it at 1")
        if not self.limit > 0:
            raise ValueError(f"limit must be above 0, got {self.limit}; math.inf is no limit")


class Dispatch(NamedTuple):
    """Assigns each routed slot (one chosen expert of one token) to a row; rows are grouped by expert.

    `ops.dispatch` returns it, `ops.permute` and `ops.combine` read it.

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


class SeenOutputs(NamedTuple):
    """Sizes of the outputs f_e(x_t) of one layer's chosen experts; 0 in empty slots."""

    norms: Tensor  # float32 or float64 [T, k], Euclidean norm
    peaks: Tensor  # float32 or float64 [T, k], largest absolute element


class PackedExperts(NamedTuple):
    """Both weights of experts in the order in which a CPU kernel reads them; `ops.pack_experts` returns it.

    They stand in panels of 64 rows, see csrc/include/moe_route/experts.h.
    """

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


@dataclass(frozen=True, slots=True, eq=False)
class AddedDirections:
    """Directions that a plan adds to outputs of experts in one layer, by steering row.

    Attributes:
        experts: int64 [n], the expert of each direction.
        full: bool [n], whether it is weighed by the softmax over all experts, not by the model's own weight.
        vectors: float32 [n, H].
        strength: float32 [rows, n]; 0 in rows without it.
    """

    experts: Tensor
    full: Tensor
    vectors: Tensor
    strength: Tensor

    def to(self, device: torch.device) -> AddedDirections:
        """Copy to another device, without waiting for it."""
        parts = (self.experts, self.full, self.vectors, self.strength)
        return AddedDirections(*(upload(part, device) for part in parts))

    def added(
        self, tokens: Tensor, ids: Tensor, weights: Tensor, logits: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """What is added to each token's output, float32 [T, H], and bool [T, 1], the tokens that get something.

        "model": ``strength * w_e * v`` for tokens that chose e, with the weight that the experts are given. "full":
        ``strength * scale * softmax(logits)_e * v`` for every token.

        Args:
            tokens: int32 [T, 4], the token table.
            ids: [T, k], the experts that are given the token.
            weights: [T, k] or [T, E], by slot or by expert.
            logits: [T, E], the router's own logits.
            scale: `RouterSpec.scale`, the factor on weights that the router applies.
        """
        row = torch.where(tokens[:, 3] != 0, tokens[:, 0], -1).to(torch.int64)
        here = (row >= 0) & (row < len(self.strength))
        strength = torch.where(here[:, None], self.strength[row.clamp(0, len(self.strength) - 1)], 0.0)
        chose = ids[:, :, None] == self.experts  # [T, k, n]
        if weights.shape == ids.shape:
            own = torch.where(chose, weights.float()[:, :, None], 0.0).sum(1)
        else:
            own = torch.where(chose.any(1), weights.float()[:, self.experts], 0.0)
        whole = scale * torch.softmax(logits.float(), 1)[:, self.experts]
        amount = strength * torch.where(self.full, whole, own)
        return amount @ self.vectors, (amount != 0).any(1, keepdim=True)

"""Count the choices of a step in one call for all layers, after its forward.

Between the experts of two layers every call meets cold caches, and takes several times as long. What a layer chose is
copied aside, which is cheap. Only on a CPU, where the operator runs as Python at every step: a CUDA graph would freeze
whether to count at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_route import ops
from moe_route.contract.spec import RouterSpec

if TYPE_CHECKING:
    from moe_route.integrations.vllm.sites import Site

__all__ = ["StepCounts"]

_MOST_TOKENS = 512  # of a larger step, counting is small beside the experts, and the copies are not


class StepCounts:
    """The choices of one step."""

    def __init__(self, sites: Sequence[Site]):
        self._sites = sites
        self._layers: dict[RouterSpec, list[int]] = {}  # layers that are counted in one call
        for layer, site in enumerate(sites):
            self._layers.setdefault(site.spec, []).append(layer)
        self._buffers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._kept: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(sites)

    def keep(self, layer: int, logits: Tensor, ids: Tensor, weights: Tensor) -> bool:
        """Copy the choice of a layer aside; False if the step is too large for that."""
        tokens = logits.shape[0]
        if tokens > _MOST_TOKENS:
            return False
        given = logits, ids, weights
        buffers = self._buffers.get(layer)
        if buffers is None:
            logits, ids, weights = (one.new_empty(_MOST_TOKENS, one.shape[1]) for one in given)
            buffers = self._buffers[layer] = logits, ids, weights
        kept = buffers[0][:tokens], buffers[1][:tokens], buffers[2][:tokens]
        torch._foreach_copy_(kept, given)
        self._kept[layer] = kept
        return True

    def count(self, tokens: Tensor) -> None:
        """Add what was kept to the statistics of its layers; ``tokens``: int32 [T, 4], the token table of the step."""
        for spec, layers in self._layers.items():
            found = [(layer, kept) for layer in layers if (kept := self._kept[layer]) is not None]
            if not found:
                continue
            logits, ids, weights = zip(*(kept for _, kept in found), strict=True)
            tables = [table for layer, _ in found if (table := self._sites[layer].statistics) is not None]
            ops.observe_layers(logits, ids, weights, spec, tokens=tokens[: logits[0].shape[0]], statistics=tables)
        self.forget()

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept = [None] * len(self._sites)

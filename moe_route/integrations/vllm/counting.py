"""Count the choices of a step in one call for all layers, after its forward.

Between the experts of two layers every call meets cold caches, and takes several times as long. What a layer chose is
copied aside, which is cheap. Only on a CPU, where the operator runs as Python at every step: a CUDA graph would freeze
whether to count at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_route import ops
from moe_route.contract.spec import RouterSpec

if TYPE_CHECKING:
    from moe_route.integrations.vllm.sites import Site

__all__ = ["StepCounts", "layers_by_spec", "observe"]

_MOST_TOKENS = 512  # of a larger step, counting is small beside the experts, and the copies are not


def layers_by_spec(sites: Sequence[Site]) -> dict[RouterSpec, list[int]]:
    """Layers that can be counted in one call."""
    found: dict[RouterSpec, list[int]] = {}
    for layer, site in enumerate(sites):
        found.setdefault(site.spec, []).append(layer)
    return found


def observe(
    sites: Sequence[Site],
    layers: Mapping[RouterSpec, Sequence[int]],
    kept: Mapping[int, tuple[Tensor, Tensor, Tensor]],
    tokens: Tensor,
) -> None:
    """Count the choices of several layers as they stand.

    Args:
        layers: as ``layers_by_spec`` has them; those that are not in ``kept`` are left out.
        kept: by layer, logits, ids and weights of the same T tokens.
        tokens: int32 [T, 4], their token table.
    """
    for spec, same in layers.items():
        found = [layer for layer in same if layer in kept]
        if not found:
            continue
        logits, ids, weights = zip(*(kept[layer] for layer in found), strict=True)
        tables = [table for layer in found if (table := sites[layer].statistics) is not None]
        ops.observe_layers(logits, ids, weights, spec, tokens=tokens, statistics=tables)


class StepCounts:
    """The choices of one step."""

    def __init__(self, sites: Sequence[Site]):
        self._sites, self._layers = sites, layers_by_spec(sites)
        self._buffers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

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
        if self._kept:
            logits, _, _ = next(iter(self._kept.values()))
            observe(self._sites, self._layers, self._kept, tokens[: logits.shape[0]])
        self.forget()

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept = {}

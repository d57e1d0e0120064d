"""Count pairs of experts: chosen by one token in one layer, and in two layers that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moe_route.recording.accumulators import Accumulator
from moe_route.recording.choices import ObservedCall
from moe_route.recording.tables import RecordedRouter

__all__ = ["PairCounts"]


class PairCounts(Accumulator):
    """Counts co-selection ``[G, L, E, E]`` and transitions ``[G, L-1, E, E]``.

    The latter are counted between neighboring layers whose routers are of one kind. An empty slot is in no pair.
    """

    option = "pairs"

    def __init__(self, routers: Sequence[RecordedRouter], groups: int) -> None:
        """Prepare the arrays, of E x E x 8 bytes for each group and layer, twice."""
        widest = max(router.num_experts for router in routers)
        super().__init__(routers, groups, dict.fromkeys(("co_selection", "transitions"), (widest, widest)))
        self._follows = [False, *(before.role == after.role for before, after in pairwise(routers))]

    def take(self, observed: ObservedCall) -> None:
        """Count the pairs of a call."""
        for layer, ids in observed.ids.items():
            groups = observed.groups(ids.device)
            _count(self.table("co_selection", layer, ids.device), groups, ids, ids)
            before = observed.ids.get(layer - 1) if self._follows[layer] else None
            if before is not None:
                _count(self.table("transitions", layer - 1, ids.device), groups, before.to(ids.device), ids)


def _count(table: Tensor, groups: Tensor, first: Tensor, second: Tensor) -> None:
    """Add 1 to ``table[g, e, e']`` for each token of group g with e in ``first`` and e' in ``second``.

    ``groups [T]``; ``first [T, k]`` and ``second [T, k']``; -1 is left out.
    """
    experts = table.shape[-1]
    rows, columns = first.long()[:, :, None], second.long()[:, None, :]
    cell = (groups[:, None, None] * experts + rows) * experts + columns
    counted = (groups[:, None, None] >= 0) & (rows >= 0) & (columns >= 0)
    cell = torch.where(counted, cell, 0)  # a mask instead of a selection, which would wait for the device
    table.view(-1).index_add_(0, cell.reshape(-1), counted.reshape(-1).to(table.dtype))

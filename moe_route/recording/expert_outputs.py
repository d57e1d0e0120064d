"""Add up the sizes of the outputs of chosen experts, by group, layer and expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_route.contract.outputs import SeenOutputs
from moe_route.recording.accumulated import SIZE_UNIT
from moe_route.recording.accumulators import Accumulator
from moe_route.recording.choices import ObservedCall
from moe_route.recording.statistics import RecordingError
from moe_route.recording.tables import RecordedRouter

__all__ = ["ExpertOutputs"]


class ExpertOutputs(Accumulator):
    """Per (group, layer, expert), over the tokens t that chose expert e with routing weight g_e(t):

    - ``weighted_norm``: sum of g_e(t) * |f_e(x_t)|, in multiples of `SIZE_UNIT`;
    - ``norm``: sum of |f_e(x_t)|, in multiples of `SIZE_UNIT`;
    - ``peak``: largest absolute element of any f_e(x_t);
    - ``first``: number of first tokens of a sequence (position 0) that chose e.
    """

    option = "expert_outputs"
    weights_dtype = torch.float32

    def __init__(self, routers: Sequence[RecordedRouter], groups: int) -> None:
        widest = max((router.num_experts for router in routers), default=0)
        super().__init__(routers, groups, dict.fromkeys(("weighted_norm", "norm", "peak", "first"), (widest,)))
        self._call: ObservedCall | None = None
        self._is_first: Tensor | None = None  # bool [T]
        self._seen: dict[int, SeenOutputs] = {}

    def begin_call(self, observed: ObservedCall) -> None:
        self._call, self._seen = observed, {}
        self._is_first = (observed.call.tokens_before() == 0).expand(observed.batch, -1).reshape(-1)

    def drop_call(self) -> None:
        self._call, self._is_first, self._seen = None, None, {}

    def awaits(self, layer: int) -> Tensor | None:
        """The choice ids [T, k] of a layer (-1: an empty slot) whose outputs are wanted now, or None."""
        return None if self._call is None or layer in self._seen else self._call.ids.get(layer)

    def add_outputs(self, layer: int, seen: SeenOutputs) -> None:
        """Receive the outputs for that choice."""
        self._seen[layer] = seen

    def take(self, observed: ObservedCall) -> None:
        first, seen = self._is_first, self._seen
        self.drop_call()
        assert first is not None
        for layer, ids in observed.ids.items():
            if layer not in seen:
                raise RecordingError(
                    f"the router of layer {layer} chose experts, and their outputs were not seen: something replaces "
                    "the block's experts (a kernel, a compiled graph). Record without expert_outputs"
                )
            self._add(
                layer, ids, observed.weights[layer], observed.groups(ids.device), first.to(ids.device), seen[layer]
            )

    def _add(self, layer: int, ids: Tensor, weights: Tensor, groups: Tensor, first: Tensor, seen: SeenOutputs) -> None:
        counted = (ids >= 0) & (groups >= 0)[:, None]
        experts = self._shapes["norm"][0]
        place = torch.where(counted, groups[:, None] * experts + ids, 0).reshape(-1)

        def table(name: str) -> Tensor:
            return self.table(name, layer, ids.device).view(-1)

        norms = torch.where(counted, seen.norms.double(), 0.0)
        for name, values in (("weighted_norm", norms * weights.double()), ("norm", norms)):
            table(name).index_add_(0, place, _as_units(values).reshape(-1))
        peaks = torch.where(counted, seen.peaks.double(), 0.0).reshape(-1)
        table("peak").scatter_reduce_(0, place, peaks, "amax")
        table("first").index_add_(0, place, (counted & first[:, None]).long().reshape(-1))


def _as_units(values: Tensor) -> Tensor:
    """Round to multiples of `SIZE_UNIT`, as int64. Values that are not finite become 0; the peaks keep them."""
    return torch.nan_to_num(values / SIZE_UNIT, nan=0.0, posinf=0.0, neginf=0.0).round().long()

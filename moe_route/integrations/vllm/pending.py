"""Tokens of a step that are counted later: once the engine core has told whether they became text.

The operator copies their choices aside, before they are steered; their rows of the step's token table say that nothing
is counted. When ``texts`` is known, those that became text are routed and counted again from the copies, which gives
the same bits: rows of a table are independent, and sums are integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_route import ops
from moe_route.integrations.vllm.counting import layers_by_spec, observe
from moe_route.integrations.vllm.requests import RequestTable, positions_of
from moe_route.integrations.vllm.texts import Known

if TYPE_CHECKING:
    from moe_route.integrations.vllm.runners import Batch
    from moe_route.integrations.vllm.sites import Site

__all__ = ["PendingTokens"]

_NONE = np.zeros(0, np.int64)


class PendingTokens:
    """The pending tokens of the latest step.

    Buffers have fixed addresses and room for the most that a step holds. On a device all of them are always written,
    so that a CUDA graph may capture the copies: the places are data, and those that are not used say 0.
    """

    def __init__(self, sites: Sequence[Site], requests: RequestTable, layer_rows: Tensor, most: int):
        """``layer_rows``: int32 [L, rows + 1], steering rows by layer; ``most``: pending tokens of a step."""
        self._sites, self._requests, self._layer_rows = sites, requests, layer_rows
        self._layers = layers_by_spec(sites)
        self._device = sites[0].device
        self._captured = self._device.type != "cpu"
        self._places = torch.zeros(most, dtype=torch.int64, device=self._device)
        self._buffers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._names: list[str] = []
        self.forget()

    def forget(self) -> None:
        """No token is pending. Those that were are lost."""
        self._requests.tokens_lost += len(self._names)
        self._names = []
        self._positions, self._at, self._rows = _NONE, _NONE, np.zeros((0, 4), np.int32)
        if self._captured:
            self._places.zero_()

    def lay_out(self, rows: np.ndarray, batch: Batch, tails: np.ndarray) -> None:
        """Take the last ``tails`` tokens of each request out of a step's token table, int32 [T, 4]."""
        ends = np.cumsum(batch.counts)
        kept = np.arange(len(rows)) >= np.repeat(ends - tails, batch.counts)
        at = np.flatnonzero(kept)
        room = len(self._places)
        self._requests.tokens_lost += max(len(at) - room, 0)
        self._at, rest = at[:room], at[room:]
        of = np.repeat(np.arange(len(batch.names)), batch.counts)[self._at]
        self._names = [batch.names[number] for number in of]
        self._positions = positions_of(batch.counts, batch.starts)[self._at]
        self._rows = rows[self._at].copy()
        rows[self._at, 1:3] = rows[rest, 1:3] = -1
        if self._captured:
            places = np.zeros(room, np.int64)
            places[: len(self._at)] = self._at
            self._places.copy_(torch.from_numpy(places).pin_memory(), non_blocking=True)
        else:
            self._places[: len(self._at)] = torch.from_numpy(self._at)

    def keep(self, layer: int, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Copy the choices of pending tokens aside, which the router of a layer made for the step."""
        number = len(self._places) if self._captured else len(self._at)
        if not number:
            return
        buffers = self._buffers.get(layer)
        if buffers is None:  # on a device while vLLM profiles the memory, before graphs are captured
            room = len(self._places)
            buffers = self._buffers[layer] = (
                logits.new_empty(room, logits.shape[1]),
                ids.new_empty(room, ids.shape[1], dtype=torch.int32),
                weights.new_empty(room, weights.shape[1], dtype=torch.float32),
            )
        places = self._places[:number]
        for buffer, given in zip(buffers, (logits, ids, weights), strict=True):
            buffer[:number].copy_(given.index_select(0, places))

    def resolve(self, known: Mapping[str, Known]) -> np.ndarray:
        """Count the pending tokens that became text; returns the places in the step of those that did not."""
        for name, text in known.items():
            request = self._requests.running.get(name)
            if request is not None and request.ids is not None:
                request.ids += text.ids
        text = np.array([self._became_text(*one, known) for one in zip(self._names, self._positions, strict=True)], bool)
        for name, position, became in zip(self._names, self._positions, text, strict=True):
            if became:
                self._requests.advance(name, int(position) + 1)
        self._requests.tokens_rejected += int((self._rows[~text, 1] >= 0).sum())
        self._rows[~text, 1:3] = -1
        if (self._rows[:, 1] >= 0).any():
            self._count()
        rejected = self._at[~text]
        self._names = []
        self.forget()
        return rejected

    def _became_text(self, name: str, position: int, known: Mapping[str, Known]) -> bool:
        found = known.get(name)
        if found is None or (self._requests.ahead and not found.ended and position >= found.end):
            self._requests.tokens_lost += 1
            return False
        return position < found.end

    def _count(self) -> None:
        """Count what is left in the rows."""
        number = len(self._rows)
        rows = torch.from_numpy(self._rows).to(self._device)
        kept = {
            layer: (logits[:number], ids[:number], weights[:number])
            for layer, (logits, ids, weights) in self._buffers.items()
        }
        steered = bool((self._rows[:, 0] >= 0).any())
        steers = [layer for layer in kept if steered and self._sites[layer].steers]
        observe(self._sites, self._layers, {layer: one for layer, one in kept.items() if layer not in steers}, rows)
        for layer in steers:
            site, (logits, ids, weights) = self._sites[layer], kept[layer]
            of_layer = rows.clone()
            of_layer[:, 0] = self._layer_rows[layer, rows[:, 0]]
            ops.route(
                logits,
                site.top_k,
                site.spec,
                correction_bias=site.correction_bias,
                steering=site.steering,
                tokens=of_layer,
                choice=ids,
                choice_weights=weights,
                statistics=site.statistics,
            )

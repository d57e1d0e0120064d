"""Tokens of a step that are counted later: once the engine core has told whether they became text.

The operator copies their choices aside, before they are steered; their rows of the step's token table say that nothing
is counted. When ``texts`` has told, those that became text are steered again and counted from the copies. That gives
the same bits: tokens do not meet in a router, and sums are integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_route.devices import upload
from moe_route.integrations.vllm.counting import layers_by_spec, observe
from moe_route.integrations.vllm.requests import RequestTable, positions_of
from moe_route.integrations.vllm.texts import Known

if TYPE_CHECKING:
    from moe_route.integrations.vllm.runners import Batch
    from moe_route.integrations.vllm.sites import Site
    from moe_route.integrations.vllm.token_values import TokenValues

__all__ = ["PendingTokens"]


class PendingTokens:
    """The pending tokens of the latest step.

    Buffers have fixed addresses and room for the most that a step holds. On a device all of them are always written,
    so that a CUDA graph may capture the copies: the places are data, and those that are not used say 0.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        requests: RequestTable,
        layer_rows: Tensor,
        values: TokenValues,
        device: torch.device,
        most: int,
    ):
        """``layer_rows``: int32 [L, rows + 1], steering rows by layer; ``most``: pending tokens of a step."""
        self._sites, self._requests, self._layer_rows, self._values = sites, requests, layer_rows, values
        self._layers = layers_by_spec(sites)
        self._device = device
        self._captured = device.type != "cpu"
        self._places = torch.zeros(most, dtype=torch.int64, device=device)
        self._buffers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._names: list[str]
        self._counter: Tensor | None
        self._entries: Tensor | None
        self._clear()

    def lay_out(self, rows: np.ndarray, batch: Batch, tails: np.ndarray) -> None:
        """Take the last ``tails`` tokens of each request out of a step's token table, int32 [T, 4].

        What rules that look at single tokens need of the step was made before.
        """
        self._requests.tokens_lost += len(self._names)  # of a step that failed
        ends = np.cumsum(batch.counts)
        at = np.flatnonzero(np.arange(len(rows)) >= np.repeat(ends - tails, batch.counts))
        room = len(self._places)
        self._at, without_room = at[:room], at[room:]
        self._requests.tokens_lost += len(without_room)
        of = np.repeat(np.arange(len(batch.names)), batch.counts)[self._at]
        self._names = [batch.names[number] for number in of]
        self._positions = positions_of(batch.counts, batch.starts)[self._at]
        self._rows = rows[self._at]
        rows[at, 1:3] = -1
        self._write_places()
        self._by_token = self._values.present
        of_tokens = self._values.counter, self._values.entries
        places = self._places[: len(self._at)]
        self._counter, self._entries = (None if one is None else one[places] for one in of_tokens)

    def lose(self) -> None:
        """Nothing is pending any more, and of what was, nothing will be told."""
        self._requests.tokens_lost += len(self._names)
        self._clear()
        self._places.zero_()

    def _clear(self) -> None:
        self._names = []
        self._positions = self._at = np.zeros(0, np.int64)
        self._rows = np.zeros((0, 4), np.int32)
        self._by_token = False
        self._counter = self._entries = None

    def _write_places(self) -> None:
        number = len(self._at)
        if not self._captured:
            self._places[:number] = torch.from_numpy(self._at)
            return
        places = np.zeros(len(self._places), np.int64)
        places[:number] = self._at
        self._places.copy_(upload(torch.from_numpy(places), self._device))

    def keep(self, layer: int, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Copy the choices of pending tokens aside, which the router of a layer made for the step."""
        number = len(self._places) if self._captured else len(self._at)
        if not number:
            return
        given = logits, ids, weights
        buffers = self._buffers.get(layer)
        if buffers is None:  # on a device while vLLM profiles the memory, before graphs are captured
            dtypes = logits.dtype, torch.int32, torch.float32
            made = (
                one.new_zeros(len(self._places), one.shape[1], dtype=dtype)
                for one, dtype in zip(given, dtypes, strict=True)
            )
            buffers = self._buffers[layer] = next(made), next(made), next(made)
        places = self._places[:number]
        for buffer, one in zip(buffers, given, strict=True):
            buffer[:number].copy_(one.index_select(0, places))

    def resolve(self, known: Mapping[str, Known]) -> np.ndarray:
        """Count the pending tokens that became text; returns the places in the step of those that did not."""
        for name, told in known.items():
            request = self._requests.running.get(name)
            if request is not None and request.ids is not None:
                request.ids += told.ids
        text = np.zeros(len(self._names), bool)
        for number, (name, position) in enumerate(zip(self._names, self._positions.tolist(), strict=True)):
            text[number] = self._is_text(position, known.get(name))
            if text[number]:
                self._requests.advance(name, position + 1)
        counted = self._rows[:, 1] >= 0
        self._requests.tokens_rejected += int((counted & ~text).sum())
        self._rows[~text, 1:3] = -1
        if (counted & text).any():
            self._count()
        rejected = self._at[~text]
        self._clear()
        return rejected

    def _is_text(self, position: int, known: Known | None) -> bool:
        if known is None or (self._requests.ahead and not known.ended and position >= known.end):
            self._requests.tokens_lost += 1
            return False
        return position < known.end

    def _count(self) -> None:
        """Count what is left in the rows."""
        number = len(self._rows)
        rows = upload(torch.from_numpy(self._rows), self._device)
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
            site.route(logits, ids, weights, of_layer, (self._counter, self._entries) if self._by_token else None)

"""What is counted after the forward of a step, and what is traced of it.

``StepCounts`` counts the choices of all layers in one call, and ``PendingTokens`` those of tokens of which it is known
only later whether they became text. ``StepTrace`` keeps the choices of every token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_route import ops
from moe_route.base.devices import upload
from moe_route.contract.spec import RouterSpec
from moe_route.integrations.serving.requests import Batch, Request, RequestTable, positions_of
from moe_route.integrations.serving.sites import Site, TokenNumbers, traced_buffers
from moe_route.ops import library
from moe_route.recording.trace import Trace

_COLUMNS = ("sequence", "group", "position", "phase", "ids", "weights")
_MOST_TOKENS = 512  # of a larger step, counting is small beside the experts, and the copies are not
logger = logging.getLogger(__name__)


def layers_by_spec(sites: Sequence[Site]) -> dict[RouterSpec, list[int]]:
    """Layers that can be counted in one call."""
    layers: dict[RouterSpec, list[int]] = {}
    for layer, site in enumerate(sites):
        layers.setdefault(site.spec, []).append(layer)
    return layers


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
        together = [layer for layer in same if layer in kept]
        if not together:
            continue
        logits, ids, weights = zip(*(kept[layer] for layer in together), strict=True)
        tables = [table for layer in together if (table := sites[layer].statistics) is not None]
        ops.observe_layers(logits, ids, weights, spec, tokens=tokens, statistics=tables)


class StepCounts:
    """The choices of one step, counted in one call for all layers after its forward.

    Between the experts of two layers every call meets cold caches, and takes several times as long. What a layer chose
    is copied aside, which is cheap. Only on a CPU, where the operator runs as Python at every step: a CUDA graph would
    freeze whether to count at once.
    """

    def __init__(self, sites: Sequence[Site]):
        self._sites, self._layers = sites, layers_by_spec(sites)
        self._buffers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._views: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # of the buffers, as large as the step before

    def keep(self, layer: int, logits: Tensor, ids: Tensor, weights: Tensor) -> bool:
        """Copy the choice of a layer aside; False if the step is too large for that."""
        tokens = logits.shape[0]
        if tokens > _MOST_TOKENS:
            return False
        given = logits, ids, weights
        kept = self._views.get(layer)
        if kept is None or len(kept[0]) != tokens:
            buffers = self._buffers.get(layer)
            if buffers is None:
                logits, ids, weights = (one.new_empty(_MOST_TOKENS, one.shape[1]) for one in given)
                buffers = self._buffers[layer] = logits, ids, weights
            kept = self._views[layer] = buffers[0][:tokens], buffers[1][:tokens], buffers[2][:tokens]
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


class Known(NamedTuple):
    """What is known of one request."""

    end: int  # of the tokens that ran last, those at positions below it are what a plain engine would have fed
    ended: bool
    ids: list[int]  # of its answer, those that were not told before; empty where the runner holds them


class StepTrace:
    """Collects the experts and weights of every counted token, step by step, as a ``recording.Trace``.

    It reads the choices of a step before the next one is laid out, from buffers that the operator writes.
    """

    def __init__(self, sites: Sequence[Site], layers: Sequence[int], most_tokens: int, limit: int, first: int = 0):
        """``layers``: indices of the traced sites, of which the model has ``first`` in earlier stages.

        ``limit``: largest number of tokens to keep.
        """
        self._sites, self._limit = [sites[layer] for layer in layers], limit
        self._layers = tuple(first + layer for layer in layers)
        for site in self._sites:
            site.traced = traced_buffers(site, most_tokens)
        self._slots = max(site.top_k for site in self._sites)
        self._ids_dtype = np.int8 if max(site.num_experts for site in self._sites) <= 128 else np.int16
        self.forget()

    def forget(self) -> None:
        """Begin a new trace."""
        self._chunks: list[dict[str, np.ndarray]] = []
        self._requests: list[Request] = []
        self._number: dict[str, int] = {}  # of a running request, by its name
        self._waiting: dict[str, np.ndarray] | None = None  # tokens of the step whose choices are on the device
        self._kept, self._truncated = 0, False

    def begin(self, request: Request) -> None:
        """A request that is counted begins."""
        self._number[request.name] = len(self._requests)
        self._requests.append(request)

    def end(self, request: Request) -> None:
        """A request ended; its token ids are kept in it."""
        self._number.pop(request.name, None)

    def lay_out(
        self, rows: np.ndarray, group_capacity: int, names: Sequence[str], counts: np.ndarray, starts: np.ndarray
    ) -> None:
        """Note whose tokens a step runs; ``rows``: int32 [T, 4], its token table. ``take`` was called before."""
        places = np.flatnonzero(rows[:, 1] >= 0)
        if not len(places):
            return
        numbers = np.repeat([self._number.get(name, -1) for name in names], counts)[places]
        self._waiting = {
            "place": places,
            "sequence": numbers.astype(np.int32),
            "group": rows[places, 1] % group_capacity,
            "position": positions_of(counts, starts)[places].astype(np.int32),
            "phase": (rows[places, 1] // group_capacity).astype(np.uint8),
        }

    def drop(self, places: np.ndarray) -> None:
        """Tokens at these places of the step that ran did not become text."""
        if self._waiting is not None and len(places):
            stay = ~np.isin(self._waiting["place"], places)
            self._waiting = {name: column[stay] for name, column in self._waiting.items()}

    def take(self) -> None:
        """Copy the choices of the step that ran, before the operator overwrites them."""
        if self._waiting is None:
            return
        chunk, self._waiting = self._waiting, None
        room = self._limit - self._kept
        if len(chunk["place"]) > room:
            chunk = {name: column[:room] for name, column in chunk.items()}
            if not self._truncated:
                logger.warning(
                    'moe_route: the trace is full (%d tokens): later tokens are not traced; raise "trace_limit"',
                    self._limit,
                )
            self._truncated = True
        if not len(chunk["place"]):
            return
        self._kept += len(chunk["place"])
        places = torch.from_numpy(chunk.pop("place"))
        shape = (len(places), len(self._sites), self._slots)
        ids, weights = np.full(shape, -1, self._ids_dtype), np.zeros(shape, np.float16)
        for layer, site in enumerate(self._sites):
            assert site.traced is not None  # `__init__` made it
            here = places.to(site.device)
            ids[:, layer, : site.top_k] = site.traced[0][here].cpu().numpy()
            weights[:, layer, : site.top_k] = (site.traced[1][here] * site.output_scale).cpu().numpy()
        self._chunks.append({**chunk, "ids": ids, "weights": weights})

    def snapshot(self, groups: Sequence[str], token_ids: Callable[[Request], np.ndarray | None]) -> Trace:
        """The tokens traced so far; ``token_ids`` reads those of a request, from position 0."""
        self.take()
        shape = (0, len(self._sites), self._slots)
        empty = {"ids": np.zeros(shape, self._ids_dtype), "weights": np.zeros(shape, np.float16)}
        numbers = {"sequence": np.int32, "group": np.int32, "position": np.int32, "phase": np.uint8}
        empty |= {name: np.zeros(0, dtype) for name, dtype in numbers.items()}
        columns: dict[str, Any] = {
            name: np.concatenate([empty[name], *(chunk[name] for chunk in self._chunks)]) for name in _COLUMNS
        }
        token = np.full(len(columns["sequence"]), -1, np.int32)
        order = np.argsort(columns["sequence"], kind="stable")
        bounds = np.searchsorted(columns["sequence"][order], np.arange(1, len(self._requests)))
        for request, mine in zip(self._requests, np.split(order, bounds), strict=False):
            ids = token_ids(request)
            if ids is not None:
                token[mine] = ids[columns["position"][mine]]
        return Trace(
            layers=tuple(site.name for site in self._sites),
            layer_numbers=self._layers,
            groups=tuple(groups),
            items=tuple(request.item for request in self._requests),
            token=token,
            truncated=self._truncated,
            backends=tuple(sorted({library.served(site.device) for site in self._sites})),
            **columns,
        )


class PendingTokens:
    """Tokens of the latest step that are counted later: once the engine core has told whether they became text.

    The operator copies their choices aside, before they are steered; their rows of the step's token table say that
    nothing is counted. When that is known, those that became text are steered again and counted from the copies.
    That gives the same bits: tokens do not meet in a router, and sums are integers.

    Buffers have fixed addresses and room for the most that a step holds. On a device all of them are always written,
    so that a CUDA graph may capture the copies: the places are data, and those that are not used say 0.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        requests: RequestTable,
        layer_rows: Tensor,
        numbers: TokenNumbers,
        device: torch.device,
        most: int,
    ):
        """``layer_rows``: int32 [L, rows + 1], steering rows by layer; ``numbers``: those of the step that runs.

        ``most``: pending tokens of a step.
        """
        self._sites, self._requests, self._layer_rows, self._step = sites, requests, layer_rows, numbers
        self._layers = layers_by_spec(sites)
        self._device = device
        self._captured = device.type != "cpu"
        self._places = torch.zeros(most, dtype=torch.int64, device=device)
        self._buffers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._names: list[str]
        self._numbers: TokenNumbers
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
        self._numbers = self._step.at(self._places[: len(self._at)])

    def lose(self) -> None:
        """Nothing is pending any more, and of what was, nothing will be told."""
        self._requests.tokens_lost += len(self._names)
        self._clear()
        self._places.zero_()

    def _clear(self) -> None:
        self._names = []
        self._positions = self._at = np.zeros(0, np.int64)
        self._rows = np.zeros((0, 4), np.int32)
        self._numbers = TokenNumbers()

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
        if buffers is None:  # on a device while the engine profiles its memory, before graphs are captured
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
            self._requests.expect(self._rows)
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
            site.route(logits, ids, weights, of_layer, self._numbers)

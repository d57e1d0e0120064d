"""The experts and weights of every counted token, collected step by step as a ``recording.Trace``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_route.integrations.vllm.requests import Request, positions_of
from moe_route.recording.trace import Trace

if TYPE_CHECKING:
    from moe_route.integrations.vllm.sites import Site

__all__ = ["StepTrace"]

logger = logging.getLogger(__name__)
_COLUMNS = ("sequence", "group", "position", "phase", "ids", "weights")


class StepTrace:
    """Reads the choices of a step before the next one is laid out, from buffers that the operator writes."""

    def __init__(self, sites: Sequence[Site], layers: Sequence[int], most_tokens: int, limit: int, first: int = 0):
        """``layers``: indices of the traced sites, of which the model has ``first`` in earlier stages.

        ``limit``: largest number of tokens to keep.
        """
        self._sites, self._limit = [sites[layer] for layer in layers], limit
        self._layers = tuple(first + layer for layer in layers)
        for site in self._sites:
            site.traced = (
                torch.full((most_tokens, site.top_k), -1, dtype=torch.int16, device=site.device),
                torch.zeros(most_tokens, site.top_k, device=site.device),
            )
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
        if len(places) > self._limit - self._kept:
            places = places[: self._limit - self._kept]
            if not self._truncated:
                logger.warning(
                    'moe_route: the trace is full (%d tokens): later tokens are not traced; raise "trace_limit"',
                    self._limit,
                )
            self._truncated = True
        if not len(places):
            return
        numbers = np.repeat([self._number.get(name, -1) for name in names], counts)[places]
        self._kept += len(places)
        self._waiting = {
            "place": places,
            "sequence": numbers.astype(np.int32),
            "group": rows[places, 1] % group_capacity,
            "position": positions_of(counts, starts)[places].astype(np.int32),
            "phase": (rows[places, 1] // group_capacity).astype(np.uint8),
        }

    def take(self) -> None:
        """Copy the choices of the step that ran, before the operator overwrites them."""
        if self._waiting is None:
            return
        chunk, self._waiting = self._waiting, None
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
        columns = {name: np.concatenate([empty[name], *(chunk[name] for chunk in self._chunks)]) for name in _COLUMNS}
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
            **columns,
        )

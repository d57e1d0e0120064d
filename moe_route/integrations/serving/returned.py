"""The experts and weights of the requests that ask for them, kept until these end.

The operator writes the choices of a step into buffers, and what belongs to a request that asks is copied from there
before the next step.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_route.integrations.serving.options import WANTED
from moe_route.integrations.serving.requests import Batch
from moe_route.integrations.serving.sites import Site, traced_buffers

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


class Routed(NamedTuple):
    """The tokens of one request from some position on, in the MoE layers of one stage."""

    layers: list[int]  # their numbers among all layers of the model, dense ones included
    ids: np.ndarray  # int16 [tokens, L, k]; an empty slot has expert 0, as the kernel gets it
    weights: np.ndarray  # float32 [tokens, L, k]; 0 in an empty slot


class ReturnedExperts:
    """What one worker keeps for requests that ask."""

    def __init__(self, sites: Sequence[Site], most_tokens: int):
        self._sites = sites
        for site in sites:
            site.traced = site.traced or traced_buffers(site, most_tokens)
        self._layers = [layer_number(site.name) for site in sites]
        self._slots = max((site.top_k for site in sites), default=0)
        self._kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._waiting: list[tuple[str, slice, int]] = []  # request, places in the step, position of the first

    def begin(self, name: str, arguments: Mapping[str, Any] | None) -> None:
        """A request begins; it is kept if it asks."""
        if (arguments or {}).get(WANTED) is not None:
            shape = (0, len(self._sites), self._slots)
            self._kept[name] = np.zeros(shape, np.int16), np.zeros(shape, np.float32)

    def end(self, names: Collection[str]) -> None:
        """Requests have ended, and their answers are on their way."""
        for name in names:
            self._kept.pop(name, None)

    def lay_out(self, batch: Batch) -> bool:
        """Note whose tokens a step runs; returns whether some are asked for. ``take`` was called before."""
        ends = np.cumsum(batch.counts).tolist()
        for name, end, count, start in zip(
            batch.names, ends, batch.counts.tolist(), batch.starts.tolist(), strict=True
        ):
            if name in self._kept:
                self._waiting.append((name, slice(end - count, end), start))
        return bool(self._waiting)

    def take(self) -> None:
        """Copy the choices of the step that ran, before the operator overwrites them."""
        if not self._waiting:
            return
        last = max(places.stop for _, places, _ in self._waiting)
        ids, weights = np.zeros((last, len(self._sites), self._slots), np.int16), None
        weights = np.zeros(ids.shape, np.float32)
        for layer, site in enumerate(self._sites):
            assert site.traced is not None  # `__init__` made it
            ids[:, layer, : site.top_k] = site.traced[0][:last].cpu().numpy()
            weights[:, layer, : site.top_k] = (site.traced[1][:last] * site.output_scale).cpu().numpy()
        ids, weights = np.maximum(ids, 0), np.where(ids < 0, np.float32(0), weights)
        for name, places, start in self._waiting:
            if name in self._kept:  # tokens that run again, and those in the place of rejected drafts, are overwritten
                mine = self._kept[name]
                self._kept[name] = (_written(mine[0], start, ids[places]), _written(mine[1], start, weights[places]))
        self._waiting = []

    def routed(self, wanted: Mapping[str, tuple[int, int]]) -> dict[str, Routed]:
        """The tokens of requests from position ``first`` to before ``end``."""
        self.take()
        found = {}
        for name, (first, end) in wanted.items():
            if name in self._kept:
                ids, weights = self._kept[name]
                found[name] = Routed(self._layers, ids[first:end], weights[first:end])
        return found


def _written(kept: np.ndarray, start: int, rows: np.ndarray) -> np.ndarray:
    """The array with these rows from ``start`` on; it grows in steps, so that a token costs no copy of all."""
    end = start + len(rows)
    if end > len(kept):
        grown = np.zeros((max(end, 2 * len(kept)), *kept.shape[1:]), kept.dtype)
        grown[: len(kept)] = kept
        kept = grown
    kept[start:end] = rows
    return kept


def layer_number(name: str) -> int:
    """The number in the name of a layer: 3 in "model.layers.3.mlp.experts"."""
    numbers = _LAYER.findall(name)
    return int(numbers[0]) if numbers else 0

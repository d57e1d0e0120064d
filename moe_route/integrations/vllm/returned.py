"""Routed experts in answers: the experts and weights of the requests that ask for them, until these end.

vLLM's own ``enable_return_routed_experts`` wants its V2 runner, and has no weights. Here the operator writes the
choices of a step into buffers, and what belongs to a request that asks is copied from there before the next step.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_route.integrations.vllm.options import START, WANTED
from moe_route.integrations.vllm.requests import Batch
from moe_route.integrations.vllm.sites import Site, traced_buffers

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
        self._layers = [layer_number(site.runner.layer_name) for site in sites]
        self._slots = max((site.top_k for site in sites), default=0)
        self._kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._waiting: list[tuple[str, slice, int]] = []  # request, places in the step, position of the first

    def begin(self, name: str, extra_args: Mapping[str, Any] | None) -> None:
        """A request begins; it is kept if it asks."""
        if (extra_args or {}).get(WANTED) is not None:
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


# ---- in the engine core


class AskedExperts:
    """The requests of an engine core that ask for their experts."""

    def __init__(self, layers: int, experts: int):
        """``layers``: of the model, dense ones included; ``experts``: of a layer."""
        self._layers, self._dtype = layers, ids_dtype(experts)
        self.requests: dict[str, Any] = {}

    def add(self, request: Any) -> None:
        """A request arrives."""
        if _asks(request) is not None:
            self.requests[request.request_id] = request

    def ended(self, outputs: Mapping[int, Any] | None) -> dict[str, Any]:
        """The outputs of a step that end a request which asks, by its id."""
        found = {}
        for of_client in (outputs or {}).values():
            for output in of_client.outputs:
                if output.finish_reason is not None and output.request_id in self.requests:
                    found[output.request_id] = output
        return found

    def places(self, names: Collection[str]) -> dict[str, tuple[int, int]]:
        """Positions from and to, of requests that ended; the last token was sampled and not routed."""
        places = {}
        for name in names:
            request = self.requests[name]
            places[name] = int(request.sampling_params.extra_args.get(START) or 0), request.num_tokens - 1
        return places

    def fill(self, outputs: Mapping[str, Any], answers: Sequence[Mapping[str, Routed] | None]) -> None:
        """Put the experts into the outputs: ids as vLLM writes them, or with weights, see ``packed``."""
        for name, output in outputs.items():
            parts = [answer[name] for answer in answers if answer is not None and name in answer]
            asked = _asks(self.requests[name])
            if not parts or asked is None:
                continue
            slots = max(part.ids.shape[2] for part in parts)
            shape = (len(parts[0].ids), max(self._layers, *(n + 1 for part in parts for n in part.layers)), slots)
            ids, weights = np.zeros(shape, self._dtype), np.zeros(shape, np.float32)
            for part in parts:
                ids[:, part.layers, : part.ids.shape[2]] = part.ids
                weights[:, part.layers, : part.ids.shape[2]] = part.weights
            output.routed_experts = packed(ids, weights, asked)
        self.requests = {name: one for name, one in self.requests.items() if not one.is_finished()}


def _asks(request: Any) -> str | None:
    params = request.sampling_params
    asked: str | None = ((params and params.extra_args) or {}).get(WANTED)
    return asked


# ---- in front ends

_PACKED = {"float32": np.complex128, "float16": np.complex64}  # dtype of the weights -> of ids and weights together


def ids_dtype(experts: int) -> type:
    """The dtype in which vLLM writes ids."""
    return np.uint8 if experts <= 256 else np.uint16


def packed(ids: np.ndarray, weights: np.ndarray, asked: str) -> np.ndarray:
    """Ids, and weights if they are asked for, in one array, for the one field that vLLM passes on."""
    return ids if asked not in _PACKED else (ids + 1j * weights.astype(asked)).astype(_PACKED[asked])


def unpacked(array: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids, and weights or None; ``experts``: of a layer."""
    for name, dtype in _PACKED.items():
        if array.dtype == dtype:
            return array.real.astype(ids_dtype(experts)), array.imag.astype(name)
    return array, None


def split(choice: Any, experts: int) -> None:
    """Put weights that came with the ids of a choice, in an answer over HTTP, beside them, into its ``moe_route``."""
    if choice.routed_experts:
        array = np.load(io.BytesIO(base64.b64decode(choice.routed_experts)), allow_pickle=False)
        ids, weights = unpacked(array, experts)
        if weights is not None:
            choice.routed_experts, choice.moe_route = _encoded(ids), {"weights": _encoded(weights)}


def _encoded(array: np.ndarray) -> str:
    """An array as vLLM writes it in JSON: its .npy file in base64."""
    with io.BytesIO() as stream:
        np.save(stream, array, allow_pickle=False)
        return base64.b64encode(stream.getvalue()).decode("ascii")

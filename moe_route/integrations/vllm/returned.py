"""Routed experts in answers: the experts and weights of the requests that ask for them, until these end.

vLLM's own ``enable_return_routed_experts`` wants its V2 runner, and has no weights. Here the operator writes the
choices of a step into buffers, and what belongs to a request that asks is copied from there before the next step.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from moe_route.integrations.serving.options import START, WANTED
from moe_route.integrations.serving.returned import Routed


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

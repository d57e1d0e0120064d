"""Follow the length of a static cache, which keeps its length in a tensor on the device.

Reading that tensor in every call would make the host wait in every call. The length is instead computed from the calls
seen so far. The tensor's version counter shows whether anything else changed it. Tensors made in inference mode have no
version counter. They are read at every call of more than one token, and at the first call after calls that were not
seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe_route.base.devices import capturing, refuse_capture

__all__ = ["CacheLengths"]


class _Known(NamedTuple):
    past: int  # tokens in the cache before the latest call seen
    added: int  # tokens of that call
    version: int | None  # version counter before that call; None in inference mode
    replayed: bool = False  # captured in a CUDA graph, whose replays add tokens that are not seen


class CacheLengths:
    """The lengths of the static caches of one model."""

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @torch.compiler.disable
    def before(self, cache: object, counter: int | Tensor, added: int) -> int:
        """Tokens in `cache` before a call that adds `added`; `counter` is the length that the cache reports."""
        if not isinstance(counter, Tensor):
            if counter == 0:  # a static cache creates its counter in its first call
                self._known[cache] = _Known(0, added, None if torch.is_inference_mode_enabled() else 0)
            return int(counter)
        if counter.device.type == "cpu":
            return int(counter)
        known: _Known | None = self._known.get(cache)
        version = None if counter.is_inference() else counter._version
        captured = capturing(counter.device)
        past = _follow(known, version, added, captured)
        if past is None:
            refuse_capture(counter.device, "reading the length of its cache")
            past = int(counter)
        self._known[cache] = _Known(past, added, version, captured or (known is not None and known.replayed))
        return past

    def forget(self) -> None:
        """Drop the lengths of caches without version counter, after calls that were not seen or that failed."""
        for cache in [cache for cache, known in self._known.items() if known.version is None]:
            del self._known[cache]


def _follow(known: _Known | None, version: int | None, added: int, captured: bool) -> int | None:
    """The length computed from the latest call, or None where it has to be read."""
    if known is None or (known.replayed and not captured):
        return None
    after = known.past + known.added
    if captured:
        return after  # a lower bound after replays: a graph has one length for all of them
    if version is not None and known.version is not None:
        return after if version == known.version + 1 else None  # a forward increments it once
    return after if version is None and added == 1 else None

"""Follow the length of a cache that keeps it in a tensor on the device.

Reading that tensor in every call would make the host wait in every call. Its value is known here from the calls that
were seen; its version counter tells whether anything else changed it. Tensors of inference mode have no such counter:
theirs are read at every call of more than one token, and at the first call after calls that were not seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe_route.devices import capturing, refuse_capture

__all__ = ["CacheLengths"]


class _Known(NamedTuple):
    past: int  # tokens in the cache before the last call that was seen
    added: int  # tokens of that call
    version: int | None  # of the counter before that call; None in inference mode
    replayed: bool = False  # a CUDA graph was captured with it: replays add tokens that are not seen


class CacheLengths:
    """Lengths of static caches."""

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @torch.compiler.disable
    def before(self, cache: object, counter: int | Tensor, added: int) -> int:
        """Tokens in `cache` before a call that adds `added`; `counter` is what the cache says of itself."""
        if not isinstance(counter, Tensor):
            if counter == 0:  # a static cache makes its counter in its first call
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
        """Calls were made that were not seen, or one broke off: what has no version counter is not known any more."""
        for cache in [cache for cache, known in self._known.items() if known.version is None]:
            del self._known[cache]


def _follow(known: _Known | None, version: int | None, added: int, captured: bool) -> int | None:
    """The length that follows from the last call, or None where it has to be read."""
    if known is None or (known.replayed and not captured):
        return None
    after = known.past + known.added
    if captured:
        return after  # after replays a lower bound; a graph has one length for all of its replays
    if version is not None and known.version is not None:
        return after if version == known.version + 1 else None  # a forward adds to it once
    return after if version is None and added == 1 else None

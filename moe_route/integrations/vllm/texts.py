"""Which tokens became text: known in the engine core alone, and told to the workers with every step.

A step may run tokens before it is known whether they belong to the text of their request. Drafts may be rejected, and
under async scheduling a step is laid out before the one before it has told whether a text ends. Where a text ends also
depends on what no worker sees: stop tokens, grammars, repetitions, aborts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_route.integrations.vllm.options import Options, runs_ahead

__all__ = ["FIELD", "Known", "Texts"]

FIELD = "moe_route_known"
"""Attribute of a ``SchedulerOutput``: dict of request name -> ``Known``."""


class Known(NamedTuple):
    """What is known of one request."""

    end: int  # of the tokens that ran last, those at positions below it are what a plain engine would have fed
    ended: bool
    ids: list[int]  # of its answer, those that were not told before; empty where the runner holds them


@dataclass
class _Text:
    request: Any
    told: int = 0  # ids of its answer


class Texts:
    """The texts of one scheduler's requests.

    A plain engine feeds every token of a text but its last one. Under async scheduling the last known token of a
    request that goes on has been fed too, or will be: it is the step in flight, of which there is one at most.
    """

    def __init__(self, ahead: bool):
        """``ahead``: as ``runs_ahead`` says."""
        self._ahead = ahead
        self._texts: dict[str, _Text] = {}
        self._latest: set[str] = set()  # requests of the latest step

    @classmethod
    def of(cls, config: Any) -> Texts | None:
        """Those of an engine with moe-route whose workers need to be told; else None."""
        if Options.of(config.additional_config) is None:
            return None
        ahead = runs_ahead(config)
        return cls(ahead) if ahead or config.speculative_config is not None else None

    def news(self) -> dict[str, Known]:
        """What became known since the last call."""
        found: dict[str, Known] = {}
        for name, text in list(self._texts.items()):
            request, ended = text.request, text.request.is_finished()
            ids = list(request.output_token_ids[text.told :]) if self._ahead else []
            if ended:
                del self._texts[name]
            elif not ids and name not in self._latest:
                continue
            text.told += len(ids)
            found[name] = Known(request.num_tokens - (ended or not self._ahead), ended, ids)
        self._latest = set()
        return found

    def attach(self, news: Mapping[str, Known], step: Any, requests: Mapping[str, Any]) -> None:
        """Send news with a step that was laid out after they were asked for; ``requests``: all of the scheduler."""
        setattr(step, FIELD, news)
        self._latest = set(step.num_scheduled_tokens)
        for name in self._latest:
            known = self._texts.get(name)
            if known is None or known.request is not requests[name]:
                self._texts[name] = _Text(requests[name])

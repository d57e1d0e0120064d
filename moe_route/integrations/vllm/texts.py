"""Which tokens became text: known in the engine core alone, and told to the workers with every step.

A step may run tokens before it is known whether they belong to the text of their request. Drafts may be rejected, and
under async scheduling a step is laid out before the one before it has told whether a text ends. Where a text ends also
depends on what no worker sees: stop tokens, grammars, repetitions, aborts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_route.integrations.serving.counts import Known
from moe_route.integrations.serving.options import Options
from moe_route.integrations.vllm.options import LEFT, runs_ahead

FIELD = "moe_route_known"
"""Attribute of a ``SchedulerOutput``: dict of request name -> ``Known``."""
ABORTED = "moe_route_aborted"
"""Attribute of a ``SchedulerOutput``: which of the requests that ended before it were given up."""


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
        news: dict[str, Known] = {}
        for name, text in list(self._texts.items()):
            request, ended = text.request, text.request.is_finished()
            ids = list(request.output_token_ids[text.told :]) if self._ahead else []
            if ended:
                del self._texts[name]
            elif not ids and name not in self._latest:
                continue
            text.told += len(ids)
            news[name] = Known(request.num_tokens - (ended or not self._ahead), ended, ids)
        self._latest = set()
        return news

    def attach(self, news: Mapping[str, Known], step: Any, requests: Mapping[str, Any]) -> None:
        """Send news with a step that was laid out after they were asked for; ``requests``: all of the scheduler."""
        setattr(step, FIELD, news)
        self._latest = set(step.num_scheduled_tokens)
        for name in self._latest:
            known = self._texts.get(name)
            if known is None or known.request is not requests[name]:
                self._texts[name] = _Text(requests[name])


def texts_of(scheduler: Any) -> Texts | None:
    """What a scheduler knows of the texts of its requests, or None where its workers need not be told."""
    if not hasattr(scheduler, "moe_route_texts"):
        scheduler.moe_route_texts = Texts.of(scheduler.vllm_config)
    texts: Texts | None = scheduler.moe_route_texts
    return texts


def aborted_of(scheduler: Any) -> set[str]:
    """Requests that were given up, of those that the next step tells to have ended."""
    if not hasattr(scheduler, "moe_route_aborted"):
        scheduler.moe_route_aborted = set()
    aborted: set[str] = scheduler.moe_route_aborted
    return aborted


def note_aborted(scheduler: Any, given: Sequence[str] | None, requests: Sequence[Any]) -> None:
    """Note which of these requests, which are finished from outside, are given up; ``given``: ids, None for all.

    A front end finishes a text that ends at a stop string in the same way, but adds no id that begins with ``LEFT``.
    """
    for request in requests:
        stops = given is not None and getattr(request.sampling_params, "stop", None)
        if not stops or LEFT + request.request_id in (given or ()):
            aborted_of(scheduler).add(request.request_id)

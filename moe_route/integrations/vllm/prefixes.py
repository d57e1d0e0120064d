"""Who may share a cached prefix: requests whose tokens are steered alike, by the salt of vLLM's block hashes.

This runs in the engine core, which owns the cache. Workers, which own the plans, say what steers a request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moe_route import files
from moe_route.integrations.vllm.answers import joined
from moe_route.integrations.vllm.options import Options, identity
from moe_route.integrations.vllm.plans import tables_used
from moe_route.steering.compiled import CompiledPlan

__all__ = ["Prefixes", "Steered", "Workers", "steered_prefixes"]

_MARK = "moe_route:"  # begins every salt that is not the request's own alone


class Steered(NamedTuple):
    """What decides the steering of a token of one plan and group, beside its position and id."""

    digest: str
    by_phase: bool  # prompt and answer are steered differently
    by_item: bool = False  # the plan has values of single tokens, by item


@dataclass(frozen=True)
class Workers:
    """What the workers hold now."""

    counts: bool = False  # whether a recording runs
    steered: Mapping[tuple[str, str | None], Steered] = field(default_factory=dict)  # by plan and group


def steered_prefixes(
    plans: Mapping[str, CompiledPlan], groups: tuple[str, ...]
) -> dict[tuple[str, str | None], Steered]:
    """What the plans do to requests of each group; pairs that no rule reaches are left out."""
    found: dict[tuple[str, str | None], Steered] = {}
    for name, plan in plans.items():
        for column, group in enumerate((None, *groups)):
            rows = plan.rows[:, column]
            if plan.is_null or not bool((rows >= 0).any()):
                continue
            by_item = bool(tables_used(plan, group))
            digest = _digest([plan.plan_hash, rows.tolist(), list(plan.bounds), group if by_item else None])
            found[name, group] = Steered(digest, not bool((rows[0] == rows[1]).all()), by_item)
    return found


def _digest(content: Any) -> str:
    return hashlib.blake2b(files.canonical_json(content).encode(), digest_size=16).hexdigest()


class Prefixes:
    """The salts of one engine core's requests."""

    def __init__(self, core: Any, options: Options):
        self._core, self._options = core, options
        self._workers: Workers | None = None  # None: ask them
        self._epoch = 0

    def prepare(self, request: Any) -> None:
        """Salt a request that has no computed token yet, and keep it from the cache if it is to be counted in full."""
        if self._workers is None:
            self._workers = joined(self._core.model_executor.collective_rpc("moe_route_prefixes"))[0]
        plan, group, item = identity(request.sampling_params, self._options)
        steered = self._workers.steered.get((plan, group))
        request.skip_reading_prefix_cache = request.get_skip_reading_prefix_cache() or (
            self._workers.counts and group is not None
        )
        self._salt(request, self._salt_of(steered, request.num_prompt_tokens, item))

    def _salt_of(self, steered: Steered | None, prompt: int, item: str | int | None) -> str:
        if steered is None:
            return f":{self._epoch}" if self._epoch else ""  # shares with every request that is not steered
        parts = [str(self._epoch), steered.digest]
        if steered.by_phase:
            parts.append(str(prompt))
        if steered.by_item:
            parts.append(_digest(item))
        return ":".join(["", *parts])

    def _salt(self, request: Any, salt: str) -> None:
        own = vars(request).setdefault("moe_route_own_salt", request.cache_salt) or ""
        # with its length, and wherever it looks like one of ours, so that no request can make up the salt of another
        wanted = f"{_MARK}{len(own)}:{own}{salt}" if salt or _MARK in own else own or None
        if wanted != request.cache_salt:
            request.cache_salt = wanted
            request.block_hashes.clear()
            request.update_block_hashes()

    def called(self, verb: str) -> None:
        """A verb of moe_route ran on the workers: plans or recordings may have changed.

        Requests that run keep the cache blocks of their salt: what they add to them from now on is steered otherwise,
        so later requests get a new salt. Requests that are waiting get theirs anew.
        """
        self._workers = None
        running = list(self._core.scheduler.requests.values())
        if verb == "steer" and running:
            self._epoch += 1
        for request in running:
            if not request.num_computed_tokens:
                self.prepare(request)

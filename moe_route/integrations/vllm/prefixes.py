"""The salts of vLLM's block hashes: cached prefixes are shared only by requests whose tokens are steered alike.

This runs in the engine core, which owns the cache. Workers, which own the plans, say what steers a request.
"""

from __future__ import annotations

from typing import Any

from moe_route.integrations.serving.answers import joined
from moe_route.integrations.serving.options import WANTED, Options, identity
from moe_route.integrations.serving.plans import Workers, marked_salt, salt_of
from moe_route.integrations.vllm.options import arguments_of


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
        arguments = arguments_of(request.sampling_params)
        plan, group, item = identity(arguments, self._options)
        steered = self._workers.steered.get((plan, group))
        asks = bool(arguments.get(WANTED))  # for its experts, and cached tokens have none
        counted = self._options.count_cached and self._workers.counts and group is not None
        request.skip_reading_prefix_cache = request.get_skip_reading_prefix_cache() or asks or counted
        self._salt(request, salt_of(steered, request.num_prompt_tokens, item, self._epoch))

    def _salt(self, request: Any, salt: str) -> None:
        wanted = marked_salt(vars(request).setdefault("moe_route_own_salt", request.cache_salt), salt)
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

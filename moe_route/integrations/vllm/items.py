"""The items of which plans have values of single tokens, as a front end knows them: it refuses other requests.

A front end reads the plan files of the options, and sees the plans that pass it by ``collective_rpc``.
"""

from __future__ import annotations

import logging
from typing import Any

from moe_route import files
from moe_route.integrations.vllm.options import DEFAULT_PLAN, ITEM, PLAN, Options, identity
from moe_route.integrations.vllm.plans import plan_of
from moe_route.steering.model import PlanError
from moe_route.steering.plan import Plan
from moe_route.steering.sequence_table import Key

__all__ = ["PlannedItems"]

logger = logging.getLogger(__name__)


class PlannedItems:
    """The items of one engine's plans."""

    def __init__(self, options: Options):
        self._options = options
        # by plan: (groups that a rule steers, or None for all; the keys of its table)
        self._known: dict[str, list[tuple[tuple[str, ...] | None, frozenset[Key]]]] = {}
        for name, path in {DEFAULT_PLAN: options.plan, **options.plans}.items():
            if path is not None:
                self.steered(path, name)

    def steered(self, plan: str | bytes | None, name: str = DEFAULT_PLAN) -> None:
        """A plan, a file's path or content, steers from now on; None: none does. Arguments as those of the verb."""
        try:
            made = Plan() if plan is None else plan_of(plan)
        except (files.FileRefusedError, PlanError) as error:  # a path of the workers' machine
            logger.warning(
                "moe_route: requests are not checked against plan %r, which only workers read: %s", name, error
            )
            made = Plan()
        self._known[name] = [(rule.groups, frozenset(rule.table.keys or ())) for rule in made.rules if rule.table]

    def error(self, params: Any) -> str | None:
        """What is wrong with a request, by its sampling parameters: its plan has no values for its item. Or None."""
        plan, group, item = identity(params, self._options)
        for groups, keys in self._known.get(plan, ()):
            if groups is not None and group not in groups:
                continue
            if item is None:
                return f"plan {plan!r} has values of single tokens, by item: give the request {ITEM}"
            if (item, None) not in keys and (item, group) not in keys:
                return (
                    f"plan {plan!r} has no values for {ITEM}={item!r} in group {group!r}: let the request choose "
                    f"another plan by {PLAN}, or none"
                )
        return None

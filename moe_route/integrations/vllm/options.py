"""What the user asks of the plug-in, read from ``--additional-config '{"moe_route": {...}}'``, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moe_route.integrations.vllm.versions import EngineNotSupportedError

__all__ = [
    "GROUP",
    "ITEM",
    "PLAN",
    "UNSTEERED",
    "Options",
    "identity",
    "refuse_engine",
    "refuse_recording",
    "request_error",
]

GROUP, ITEM, PLAN = "moe_route_group", "moe_route_item", "moe_route_plan"
"""Keys of ``SamplingParams.extra_args``, and of ``vllm_xargs`` over HTTP."""
UNSTEERED = "none"
DEFAULT_PLAN, DEFAULT_GROUP = "default", "all"


@dataclass(frozen=True)
class Options:
    """Options of one engine. They are part of vLLM's key of compiled graphs.

    Attributes:
        groups: names of the groups that requests may carry; by default one group, "all", for every request.
        plan: file of the plan that steers requests which name none.
        plans: name -> file of the plans that a request may choose by ``moe_route_plan``; None reserves a name.
        record: whether to record from the start.
        sequences: whether to keep the averages of every sequence, by (item, group).
        trace: whether to keep the experts and weights of every token, or the MoE layers in which to keep them.
        trace_limit: largest number of tokens in a trace.
        rows: steering rows that fit in the tables, over all plans. The tables are made once, as CUDA graphs need.
        any_version: whether to run on a vLLM that was not tried.
    """

    groups: tuple[str, ...] = (DEFAULT_GROUP,)
    plan: str | None = None
    plans: Mapping[str, str | None] = field(default_factory=dict)
    record: bool = False
    sequences: bool = False
    trace: bool | tuple[int, ...] = False
    trace_limit: int = 1_000_000
    rows: int = 16
    any_version: bool = False

    @classmethod
    def of(cls, additional_config: Any) -> Options | None:
        """The options in vLLM's ``additional_config``, or None where the plug-in was not asked for.

        Raises ``EngineNotSupportedError`` for options that do not exist or have another type.
        """
        given = additional_config.get("moe_route") if isinstance(additional_config, Mapping) else None
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise EngineNotSupportedError(f"moe_route takes options by name, {{...}}, not {given!r}")
        known = [entry.name for entry in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise EngineNotSupportedError(f"moe_route: no option {', '.join(unknown)}; there are {', '.join(known)}")
        trace = given.get("trace", False)
        options = cls(
            **{
                **given,
                "groups": tuple(given.get("groups", (DEFAULT_GROUP,))),
                "trace": tuple(trace) if isinstance(trace, (list, tuple)) else trace,
            }
        )
        options._check(given.get("groups"))
        return options

    def _check(self, groups: Any) -> None:
        names = self.groups
        if isinstance(groups, str) or not names or len(set(names)) != len(names) or not _all_text(names):
            raise EngineNotSupportedError('moe_route: "groups" is a list of different names')
        if not isinstance(self.plans, Mapping) or {UNSTEERED, DEFAULT_PLAN} & set(self.plans):
            raise EngineNotSupportedError(
                f'moe_route: "plans" maps names to files; "{DEFAULT_PLAN}" and "{UNSTEERED}" are taken'
            )
        for name in ("rows", "trace_limit"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise EngineNotSupportedError(f'moe_route: "{name}" is a number from 1, not {number!r}')
        if not isinstance(self.trace, bool) and not (
            isinstance(self.trace, tuple) and list(self.trace) == sorted({n for n in self.trace if type(n) is int})
        ):
            raise EngineNotSupportedError('moe_route: "trace" is true, false, or a list of layers in order')
        for name in ("record", "sequences", "any_version"):
            if not isinstance(getattr(self, name), bool):
                raise EngineNotSupportedError(f'moe_route: "{name}" is true or false')

    @property
    def plan_names(self) -> tuple[str, ...]:
        """Names of all plans, by index."""
        return (DEFAULT_PLAN, *self.plans)


def _all_text(names: tuple[Any, ...]) -> bool:
    return all(isinstance(name, str) for name in names)


def request_error(options: Options, extra_args: Mapping[str, Any] | None) -> str | None:
    """What is wrong with the arguments of a request, or None. A request that was let in cannot raise later."""
    given = {key: value for key, value in (extra_args or {}).items() if str(key).startswith("moe_route_")}
    unknown = sorted(set(given) - {GROUP, ITEM, PLAN})
    if unknown:
        return f"{unknown[0]} is no argument of moe_route; there are {GROUP}, {ITEM} and {PLAN}"
    group, item, plan = (given.get(key) for key in (GROUP, ITEM, PLAN))
    if group is not None and group not in options.groups:
        return f"{GROUP}={group!r} is none of the groups of this engine: {', '.join(options.groups)}"
    if group is None and len(options.groups) > 1 and ITEM in given:
        return f"{ITEM} without {GROUP}: a request without a group is not counted"
    if item is not None and (isinstance(item, bool) or not isinstance(item, (str, int))):
        return f"{ITEM} is a text or a whole number, not {item!r}"
    names = (*options.plan_names, UNSTEERED)
    if plan is not None and plan not in names:
        return f"{PLAN}={plan!r} is none of the plans of this engine: {', '.join(names)}"
    return None


def identity(params: Any, options: Options) -> tuple[str, str | None, str | int | None]:
    """Plan, group and item of a request, by its sampling parameters."""
    given = (params and params.extra_args) or {}
    only = options.groups[0] if len(options.groups) == 1 else None
    return given.get(PLAN) or DEFAULT_PLAN, given.get(GROUP) or only, given.get(ITEM)


def refuse_recording(config: Any) -> None:
    """Raise ``EngineNotSupportedError`` for a configuration that steers as it should, and would count wrongly."""
    if config.speculative_config is not None:
        raise EngineNotSupportedError(
            "moe_route: drafts that are rejected would be counted: to record, start without --speculative-config"
        )


def refuse_engine(config: Any) -> None:
    """Raise ``EngineNotSupportedError`` for a vLLM configuration in which counts or steering would be wrong."""
    parallel, scheduler = config.parallel_config, config.scheduler_config
    for refused, why in (
        (
            getattr(scheduler, "async_scheduling", False),
            "a token after the end of a text may be routed and counted: start with --no-async-scheduling",
        ),
        (
            getattr(scheduler, "policy", "fcfs") != "fcfs",
            "preempted requests could outgrow the tables: start with --scheduling-policy fcfs",
        ),
        (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallel ranks split the tokens of a text: start without context parallelism",
        ),
        (
            getattr(parallel, "enable_elastic_ep", False),
            "replicas that join later know neither plans nor the recording: start without --enable-elastic-ep",
        ),
        (getattr(parallel, "enable_dbo", False), "a step is split in two: start without --enable-dbo"),
    ):
        if refused:
            raise EngineNotSupportedError(f"moe_route: {why}")

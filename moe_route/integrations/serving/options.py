"""What the user asks of an engine with moe-route, and what a request may ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from moe_route.base.schema import FileRefusedError, Kind, Natural, Range, meant, misspelt


class EngineNotSupportedError(RuntimeError):
    """The engine is set up in a way in which counts or steering would be wrong; the message says what mends it."""


GROUP, ITEM, PLAN = "moe_route_group", "moe_route_item", "moe_route_plan"
WANTED, START = "moe_route_experts", "moe_route_from"
"""Arguments of a request."""
_WANTED = ("ids", "float32", "float16")  # ids alone, or with weights of this dtype
UNSTEERED = "none"
_MOST_METRICS_GROUPS = 8  # each has five series a layer
DEFAULT_PLAN, DEFAULT_GROUP = "default", "all"


@dataclass(frozen=True)
class Options:
    """Options of one engine.

    Attributes:
        groups: names of the groups that requests may carry; by default one group, "all", for every request.
        plan: file of the plan that steers requests which name none.
        plans: name -> file of the plans that a request may choose by ``moe_route_plan``; None reserves a name.
        record: whether to record from the start.
        sequences: whether to keep the averages of every sequence, by (item, group).
        trace: whether to keep the experts and weights of every token, or the MoE layers in which to keep them.
        trace_limit: largest number of tokens in a trace.
        count_cached: whether counted requests route their whole prompt, in the place of reading the prefix cache.
        routed_experts: whether requests may ask for their experts in the answer.
        rows: steering rows that fit in the tables, over all plans. The tables are made once, as CUDA graphs need.
        any_version: whether to run on a version of the engine that was not tried.
        save: file of the statistics, which the engine core writes while it runs and when it ends, and reads when it
            starts; None: none.
        every: seconds between two of these writes, and between two updates of the metrics.
        metrics_groups: groups that have metrics of their own, beside those over all groups.
        admin: whether clients with the API key may change plans over HTTP.
    """

    groups: tuple[str, ...] = (DEFAULT_GROUP,)
    plan: str | None = None
    plans: Mapping[str, str | None] = field(default_factory=dict)
    record: bool = False
    sequences: bool = False
    trace: bool | tuple[Natural, ...] = False
    trace_limit: Annotated[int, Range(1)] = 1_000_000
    count_cached: bool = True
    routed_experts: bool = False
    rows: Annotated[int, Range(1)] = 16
    any_version: bool = False
    save: str | None = None
    every: float = 60.0
    metrics_groups: tuple[str, ...] = ()
    admin: bool = False

    @classmethod
    def of(cls, settings: Any) -> Options | None:
        """The options under "moe_route" in what an engine is started with, or None where moe-route was not asked for.

        Raises ``EngineNotSupportedError`` for options that do not exist or have another type.
        """
        given = settings.get("moe_route") if isinstance(settings, Mapping) else None
        if given is None:
            return None
        try:
            options: Options = OPTIONS.read(given, "moe_route")
        except FileRefusedError as error:
            raise EngineNotSupportedError(str(error)) from error
        return options

    def __post_init__(self) -> None:
        names = self.groups
        if not names or len(set(names)) != len(names):
            raise ValueError('"groups" is a list of different names')
        if {UNSTEERED, DEFAULT_PLAN} & set(self.plans):
            raise ValueError(f'"plans" maps names to files; "{DEFAULT_PLAN}" and "{UNSTEERED}" are taken')
        if isinstance(self.trace, tuple) and list(self.trace) != sorted(set(self.trace)):
            raise ValueError('"trace" is true, false, or a list of layers in order')
        if not set(self.metrics_groups) <= set(names) or len(self.metrics_groups) > _MOST_METRICS_GROUPS:
            raise ValueError(f'"metrics_groups" is a list of at most {_MOST_METRICS_GROUPS} of the groups')
        if self.save == "":
            raise ValueError('"save" is the path of a file')
        if self.every <= 0:
            raise ValueError('"every" is a number of seconds above 0')

    @property
    def plan_names(self) -> tuple[str, ...]:
        """Names of all plans, by index."""
        return (DEFAULT_PLAN, *self.plans)


OPTIONS = Kind("engine-options", Options, mark="")
"""The options of an engine."""


def request_error(options: Options, arguments: Mapping[str, Any] | None) -> str | None:
    """What is wrong with the arguments of a request, or None. A request that was let in cannot raise later."""
    given = {key: value for key, value in (arguments or {}).items() if str(key).startswith("moe_route_")}
    known = (GROUP, ITEM, PLAN, WANTED, START)
    near = misspelt(sorted(map(str, arguments or {})), known)
    unknown = sorted(set(given) - {*known}) or ([near[0]] if near else [])
    if unknown:
        return f"{unknown[0]} is no argument of moe_route: {meant(unknown[0], known)}"
    group, item, plan = (given.get(key) for key in (GROUP, ITEM, PLAN))
    if group is not None and group not in options.groups:
        return f"{GROUP}={group!r} is none of the groups of this engine: {', '.join(options.groups)}"
    if group is None and len(options.groups) > 1 and ITEM in given:
        return f"{ITEM} without {GROUP}: a request without a group is not counted"
    if item is not None and (isinstance(item, bool) or not isinstance(item, (str, int))):
        return f"{ITEM} is a text or a whole number, not {item!r}"
    wanted, start = given.get(WANTED), given.get(START)
    if wanted is not None and not options.routed_experts:
        return f'{WANTED} wants an engine that starts with "moe_route": {{"routed_experts": true}}'
    if wanted is not None and wanted not in _WANTED:
        return f"{WANTED}={wanted!r} is none of {', '.join(_WANTED)}"
    if start is not None and (wanted is None or isinstance(start, bool) or not isinstance(start, int) or start < 0):
        return f"{START} is a number of tokens from 0, beside {WANTED}, not {start!r}"
    names = (*options.plan_names, UNSTEERED)
    if plan is not None and plan not in names:
        return f"{PLAN}={plan!r} is none of the plans of this engine: {', '.join(names)}"
    return None


def identity(arguments: Mapping[str, Any] | None, options: Options) -> tuple[str, str | None, str | int | None]:
    """Plan, group and item of a request, by its arguments."""
    given = arguments or {}
    only = options.groups[0] if len(options.groups) == 1 else None
    return given.get(PLAN) or DEFAULT_PLAN, given.get(GROUP) or only, given.get(ITEM)

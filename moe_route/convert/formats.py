"""The formats that can be read and written, as two tables, and how a file's format is recognized.

``reads`` and ``writes`` stand beside each function and fill the tables. The formats of other programs are the modules
of ``convert.foreign``; a new one there is all that a new format needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from moe_route.convert.source import Source
from moe_route.convert.traces import statistics_of
from moe_route.recording import RoutingStatistics, Trace
from moe_route.steering import ExpertSelection, Plan

_Function = TypeVar("_Function", bound=Callable[..., Any])
KINDS: Mapping[str, Any] = {
    "statistics": RoutingStatistics,
    "trace": Trace,
    "selection": ExpertSelection,
    "plan": Plan,
}
"""Kinds of results, by the names that their files have."""


@dataclass(frozen=True)
class Format:
    """A format that can be read."""

    holds: str  # what a file holds and who writes it, in a few words
    recognizes: Callable[[Source], bool]
    gives: dict[str, Callable[..., Any]]  # kind -> reader of one source; the first is what the format is
    defaults: Mapping[str, Any]  # options that are known of the format


@dataclass(frozen=True)
class Target:
    """A format that can be written."""

    holds: str  # what the file holds, and who reads it
    kinds: tuple[str, ...]  # kinds that can be written so
    suffixes: tuple[str, ...]
    write: Callable[..., None]  # (value, path, **options)


FORMATS: dict[str, Format] = {}
"""Every format that can be read, by name."""
TARGETS: dict[str, Target] = {}
"""Every format that can be written, by name."""


def reads(
    name: str,
    holds: str = "",
    *,
    gives: str,
    when: Callable[[Source], bool] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[_Function], _Function]:
    """Enter a reader, ``function(source, *, options) -> value``, in ``FORMATS``.

    Args:
        name: of the format; readers of further kinds of the same format need only this and ``gives``.
        holds: what a file holds and who writes it, in a few words.
        gives: the kind that the reader returns, one of ``KINDS``.
        when: whether a source is of this format.
        defaults: options that are known of the format.
    """

    def enter(function: _Function) -> _Function:
        if when is not None:
            FORMATS[name] = Format(holds, when, {}, defaults or {})
        FORMATS[name].gives[gives] = function
        return function

    return enter


def writes(name: str, holds: str, *, takes: Sequence[str], suffixes: Sequence[str]) -> Callable[[_Function], _Function]:
    """Enter a writer, ``function(value, path, *, options)``, in ``TARGETS``; ``takes``: the kinds that it writes."""

    def enter(function: _Function) -> _Function:
        TARGETS[name] = Target(holds, tuple(takes), tuple(suffixes), function)
        return function

    return enter


def _is_ours(kind: str, source: Source) -> bool:
    if source.form == "moe-route":
        return bool(source.content == kind)
    plain = kind in ("plan", "selection") and source.form == "json" and isinstance(source.content, dict)
    return plain and source.content.get("moe_route") == kind


for _kind, _class in KINDS.items():
    reads(_kind, f"{_kind}, saved by moe-route", gives=_kind, when=partial(_is_ours, _kind))(
        lambda source, _class=_class: _class.load(source.path)
    )


def _plan_of(selection: ExpertSelection, *, action: str = "activate", strength: float = 0.5) -> Plan:
    if action in ("activate", "deactivate"):
        return getattr(Plan, action)(selection, strength=strength)  # type: ignore[no-any-return]
    if action in ("force_on", "force_off", "forbid"):
        return getattr(Plan, action)(selection)  # type: ignore[no-any-return]
    raise ValueError(f"no action {action!r}: activate, deactivate, force_on, force_off or forbid")


DERIVED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("trace", "statistics"): statistics_of,
    ("trace", "plan"): lambda trace: Plan.replay(trace),
    ("selection", "plan"): _plan_of,
}
"""(kind, other kind) -> how the first becomes the other."""


def format_of(source: Source, name: str | None = None) -> str:
    """The name of a file's format: ``name`` if it is given and fits, else the only one that recognizes the file."""
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f"no format {name!r}: one of {', '.join(FORMATS)}")
        if not _fits(name, source):
            raise source.refused(f"it is not {FORMATS[name].holds}", f"check --from, {_others(source, name)}")
        return name
    fitting = [known for known in FORMATS if _fits(known, source)]
    if len(fitting) > 1:
        raise source.refused(f"it may be {' or '.join(fitting)}", "say which (--from, format=)")
    if not fitting:
        raise source.refused("it is of no known format", f"give one of {', '.join(FORMATS)}")
    return fitting[0]


def _fits(name: str, source: Source) -> bool:
    try:
        return FORMATS[name].recognizes(source)
    except (LookupError, TypeError, AttributeError):  # a list where the format has a mapping, and the like
        return False


def _others(source: Source, name: str) -> str:
    others = [known for known in FORMATS if known != name and _fits(known, source)]
    return f"it looks like {' or '.join(others)}" if others else "it is of no known format"


def options_of(*functions: Callable[..., Any]) -> set[str]:
    """The keyword options of readers."""
    return {
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def readers(name: str, to: str | None) -> tuple[str, Callable[..., Any], Sequence[Callable[..., Any]]]:
    """How format ``name`` becomes kind ``to``: the kind that is read, its reader, and what is then done to it."""
    gives = FORMATS[name].gives
    if to is None or to in gives:
        kind = to or next(iter(gives))
        return kind, gives[kind], ()
    for kind, reader in gives.items():
        if (kind, to) in DERIVED:
            return kind, reader, (DERIVED[kind, to],)
    known = [*gives, *(other for kind, other in DERIVED if kind in gives)]
    raise ValueError(f"{name} gives no {to}: it gives {', '.join(dict.fromkeys(known))}")

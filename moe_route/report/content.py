"""The content of a report: everything the page shows, as JSON."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from moe_route import __version__, plots
from moe_route.recording import RoutingStatistics
from moe_route.report.by_layer import MIN_GROUPS, balance_of, correlation_with, divergence_from
from moe_route.report.inputs import Inputs
from moe_route.report.recordings import facts_of, frequencies_of
from moe_route.report.token_texts import Pieces, pieces_by_id, pieces_of
from moe_route.report.token_view import chosen_sequences, token_view
from moe_route.steering import ExpertSelection, Plan

__all__ = ["content_of"]

logger = logging.getLogger(__name__)

_DEFAULT_REFERENCE = "eng_Latn"
_TRACE_BYTES = 1_200_000  # of all traces together


def content_of(
    inputs: Inputs, *, reference: str | None = None, tokenizer: Any = None, title: str | None = None
) -> dict[str, Any]:
    """Compute what a report shows.

    Args:
        reference: the group that others are compared with; by default eng_Latn, or the first group.
        tokenizer: gives the texts of token ids; without it, the ids are shown.
        title: heading of the page; by default the name of the model.

    Raises ``ValueError`` if there is nothing to show, or no recording has the reference.
    """
    if not inputs:
        raise ValueError("there is nothing to report: pass a recording, a trace, or another result")
    if reference is not None and not any(reference in of.groups for of in inputs.recordings.values()):
        held = sorted({group for of in inputs.recordings.values() for group in of.groups})
        raise ValueError(f"no recording has the reference {reference!r}: there are {', '.join(held) or 'no groups'}")
    pieces = pieces_by_id if tokenizer is None else pieces_of(tokenizer)
    with _warnings() as warned:
        recordings = {name: _recording(one, reference, inputs.scores) for name, one in inputs.recordings.items()}
        traces = _traces(inputs, pieces)
    return {
        "title": title or f"Expert routing of {_model_name(inputs)}",
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "recordings": recordings,
        "styles": _styles(inputs),
        "marks": _marks(inputs),
        "results": [table.to_dict() for table in inputs.results],
        "traces": traces,
        "hasTexts": tokenizer is not None,
        "warnings": list(dict.fromkeys(warned)),
    }


def _recording(
    given: RoutingStatistics, reference: str | None, scores: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    seen = given.tokens().max(axis=1, initial=0) > 0
    statistics = given.select(groups=[name for name, some in zip(given.groups, seen, strict=True) if some])
    content: dict[str, Any] = {
        "facts": facts_of(given),
        "groups": list(statistics.groups),
        "frequency": frequencies_of(statistics) if statistics.groups else None,
        "balance": balance_of(statistics) if statistics.groups else None,
        "divergence": None,
        "correlations": [],
    }
    base = _reference(statistics, reference)
    content["reference"] = base
    if base is not None and len(statistics.groups) > 1:
        found, content["divergence"] = divergence_from(statistics, base)
        correlations = {name: correlation_with(found, of) for name, of in scores.items()}
        content["correlations"] = [{"name": name, **of} for name, of in correlations.items() if of is not None]
        for name in (name for name, of in correlations.items() if of is None):
            logger.warning(
                "scores %s: too few of the groups of a recording have one, a correlation needs %d", name, MIN_GROUPS
            )
    return content


def _reference(statistics: RoutingStatistics, wanted: str | None) -> str | None:
    for name in (wanted, _DEFAULT_REFERENCE, *statistics.groups[:1]):
        if name in statistics.groups:
            return name
    return None


def _marks(inputs: Inputs) -> list[dict[str, Any]]:
    """Sets of experts to mark: of selections, and those that plans name."""
    sizes = next((of.num_experts for of in inputs.recordings.values()), ())
    marks = [_mark(name, "selection", found) for name, found in inputs.selections.items()]
    every = {layer: range(size) for layer, size in enumerate(sizes)}
    for name, plan in inputs.plans.items():
        experts = every or {layer: range(size) for layer, size in enumerate(plan.model.num_experts or ())}
        marks.append(_mark(name, "plan", plan.touching(experts), plan))
    return marks


def _mark(name: str, kind: str, experts: ExpertSelection, plan: Plan | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "description": experts.description if plan is None else plan.describe(),
        "hash": None if plan is None else plan.hash,
        "experts": [list(pair) for pair in experts.pairs],
    }


def _traces(inputs: Inputs, pieces: Pieces) -> list[dict[str, Any]]:
    room = _TRACE_BYTES // max(len(inputs.traces), 1)
    return [
        {"name": name, **token_view(trace, pieces, chosen_sequences(trace, room))}
        for name, trace in inputs.traces.items()
        if len(trace)
    ]


def _styles(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Color and dashes of each group, the same as in the figures of ``plots``."""
    groups = dict.fromkeys(group for of in inputs.recordings.values() for group in of.groups)
    found: dict[str, dict[str, Any]] = {}
    for group, style in plots.styles(groups).items():
        dashes = () if style["linestyle"] == "-" else style["linestyle"][1]
        width = style["linewidth"]
        found[group] = {"color": style["color"], "dash": " ".join(f"{width * d:g}" for d in dashes) or None}
    return found


def _model_name(inputs: Inputs) -> str:
    names = [(of.metadata.get("model") or {}).get("name") for of in inputs.recordings.values()]
    names += [plan.model.name for plan in inputs.plans.values()]
    return next((str(name) for name in names if name), "a model")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings of this library, which the report repeats; they are logged and shown as well."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Collect(logging.WARNING)
    log = logging.getLogger("moe_route")
    log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        log.removeHandler(handler)
    found.extend(str(one.message) for one in caught if issubclass(one.category, UserWarning))
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

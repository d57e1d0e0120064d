"""Tokens of a trace: which of them, which layers, which of their experts. Every analysis of traces starts here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_route.analysis.inputs import AnalysisError
from moe_route.calls.call import PHASES
from moe_route.steering.layers import as_layers, show_numbers

if TYPE_CHECKING:
    from moe_route.recording import Trace

__all__ = [
    "check_k",
    "check_trace",
    "chunks",
    "class_index",
    "expert_numbers",
    "layer_places",
    "strongest_experts",
    "text_order",
    "token_rows",
]


def token_rows(trace: Trace, groups: Sequence[str] | str | None = None, phase: str | None = None) -> np.ndarray:
    """int64 [n]: the tokens of these groups (by default all) and this phase.

    Raises ``AnalysisError`` if there are none, naming the group that has none.
    """
    if phase is not None and phase not in PHASES:
        raise AnalysisError(f"no phase {phase!r}: prefill, decode, or None for both")
    kept = np.ones(len(trace.sequence), bool) if phase is None else trace.phase == PHASES.index(phase)
    if groups is not None:
        names = [groups] if isinstance(groups, str) else list(groups)
        for name in names:
            if name not in trace.groups or not (kept & (trace.group == trace.groups.index(name))).any():
                held = ", ".join(map(repr, trace.groups)) or "no groups"
                raise AnalysisError(f"the trace has no tokens of group {name!r} (its groups: {held})")
        kept &= np.isin(trace.group, [trace.groups.index(name) for name in names])
    rows = np.flatnonzero(kept)
    if not rows.size:
        raise AnalysisError("the trace has no tokens of this phase" if len(trace.sequence) else "the trace is empty")
    return rows


def check_trace(trace: object) -> None:
    """Refuse what is no trace."""
    if not hasattr(trace, "layer_numbers"):
        raise AnalysisError(f"give a Trace (record(trace=True), recorder.trace()), not {type(trace).__name__}")


def layer_places(trace: Trace, layers: Iterable[int] | int | None) -> tuple[tuple[int, ...], list[int]]:
    """The layers (by default all that were traced), and their places along the layer axis of the trace."""
    check_trace(trace)
    numbers = trace.layer_numbers if layers is None else as_layers(layers)
    missing = [number for number in numbers if number not in trace.layer_numbers]
    if missing or not numbers:
        traced = show_numbers(trace.layer_numbers) or "none"
        wanted = f"layer {missing[0]} was not traced" if missing else "there is no layer to look at"
        raise AnalysisError(f"{wanted}: the trace holds layers {traced}; record(trace=[...]) chooses them")
    return tuple(numbers), [trace.layer_numbers.index(number) for number in numbers]


def expert_numbers(trace: Trace, places: Sequence[int], num_experts: int | Sequence[int] | None) -> tuple[int, ...]:
    """Number of experts of the layers at these places: as given for all traced layers, or up to the largest id."""
    largest = [int(trace.ids[:, place].max(initial=-1)) + 1 for place in places]
    if num_experts is None:
        return tuple(max(number, 1) for number in largest)
    traced = len(trace.layer_numbers)
    given = [num_experts] * traced if isinstance(num_experts, int) else [int(size) for size in num_experts]
    if len(given) != traced:
        raise AnalysisError(f"num_experts must be one number, or one for each of the {traced} traced layers")
    sizes = tuple(given[place] for place in places)
    for place, size, found in zip(places, sizes, largest, strict=True):
        if size < max(found, 1):
            layer = trace.layer_numbers[place]
            raise AnalysisError(f"the trace holds expert {found - 1} of layer {layer}: num_experts is not {size}")
    return sizes


def strongest_experts(ids: np.ndarray, weights: np.ndarray, k: int | None) -> np.ndarray:
    """The k experts of each token with the largest weights, [..., k]; None: all slots. Ties go to the earlier slot."""
    if k is None or k == ids.shape[-1]:
        return ids
    ranked = np.where(ids >= 0, weights, -np.inf)
    if k == 1:
        return np.take_along_axis(ids, ranked.argmax(-1)[..., None], -1)
    order = np.argsort(-ranked, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(ids, order, -1)


def chunks(rows: np.ndarray, size: int = 1 << 15) -> Iterator[np.ndarray]:
    """The rows, ``size`` at a time, so that memory does not grow with the trace."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def check_k(trace: Trace, k: int | None) -> None:
    """Refuse a number of experts per token that the trace does not hold."""
    check_trace(trace)
    slots = trace.ids.shape[-1]
    if k is not None and not 1 <= k <= slots:
        raise AnalysisError(f"k must be between 1 and {slots}, the experts of a token in this trace, not {k}")


def text_order(trace: Trace, rows: np.ndarray) -> np.ndarray:
    """The rows in the order of the text: by sequence, then by position.

    Raises ``AnalysisError`` if a position of a sequence occurs twice, so that the text has no order.
    """
    ordered = rows[np.lexsort((trace.position[rows], trace.sequence[rows]))]
    sequence, position = trace.sequence[ordered], trace.position[ordered]
    twice = np.flatnonzero((sequence[1:] == sequence[:-1]) & (position[1:] == position[:-1]))
    if twice.size:
        raise AnalysisError(
            f"sequence {sequence[twice[0]]} has position {position[twice[0]]} twice, as with beams or with an encoder "
            "and its decoder: trace without beams, and either the encoder's layers or the decoder's"
        )
    return ordered


def class_index(trace: Trace, rows: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 [n], the class of each of these tokens, and the names of the classes; ids outside are "other"."""
    names, numbers = np.unique(np.asarray([*classes, "other"], dtype=np.str_), return_inverse=True)
    token = trace.token[rows].astype(np.int64)
    known = (token >= 0) & (token < len(classes))
    return numbers[np.where(known, token, len(classes))], tuple(names.tolist())

"""Router saturation: how many of the final checkpoint's experts an earlier checkpoint already chose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.result import by_depth, plain
from moe_route.analysis.trace_tokens import check_k, check_trace, chunks, layer_places, strongest_experts, token_rows
from moe_route.recording.frames import data_frame
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

    from moe_route.recording import Trace

__all__ = ["Saturation", "saturation"]


@dataclass(frozen=True, eq=False, repr=False)
class Saturation(ShownAsTables):
    """Share of the final checkpoint's top-k experts that an earlier checkpoint chose for the same token.

    Attributes:
        values: float64 [k, L], mean over tokens, in [0, 1]; NaN in a layer without tokens.
        by_group: float64 [k, G, L], mean over the tokens of each group.
        ks: the numbers of experts per token that were compared.
        groups: names of the G groups.
        layers: the L layers, as indices among the MoE layers.
        tokens: int64 [G], tokens of each group.
    """

    values: np.ndarray
    by_group: np.ndarray
    ks: tuple[int, ...]
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: np.ndarray

    def of(self, k: int) -> np.ndarray:
        """float64 [L]: saturation of the top-k experts."""
        if k not in self.ks:
            raise AnalysisError(f"k = {k} was not compared: saturation(k=[...]) chooses it")
        return self.values[self.ks.index(k)]

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (k, group, layer)."""
        axes = {"k": self.ks, "group": self.groups, "layer": self.layers}
        return data_frame({"saturation": self.by_group.reshape(-1)}, axes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        content: dict[str, Any] = plain({name: getattr(self, name) for name in _FIELDS})
        return content

    def tables(self) -> list[Table]:
        title = f"Router saturation over {int(self.tokens.sum())} tokens"
        shown = [by_depth([f"top-{k}" for k in self.ks], self.values, layers=self.layers, title=title)]
        if len(self.groups) > 1:
            for k, values in zip(self.ks, self.by_group, strict=True):
                shown.append(by_depth(self.groups, values, layers=self.layers, title=f"top-{k}, by group"))
        return shown


_FIELDS = ("values", "by_group", "ks", "groups", "layers", "tokens")


def saturation(
    early: Trace,
    final: Trace,
    *,
    k: int | Sequence[int] | None = None,
    layers: Iterable[int] | None = None,
    groups: Sequence[str] | None = None,
) -> Saturation:
    """Compare the routing of one text by two checkpoints, token by token [arXiv 2409.02060, section 5.1].

    ``saturation = mean over tokens of |A & B| / k``, where A and B are the token's top-k experts (those with the
    largest weights) in the earlier and in the final checkpoint. Two routers that draw k of E experts at random have
    k / E.

    Args:
        early, final: traces of the same texts in the same order.
        k: one or several numbers of experts; by default 1 and the number that the model chooses. A token with fewer
            than k experts in the final checkpoint is divided by the number that it has.
        layers: by default all that both traces hold.
        groups: the tokens to compare; by default all.

    Raises ``AnalysisError`` if the traces hold different tokens, naming the first that differs.
    """
    for given in (early, final):
        check_trace(given)
    _check_same_tokens(early, final)
    slots = min(early.ids.shape[-1], final.ids.shape[-1])
    ks = sorted({1, slots}) if k is None else [k] if isinstance(k, (int, np.integer)) else list(k)
    if not ks:
        raise AnalysisError("there is no number of experts to compare: leave k out, or name one")
    for number in ks:
        check_k(early, number)
        check_k(final, number)
    shared = [layer for layer in final.layer_numbers if layer in early.layer_numbers] if layers is None else layers
    numbers, early_places = layer_places(early, shared)
    _, final_places = layer_places(final, shared)
    rows = token_rows(final, groups)
    cells = (len(ks), len(final.groups), len(numbers))
    total, seen = np.zeros(cells), np.zeros(cells)
    for part in chunks(rows):
        group = final.group[part]
        for column, (one, other) in enumerate(zip(early_places, final_places, strict=True)):
            ours = early.ids[part, one], early.weights[part, one]
            theirs = final.ids[part, other], final.weights[part, other]
            for row, number in enumerate(ks):
                a, b = strongest_experts(*ours, number), strongest_experts(*theirs, number)
                size = (b >= 0).sum(-1)
                share = _shared(a, b) / np.maximum(size, 1)
                total[row, :, column] += np.bincount(group, share, cells[1])
                seen[row, :, column] += np.bincount(group, size > 0, cells[1])
    return Saturation(
        values=_ratio(total.sum(1), seen.sum(1)),
        by_group=_ratio(total, seen),
        ks=tuple(ks),
        groups=tuple(final.groups),
        layers=numbers,
        tokens=np.bincount(final.group[rows], minlength=cells[1]),
    )


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of experts in both rows, int16 [n]; the experts of a row differ, -1 is empty."""
    found = np.zeros(len(a), np.int16)
    ours, theirs = np.ascontiguousarray(a.T), np.ascontiguousarray(np.where(b >= 0, b, -2).T)
    for one in ours:  # a loop over pairs of slots: each comparison runs over all tokens
        for other in theirs:
            found += one == other
    return found


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _check_same_tokens(early: Trace, final: Trace) -> None:
    mend = "trace both checkpoints over the same texts, in the same order, with the same batch size and trace_limit"
    if len(early) != len(final):
        raise AnalysisError(f"the traces hold {len(early)} and {len(final)} tokens: {mend}")
    names = {"text": _items, "group": _groups, "position": _positions, "token id": _tokens}
    for name, column in names.items():
        different = np.flatnonzero(column(early) != column(final))
        if different.size:
            place = int(different[0])
            ours, theirs = column(early)[place], column(final)[place]
            raise AnalysisError(f"token {place} has {name} {ours!s} in one trace and {theirs!s} in the other: {mend}")


def _items(trace: Trace) -> np.ndarray:
    return np.asarray(trace.items, dtype=object)[trace.sequence]


def _groups(trace: Trace) -> np.ndarray:
    return np.asarray(trace.groups, dtype=object)[trace.group]


def _positions(trace: Trace) -> np.ndarray:
    return trace.position


def _tokens(trace: Trace) -> np.ndarray:
    return trace.token

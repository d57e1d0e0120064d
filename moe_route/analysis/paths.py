"""Routing of single tokens through layers (paths), and through training (saturation)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.measures import ratio
from moe_route.analysis.result import Result, by_depth
from moe_route.analysis.tokens import (
    check_k,
    check_trace,
    chunks,
    class_index,
    layer_places,
    strongest_experts,
    token_rows,
)
from moe_route.base.table import Table, number_of
from moe_route.recording import Trace
from moe_route.steering.layers import show_numbers


@dataclass(frozen=True, eq=False)
class RoutingPath:
    """A path that many tokens take.

    Attributes:
        experts: for each layer of the window, the experts in increasing order.
        tokens: number of tokens that take it.
        by_class, by_group: number of these tokens per class and per group, those with any, the most frequent first.
    """

    experts: tuple[tuple[int, ...], ...]
    tokens: int
    by_class: dict[str, int]
    by_group: dict[str, int]

    def __str__(self) -> str:
        return " > ".join("+".join(map(str, layer)) for layer in self.experts)


@dataclass(frozen=True, eq=False)
class PathWindow:
    """The paths through some layers.

    Attributes:
        layers: the layers of the window, as indices among the MoE layers.
        tokens: N, number of tokens with a choice in all of these layers; others are left out.
        distinct: number of different paths.
        entropy: entropy of the distribution of tokens over paths, in nats, from 0 to log N.
        purity: share of tokens that belong to the most frequent class of their path, over the ``covered`` tokens; NaN
            without any.
        chance: purity of a single path that all covered tokens took.
        spread: mean number of groups that use the path of a token, over the covered tokens.
        covered: number of tokens on paths with ``min_tokens`` tokens or more.
        distinct_by_group, entropy_by_group: ``distinct`` and ``entropy`` of the tokens of each group; int64 and
            float64 [G].
        frequent: the most frequent paths.
    """

    layers: tuple[int, ...]
    tokens: int
    distinct: int
    entropy: float
    purity: float
    chance: float
    spread: float
    covered: int
    distinct_by_group: np.ndarray
    entropy_by_group: np.ndarray
    frequent: tuple[RoutingPath, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Paths(Result):
    """Routing paths of the tokens of a trace, in one window of layers or in several.

    Attributes:
        windows: a result per window.
        groups: names of the G groups.
        classes: names of the classes that purity looks at.
        k: number of experts per layer that make up a path; None: all chosen ones.
        min_tokens: paths with fewer tokens do not count for purity, since a path with one token is always pure.
    """

    windows: tuple[PathWindow, ...]
    groups: tuple[str, ...]
    classes: tuple[str, ...]
    k: int | None
    min_tokens: int

    def columns(self) -> dict[str, Any]:
        """A row per window: ``first`` and ``last`` layer, and its numbers."""
        names = ("tokens", "distinct", "entropy", "purity", "chance", "spread", "covered")
        ends = {"first": [w.layers[0] for w in self.windows], "last": [w.layers[-1] for w in self.windows]}
        return ends | {name: [getattr(window, name) for window in self.windows] for name in names}

    def tables(self) -> list[Table]:
        head = ["layers", "tokens", "paths", "entropy", "purity", "chance", "groups per path", "covered"]
        rows = [
            [show_numbers(w.layers), w.tokens, w.distinct, w.entropy, w.purity, w.chance, w.spread, w.covered]
            for w in self.windows
        ]
        kind = "all chosen experts" if self.k is None else f"top-{self.k}"
        groups = max(int((window.distinct_by_group > 0).sum()) for window in self.windows)
        title = f"Routing paths ({kind}) of {number_of(groups, 'group')}"
        note = f"purity, chance, groups per path: over tokens on paths with {self.min_tokens} tokens or more (covered)"
        shown = [Table(head, rows, title, note)]
        if len(self.windows) == 1 and self.windows[0].frequent:
            window = self.windows[0]
            shown.append(
                Table(
                    ["tokens", "groups", "most frequent class", "path"],
                    [[path.tokens, len(path.by_group), _leading(path), str(path)] for path in window.frequent],
                    f"most frequent paths through layers {show_numbers(window.layers)}",
                )
            )
        return shown


def paths(
    trace: Trace,
    *,
    layers: Iterable[int] | None = None,
    window: int | None = None,
    k: int | None = 1,
    groups: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    min_tokens: int = 5,
    keep: int = 10,
) -> Paths:
    """Count the paths of tokens through layers: a path is the tuple of the experts of a token in each layer.

    Paths through several layers as units of interpretation are from arXiv 2604.17837, which takes the top-1 expert of
    each layer. The measures are defined in :class:`PathWindow`.

    Args:
        layers: layers of a path, as indices among the MoE layers; by default all that were traced.
        window: look at every run of this many layers; by default at all layers together.
        k: number of experts per layer, those with the largest weights (their order does not matter); None: all.
        groups, phase: the tokens to look at; by default all.
        classes: class of each token id, a name per id (as ``token_classes`` gives), for purity; by default the classes
            are the groups. Tokens with an id outside have the class "other".
        min_tokens: smallest number of tokens of a path that counts for purity.
        keep: number of most frequent paths to list.

    Paths are told apart by 64-bit hashes: for a million different paths, the probability that any two are taken for one
    is below 1e-7. Memory is less than 200 bytes per token, beside the trace.

    Raises ``AnalysisError`` for layers that were not traced and groups without tokens.
    """
    numbers, _ = layer_places(trace, layers)
    size = len(numbers) if window is None else window
    if not 1 <= size <= len(numbers):
        raise AnalysisError(f"window must be between 1 and {len(numbers)}, the number of layers, not {window}")
    if min_tokens < 1 or keep < 0:
        raise AnalysisError("min_tokens must be 1 or more, and keep 0 or more")
    check_k(trace, k)
    rows = token_rows(trace, groups, phase)
    of_class, names = (
        (trace.group[rows].astype(np.int64), tuple(trace.groups))
        if classes is None
        else class_index(trace, rows, classes)
    )
    windows = tuple(
        _window(trace, rows, numbers[start : start + size], k, of_class, names, min_tokens, keep)
        for start in range(len(numbers) - size + 1)
    )
    return Paths(windows, tuple(trace.groups), names, k, min_tokens)


def _window(
    trace: Trace,
    rows: np.ndarray,
    layers: tuple[int, ...],
    k: int | None,
    of_class: np.ndarray,
    classes: tuple[str, ...],
    min_tokens: int,
    keep: int,
) -> PathWindow:
    _, places = layer_places(trace, layers)
    hashes, complete = _hashes(trace, rows, places, k)
    rows, of_class, hashes = rows[complete], of_class[complete], hashes[complete]
    _, first, path, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    groups = len(trace.groups)
    of_group = trace.group[rows]
    by_class, by_group = _table(path, of_class, len(classes)), _table(path, of_group, groups)
    frequent = np.argsort(-counts, kind="stable")[:keep]
    kept = counts >= min_tokens
    total = int(counts[kept].sum())
    largest = np.zeros(len(counts), np.int64)
    np.maximum.at(largest, by_class.path, by_class.tokens)
    covered = kept[by_class.path]
    in_class = np.bincount(by_class.of[covered], by_class.tokens[covered], len(classes))
    used = np.bincount(by_group.path, minlength=len(counts))
    return PathWindow(
        layers=layers,
        tokens=len(rows),
        distinct=len(counts),
        entropy=_entropy(counts),
        purity=_share(largest[kept].sum(), total),
        chance=_share(in_class.max(initial=0), total),
        spread=_share((used * counts)[kept].sum(), total),
        covered=total,
        distinct_by_group=np.bincount(by_group.of, minlength=groups),
        entropy_by_group=np.array([_entropy(by_group.tokens[by_group.of == group]) for group in range(groups)]),
        frequent=tuple(
            RoutingPath(
                _experts(trace, int(rows[first[number]]), places, k),
                int(counts[number]),
                by_class.of_path(number, classes),
                by_group.of_path(number, trace.groups),
            )
            for number in frequent.tolist()
        ),
    )


@dataclass(frozen=True, eq=False)
class _Table:
    """Number of tokens per pair of a path and a class, for the pairs that occur, in the order of the paths."""

    path: np.ndarray
    of: np.ndarray
    tokens: np.ndarray

    def of_path(self, number: int, names: Sequence[str]) -> dict[str, int]:
        start, end = np.searchsorted(self.path, [number, number + 1])
        counted = zip(self.of[start:end].tolist(), self.tokens[start:end].tolist(), strict=True)
        return {names[of]: tokens for of, tokens in sorted(counted, key=lambda pair: (-pair[1], pair[0]))}


def _table(path: np.ndarray, of: np.ndarray, size: int) -> _Table:
    pairs, tokens = np.unique(path * np.int64(size) + of, return_counts=True)
    return _Table(pairs // size, pairs % size, tokens)


def _hashes(trace: Trace, rows: np.ndarray, places: list[int], k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [n], a hash of each token's path, and bool [n], whether it chose an expert in every layer.

    The hash is a sum (modulo 2^64) of random numbers, one for each layer and expert, so the order of slots is ignored.
    """
    experts = int(trace.ids.max(initial=0)) + 2
    random = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, (len(places), experts), dtype=np.uint64)
    random[:, 0] = 0  # an empty slot
    hashes, complete = np.empty(len(rows), np.uint64), np.empty(len(rows), bool)
    done = 0
    for part in chunks(rows):
        total, seen = np.zeros(len(part), np.uint64), np.ones(len(part), bool)
        for table, place in zip(random, places, strict=True):
            chosen = strongest_experts(trace.ids[part, place], trace.weights[part, place], k)
            total += table[chosen.astype(np.int64) + 1].sum(-1, dtype=np.uint64)
            seen &= (chosen >= 0).any(-1)
        hashes[done : done + len(part)], complete[done : done + len(part)] = total, seen
        done += len(part)
    return hashes, complete


def _experts(trace: Trace, row: int, places: list[int], k: int | None) -> tuple[tuple[int, ...], ...]:
    chosen = strongest_experts(trace.ids[row, places], trace.weights[row, places], k)
    return tuple(tuple(sorted(expert for expert in layer if expert >= 0)) for layer in chosen.tolist())


def _entropy(counts: np.ndarray) -> float:
    """Entropy in nats of counts; NaN if there are none."""
    total = counts.sum()
    if not total:
        return float("nan")
    share = counts[counts > 0] / total
    return float(-(share * np.log(share)).sum() + 0.0)


def _share(part: Any, total: int) -> float:
    return float(part) / total if total else float("nan")


def _leading(path: RoutingPath) -> str:
    """The most frequent class of a path, with its share of the path's tokens."""
    name, tokens = next(iter(path.by_class.items()))
    return f"{name} ({tokens / path.tokens:.2f})"


# ---- how many of the final checkpoint's experts an earlier checkpoint already chose


@dataclass(frozen=True, eq=False, repr=False)
class Saturation(Result):
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
    by_group: Annotated[np.ndarray, "k group layer as saturation"]
    ks: tuple[int, ...]
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: np.ndarray

    def of(self, k: int) -> np.ndarray:
        """float64 [L]: saturation of the top-k experts."""
        if k not in self.ks:
            raise AnalysisError(f"k = {k} was not compared: saturation(k=[...]) chooses it")
        return self.values[self.ks.index(k)]

    def tables(self) -> list[Table]:
        title = f"Router saturation over {int(self.tokens.sum())} tokens"
        shown = [by_depth([f"top-{k}" for k in self.ks], self.values, layers=self.layers, title=title)]
        if len(self.groups) > 1:
            for k, values in zip(self.ks, self.by_group, strict=True):
                shown.append(by_depth(self.groups, values, layers=self.layers, title=f"top-{k}, by group"))
        return shown


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
        values=ratio(total.sum(1), seen.sum(1)),
        by_group=ratio(total, seen),
        ks=tuple(ks),
        groups=tuple(final.groups),
        layers=numbers,
        tokens=np.bincount(final.group[rows], minlength=cells[1]),
    )


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of experts in both rows, int16 [n]; the experts of a row differ, -1 is empty."""
    shared = np.zeros(len(a), np.int16)
    ours, theirs = np.ascontiguousarray(a.T), np.ascontiguousarray(np.where(b >= 0, b, -2).T)
    for one in ours:  # a loop over pairs of slots: each comparison runs over all tokens
        for other in theirs:
            shared += one == other
    return shared


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

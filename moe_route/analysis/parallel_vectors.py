"""Vectors of parallel sentences, a layer at a time: hidden states, routing distributions, or arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError, Statistics, pick_groups
from moe_route.analysis.pairing import paired_items
from moe_route.analysis.result import mean_of_seen
from moe_route.analysis.sequences import mean_tokens, read_sequences
from moe_route.analysis.translation_rules import Side
from moe_route.recording import SentenceVectors
from moe_route.recording.store import SequenceStore

__all__ = ["ParallelVectors", "VectorSource", "parallel_vectors"]

VectorSource = SentenceVectors | Statistics | np.ndarray
KINDS = ("full", "topk", "count", "hidden")
_PORTION_BYTES = 512 << 20  # layers are read together up to this size, one at least


@dataclass(frozen=True, eq=False)
class ParallelVectors:
    """Sentences that all of these groups have, with a vector in each layer.

    Attributes:
        groups: names of the groups.
        layers: names of the layers.
        items: the n items, in an order that does not depend on how they were recorded.
        tokens: float64 [G], mean number of tokens per sentence; NaN where it is unknown.
        centered: whether the mean of each group is subtracted.
        embedding: whether layer 0 is the embedding, which comes before the first layer.
    """

    groups: tuple[str, ...]
    layers: tuple[str, ...]
    items: tuple[Any, ...]
    tokens: np.ndarray
    centered: bool
    embedding: bool
    _source: np.ndarray | SequenceStore
    _kind: str

    def sides(self) -> Iterator[list[Side]]:
        """For each layer in turn, the sentences of every group as unit vectors."""
        for portion in self._portions():
            read = self._read(portion)
            for layer in range(len(portion)):
                yield [Side.of(_units(values[:, layer].astype(np.float64), self.centered)) for values in read]

    def _portions(self) -> Iterator[range]:
        """Layers to read together, so that memory stays bounded."""
        number = size = len(self.layers)
        if isinstance(self._source, SequenceStore):
            first = read_sequences(self._source, {self.groups[0]: self.items[:1]}, self._kind)[0].vectors()
            one_layer = len(self.groups) * len(self.items) * first.shape[-1] * 8
            size = max(1, _PORTION_BYTES // max(one_layer, 1))
        for start in range(0, number, size):
            yield range(start, min(start + size, number))

    def _read(self, layers: range) -> list[np.ndarray]:
        """Vectors of every group, [n, layers, D] each."""
        if isinstance(self._source, np.ndarray):
            return [self._source[:, g][:, layers.start : layers.stop] for g in range(len(self.groups))]
        store = self._source if len(layers) == len(self.layers) else self._source.select(layers)
        return [one.vectors() for one in read_sequences(store, dict.fromkeys(self.groups, self.items), self._kind)]


def parallel_vectors(
    source: VectorSource,
    groups: Sequence[str] | None,
    kind: str | None,
    center: bool | None,
    min_common: float,
) -> ParallelVectors:
    """The sentences that these groups have in common.

    Args:
        source: ``SentenceVectors``; statistics with kept sequences; or float [item, group, layer, width].
        groups: names of the groups to take, by default all; of an array, names of all its groups, which it needs.
        kind: of statistics: "full" (the default), "topk" or "count" distributions, or "hidden" states.
        center: subtract the mean of each group from its sentences; by default of routing distributions only, where
            what all sentences share outweighs what tells them apart.
        min_common: smallest allowed share of common items, as in ``analysis.divergence``.

    Raises ``AnalysisError`` for sentences that do not pair, one group, unknown groups, and values that are not finite.
    """
    if isinstance(source, np.ndarray):
        found = _of_array(source, groups, kind, bool(center))
    else:
        if kind is not None and isinstance(source, SentenceVectors):
            raise AnalysisError("kind tells which routing distribution is taken, and these are vectors: leave it out")
        kind = "hidden" if isinstance(source, SentenceVectors) else kind or "full"
        if kind not in KINDS:
            raise AnalysisError(f"no kind {kind!r}: use one of {', '.join(KINDS)}")
        names = _vector_groups(source, groups) if isinstance(source, SentenceVectors) else pick_groups(source, groups)
        _check_groups(names)
        items = tuple(sorted(paired_items(source, names, min_common), key=lambda item: (str(type(item)), item)))
        centered = kind != "hidden" if center is None else center
        layers = tuple(source.layers)
        embedding = isinstance(source, SentenceVectors) and layers[0] == "embedding"
        tokens = mean_tokens(source.store, names, items)
        found = ParallelVectors(names, layers, items, tokens, centered, embedding, source.store, kind)
    if found.centered and len(found.items) < 2:
        raise AnalysisError(
            "a single item is its group's mean, and nothing is left of it: record more, or center=False"
        )
    return found


def _of_array(source: np.ndarray, groups: Sequence[str] | None, kind: str | None, center: bool) -> ParallelVectors:
    if source.ndim != 4 or groups is None or len(groups) != source.shape[1] or kind is not None:
        raise AnalysisError(
            "an array of vectors is [item, group, layer, width] and needs groups=, the name of each of its groups, and "
            f"no kind; this one has the shape {list(source.shape)}"
        )
    _check_groups(groups)
    if not np.isfinite(source).all():
        raise AnalysisError("vectors must be finite: leave out items that have none")
    layers = tuple(str(layer) for layer in range(source.shape[2]))
    unknown = np.full(len(groups), np.nan)
    return ParallelVectors(tuple(groups), layers, tuple(range(len(source))), unknown, center, False, source, "hidden")


def _vector_groups(vectors: SentenceVectors, groups: Sequence[str] | None) -> tuple[str, ...]:
    names = vectors.groups if groups is None else (groups,) if isinstance(groups, str) else tuple(groups)
    unknown = [name for name in names if name not in vectors.groups]
    if unknown:
        raise AnalysisError(f"no group {unknown[0]!r}: there are {', '.join(vectors.groups)}")
    return tuple(names)


def _check_groups(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise AnalysisError(f"a group is named twice: {', '.join(names)}")
    if len(names) < 2:
        raise AnalysisError("parallel sentences are compared between two groups or more: name another one")


def _units(vectors: np.ndarray, center: bool) -> np.ndarray:
    """Unit vectors [n, D]; NaN for a sentence without tokens, zero for one that is like the mean."""
    moved = vectors - mean_of_seen(vectors)[0] if center else vectors
    length = np.sqrt((moved * moved).sum(-1, keepdims=True))
    return np.divide(moved, length, out=np.zeros(moved.shape), where=~(length <= 1e-12))

"""Sums over finished sequences: the averages of each sequence, rounded once to a multiple of 2^-32, as integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_route.calls.call import PHASES
from moe_route.contract.tables import FIXED_POINT, SCALARS
from moe_route.recording.statistics import KIND_METRIC, SEQUENCE_KINDS, SEQUENCE_SCALARS, VIEWS
from moe_route.recording.tables import TableSums

__all__ = ["SequenceAverages", "SequencePool"]

_ALL = VIEWS.index("all")


@dataclass(frozen=True)
class SequenceAverages:
    """Averages of n sequences.

    Attributes:
        tokens: int64 ``[n, L]``, number of tokens L_i of each sequence.
        counts: int64 ``[n, L, E]``, number of tokens a_i that chose each expert; None if not recorded.
        values: kind -> float64 ``[n, L, E]``: q_i of each kind, and a_i / L_i. Rows without tokens are NaN.
        scalars: name from ``SEQUENCE_SCALARS`` -> ``[n, L]``. Those that count sequences are bool. ``entropy`` (H(q_i))
            and ``mean_token_entropy`` (mean over tokens t of H(p_t)) are float64 in nats, NaN without tokens.
    """

    tokens: np.ndarray
    counts: np.ndarray | None
    values: Mapping[str, np.ndarray]
    scalars: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, scalars: np.ndarray, metrics: Mapping[str, np.ndarray], *, entropy: bool) -> SequenceAverages:
        """Compute the averages from sums over the tokens of each sequence.

        ``scalars [n, L, 8]`` are ``ops.SCALARS``; ``metrics`` maps a name to ``[n, L, E]``; ``entropy`` says whether
        token entropies were recorded. q_i (arXiv 2510.04694 eq. 1) is a metric divided by its own sum, so tokens with
        an all-zero row are left out.
        """
        tokens, unscored, summed = (scalars[..., SCALARS.index(name)] for name in ("tokens", "unscored", "entropy"))
        values = {}
        for kind in SEQUENCE_KINDS:
            if KIND_METRIC[kind] not in metrics:
                continue
            table = metrics[KIND_METRIC[kind]].astype(np.float64)
            divisor = tokens[..., None] if kind == "frequency" else table.sum(-1, keepdims=True)
            values[kind] = table / np.where(divisor > 0, divisor, np.nan)
        columns: dict[str, np.ndarray] = {"sequences": tokens > 0}
        columns |= {kind: ~np.isnan(table[..., 0]) for kind, table in values.items() if kind in SEQUENCE_SCALARS}
        if "full" in values:
            q = values["full"]
            columns["entropy"] = -(q * np.log(np.where(q > 0, q, 1.0))).sum(-1)
        if entropy:
            scored = tokens - unscored
            columns["full"] = scored > 0  # every scored token adds 1 to q_i
            columns["mean_token_entropy"] = summed * FIXED_POINT / np.where(scored > 0, scored, np.nan)
        return cls(tokens, metrics.get("counts"), values, columns)

    def stored(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays that a `SequenceStore` keeps of the sequences ``rows``."""
        arrays: dict[str, np.ndarray] = {"tokens": self.tokens[rows]}
        if self.counts is not None:
            arrays["counts"] = self.counts[rows].astype(np.int32)
        arrays |= {kind: self.values[kind][rows].astype(np.float32) for kind in ("full", "topk") if kind in self.values}
        if "mean_token_entropy" in self.scalars:
            arrays["token_entropy"] = self.scalars["mean_token_entropy"][rows]
        return arrays


class SequencePool:
    """int64 sums over finished sequences per (view, group, layer, expert); the views are prefill, decode and all."""

    def __init__(self, groups: int, layers: int, widest: int, metrics: Sequence[str], *, entropy: bool):
        self._entropy = entropy
        kinds = [kind for kind in SEQUENCE_KINDS if KIND_METRIC[kind] in metrics]
        self.scalars = np.zeros((len(VIEWS), groups, layers, len(SEQUENCE_SCALARS)), np.int64)
        self.sums = {kind: np.zeros((len(VIEWS), groups, layers, widest), np.int64) for kind in kinds}

    def reserve(self, groups: int) -> None:
        """Make room for ``groups`` groups."""
        missing = groups - self.scalars.shape[1]
        if missing <= 0:
            return

        def widened(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array, np.zeros((array.shape[0], missing, *array.shape[2:]), np.int64)], axis=1)

        self.scalars = widened(self.scalars)
        self.sums = {kind: widened(table) for kind, table in self.sums.items()}

    def add(self, sums: TableSums, groups: np.ndarray) -> SequenceAverages:
        """Add n finished sequences, sequence i to group ``groups[i]``; returns their averages over all phases."""
        tokens = sums.scalar("tokens")
        ran = [phase for phase in range(len(PHASES)) if tokens[phase].any()]
        averages = None
        for phase in ran:
            averages = self._averages(sums.scalars[phase], {name: table[phase] for name, table in sums.metrics.items()})
            # sequences that ran in one phase only have the same averages over all phases
            self._add((phase,) if len(ran) > 1 else (phase, _ALL), averages, groups)
        if averages is None or len(ran) > 1:
            averages = self._averages(sums.scalars.sum(0), {name: table.sum(0) for name, table in sums.metrics.items()})
            self._add((_ALL,), averages, groups)
        return averages

    def _averages(self, scalars: np.ndarray, metrics: Mapping[str, np.ndarray]) -> SequenceAverages:
        return SequenceAverages.of(scalars, metrics, entropy=self._entropy)

    def _add(self, views: tuple[int, ...], averages: SequenceAverages, groups: np.ndarray) -> None:
        for kind, values in averages.values.items():
            _add_rows([self.sums[kind][view] for view in views], groups, _fixed(values))
        for name, column in averages.scalars.items():
            rows = column.astype(np.int64) if column.dtype == bool else _fixed(column)
            place = SEQUENCE_SCALARS.index(name)
            _add_rows([self.scalars[view, ..., place] for view in views], groups, rows)


def _add_rows(targets: Sequence[np.ndarray], groups: np.ndarray, rows: np.ndarray) -> None:
    """Add row i of ``rows`` to row ``groups[i]`` of each target."""
    for group in np.unique(groups):
        total = rows[groups == group].sum(0)
        for target in targets:
            target[group] += total


def _fixed(values: np.ndarray) -> np.ndarray:
    """Round to multiples of 2^-32, as int64; NaN (no tokens) becomes 0."""
    scaled = np.nan_to_num(values / FIXED_POINT, copy=False, nan=0.0)
    return np.rint(scaled, out=scaled).astype(np.int64)

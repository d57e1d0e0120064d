"""Local routing consistency: whether nearby tokens choose the same experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.result import by_depth, plain
from moe_route.analysis.trace_tokens import chunks, expert_numbers, layer_places, text_order, token_rows
from moe_route.recording.frames import data_frame
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

    from moe_route.recording import Trace

__all__ = ["LocalConsistency", "local_consistency"]


_CHUNK = 1 << 12  # number of runs that are counted together


@dataclass(frozen=True, eq=False, repr=False)
class LocalConsistency(ShownAsTables):
    """Segment routing best performance (SRP) of each layer and expert.

    Attributes:
        values: float64 [L], SRP of the experts of a layer together, in [0, 1]; NaN without segments.
        size_ratio: float64 [L], experts that the best segment router activates over those that the model activates.
        by_expert: float64 [L, E], SRP of single experts; NaN for experts that were never chosen.
        segment: m, the number of tokens in a segment.
        segments: int64 [L], number of segments.
        layers: the L layers, as indices among the MoE layers.
    """

    values: np.ndarray
    size_ratio: np.ndarray
    by_expert: np.ndarray
    segment: int
    segments: np.ndarray
    layers: tuple[int, ...]

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with a row per layer."""
        return data_frame(
            {"layer": self.layers, "srp": self.values, "size_ratio": self.size_ratio, "segments": self.segments}
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        names = ("values", "size_ratio", "by_expert", "segment", "segments", "layers")
        content: dict[str, Any] = plain({name: getattr(self, name) for name in names})
        return content

    def tables(self) -> list[Table]:
        title = f"Segment routing best performance, segments of {self.segment} tokens"
        rows = {"SRP": self.values, "size ratio": self.size_ratio}
        return [by_depth(list(rows), np.stack(list(rows.values())), layers=self.layers, title=title)]


def local_consistency(
    trace: Trace,
    *,
    segment: int = 16,
    layers: Iterable[int] | None = None,
    groups: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    num_experts: int | Sequence[int] | None = None,
) -> LocalConsistency:
    """Measure how well one set of experts can serve m consecutive tokens: SRP [arXiv 2505.16056, eq. 3 to 6].

    A segment router chooses, for every run of m consecutive tokens of a sequence, experts that it uses for all m. SRP
    is the largest F1 score that such a router can reach against the model's own choices. With f the number of tokens in
    a run that chose an expert, it is reached by choosing the experts with f of at least some threshold a:

    ``SRP = max_a 2 sum_{f >= a} f / (sum_{f >= a} m + sum f)``, sums over runs and experts.

    Runs overlap: one begins at every token. Runs with a missing token (a gap in the positions) are left out.

    Args:
        segment: m.
        layers, groups, phase: what to look at; by default everything that was traced.
        num_experts: experts of the traced layers; by default up to the largest id that was chosen.

    Raises ``AnalysisError`` if no sequence has m consecutive tokens.
    """
    if segment < 1:
        raise AnalysisError(f"segment must be 1 token or more, not {segment}")
    numbers, places = layer_places(trace, layers)
    sizes = expert_numbers(trace, places, num_experts)
    rows = token_rows(trace, groups, phase)
    histograms = np.zeros((len(numbers), max(sizes), segment + 1), np.int64)
    for row, place in enumerate(places):
        ordered = text_order(trace, rows[(trace.ids[rows, place] >= 0).any(-1)])
        if len(ordered) >= segment:
            histograms[row] = _histogram(trace, ordered, place, segment, histograms.shape[1])
    segments = histograms.sum(-1)[:, 0]
    if not segments.any():
        raise AnalysisError(f"no sequence has {segment} consecutive tokens in the trace: pass a smaller segment")
    together = histograms.sum(1)
    values, threshold = _best(together)
    active = np.take_along_axis(_from_above(together), threshold[:, None], -1)[:, 0] * segment
    chosen = (together * np.arange(segment + 1)).sum(-1)
    return LocalConsistency(
        values=values,
        size_ratio=np.divide(active, chosen, out=np.full(len(values), np.nan), where=chosen > 0),
        by_expert=_best(histograms)[0],
        segment=segment,
        segments=segments,
        layers=numbers,
    )


def _histogram(trace: Trace, ordered: np.ndarray, place: int, segment: int, experts: int) -> np.ndarray:
    """int64 [E, m + 1]: number of runs in which f tokens chose an expert."""
    last = len(ordered) - segment + 1
    first, end = ordered[:last], ordered[segment - 1 :]
    unbroken = (trace.sequence[first] == trace.sequence[end]) & (
        trace.position[end] - trace.position[first] == segment - 1
    )
    found = np.zeros(experts * (segment + 1), np.int64)
    offset = np.arange(experts) * (segment + 1)
    for starts in chunks(np.arange(last), _CHUNK):
        tokens = ordered[starts[0] : starts[-1] + segment]
        member = np.zeros((len(tokens) + 1, experts), np.int32)
        ids = trace.ids[tokens, place]
        of_token, slots = np.nonzero(ids >= 0)
        member[of_token + 1, ids[of_token, slots]] = 1
        before = np.cumsum(member, axis=0, dtype=np.int32)
        f = (before[segment:] - before[: len(starts)])[unbroken[starts]]
        found += np.bincount((f + offset).reshape(-1), minlength=found.size)
    return found.reshape(experts, segment + 1)


def _best(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest F1 over thresholds, and that threshold, for histograms [..., m + 1]; NaN where nothing was chosen."""
    counts = np.arange(histogram.shape[-1])
    right = _from_above(histogram * counts)
    below = (histogram.shape[-1] - 1) * _from_above(histogram) + right[..., :1]
    f1 = np.divide(2.0 * right, below, out=np.zeros(right.shape), where=below > 0)
    f1[..., 0] = -1.0  # choosing experts that no token of a run chose is never better
    threshold = f1.argmax(-1)
    best = np.take_along_axis(f1, threshold[..., None], -1)[..., 0]
    return np.where(right[..., 0] > 0, best, np.nan), threshold


def _from_above(values: np.ndarray) -> np.ndarray:
    """Sums from each place to the last, over the last axis."""
    return np.cumsum(values[..., ::-1], axis=-1)[..., ::-1]

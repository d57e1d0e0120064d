"""Sharpness of routing: entropy of tokens and of sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError, pick_groups
from moe_route.analysis.result import by_depth, plain
from moe_route.recording.frames import data_frame
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

    from moe_route.recording import RoutingStatistics

__all__ = ["Entropy", "entropy"]


@dataclass(frozen=True, eq=False, repr=False)
class Entropy(ShownAsTables):
    """Mean routing entropy in nats, float64 [G, L].

    Attributes:
        token: mean of H(p_t) over tokens, all with equal weight; None if not requested.
        sequence: mean over sequences of H(q_i), with q_i the mean distribution of a sequence; None if not requested.
        groups, layers: names of the axes.
        num_experts: experts of each layer; its logarithm is the largest possible entropy.
        within: mean over sequences of the mean of H(p_t) over a sequence's tokens, all sequences with equal weight;
            None unless both of the above were requested.
    """

    token: np.ndarray | None
    sequence: np.ndarray | None
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    within: np.ndarray | None = None

    @property
    def gap(self) -> np.ndarray:
        """Differences between the tokens of one sequence, float64 [G, L], in nats.

        It is ``sequence - within``: the mean over sequences of the Jensen-Shannon divergence of their tokens. It is not
        negative, except for rounding (1e-6). ``sequence - token`` would be another quantity, since ``token`` gives long
        sequences more weight.
        """
        if self.within is None or self.sequence is None:
            raise AnalysisError('the gap needs both entropies: entropy(statistics, of="both")')
        return self.sequence - self.within

    def normalized(self, of: Literal["token", "sequence"] = "token") -> np.ndarray:
        """Entropy divided by log E, float64 [G, L], in [0, 1]; NaN for a layer with one expert."""
        values = self._values(of)
        most = np.log(np.asarray(self.num_experts, dtype=np.float64))
        return np.divide(values, most, out=np.full(values.shape, np.nan), where=most > 0)

    def _values(self, of: str) -> np.ndarray:
        values = {"token": self.token, "sequence": self.sequence}.get(of)
        if values is None:
            raise AnalysisError(f'there is no {of} entropy here: entropy(statistics, of="both")')
        return values

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (group, layer) and a column per entropy."""
        layers = len(self.layers)
        columns: dict[str, Any] = {
            "group": np.repeat(np.asarray(self.groups, dtype=object), layers),
            "layer": np.tile(np.arange(layers), len(self.groups)),
            "router": np.tile(np.asarray(self.layers, dtype=object), len(self.groups)),
        }
        return data_frame(columns | {name: values.reshape(-1) for name, values in self._present()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        axes = {"groups": list(self.groups), "layers": list(self.layers), "num_experts": list(self.num_experts)}
        return axes | {name: plain(values) for name, values in self._present()}

    def _present(self) -> list[tuple[str, np.ndarray]]:
        both = [("token", self.token), ("sequence", self.sequence), ("within", self.within)]
        return [(name, values) for name, values in both if values is not None]

    def tables(self) -> list[Table]:
        shown = [
            by_depth(self.groups, values, title=f"{name} entropy (nats)")
            for name, values in self._present()
            if name != "within"
        ]
        if self.within is None:
            return shown
        title = "gap (nats): how much the tokens of one sequence differ"
        return [*shown, by_depth(self.groups, self.gap, title=title)]


def entropy(
    statistics: RoutingStatistics,
    *,
    of: Literal["both", "token", "sequence"] = "both",
    groups: list[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
) -> Entropy:
    """Mean routing entropy of tokens and of sequences, by group and layer.

    The gap between them needs ``of="both"`` and sequence sums. Every recording has these; imported token sums do not.

    Raises ``AnalysisError`` for unknown or empty groups, ``ValueError`` for an entropy that was not recorded.
    """
    if of not in ("both", "token", "sequence"):
        raise AnalysisError(f'of must be "both", "token" or "sequence", not {of!r}')
    names = pick_groups(statistics, groups)
    rows = [statistics.groups.index(name) for name in names]
    token = statistics.entropy("token", phase)[rows] if of in ("both", "token") else None
    sequence = statistics.entropy("sequence", phase)[rows] if of in ("both", "sequence") else None
    within = statistics.entropy("token", phase, by="sequence")[rows] if of == "both" else None
    return Entropy(token, sequence, names, tuple(statistics.layers), tuple(statistics.num_experts), within)

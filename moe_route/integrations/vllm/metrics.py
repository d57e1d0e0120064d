"""Metrics of a server for Prometheus: five values a layer over all groups, and for the groups that are named."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from prometheus_client import Counter, Gauge

from moe_route.analysis.load import load_balance
from moe_route.recording.statistics import RoutingStatistics

_LABELS = ("layer", "group")


class RoutingMetrics:
    """Series by layer and group; "" is the group of all. Gauges are over the time between two updates.

    There is no label for an expert: a model has thousands of pairs of layer and expert.
    """

    def __init__(self, groups: Sequence[str]):
        self._groups = ("", *groups)
        self._tokens = Counter("moe_route_tokens", "Tokens counted.", _LABELS)
        self._gauges = {
            name: Gauge(f"moe_route_{name}", words, _LABELS, multiprocess_mode="mostrecent")
            for name, words in (
                ("normalized_entropy", "Entropy of the load over its maximum: 1 is an even load."),
                ("top_share", "Share of the choices that the expert with the largest load takes."),
                ("dead_experts", "Experts that no token chose."),
                ("steered_share", "Share of the tokens that a rule of a plan reached."),
            )
        }
        self._unbalanced = Gauge(
            "moe_route_unbalanced_tokens",
            "Tokens that ran and that the layer did not count.",
            ("layer",),
            multiprocess_mode="mostrecent",
        )
        self._before: RoutingStatistics | None = None

    def update(self, now: RoutingStatistics) -> None:
        """Bring the series up to date; the first call tells where they begin."""
        for layer, law in now.metadata.get("unbalanced", {}).items():
            self._unbalanced.labels(layer).set(law["expected"] - law["counted"])
        before, self._before = self._before, now
        if before is None:
            return
        for group in self._groups:
            rows = [row for row, name in enumerate(now.groups) if group in ("", name)]
            counts = _new(now.token_sum("counts"), before.token_sum("counts"), rows)
            tokens, steered = (_new(now.scalar(n), before.scalar(n), rows) for n in ("tokens", "steered"))
            self._set(group, now, counts, tokens, steered)

    def _set(
        self, group: str, now: RoutingStatistics, counts: np.ndarray, tokens: np.ndarray, steered: np.ndarray
    ) -> None:
        balance = None
        if tokens.any():
            window = RoutingStatistics.from_token_sums(
                ["all"],
                counts=counts[None],
                tokens=tokens[None],
                top_k=now.top_k,
                layers=now.layers,
                num_experts=now.num_experts,
                tolerance=1.0,  # slots may be empty
            )
            balance = load_balance(window)
        for layer, name in enumerate(now.layers):
            self._tokens.labels(name, group).inc(int(tokens[layer]))
            values = dict.fromkeys(self._gauges, np.nan)
            if balance is not None and tokens[layer]:
                values = {
                    "normalized_entropy": balance.entropy[0, layer],
                    "top_share": balance.max_share[0, layer],
                    "dead_experts": balance.dead[0, layer] * now.num_experts[layer],
                    "steered_share": steered[layer] / tokens[layer],
                }
            for kind, value in values.items():
                self._gauges[kind].labels(name, group).set(float(value))


def _new(now: np.ndarray, before: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """What was added since, over these groups; everything, if a new recording began."""
    added = now[rows].sum(0) - (before[rows].sum(0) if before.shape == now.shape else 0)
    return now[rows].sum(0) if (added < 0).any() else added

"""Shape of divergence over depth: is it high in the first and last layers, and low in the middle?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.divergence import Divergence
from moe_route.analysis.effects import Difference
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.result import Result, mean_of_seen, plain
from moe_route.analysis.stats import draw_items, interval_of, resampled_means
from moe_route.base.table import Table
from moe_route.steering.layers import show_numbers

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, eq=False, repr=False)
class UShape(Result):
    """Mean divergence in the first, middle and last layers, whose U shape is typical of multilingual routing.

    See arXiv 2510.04694, section 4.3.

    Attributes:
        groups: the G groups.
        first, middle, last: float64 [G].
        first_layers, middle_layers, last_layers: the layers of each mean.
        pairs: number of parallel sequences on which divergence was measured; 0 when pooled.
        resampled: float64 [resamples, G], ``depth`` under a bootstrap over these items; None when pooled.
    """

    groups: tuple[str, ...]
    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray
    first_layers: tuple[int, ...]
    middle_layers: tuple[int, ...]
    last_layers: tuple[int, ...]
    pairs: int = 0
    resampled: np.ndarray | None = None

    @property
    def depth(self) -> np.ndarray:
        """float64 [G]: (first + last) / 2 - middle. Positive for a U, negative for an inverted U."""
        return (self.first + self.last) / 2 - self.middle

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Interval (low, high) of ``depth`` for other sentences, float64 [G] each, from a bootstrap over items.

        Needs paired divergence.
        """
        return interval_of(self._resampled(), self.pairs, level)

    def mean_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Interval (low, high) of the mean of ``depth`` over these groups; it does not hold for other groups."""
        low, high = interval_of(self._resampled().mean(1), self.pairs, level)
        return float(low), float(high)

    def difference(self, group: str, other: str) -> Difference:
        """Depth of one group minus that of another, with its 95 % interval for other sentences.

        The same items are drawn for both groups. Needs paired divergence.
        """
        first, second = self.place_of(group), self.place_of(other)
        resampled = self._resampled()
        drawn = resampled[:, first] - resampled[:, second]
        return Difference.of(float(self.depth[first] - self.depth[second]), drawn, self.pairs)

    def _resampled(self) -> np.ndarray:
        if self.resampled is None:
            raise AnalysisError(
                "an interval needs paired divergence: record(sequences=True) with items that pair sentences"
            )
        return self.resampled

    def columns(self) -> dict[str, Any]:
        """``group``, ``first``, ``middle``, ``last``, ``depth``; if paired, also ``low`` and ``high`` of the depth."""
        return {"group": self.groups, **self._measured()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        layers = {name: list(getattr(self, f"{name}_layers")) for name in ("first", "middle", "last")}
        return {"groups": list(self.groups), "layers": layers, "pairs": self.pairs, **plain(self._measured())}

    def _measured(self) -> dict[str, np.ndarray]:
        columns = {"first": self.first, "middle": self.middle, "last": self.last, "depth": self.depth}
        if self.resampled is not None:
            columns["low"], columns["high"] = self.interval()
        return columns

    def tables(self) -> list[Table]:
        parts = {"first": self.first_layers, "middle": self.middle_layers, "last": self.last_layers}
        head = ["group", *(f"{name} {show_numbers(part)}" for name, part in parts.items()), "depth"]
        columns = [self.first, self.middle, self.last, self.depth]
        rows = [[group, *map(float, row)] for group, *row in zip(self.groups, *columns, strict=True)]
        if self.resampled is None:
            return [Table(head, rows, note="pooled: the depth has no interval")]
        ends = np.stack(self.interval(), axis=1).tolist()
        rows = [[*row, low, high, _depth_verdict(low, high)] for row, (low, high) in zip(rows, ends, strict=True)]
        note = f"low, high: 95 % interval of the depth (bootstrap over {self.pairs} items)"
        return [Table([*head, "low", "high", "the middle is"], rows, note=note)]


def _depth_verdict(low: float, high: float) -> str:
    return "lower" if low > 0 else "higher" if high < 0 else "unclear"


def middle_layers(layers: int) -> tuple[int, ...]:
    """The layers between the first third and the last, whose sizes are rounded down: 16 to 31 of 48, 2 to 5 of 8."""
    return tuple(range(layers // 3, layers - layers // 3))


def u_shape(
    divergence: Divergence,
    *,
    edge: int | None = None,
    middle: Sequence[int] | range | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> UShape:
    """Compute the mean divergence of the first ``edge``, the ``middle`` and the last ``edge`` layers.

    By default ``edge`` is a twelfth of the layers (at least one) and ``middle`` is ``middle_layers``: 0-3, 16-31 and
    44-47 of 48. With paired divergence, the depth has an interval from a bootstrap over items, with all groups and
    layers of an item together.
    """
    layers = divergence.values.shape[1]
    size = max(1, layers // 12) if edge is None else edge
    inner = middle_layers(layers) if middle is None else middle
    parts = [tuple(range(size)), tuple(inner), tuple(range(layers - size, layers))]
    if not 1 <= size <= layers or not parts[1] or min(parts[1]) < 0 or max(parts[1]) >= layers:
        raise AnalysisError(f"edge and middle must name some of the {layers} layers (0-{layers - 1})")
    first, middle_mean, last = (mean_of_seen(divergence.values[:, list(part)], 1)[0] for part in parts)
    resampled = None
    if divergence.pair_values is not None:
        weights = draw_items(divergence.pairs, resamples, seed)
        drawn = np.stack([resampled_means(weights, values) for values in divergence.pair_values], axis=1)
        ends_and_middle = [mean_of_seen(drawn[..., list(part)], 2)[0] for part in parts]
        resampled = (ends_and_middle[0] + ends_and_middle[2]) / 2 - ends_and_middle[1]
    return UShape(
        divergence.groups, first, middle_mean, last, parts[0], parts[1], parts[2], divergence.pairs, resampled
    )

"""``difference``: how far fine-tuning moved each part of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.base.table import data_frame
from moe_route.merging.checkpoint import check_alike, check_descent
from moe_route.merging.layout import Layout
from moe_route.merging.swapping import Source, opened

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Change:
    """Change of one kind of weights."""

    layer: int | None  # number of the layer, None outside of layers
    moe_layer: int | None  # its index among the MoE layers, for experts
    expert: int | None
    kind: str  # "gate", "up", "down", "router", "self_attn.q_proj", ...
    change: float  # Frobenius norm of the difference
    size: float  # Frobenius norm of the base

    @property
    def relative(self) -> float:
        """Change over size; NaN where the base is zero."""
        return self.change / self.size if self.size else float("nan")


@dataclass(frozen=True)
class Difference:
    """Changes of a model from its base, one per layer, expert and kind."""

    changes: tuple[Change, ...]

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def by_layer(self) -> dict[int, float]:
        """Layer -> norm of its change over the norm of its weights."""
        layers = sorted({change.layer for change in self if change.layer is not None})
        return {layer: _relative([c for c in self if c.layer == layer]) for layer in layers}

    def by_kind(self) -> dict[str, float]:
        """Kind -> norm of its change over the norm of its weights."""
        return {kind: _relative([c for c in self if c.kind == kind]) for kind in sorted({c.kind for c in self})}

    def experts(self) -> np.ndarray:
        """float64 [MoE layer, expert]: norm of the change over the norm of the weights; NaN for no such expert."""
        cells: dict[tuple[int, int], list[Change]] = {}
        for change in self:
            if change.moe_layer is not None and change.expert is not None:
                cells.setdefault((change.moe_layer, change.expert), []).append(change)
        if not cells:
            raise ValueError("the model has no experts")
        values = np.full([1 + max(index) for index in zip(*cells, strict=True)], np.nan)
        for index, changes in cells.items():
            values[index] = _relative(changes)
        return values

    def to_dict(self) -> dict[str, Any]:
        """The changes, one dictionary each, and their summaries."""
        return {
            "by_layer": self.by_layer(),
            "by_kind": self.by_kind(),
            "changes": self._rows(),
        }

    def to_pandas(self) -> pd.DataFrame:
        """A row per change: layer, expert, kind, the norms, and their ratio. Needs pandas."""
        rows = self._rows()
        return data_frame({name: [row[name] for row in rows] for name in rows[0]} if rows else {})

    def _rows(self) -> list[dict[str, Any]]:
        return [{**vars(change), "relative": change.relative} for change in self]


def difference(model: Source, base: Source) -> Difference:
    """Measure how far a model was moved from its base, by layer, expert and kind.

    Args:
        model, base: models, state dicts or folders. One tensor of each is in memory at a time.

    Norms are Frobenius norms in float64. Raises ``ValueError`` for models that cannot be compared.
    """
    after, before = opened(model), opened(base)
    check_alike([before, after])
    check_descent(after, before)
    layout = Layout(before)
    squares: dict[tuple[int | None, int | None, str], list[float]] = {}
    for name in before.names:
        old, new = before.read(name), after.read(name)
        if not old.is_floating_point():
            continue
        place = layout.places[name]
        parts = zip(layout.matrices(name, old), layout.matrices(name, new), strict=True)
        for (expert, kind, first), (_, _, second) in parts:
            sums = squares.setdefault((place.layer, expert, kind), [0.0, 0.0])
            sums[0] += float((second.double() - first.double()).square().sum())
            sums[1] += float(first.double().square().sum())
    moe = {layer: index for index, layer in enumerate(layout.moe_layers)}
    return Difference(
        tuple(
            Change(layer, None if expert is None or layer is None else moe[layer], expert, kind, c**0.5, s**0.5)
            for (layer, expert, kind), (c, s) in squares.items()
        )
    )


def _relative(changes: list[Change]) -> float:
    size = sum(c.size**2 for c in changes) ** 0.5
    return sum(c.change**2 for c in changes) ** 0.5 / size if size else float("nan")

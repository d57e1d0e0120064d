"""Display of results: tables by layer, and JSON-able values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.base.table import Table, data_frame
from moe_route.steering.layers import show_numbers

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["by_depth", "fertility_column", "fertility_of", "frame_of_pairs", "mean_of_seen", "plain", "token_column"]

_COLUMNS = 9


def plain(values: Any) -> Any:
    """Convert to lists and numbers that JSON can hold; NaN becomes None."""
    if isinstance(values, np.ndarray):
        return plain(values.tolist())
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return None if isinstance(values, float) and not np.isfinite(values) else values


def by_depth(
    rows: Sequence[str],
    values: np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    title: str = "",
    note: str = "",
    before: Mapping[str, Sequence[object]] | None = None,
    after: Mapping[str, Sequence[object]] | None = None,
) -> Table:
    """A table of values [row, layer], with a column per layer, or per run of layers (their mean) if there are many.

    ``layers`` are the numbers of the layers, by default counted from 0. ``before`` and ``after`` are further columns by
    name, with a value per row.
    """
    numbers = np.arange(values.shape[1]) if layers is None else np.asarray(layers)
    parts = np.array_split(np.arange(values.shape[1]), min(values.shape[1], _COLUMNS))
    columns = {show_numbers(numbers[part].tolist()): mean_of_seen(values[:, part], 1)[0].tolist() for part in parts}
    shown = {**(before or {}), **columns, **(after or {})}
    cells = zip(rows, *shown.values(), strict=True)
    return Table(["layer", *shown], [list(row) for row in cells], title, note)


def frame_of_pairs(values: np.ndarray, groups: Sequence[str], layers: Sequence[str], name: str) -> pd.DataFrame:
    """A tidy data frame of values [L, G, G] with a row per (layer, group, other): ``name`` and ``router``."""
    count, size, _ = values.shape
    names = np.asarray(groups, dtype=object)
    return data_frame(
        {
            "layer": np.repeat(np.arange(count), size * size),
            "router": np.repeat(np.asarray(layers, dtype=object), size * size),
            "group": np.tile(np.repeat(names, size), count),
            "other": np.tile(names, count * size),
            name: values.reshape(-1),
        }
    )


def token_column(tokens: np.ndarray | None) -> dict[str, list[str]]:
    """The column "tokens" of a table, mean numbers per sequence; empty if none is known."""
    if tokens is None or np.isnan(tokens).all():
        return {}
    return {"tokens": ["-" if np.isnan(value) else f"{value:.1f}" for value in tokens.tolist()]}


def fertility_of(tokens: np.ndarray, groups: Sequence[str], reference: str) -> np.ndarray:
    """Tokens per sentence over those of the reference, float64 [G]; NaN where they are unknown."""
    base = tokens[list(groups).index(reference)]
    found: np.ndarray = tokens / base if base > 0 else np.full(len(tokens), np.nan)
    return found


def fertility_column(
    tokens: np.ndarray | None, groups: Sequence[str], reference: str = "eng_Latn"
) -> dict[str, list[str]]:
    """The column "fertility" of a table; empty if tokens are unknown, or the reference is none of the groups."""
    if tokens is None or np.isnan(tokens).all() or reference not in groups:
        return {}
    found = fertility_of(tokens, groups, reference).tolist()
    return {"fertility": ["-" if np.isnan(value) else f"{value:.2f}" for value in found]}


def mean_of_seen(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean over an axis of the values that are not NaN (NaN if there are none), and the number of NaN values."""
    seen = ~np.isnan(values)
    count = seen.sum(axis)
    total = np.where(seen, values, 0.0).sum(axis)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean, values.shape[axis] - count

"""How results show themselves: tables in plain text, JSON-able values, tidy data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.steering.layers import show_numbers
from moe_route.texttable import table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["by_depth", "data_frame", "plain"]

_COLUMNS = 9


def plain(values: Any) -> Any:
    """Lists and numbers that JSON holds: NaN becomes None."""
    if isinstance(values, np.ndarray):
        return plain(values.tolist())
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return None if isinstance(values, float) and not np.isfinite(values) else values


def by_depth(rows: Sequence[str], values: np.ndarray) -> str:
    """A table of values [row, layer]: a column per layer, or the mean of runs of layers where there are many."""
    layers = values.shape[1]
    parts = np.array_split(np.arange(layers), min(layers, _COLUMNS))
    head = ["layer", *(show_numbers(part.tolist()) for part in parts)]
    body = [[name, *(_mean(values[i, part]) for part in parts)] for i, name in enumerate(rows)]
    return table(head, body)


def _mean(values: np.ndarray) -> float | None:
    seen = values[~np.isnan(values)]
    return float(seen.mean()) if seen.size else None


def data_frame(columns: Mapping[str, Any]) -> pd.DataFrame:
    """A data frame; ``ImportError`` names the extra to install where pandas is missing."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("data frames need pandas: pip install 'moe-route[analysis]'") from error
    return pandas.DataFrame(dict(columns))

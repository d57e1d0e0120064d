"""Build data frames; the only module that imports pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["data_frame"]


def data_frame(columns: Mapping[str, Any], axes: Mapping[str, Sequence[Any]] | None = None) -> pd.DataFrame:
    """Build a data frame of columns by name.

    With ``axes``, the columns are flattened arrays over those axes, the last axis fastest, and the frame starts with a
    column per axis. Raises ``ImportError`` if pandas is missing, and names the extra to install.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("data frames need pandas: pip install 'moe-route[analysis]'") from error
    if axes is None:
        return pandas.DataFrame(dict(columns))
    index = pandas.MultiIndex.from_product(list(axes.values()), names=list(axes))
    return pandas.DataFrame(dict(columns), index=index).reset_index()

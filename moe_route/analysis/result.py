"""What a result is: arrays over named axes, which JSON, data frames and tables show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import numpy as np

from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.measures import ratio
from moe_route.base.table import ShownAsTables, Table, data_frame
from moe_route.steering.layers import show_numbers

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = 9
# axis -> the field with its names, where that is not the plural
_NAMES = {"class": "classes", "criterion": "criteria", "keep": "keep", "other": "groups"}


class Result(ShownAsTables):
    """Base of results, which are dataclasses with arrays over named axes.

    The type of a field names its axes, ``Annotated[np.ndarray, "group layer"]``, and its column in the frame if that
    has another name than the field, "group layer as divergence". The frame has a row for each place of the axes of the
    first such field. Fields over fewer axes are repeated along the others, fields that are None have no column. The
    names along an axis are those of the field in the plural (``groups`` of "group"), or numbers from 0. Where layers
    have names, "layer" holds their numbers and "router" their names. Experts beyond ``num_experts`` have no row.

    A subclass leaves fields out of its JSON by ``hidden=`` and adds properties to it by ``derived=``, names both. One
    with another frame defines :meth:`columns`, one with other JSON :meth:`to_dict`.
    """

    _hidden: ClassVar[tuple[str, ...]] = ()
    _derived: ClassVar[tuple[str, ...]] = ()
    if TYPE_CHECKING:
        groups: tuple[str, ...]  # of most results

    def __init_subclass__(cls, *, hidden: Sequence[str] = (), derived: Sequence[str] = (), **others: Any) -> None:
        super().__init_subclass__(**others)
        cls._hidden, cls._derived = (*cls._hidden, *hidden), (*cls._derived, *derived)

    def place_of(self, group: str) -> int:
        """Index of a group along the axis of groups; raises ``AnalysisError`` that lists the groups."""
        if group not in self.groups:
            raise AnalysisError(f"no group {group!r}: there are {', '.join(self.groups)}")
        return self.groups.index(group)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content by the names of the attributes (NaN as None)."""
        names = [field.name for field in fields(self) if field.name not in self._hidden]  # type: ignore[arg-type]
        return {name: plain(getattr(self, name)) for name in (*names, *self._derived) if not name.startswith("_")}

    def to_pandas(self) -> pd.DataFrame:
        """Return the values as a tidy data frame, a row per place of their axes; pandas is imported here."""
        return data_frame(self.columns())

    def columns(self) -> dict[str, Any]:
        """The columns of ``to_pandas`` by name, in their order: arrays or sequences of one length."""
        along = _axes_of_fields(type(self))
        axes = next(iter(along.values()))[0]
        columns = {}
        for field, (own, column) in along.items():
            if (values := getattr(self, field)) is not None:
                missing = [number for number, axis in enumerate(axes) if axis not in own]
                columns[column] = np.expand_dims(np.asarray(values), missing)
        return self.over(" ".join(axes), columns)

    def over(self, axes: str, columns: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
        """Columns of values over these axes, behind the columns of the axes; None is left out.

        The first array has all axes, the others are broadcast to its shape.
        """
        present = {name: values for name, values in columns.items() if values is not None}
        shape = next(iter(present.values())).shape
        kept = np.ones(shape, bool)
        places: dict[str, np.ndarray] = dict(zip(axes.split(), np.indices(shape), strict=True))
        if "expert" in places and hasattr(self, "num_experts"):
            kept = places["expert"] < np.asarray(self.num_experts)[places["layer"]]
        along: dict[str, np.ndarray] = {}
        for axis, numbers in places.items():
            names = getattr(self, _NAMES.get(axis, f"{axis}s"), None)
            at = numbers[kept]
            named = names is not None and len(names) and isinstance(names[0], str)
            if axis == "layer" and named:
                along |= {"layer": at, "router": np.asarray(names, dtype=object)[at]}
            else:
                along[axis] = at if names is None else np.asarray(names, dtype=object if named else None)[at]
        return along | {name: np.broadcast_to(values, shape)[kept] for name, values in present.items()}


@cache
def _axes_of_fields(cls: type[Result]) -> dict[str, tuple[tuple[str, ...], str]]:
    """Field -> its axes, and its column, of the fields that name axes."""
    along = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for part in (hint, *get_args(hint)):  # an array, or an array or None
            if get_origin(part) is Annotated:
                axes, _, column = part.__metadata__[0].partition(" as ")
                along[name] = tuple(axes.split()), column or name
    return along


def plain(values: Any) -> Any:
    """Convert to lists and numbers that JSON can hold; NaN becomes None, a result what its ``to_dict`` gives."""
    if hasattr(values, "to_dict"):
        return values.to_dict()
    if isinstance(values, (np.ndarray, np.generic)):
        return plain(values.tolist())
    if is_dataclass(values):
        return plain({field.name: getattr(values, field.name) for field in fields(values)})
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return None if isinstance(values, float) and not np.isfinite(values) else values


def by_depth(
    rows: Sequence[str] | Mapping[str, np.ndarray],
    values: np.ndarray | None = None,
    *,
    layers: Sequence[int] | None = None,
    title: str = "",
    note: str = "",
    before: Mapping[str, Sequence[object]] | None = None,
    after: Mapping[str, Sequence[object]] | None = None,
    marked: Sequence[int] = (),
) -> Table:
    """A table of values [row, layer], with a column per layer, or per run of layers (their mean) if there are many.

    Without ``values``, ``rows`` holds the values [layer] of each row by its name.
    ``layers`` are the numbers of the layers, by default counted from 0. ``before`` and ``after`` are further columns by
    name, with a value per row. The names of columns that hold a layer at the places ``marked`` end with "*".
    """
    if values is None:
        assert isinstance(rows, Mapping)
        values = np.stack(list(rows.values()))
    numbers = np.arange(values.shape[1]) if layers is None else np.asarray(layers)
    parts = np.array_split(np.arange(values.shape[1]), min(values.shape[1], _COLUMNS))
    star = ["*" if set(marked) & set(part.tolist()) else "" for part in parts]
    columns = {
        f"{show_numbers(numbers[part].tolist())}{mark}": mean_of_seen(values[:, part], 1)[0].tolist()
        for part, mark in zip(parts, star, strict=True)
    }
    shown = {**(before or {}), **columns, **(after or {})}
    cells = zip(rows, *shown.values(), strict=True)
    return Table(["layer", *shown], [list(row) for row in cells], title, note)


def token_column(tokens: np.ndarray | None) -> dict[str, list[str]]:
    """The column "tokens" of a table, mean numbers per sequence; empty if none is known."""
    if tokens is None or np.isnan(tokens).all():
        return {}
    return {"tokens": ["-" if np.isnan(value) else f"{value:.1f}" for value in tokens.tolist()]}


def fertility_of(tokens: np.ndarray, groups: Sequence[str], reference: str) -> np.ndarray:
    """Tokens per sentence over those of the reference, float64 [G]; NaN where they are unknown."""
    base = tokens[list(groups).index(reference)]
    return ratio(tokens, base)


def fertility_column(
    tokens: np.ndarray | None, groups: Sequence[str], reference: str = "eng_Latn"
) -> dict[str, list[str]]:
    """The column "fertility" of a table; empty if tokens are unknown, or the reference is none of the groups."""
    if tokens is None or np.isnan(tokens).all() or reference not in groups:
        return {}
    values = fertility_of(tokens, groups, reference).tolist()
    return {"fertility": ["-" if np.isnan(value) else f"{value:.2f}" for value in values]}


def mean_of_seen(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean over an axis of the values that are not NaN (NaN if there are none), and the number of NaN values."""
    seen = ~np.isnan(values)
    count = seen.sum(axis)
    return ratio(np.where(seen, values, 0.0).sum(axis), count), values.shape[axis] - count

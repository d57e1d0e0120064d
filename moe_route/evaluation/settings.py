"""Typed settings from nested tables, such as those of a TOML file, with errors that name the key and the fix."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

__all__ = ["RecipeError", "from_table"]

Settings = TypeVar("Settings")


class RecipeError(ValueError):
    """Raised for a recipe that cannot be used; the message names the key and how to fix it."""


def from_table(kind: type[Settings], table: Mapping[str, Any], where: str = "") -> Settings:
    """Make the dataclass `kind` from a table whose keys are its fields.

    A field that is a dataclass takes a table, and one that is a mapping to a dataclass takes a table of tables.
    Numbers, strings, booleans, tuples and choices (`Literal`) are checked against the annotation. Raises `RecipeError`
    for unknown, missing and mistyped keys, with the `ValueError` of the dataclass's own checks as text.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in table:
        if key not in names:
            close = get_close_matches(str(key), names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise RecipeError(f"the recipe has no key {_joined(where, str(key))}: {hint}")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in table and field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(
                f"the recipe lacks {_joined(where, field.name)}: add it ({_described(hints[field.name])})"
            )
    values = {key: _value(hints[key], value, _joined(where, key)) for key, value in table.items()}
    try:
        return kind(**values)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{where or 'the recipe'}: {error}") from error


def _joined(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _value(hint: Any, value: Any, where: str) -> Any:
    """The value as the annotation wants it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(inner, value, where)
    if origin is Literal:
        if value not in inner or isinstance(value, bool) is not any(isinstance(one, bool) for one in inner):
            raise RecipeError(f"{where} is {value!r}: choose {_described(hint)}")
        return value
    if is_dataclass(hint) and isinstance(value, Mapping):
        return from_table(typing.cast("type[Any]", hint), value, where)
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(key): _value(inner[1], item, _joined(where, str(key))) for key, item in value.items()}
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        of = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        if len(of) == len(value):
            return tuple(
                _value(one, item, f"{where}[{i}]") for i, (one, item) in enumerate(zip(of, value, strict=True))
            )
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool) is isinstance(value, bool):
        return value
    raise RecipeError(f"{where} is {value!r}: give {_described(hint)}")


def _one_of(hints: Sequence[Any], value: Any, where: str) -> Any:
    for hint in hints:
        if hint is type(None) and value is None:
            return None
        try:
            return _value(hint, value, where)
        except RecipeError as error:
            failure = error
            if is_dataclass(hint):
                raise
    given = " or ".join(_described(hint) for hint in hints if hint is not type(None))
    raise RecipeError(f"{where} is {value!r}: give {given}") from failure


def _described(hint: Any) -> str:
    """What a value of this type is, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(repr(one) for one in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(one) for one in inner if one is not type(None))
    if origin is tuple:
        parts = "..." if inner[-1] is Ellipsis else ", ".join(_described(one) for one in inner[1:])
        return f"a list [{_described(inner[0])}, {parts}]"
    if origin is not None or is_dataclass(hint):
        return "a table"
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(hint, str(hint))

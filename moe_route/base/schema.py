"""One reader for what people write: a kind of file is a dataclass, and its annotations say what the file may hold.

A field without a default is required, and a key that is no field is refused with the nearest one. An annotation is
``str``, ``int``, ``float``, ``bool``, ``Any``, a ``Literal``, a tuple, a mapping, another dataclass, a union of these,
or one of these ``Annotated`` with a `Range` or a `Tagged`. JSON Schemas are made of the same declarations.

This module imports no torch, so that a command can refuse its files at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from moe_route import __version__
from moe_route.base.budget import Budget, BudgetError, FileRefusedError

_OF_FORMAT, _OF_MARK = ("$schema", "format", "written_by", "needs"), ("moe_route", "schema")  # beside the content
_LONGEST = 80  # characters of a value in a message
_NUMBER = r"(0|-?[1-9][0-9]*)"
_FIELD = re.compile(r"    (\w+(?:, \w+)*): (.*)")
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
Content = TypeVar("Content")


class FileMissingError(FileRefusedError, FileNotFoundError):
    """Raised for a file that is not there."""


@dataclass(frozen=True)
class Range:
    """The smallest and the largest number that are allowed, both included."""

    low: float
    high: float | None = None

    def __str__(self) -> str:
        return f"from {self.low:g}" + ("" if self.high is None else f" to {self.high:g}")


@dataclass(frozen=True)
class Tagged:
    """One of several dataclasses: the key `key` says which of `cases`."""

    key: str
    cases: Callable[[], Mapping[str, Any]]


Natural = Annotated[int, Range(0)]
"""A layer, an expert, a position: counted from 0."""

KINDS: dict[str, Kind] = {}
"""By name, every kind of file that is declared; those of rooms that were not imported are missing."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: such as "plan".
        content: a dataclass, which declares its keys.
        format: the newest that this version reads; raised when an older reader could misread a file. A file says its
            own by the key ``format``, and is of format 1 without it.
        needs: the first version of moe-route that reads this format.
        mark: what a file says that it is, by the key ``moe_route``: the name, unless another is given; "" for none.
    """

    name: str
    content: Any
    format: int = 1
    needs: str = "0.1.0"
    mark: str | None = None

    def __post_init__(self) -> None:
        if self.mark is None:
            object.__setattr__(self, "mark", self.name)
        KINDS[self.name] = self

    def read(self, content: Any, source: str, error: type[ValueError] = FileRefusedError) -> Any:
        """The dataclass made of a file's content. `source` is the file, or what else a message calls it.

        Raises `error` for a newer format, before any key is judged; for unknown, missing and repeated keys; for wrong
        types and values; and with the text of a `ValueError` of the dataclass's own.
        """
        if not isinstance(content, Mapping):
            raise error(f"{source} is {_shown(content)}: give a table, with the keys of a {self.name}")
        check_format(self.name, content, source, error)
        beside = (*_OF_FORMAT, *(_OF_MARK if self.mark else ()))
        kept = {key: value for key, value in content.items() if key not in beside}
        return read(self.content, kept, source, error)

    def json_schema(self) -> dict[str, Any]:
        """A JSON Schema (2020-12), by which an editor completes and checks such files."""
        schema = json_schema(self.content)
        formats = {"type": "integer", "minimum": 1, "maximum": self.format, "description": "1 if it is left out"}
        envelope: dict[str, Any] = {"$schema": {"type": "string"}, "format": formats}
        envelope |= {"written_by": {"type": "string"}, "needs": {"type": "string"}}
        if self.mark:
            newest = {"type": "integer", "minimum": 1, "description": "how the file is written"}
            envelope |= {"moe_route": {"const": self.mark, "description": "what the file holds"}, "schema": newest}
            schema["required"] = ["moe_route", "schema", *schema.get("required", ())]
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"moe-route: {self.name}",
            **schema,
            "properties": envelope | schema["properties"],
        }


def stamp(kind: str) -> dict[str, Any]:
    """What a file of this kind says of its format; nothing for format 1, which files of before are of."""
    known = KINDS.get(kind)
    if known is None or known.format == 1:
        return {}
    return {"format": known.format, "written_by": __version__, "needs": known.needs}


def check_format(
    kind: str, said: Mapping[str, Any], source: str, error: type[ValueError] = FileRefusedError, writer: Any = None
) -> None:
    """Raise `error` for a file of a newer format than this version reads; `writer` is the version that wrote it."""
    newest = KINDS[kind].format if kind in KINDS else 1
    number = said.get("format", 1)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise error(f'{source}: "format" is {_shown(number)}: give a whole number from 1, or leave it out')
    if number > newest:
        wrote = said.get("written_by", writer) or "of a later version"
        needs = said.get("needs") or f"a version after {__version__}"
        raise error(
            f"{source} has format {number}, written by moe-route {wrote}, needs >= {needs}; this version reads up to "
            f"{newest}: upgrade moe-route"
        )


# ---- reading


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Budget]:
    """What reading a file may cost; turns system errors in the block into ``FileRefusedError``."""
    if Path(path).is_dir():
        raise FileRefusedError(f"{path} is a folder: give the name of a file in it")
    try:
        yield Budget(path)
    except FileNotFoundError as error:
        raise FileMissingError(f"{path} does not exist: check the name") from error
    except OSError as error:
        raise FileRefusedError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file. Raises ``FileRefusedError``."""
    return _text_of(path)[0]


def _text_of(path: str | os.PathLike[str]) -> tuple[str, Budget]:
    with reading(path) as budget:
        data = Path(path).read_bytes()
    try:
        return data.decode("utf-8"), budget
    except UnicodeDecodeError as error:
        raise FileRefusedError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from error


def load_json(path: str | os.PathLike[str], *, foreign: bool = False) -> Any:
    """The content of a JSON file; see `parse_json`. Raises ``FileRefusedError``.

    One that another program wrote for itself (``foreign``) may hold NaN, and keys twice, as Python reads them.
    """
    text, budget = _text_of(path)
    if not foreign:
        return parse_json(text, os.fspath(path), budget=budget)
    try:
        return budget.json(text)
    except BudgetError:
        raise
    except ValueError as problem:
        raise FileRefusedError(f"{path} is not JSON ({problem}): get it again") from problem


def parse_json(
    text: str | bytes, source: str, error: type[ValueError] = FileRefusedError, budget: Budget | None = None
) -> Any:
    """Parse JSON (UTF-8) of `source`. Raises `error` for anything else, a repeated key, NaN and infinite numbers.

    What it makes is drawn from `budget`, that of the file, or else from one of the text alone.
    """
    budget = budget or Budget.of_text(source, text)
    try:
        return budget.json(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except BudgetError:
        raise
    except _NotPlainError as problem:
        raise error(f"{source} {problem}") from None
    except ValueError as problem:
        raise error(f"{source} is not JSON ({problem}): correct it there, or save it again") from problem


class _NotPlainError(ValueError):
    """Raised for JSON of which programs read different things."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NotPlainError(f'has the key "{twice}" twice in one object: keep one of them')
    return table


def _no_number(name: str) -> None:
    raise _NotPlainError(f"holds {name}, which is no number of JSON: give a finite number, or null where it is allowed")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _NotPlainError(f"holds {digits[:_LONGEST]}, which is too large: give a smaller number")
    return number


def read(hint: Any, value: Any, source: str, error: type[ValueError] = FileRefusedError, at: str = "") -> Any:
    """The value as the annotation `hint` wants it: dataclasses and tuples are made, and keys become whole numbers.

    `at` is where the value stands in `source`, for messages. Raises `error`, as `Kind.read` does.
    """
    return _Reader(source, error).value(hint, value, at)


def check(made: Any) -> None:
    """Raise ``ValueError`` unless the fields of a dataclass are as annotated: for a ``__post_init__``."""
    reader = _Reader(f"the {type(made).__name__.lower()}", ValueError)
    kind: Any = type(made)
    for name, hint in _hints(kind).items():
        reader.value(hint, getattr(made, name), name)


@dataclass(frozen=True)
class _Reader:
    source: str
    error: type[ValueError]

    def refused(self, at: str, value: Any, allowed: str) -> ValueError:
        return self.error(f"{self.source}{f': {at}' if at else ''} is {_shown(value)}: give {allowed}")

    def table(self, kind: Any, given: Mapping[Any, Any], at: str) -> Any:
        hints, known = _hints(kind), fields(kind)
        here = f"{self.source}: {at}" if at else self.source
        for key in given:
            if key not in hints:
                raise self.error(f'{here} has no key "{key}": {meant(str(key), list(hints), "it has")}')
        for one in known:
            if one.name not in given and one.default is MISSING and one.default_factory is MISSING:
                raise self.error(f'{here} lacks "{one.name}": add it ({described(hints[one.name])})')
        values = {key: self.value(hints[key], value, _joined(at, key)) for key, value in given.items()}
        try:
            return kind(**values)
        except ValueError as problem:
            raise self.error(f"{here}: {problem}") from problem

    def value(self, hint: Any, value: Any, at: str) -> Any:
        limit, hint = _limit(hint), _bare(hint)
        if isinstance(limit, Tagged):
            return self.tagged(limit, value, at)
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return self.one_of(inner, value, at)
        if hint is Any:
            return value
        if not _has_form(hint, value):
            raise self.refused(at, value, described(hint if limit is None else Annotated[hint, limit]))
        if origin is Literal:
            same = [one for one in inner if one == value and isinstance(one, bool) is isinstance(value, bool)]
            if not same:
                near = _nearest([value], inner) if isinstance(value, str) else None
                raise self.refused(at, value, described(hint) + (f' (did you mean "{near}"?)' if near else ""))
            return same[0]
        if is_dataclass(hint):
            return self.table(hint, value, at)
        if origin is tuple:
            return self.items(hint, inner, value, at)
        if origin is not None:
            return self.mapping(inner, value, at)
        number = hint(value) if hint in (int, float) else value
        if isinstance(limit, Range) and not (limit.low <= number <= (math.inf if limit.high is None else limit.high)):
            raise self.refused(at, value, described(Annotated[hint, limit]))
        return number

    def one_of(self, hints: tuple[Any, ...], value: Any, at: str) -> Any:
        """The first that fits; an error names what is wrong inside the one whose form or keys fit, or else all."""
        formed = [hint for hint in hints if _has_form(hint, value)]
        problems = []
        for hint in formed:
            try:
                return self.value(hint, value, at)
            except ValueError as problem:
                problems.append(problem)
        if len(problems) == 1:
            raise problems[0]
        if problems and all(is_dataclass(hint) for hint in formed):
            shared = [len(_hints(hint).keys() & value.keys()) for hint in formed]
            raise problems[shared.index(max(shared))]
        raise self.refused(at, value, described(typing.Union[hints]))  # noqa: UP007 (made of values)

    def tagged(self, tag: Tagged, value: Any, at: str) -> Any:
        cases = tag.cases()
        if not isinstance(value, Mapping):
            raise self.refused(at, value, f'a table with "{tag.key}"')
        if tag.key not in value:
            near = _nearest([key for key in value if isinstance(key, str)], (tag.key,))
            hint = f'"{near}" has another name' if near else f"one of {', '.join(cases)}"
            raise self.error(f'{self.source}: {at} lacks "{tag.key}": add it ({hint})')
        kind = value[tag.key]
        if not isinstance(kind, str) or kind not in cases:
            fix = meant(str(kind), list(cases), "upgrade moe-route, or give one of")
            raise self.error(f"{self.source}: {_joined(at, tag.key)} is {_shown(kind)}, which is not known here: {fix}")
        return self.table(cases[kind], value, at)

    def items(self, hint: Any, inner: tuple[Any, ...], value: Any, at: str) -> tuple[Any, ...]:
        of = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(of) != len(value):
            raise self.refused(at, value, described(hint))
        return tuple(self.value(one, item, f"{at}[{i}]") for i, (one, item) in enumerate(zip(of, value, strict=True)))

    def mapping(self, inner: tuple[Any, ...], value: Mapping[Any, Any], at: str) -> dict[Any, Any]:
        made = {}
        for key, item in value.items():
            here = _joined(at, str(key))
            name: Any = key
            if _bare(inner[0]) is int:
                if isinstance(key, str) and re.fullmatch(_NUMBER, key):
                    name = int(key)
                name = self.value(inner[0], name, f"the key {here}")
            made[name] = self.value(inner[1], item, here)
        return made


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {one.name: hints[one.name] for one in fields(kind)}


def _limit(hint: Any) -> Any:
    return hint.__metadata__[0] if typing.get_origin(hint) is Annotated else None


def _bare(hint: Any) -> Any:
    return hint.__origin__ if typing.get_origin(hint) is Annotated else hint


def _has_form(hint: Any, value: Any) -> bool:
    """Whether a value is a text, a number, a list, ... as an annotation has it, whatever is inside."""
    if isinstance(_limit(hint), Tagged):
        return isinstance(value, Mapping)
    hint = _bare(hint)
    origin = typing.get_origin(hint)
    if origin is Literal:
        return not isinstance(value, (Mapping, list, tuple))
    if origin is tuple:
        return isinstance(value, (list, tuple))
    if origin is not None or is_dataclass(hint):
        return isinstance(value, Mapping)
    if hint in (int, float):
        wanted = Integral if hint is int else Real
        return isinstance(value, wanted) and not isinstance(value, bool) and (hint is int or math.isfinite(value))
    return hint is Any or isinstance(value, hint)


def described(hint: Any) -> str:
    """What a value of this annotation is, in words."""
    limit, hint = _limit(hint), _bare(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(limit, Range):
        return f"{described(hint)} {limit}"
    if origin is Literal:
        return " or ".join(json.dumps(one) for one in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(one) for one in inner if one is not type(None))
    if origin is tuple:
        several = inner[-1] is Ellipsis
        return f"a list [{', '.join(map(described, inner[:1] if several else inner))}{', ...' if several else ''}]"
    return _WORDS.get(hint, "anything" if hint is Any else "a table")


def _shown(value: Any) -> str:
    """A value for a message, on one line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _joined(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


# ---- misspelt words


def meant(word: str, known: Collection[Any], otherwise: str = "there are") -> str:
    """The nearest known word as a question; without one, all of them."""
    near = _nearest([word], known)
    return f'did you mean "{near}"?' if near else f"{otherwise} {', '.join(sorted(map(str, known)))}"


def _nearest(words: Iterable[str], known: Collection[Any]) -> str | None:
    folded = {str(one).casefold(): str(one) for one in known}
    for word in words:
        if near := get_close_matches(word.casefold(), folded, n=1):
            return folded[near[0]]
    return None


def misspelt(given: Iterable[Any], known: Collection[str]) -> tuple[str, str] | None:
    """A name that differs by case or one letter from a known one that is not given, and that one; None if none does.

    For tables that may have columns of others, in which a word that is merely unknown is none of our business.
    """
    words = [str(word) for word in given]
    for name in known:
        for word in words if name not in words else ():
            if word not in known and _one_letter_apart(word.casefold(), name.casefold()):
                return word, name
    return None


def _one_letter_apart(one: str, other: str) -> bool:
    """Whether two words are the same but for a letter that is changed, added, left out, or exchanged with the next."""
    if abs(len(one) - len(other)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    a, b = one[start:], other[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[:2][::-1] and a[2:] == b[2:])


# ---- JSON Schema


def json_schema(hint: Any) -> dict[str, Any]:
    """The JSON Schema of an annotation; texts of docstrings become descriptions."""
    limit, hint = _limit(hint), _bare(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(limit, Tagged):
        return {"oneOf": [json_schema(case) for case in limit.cases().values()]}
    if isinstance(limit, Range):
        ends = {"minimum": limit.low, "maximum": limit.high}
        return json_schema(hint) | {name: end for name, end in ends.items() if end is not None}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [json_schema(one) for one in inner]}
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return {"type": "array", "items": json_schema(inner[0])}
        return {
            "type": "array",
            "prefixItems": [json_schema(one) for one in inner],
            "minItems": len(inner),
            "maxItems": len(inner),
        }
    if is_dataclass(hint):
        return _object_schema(hint)
    if origin is not None:
        return _mapping_schema(*inner)
    return {"type": _TYPES[hint]} if hint in _TYPES else {}


def _mapping_schema(key: Any, value: Any) -> dict[str, Any]:
    inside = json_schema(value)
    if _bare(key) is not int:
        return {"type": "object", "additionalProperties": inside}
    sign = "" if isinstance(_limit(key), Range) else "-?"
    return {
        "type": "object",
        "patternProperties": {f"^(0|{sign}[1-9][0-9]*)$": inside},
        "additionalProperties": False,
    }


def _object_schema(kind: Any) -> dict[str, Any]:
    summary, texts = _documented(kind)
    properties, required = {}, []
    for one, hint in zip(fields(kind), _hints(kind).values(), strict=True):
        entry = json_schema(hint)
        if text := texts.get(one.name):
            entry["description"] = text
        if one.default is not MISSING and isinstance(one.default, (str, int, float)):
            entry["default"] = one.default
        if one.default is MISSING and one.default_factory is MISSING:
            required.append(one.name)
        properties[one.name] = entry
    return {
        "type": "object",
        **({"description": summary} if summary else {}),
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _documented(kind: Any) -> tuple[str, dict[str, str]]:
    """The first sentence of a dataclass, and the text of each of its fields, from its docstring."""
    summary, _, listed = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    names: tuple[str, ...] = ()
    for line in listed.split("\n\n")[0].splitlines():
        if match := _FIELD.fullmatch(line):
            names = tuple(match[1].split(", "))
            texts |= dict.fromkeys(names, match[2])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return " ".join(summary.split("\n\n")[0].split()), texts

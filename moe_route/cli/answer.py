"""The result of a command, as JSON and as text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from errno import ENOENT
from pathlib import Path
from typing import Any

from moe_route.base.table import printable


@dataclass(frozen=True)
class Answer:
    """The result of a command: `data` is printed with `--json`, `text` without; `code` is the exit code.

    `frame` makes the table that `--out` keeps, for commands whose result is one; `paint` colors the text that is shown.
    """

    data: Mapping[str, Any]
    text: str
    code: int = 0
    frame: Callable[[], Any] | None = None
    paint: Callable[[str], str] = str

    @classmethod
    def of(cls, result: Any, **more: Any) -> Answer:
        """The answer with a result of the library; `more` is added to its data."""
        return cls({**result.to_dict(), **more}, repr(result), frame=result.to_pandas)

    def kept(self, path: Path | None) -> Answer:
        """Write the table to a file, if one is asked for: .json holds all data, .csv and .parquet the table."""
        if self.frame is None or path is None:
            return self
        _write_table(path, self)
        return replace(self, data={**self.data, "out": path}, text=f"{self.text}\nwritten to {path}")

    def shown(self, *, json: bool) -> str:
        """What is printed: names from data cannot command a terminal."""
        return printable(self.as_json()) if json else self.paint(printable(self.text))

    def as_json(self) -> str:
        """Strict JSON, in which numbers that are not finite become null."""
        return json.dumps(plain(self.data), ensure_ascii=False, indent=2, allow_nan=False)


def _write_table(path: Path, answer: Answer) -> None:
    from moe_route.base import files
    from moe_route.base.table import csv_text

    if path.suffix.lower() == ".json":
        files.write_text(path, answer.as_json() + "\n")
        return
    assert answer.frame is not None
    frame = answer.frame()
    with files.replacing(path) as stream:
        if path.suffix.lower() == ".csv":
            stream.write(csv_text(frame).encode())
        else:
            frame.to_parquet(stream, index=False)


def plain(value: Any) -> Any:
    """Convert `value` to JSON types: arrays and tuples to lists, keys to strings, NaN and infinity to null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # arrays and numbers of numpy
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    text: object = error
    if isinstance(error, KeyError) and error.args:
        text = error.args[0]  # str(KeyError) has quotes around it
    elif isinstance(error, FileNotFoundError) and error.filename is not None and error.errno == ENOENT:
        text = f"{error.filename} does not exist: check the name"  # str(FileNotFoundError) begins with "[Errno 2]"
    elif isinstance(error, OSError) and error.strerror and error.filename is None:
        text = error.strerror  # str(OSError) begins with "[Errno 2]"
    return printable(" ".join(str(text).split())) or type(error).__name__

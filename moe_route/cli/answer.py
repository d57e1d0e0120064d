"""The result of a command, as JSON and as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from errno import ENOENT
from typing import Any

__all__ = ["Answer", "one_line", "plain"]


@dataclass(frozen=True)
class Answer:
    """The result of a command: `data` is printed with `--json`, `text` without; `code` is the exit code."""

    data: Mapping[str, Any]
    text: str
    code: int = 0

    def as_json(self) -> str:
        """Strict JSON, in which numbers that are not finite become null."""
        return json.dumps(plain(self.data), ensure_ascii=False, indent=2, allow_nan=False)


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
    return " ".join(str(text).split()) or type(error).__name__

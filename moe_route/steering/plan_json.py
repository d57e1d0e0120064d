"""Layout of plans as JSON: a line for each layer of a rule, which people can edit and tools can compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["laid_out"]


def laid_out(value: Any, indent: str = "") -> str:
    """JSON text in which a list or object without others inside takes one line, and any other a line for each entry."""
    if isinstance(value, Mapping):
        entries = [(f"{json.dumps(str(key))}: ", entry) for key, entry in value.items()]
        brackets = "{}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        entries, brackets = [("", entry) for entry in value], "[]"
    else:
        return json.dumps(value, allow_nan=False)
    if not any(_holds_others(entry) for _, entry in entries):
        flat = ", ".join(f"{key}{laid_out(entry)}" for key, entry in entries)
        return f"{brackets[0]}{flat}{brackets[1]}"
    deeper = indent + "  "
    lines = ",\n".join(f"{deeper}{key}{laid_out(entry, deeper)}" for key, entry in entries)
    return f"{brackets[0]}\n{lines}\n{indent}{brackets[1]}"


def _holds_others(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str))

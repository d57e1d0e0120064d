"""Read a table of performance: a score per group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

__all__ = ["read_scores"]


def read_scores(path: Path) -> dict[str, float]:
    """group -> score, of a JSON file or of tab-separated lines, whose first may be a heading."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        found = json.loads(text)
        if not isinstance(found, Mapping):
            raise ValueError(f"{path} must be a JSON object: {{group: score}}")
        return {str(group): float(score) for group, score in found.items()}
    scores: dict[str, float] = {}
    for number, line in enumerate(filter(str.strip, text.splitlines())):
        group, *rest = line.split("\t")
        try:
            scores[group] = float(rest[0])
        except (ValueError, IndexError):
            if number:
                raise ValueError(f"{path}: {line!r} is not a group, a tab and a score") from None
    return scores

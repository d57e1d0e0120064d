"""Read a table of performance: a score per group."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

__all__ = ["read_scores"]


def read_scores(path: Path) -> dict[str, float]:
    """group -> score, of a JSON file or of tab-separated lines, whose first may be a heading.

    Raises ``ValueError`` for another form, a score that is no finite number, and a group that comes twice.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        found = json.loads(text)
        if not isinstance(found, Mapping):
            raise ValueError(f"{path} must be a JSON object: {{group: score}}")
        return _finite({str(group): float(score) for group, score in found.items()}, path)
    scores: dict[str, float] = {}
    for number, line in enumerate(filter(str.strip, text.splitlines())):
        group, *rest = line.split("\t")
        try:
            score = float(rest[0])
        except (ValueError, IndexError):
            if number:
                raise ValueError(f"{path}: {line!r} is not a group, a tab and a score") from None
            continue
        if group in scores:
            raise ValueError(f"{path}: {group} comes twice: keep one of its scores")
        scores[group] = score
    return _finite(scores, path)


def _finite(scores: dict[str, float], path: Path) -> dict[str, float]:
    for group, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"{path}: the score of {group} is {score}: leave the group out")
    return scores

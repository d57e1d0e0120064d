"""What a report is made from: recordings, traces, selections, plans, scores and tables of results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_route import files
from moe_route.analysis.score_files import read_scores
from moe_route.recording import RoutingStatistics, Trace
from moe_route.report.result_tables import TABLES_FILE, ResultTable, is_results, read_results
from moe_route.steering import ExpertSelection, Plan

__all__ = ["Inputs", "read"]

_LOADERS: dict[str, tuple[str, Any]] = {
    "statistics": ("recordings", RoutingStatistics.load),
    "trace": ("traces", Trace.load),
    "selection": ("selections", ExpertSelection.load),
    "plan": ("plans", Plan.load),
}


@dataclass(frozen=True)
class Inputs:
    """What a report shows, each thing under a name of its own.

    Attributes:
        recordings: recorded statistics.
        traces: experts of single tokens. Two traces of the same texts are shown side by side, such as with and without
            a plan.
        selections, plans: experts to mark.
        scores: name of a measure of performance -> group -> score.
        results: tables of results, such as those of an evaluation.
    """

    recordings: Mapping[str, RoutingStatistics] = field(default_factory=dict)
    traces: Mapping[str, Trace] = field(default_factory=dict)
    selections: Mapping[str, ExpertSelection] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    results: tuple[ResultTable, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to show; scores are shown with a recording only."""
        return any((self.recordings, self.traces, self.selections, self.plans, self.results))


def read(paths: Iterable[str | os.PathLike[str]]) -> Inputs:
    """Read files of any of these kinds, and folders with a ``tables.json``; the content tells the kind.

    Each thing gets the name of its file without suffix. Raises ``files.FileRefusedError`` for a damaged file, and
    ``ValueError`` for one that a report cannot show.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in ("recordings", "traces", "selections", "plans", "scores")}
    results: list[ResultTable] = []
    for path in map(Path, paths):
        where, thing = _read(path)
        if where == "results":
            results.extend(thing)
        else:
            found[where][_free_name(path, found[where])] = thing
    return Inputs(**found, results=tuple(results))


def _read(path: Path) -> tuple[str, Any]:
    if path.is_dir():
        # `moe-route eval` writes its tables into the folder of its last stage
        tables = next((one for one in (path / TABLES_FILE, path / "report" / TABLES_FILE) if one.is_file()), None)
        if tables is None:
            raise ValueError(f"{path} has no {TABLES_FILE}: name files, or a folder of results")
        return "results", read_results(tables)
    if path.suffix in (".tsv", ".txt"):
        return "scores", _scores(path)
    if not files.is_json(path):
        kind = files.read_header(path)["kind"]
        if kind not in _LOADERS:
            raise ValueError(f"{path} is a file of kind {kind!r}, which a report does not show: leave it out")
        where, load = _LOADERS[kind]
        return where, load(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): correct it, or leave it out") from error
    if is_results(content):
        return "results", read_results(path)
    kind = content.get("moe_route") if isinstance(content, dict) else None
    if kind in _LOADERS:
        where, load = _LOADERS[kind]
        return where, load(path)
    return "scores", _scores(path)


def _scores(path: Path) -> dict[str, float]:
    try:
        found = read_scores(path)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is neither results nor a score per group ({error}): leave it out") from error
    if not found:
        raise ValueError(f"{path} holds no score: write a group, a tab and a score per line")
    return found


def _free_name(path: Path, taken: Mapping[str, Any]) -> str:
    """The file's name without suffix; with its folder, then with a number, if it is taken."""
    for name in (path.stem, f"{path.parent.name}/{path.stem}", *(f"{path.stem} ({n})" for n in range(2, 1000))):
        if name not in taken:
            return name
    raise ValueError(f"too many files are named {path.stem}: rename some")

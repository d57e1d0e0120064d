"""What a benchmark run found, as a file and as tables: times with their spread, ratios, floors, targets."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

import moe_route
from moe_route.base import files
from moe_route.base.schema import Kind
from moe_route.base.table import ShownAsTables, Table, duration
from moe_route.bench.timing import Race, clock_of_threads
from moe_route.ops import library

KIND = "BenchmarkResults"
TREE = Path(__file__).resolve().parents[2]  # the source tree, where this is not installed


@dataclass(frozen=True)
class Row:
    """One contender in one case. Times in seconds a call; low and high are quartiles over `calls` calls.

    Attributes:
        peer: what it is compared with, timed in the same rounds.
        times_peer: how many times as fast as the peer (above 1 is faster), the median over rounds of the ratio inside
            a round; with the quartiles of these ratios, None in files of versions that did not keep them.
        floor: what takes the least time that the work can take, timed in the same rounds.
        floor_fraction: the floor's time / this time: 1 is the floor. With quartiles as `times_peer`.
        ours: whether moe-route runs it; others are there to compare with.
    """

    section: str
    case: str
    name: str
    median: float
    low: float
    high: float
    calls: int
    peer: str | None = None
    times_peer: float | None = None
    floor: str | None = None
    floor_fraction: float | None = None
    times_peer_low: float | None = None
    times_peer_high: float | None = None
    floor_fraction_low: float | None = None
    floor_fraction_high: float | None = None
    ours: bool = True


@dataclass(frozen=True)
class Target:
    """A figure the project set itself, and what came out."""

    what: str
    wanted: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Fact:
    """A figure that is no timing of its own, in words."""

    section: str
    case: str
    what: str
    value: float
    unit: str


@dataclass(frozen=True)
class _Content:
    """A run of benchmarks.

    Attributes:
        machine: what it ran on.
        rows: a timing of a contender each.
        facts: figures that are no timings of their own.
        targets: figures that the project set itself.
    """

    machine: Mapping[str, str]
    rows: tuple[Row, ...]
    facts: tuple[Fact, ...]
    targets: tuple[Target, ...]


_RESULTS = Kind(KIND, _Content)


@dataclass
class Measured:
    """What a section found."""

    rows: list[Row] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def __add__(self, other: Measured) -> Measured:
        return Measured(self.rows + other.rows, self.facts + other.facts, self.targets + other.targets)


def rows(
    section: str,
    case: str,
    race: Race,
    *,
    peers: Mapping[str, str] | None = None,
    floors: Mapping[str, str] | None = None,
    others: Collection[str] = (),
) -> list[Row]:
    """A row for every contender of `race`; `peers` and `floors` name what each is compared with.

    `others` are contenders that are compared too and that moe-route does not run.
    """
    out = []
    for name in race.seconds:
        took, peer, floor = race.timing(name), (peers or {}).get(name), (floors or {}).get(name)
        row = Row(section, case, name, took.median, took.low, took.high, took.number, ours=False)
        if peer is not None:
            times = race.ratios(peer, name)
            row = replace(row, peer=peer, times_peer=times.median, times_peer_low=times.low, times_peer_high=times.high)
        if floor is not None:
            share = race.ratios(floor, name)
            row = replace(row, floor=floor, floor_fraction=share.median)
            row = replace(row, floor_fraction_low=share.low, floor_fraction_high=share.high)
        out.append(replace(row, ours=(peer or floor) is not None and name not in others))
    return out


@dataclass(frozen=True, repr=False)
class BenchmarkResults(ShownAsTables):
    """A run of benchmarks: the machine it ran on, and what was measured there."""

    machine: Mapping[str, str]
    measured: Measured

    def to_dict(self) -> dict[str, Any]:
        listed_by_kind = {kind: [asdict(each) for each in listed] for kind, listed in vars(self.measured).items()}
        listed_by_kind["rows"] = [
            {name: value for name, value in row.items() if value is not None} for row in listed_by_kind["rows"]
        ]
        return {"machine": dict(self.machine), **listed_by_kind}

    def save(self, path: Path) -> Path:
        """Write a JSON file, whole or not at all. Raises ValueError if a number is not finite."""
        files.write_json(path, self.to_dict(), KIND)
        return path

    @classmethod
    def load(cls, path: Path) -> BenchmarkResults:
        """Read a file that `save` wrote. Raises FileRefusedError that names the fault and the mend."""
        try:
            content = files.read_json(path, KIND)
        except files.FileRefusedError as error:
            raise files.FileRefusedError(f"{error} (`moe-route bench --out FOLDER` writes such files)") from error
        said = _RESULTS.read(content, str(path))
        with files.expected_content(path):
            measured = Measured(list(said.rows), list(said.facts), list(said.targets))
            _check(measured)
        return cls(said.machine, measured)

    @classmethod
    def joined(cls, runs: Sequence[BenchmarkResults]) -> BenchmarkResults:
        """Several runs as one; where their machines differ, all values stand there."""
        names = dict.fromkeys(name for run in runs for name in run.machine)
        values = {name: dict.fromkeys(run.machine[name] for run in runs if name in run.machine) for name in names}
        whole = sum((run.measured for run in runs), Measured())
        return cls({name: " / ".join(each) for name, each in values.items()}, whole)

    def tables(self) -> Sequence[Table]:
        """What moe-route ran, section by section, and the targets."""
        return [*self._sections(), *self._targets()]

    def _sections(self) -> Iterator[Table]:
        ours = [row for row in self.measured.rows if row.ours]
        for section in dict.fromkeys(row.section for row in ours):
            cells = [
                (
                    row.case,
                    row.name,
                    duration(row.median),
                    row.times_peer and f"{row.times_peer:.2f}",
                    row.peer or "",
                    row.floor_fraction and f"{row.floor_fraction:.2f}",
                )
                for row in ours
                if row.section == section
            ]
            head = ("case", "contender", "median", "times as fast", "as", "share of the floor")
            yield Table(head, cells, title=section)

    def _targets(self) -> Iterator[Table]:
        if targets := self.measured.targets:
            cells = [(each.what, each.wanted, each.measured, "yes" if each.met else "no") for each in targets]
            yield Table(("target", "wanted", "measured", "met"), cells, title="Targets that the project set itself")


def _check(measured: Measured) -> None:
    names = {(row.section, row.case, row.name) for row in measured.rows}
    for row in measured.rows:
        for other in (row.peer, row.floor):
            if other is not None and (row.section, row.case, other) not in names:
                raise ValueError(f"{row.name} in {row.section}, {row.case} is compared with {other}, which is missing")
        for name in ("median", "low", "high", "calls", "times_peer", "floor_fraction"):
            _check_number(getattr(row, name), f"{name} of {row.name} in {row.section}, {row.case}")
    for fact in measured.facts:
        _check_number(fact.value, f"{fact.what} in {fact.section}, {fact.case}")


def _check_number(value: object, what: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise ValueError(f"{what} is {value!r}, no finite number")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def commit(tree: Path = TREE) -> str:
    """The commit that was measured, with '+' where the tree held changes; outside a checkout of this project what the
    variable MOE_ROUTE_COMMIT says."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=tree)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "moe_route/bench/results.py")  # no repository that an installation lies in
        name, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", "moe_route", "csrc")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MOE_ROUTE_COMMIT", "unknown")
    return name + ("+" if changes else "")


def machine(command: str) -> dict[str, str]:
    """What a run on the CPU was made with; `command` makes it again."""
    transformers = sys.modules.get("transformers")
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "threads used": str(torch.get_num_threads()),
        "clock": clock_of_threads().name,
        "instruction set of the kernels": library.instruction_set(),
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"transformers": transformers.__version__} if transformers else {}),
        "moe_route": moe_route.__version__,
        "commit": commit(),
        "load": "{:.1f}, {:.1f}, {:.1f} over 1, 5, 15 minutes, this run among it".format(*os.getloadavg()),
        "command": command,
    }

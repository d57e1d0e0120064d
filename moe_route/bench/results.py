"""What a benchmark run leaves behind: one JSON file and the same as a markdown page, named after the machine class."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moe_route.bench.timing import Race

TREE = Path(__file__).resolve().parents[2]  # the source tree, where this is not installed


@dataclass(frozen=True)
class Row:
    """One contender in one case. Times in seconds a call; ratios are medians over rounds of ratios inside a round."""

    section: str
    case: str
    name: str
    median: float
    low: float
    high: float
    calls: int
    peer: str | None = None  # what it is compared with, timed in the same rounds
    times_peer: float | None = None  # how many times as fast as the peer: above 1 is faster
    floor: str | None = None
    floor_fraction: float | None = None  # floor's time / this time: 1 is the floor


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


def rows(
    section: str, case: str, race: Race, *, peers: dict[str, str] | None = None, floors: dict[str, str] | None = None
) -> list[Row]:
    """A row for every contender of `race`; `peers` and `floors` name what each is compared with."""
    out = []
    for name in race.seconds:
        timing = race.timing(name)
        peer, floor = (peers or {}).get(name), (floors or {}).get(name)
        out.append(
            Row(
                section,
                case,
                name,
                timing.median,
                timing.low,
                timing.high,
                timing.calls,
                peer,
                race.ratio(peer, name) if peer else None,
                floor,
                race.ratio(floor, name) if floor else None,
            )
        )
    return out


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


def machine(instruction_set: str) -> dict[str, str]:
    import moe_route

    transformers = sys.modules.get("transformers")
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "threads used": str(torch.get_num_threads()),
        "instruction set of the kernels": instruction_set,
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"transformers": transformers.__version__} if transformers else {}),
        "moe_route": moe_route.__version__,
        "commit": commit(),
        "load": "{:.1f}, {:.1f}, {:.1f} over 1, 5, 15 minutes, this run among it".format(*os.getloadavg()),
        "command": " ".join(["moe-route", *sys.argv[1:]]),
    }


def save(
    folder: Path,
    name: str,
    about: dict[str, str],
    measured: Sequence[Row],
    facts: Sequence[Fact],
    targets: Sequence[Target],
) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": about,
        "targets": [asdict(t) for t in targets],
        "rows": [asdict(r) for r in measured],
        "facts": [asdict(f) for f in facts],
    }
    paths = folder / f"{name}.json", folder / f"{name}.md"
    for path, text in zip(
        paths, (json.dumps(content, indent=1) + "\n", markdown(about, measured, facts, targets)), strict=True
    ):
        new = path.with_suffix(path.suffix + ".new")
        new.write_text(text)
        new.replace(path)
    return paths


def markdown(about: dict[str, str], measured: Sequence[Row], facts: Sequence[Fact], targets: Sequence[Target]) -> str:
    parts = ["# Benchmark results\n", table(("", ""), about.items())]
    if targets:
        parts += [
            "## Targets\n",
            table(
                ("figure", "wanted", "measured", "met"),
                ((t.what, t.wanted, t.measured, "yes" if t.met else "**no**") for t in targets),
            ),
        ]
    for section in dict.fromkeys(r.section for r in measured):
        parts.append(f"## {section}\n")
        parts.append(
            table(
                ("case", "contender", "median", "quartiles", "compared with", "times as fast", "share of the floor"),
                (_cells(r) for r in measured if r.section == section),
            )
        )
        inside = [f for f in facts if f.section == section]
        if inside:
            parts.append(
                table(("case", "what", "value"), ((f.case, f.what, f"{f.value:.3g} {f.unit}") for f in inside))
            )
    return "\n".join(parts)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.case,
        row.name,
        duration(row.median),
        f"{duration(row.low)} - {duration(row.high)}",
        row.peer or "",
        f"{row.times_peer:.2f}" if row.times_peer is not None else "",
        f"{row.floor_fraction:.2f}" if row.floor_fraction is not None else "",
    )


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"

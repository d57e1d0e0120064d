"""docs/support.md: every architecture on every path, written by running the paths and read by their tests.

python tests/support_table.py [--check] [--paths NAME,...] [--only NAME,...]

runs all paths whose packages are installed (costly ones too; most of an hour on two cores), keeps the committed
cells of the others, and writes the table. With --check it writes nothing and fails where the table differs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path as File

sys.path.insert(0, str(File(__file__).parent))

import transformers
from harness.whole_models import ROWS, WHOLE
from paths.registry import SECTIONS, Path, all_paths
from paths.subject import Outcome, Subject

TABLE = File(__file__).parent.parent / "docs" / "support.md"
Cells = dict[tuple[str, str], Outcome]
_SIGNS = {"passed": "yes", "refused": "R", "none": "-"}
_KINDS = {"R": "refused", "-": "none"}
_HEAD = """\
# What works on which model

Each row is an architecture of transformers, as a tiny random model of its own configuration class; each column is a way
in which models are run. The tests run these paths and compare what they find with this page (`tests/paths`), and
`python tests/support_table.py` writes it. What passing a path means is said above its table.

Last tested on {day}, with transformers {transformers} and torch {torch}.

Classes that take more than text are tested whole, with their towers: {whole}.

`yes`: passed. `R` and a number: refused, by an error that names the reason. `-` and a number: there is no such path
here, or the model fails on it without moe-route.
"""


def head() -> dict[str, str]:
    """What the page says of its making."""
    day, torch = datetime.date.today().isoformat(), version("torch").partition("+")[0]
    return {"day": day, "transformers": transformers.__version__, "torch": torch}


def read_head(text: str) -> dict[str, str]:
    """The same, of a page that `render` wrote."""
    said = re.search(
        r"tested on (?P<day>\S+), with transformers (?P<transformers>\S+) and torch (?P<torch>\S+)\.", text
    )
    assert said is not None, "the support table does not say when it was made"
    return said.groupdict()


def render(cells: Cells, paths: Iterable[Path], names: Iterable[str]) -> str:
    """The page for these cells."""
    names = list(names)
    whole = ", ".join(f"`{name}` (`{WHOLE[name].model}`)" for name in names if name in WHOLE)
    lines = [_HEAD.format(**head(), whole=whole)]
    for section in SECTIONS:
        columns = [each for each in paths if each.section == section and any((n, each.name) in cells for n in names)]
        if columns:
            lines += _section(section, columns, names, cells)
    return "\n".join(lines)


def _section(section: str, columns: list[Path], names: list[str], cells: Cells) -> list[str]:
    reasons: dict[Outcome, str] = {}
    rows = [
        "| " + " | ".join(["architecture", *(each.name for each in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in names:
        row = [_cell(cells.get((name, each.name)), reasons) for each in columns]
        rows.append("| " + " | ".join([f"`{name}`", *row]) + " |")
    said = [f"- **{each.name}**: {each.what}." for each in columns]
    notes = [f"- {label}: {outcome.reason}" for outcome, label in reasons.items()]
    return [f"## {section}\n", *said, "", *rows, "", *notes, *([""] if notes else [])]


def _cell(outcome: Outcome | None, reasons: dict[Outcome, str]) -> str:
    if outcome is None:
        return ""
    if outcome.kind == "passed":
        return _SIGNS["passed"]
    sign = _SIGNS[outcome.kind]
    number = 1 + sum(label.startswith(sign) for label in reasons.values())
    return reasons.setdefault(outcome, f"{sign}{number}")


def read_table(text: str) -> Cells:
    """The cells of a page that `render` wrote."""
    cells: Cells = {}
    for section in text.split("\n## ")[1:]:
        lines = section.splitlines()
        reasons = dict(match.groups() for line in lines if (match := re.fullmatch(r"- ([R-]\d+): (.*)", line)))
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
        for name, *row in rows[1:]:
            for column, cell in zip(rows[0][1:], row, strict=True):
                if cell == "yes":
                    cells[name.strip("`"), column] = Outcome("passed")
                elif cell:
                    cells[name.strip("`"), column] = Outcome(_KINDS[cell[0]], reasons[cell])  # type: ignore[arg-type]
    return cells


def run_paths(
    paths: Iterable[Path], names: Iterable[str], keep: Callable[[Cells], None] = lambda found: None
) -> tuple[Cells, list[str]]:
    """What is found, and where a path failed; `keep` is given what was found so far after each architecture."""
    cells: Cells = {}
    failures: list[str] = []
    paths = list(paths)
    for name in names:
        subject, began = Subject(name), time.monotonic()
        for each in paths:
            try:
                cells[name, each.name] = each.outcome(subject)
            except Exception:
                failures.append(f"{name}, {each.name}:\n{traceback.format_exc(limit=-2)}")
        failed = sum(failure.startswith(f"{name}, ") for failure in failures)
        print(f"{name}: {time.monotonic() - began:.1f} s, {failed} failed", file=sys.stderr, flush=True)  # noqa: T201
        keep(cells)
        gc.collect()
    return cells, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--paths", default="", help="names of paths or sections, separated by commas")
    parser.add_argument("--only", default="", help="names of architectures, separated by commas")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    known = all_paths()
    wanted = [name for name in options.paths.split(",") if name]
    chosen = [p for p in known.values() if not p.missing and (not wanted or p.name in wanted or p.section in wanted)]
    names = [name for name in options.only.split(",") if name] or list(ROWS)
    committed = read_table(TABLE.read_text()) if TABLE.exists() else {}
    kept = {key: value for key, value in committed.items() if key[0] in ROWS and key[1] in known}

    def write(found: Cells) -> None:
        if not options.check:
            TABLE.write_text(render(kept | found, known.values(), ROWS))

    found, failures = run_paths(chosen, names, write)
    print("\n".join(failures), file=sys.stderr)  # noqa: T201
    if options.check:
        differing = [key for key, value in found.items() if committed.get(key) != value]
        print("\n".join(f"{key}: {committed.get(key)} -> {found[key]}" for key in differing), file=sys.stderr)  # noqa: T201
        return int(bool(failures or differing))
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())

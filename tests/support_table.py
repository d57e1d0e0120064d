"""docs/support.csv: every architecture on every path, written by running the paths and read by their tests.

python tests/support_table.py [--check] [--paths NAME,...] [--only NAME,...]

runs all paths whose packages are installed (costly ones too; most of an hour on two cores), keeps the committed
cells of the others, and writes the table. With --check it writes nothing and fails where the table differs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import io
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

TABLE = File(__file__).parent.parent / "docs" / "support.csv"
Cells = dict[tuple[str, str], Outcome]
_ABOUT = ("tested", "section", "passing means")  # the rows between the names of the paths and the architectures
_KINDS = {"refused": "refused", "-": "none"}
_SIGNS = {kind: sign for sign, kind in _KINDS.items()}


def head() -> dict[str, str]:
    """What the table says of its making."""
    day, torch = datetime.date.today().isoformat(), version("torch").partition("+")[0]
    return {"day": day, "transformers": transformers.__version__, "torch": torch}


def read_head(text: str) -> dict[str, str]:
    """The same, of a table that `render` wrote."""
    made = r"^tested,(?P<day>\S+) with transformers (?P<transformers>\S+) and torch (?P<torch>[^\s,]+),"
    said = re.search(made, text, re.M)
    assert said is not None, "the support table does not say when it was made"
    return said.groupdict()


def render(cells: Cells, paths: Iterable[Path], names: Iterable[str], made: dict[str, str]) -> str:
    """The table as CSV: a row per architecture, with its class where it is tested whole, and a column per path.

    A cell is "yes" (passed), "refused: reason", "-: reason" (there is no such path), or empty (never run).
    """
    names = list(names)
    paths = list(paths)
    columns = [each for section in SECTIONS for each in paths if each.section == section]
    columns = [each for each in columns if any((name, each.name) in cells for name in names)]
    when = f"{made['day']} with transformers {made['transformers']} and torch {made['torch']}"
    rows = [
        ["architecture", "class that is tested whole, with its towers", *(each.name for each in columns)],
        ["tested", when, *("" for _ in columns)],
        ["section", "", *(each.section for each in columns)],
        ["passing means", "", *(each.what for each in columns)],
    ]
    for name in names:
        whole = WHOLE[name].model if name in WHOLE else ""
        rows.append([name, whole, *(_cell(cells.get((name, each.name))) for each in columns)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    return "yes" if outcome.kind == "passed" else f"{_SIGNS[outcome.kind]}: {outcome.reason}"


def read_table(text: str) -> Cells:
    """The cells of a table that `render` wrote."""
    cells: Cells = {}
    (_, _, *columns), *rows = csv.reader(io.StringIO(text))
    for name, _, *row in rows:
        if name in _ABOUT:
            continue
        for column, cell in zip(columns, row, strict=True):
            sign, _, reason = cell.partition(": ")
            if cell == "yes":
                cells[name, column] = Outcome("passed")
            elif cell:
                cells[name, column] = Outcome(_KINDS[sign], reason)  # type: ignore[arg-type]
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
            TABLE.write_text(render(kept | found, known.values(), ROWS, head()))

    found, failures = run_paths(chosen, names, write)
    print("\n".join(failures), file=sys.stderr)  # noqa: T201
    if options.check:
        differing = [key for key, value in found.items() if committed.get(key) != value]
        print("\n".join(f"{key}: {committed.get(key)} -> {found[key]}" for key in differing), file=sys.stderr)  # noqa: T201
        return int(bool(failures or differing))
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())

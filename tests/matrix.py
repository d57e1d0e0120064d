"""Every path on every architecture, under several versions of transformers: `make test-matrix`.

python tests/matrix.py [--folder build/matrix] [VERSION ...]

Each version gets an environment of its own that reads torch and everything else from the one this runs in. Under the
newest, all paths are tested, and docs/support.csv is what was found; under the others the cheap ones. docs/versions.csv
and a section of docs/support.md sum all of them up, with the day.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path as File
from typing import Any

HERE = File(__file__).resolve().parent
TABLE = HERE.parent / "docs" / "versions.csv"
PAGE = HERE.parent / "docs" / "support.md"
SECTION = re.compile(r"(?<=<!-- versions -->\n).*?(?=<!-- end of versions -->)", re.S)
RESULTS = HERE / "results"
NEWEST = "latest"
VERSIONS = ("4.57.6", "5.0.0", "5.6.2", "5.17.0", NEWEST)
_OTHER_FORM = "the router returns its decision in another form"
_REFUSALS = {  # a part of the error, and what it says of a version
    "is not a known router": "the block decides, and its gate is no more than a matrix product",
    "does not say its number": "the block decides, and its router does not know the number of experts or of choices",
    "has no known router": "no class of the block is known, and its parts have other names",
    "does not weigh": "what the router returns as logits is not what its weights follow from",
    "does not return": _OTHER_FORM,
    "returns shapes": _OTHER_FORM,
    "cannot be run": "the router takes other arguments",
}


# ---- an environment for each version


def environment(version: str, folder: File) -> File:
    """The Python of an environment with this version of transformers, made where there is none yet."""
    place = folder.resolve() / version
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        [packages] = place.glob("lib/python*/site-packages")
        shared = sysconfig.get_paths()["purelib"]
        (packages / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        wanted = "transformers" if version == NEWEST else f"transformers=={version}"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", wanted], check=True)
    return python


def tested_in(version: str, folder: File) -> bool:
    """Whether every path was passed under one version. What was found is left in RESULTS, or in the support table."""
    python = environment(version, folder)
    settings = os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
    if version == NEWEST:
        return not subprocess.run([python, HERE / "support_table.py"], cwd=HERE.parent, env=settings).returncode
    out = folder.resolve() / f"{version}.json"
    subprocess.run([python, __file__, "--inside", str(out)], check=True, cwd=HERE.parent, env=settings)
    found: dict[str, Any] = json.loads(out.read_text())
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"transformers-{found['transformers']}.json"
    kept.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"transformers {found['transformers']}: {summary(found)}")  # noqa: T201
    return not found["failures"]


# ---- inside that environment


def inside(out: File) -> None:
    """Run the paths, and write what was found."""
    import torch
    import transformers

    sys.path.insert(0, str(HERE))
    transformers.logging.set_verbosity_error()
    from harness.whole_models import ROWS
    from paths.registry import all_paths
    from support_table import run_paths

    began = time.monotonic()
    paths = [each for each in all_paths().values() if not each.missing and each.cost != "costly"]
    first: dict[str, str] = {name: entry(name) for name in ROWS}
    cells, failures = run_paths(paths, [name for name, how in first.items() if how == "attached"])
    failures += [f"{name}, attaching" for name, how in first.items() if how == "failed"]
    found = {name: how if how != "attached" else _share(name, cells, failures) for name, how in first.items()}
    out.write_text(
        json.dumps(
            {
                "transformers": transformers.__version__,
                "torch": torch.__version__.partition("+")[0],
                "day": datetime.date.today().isoformat(),
                "minutes": round((time.monotonic() - began) / 60, 1),
                "paths": [each.name for each in paths],
                "found": found,
                "outcomes": Counter(outcome.kind for outcome in cells.values()),
                "failures": [" ".join(failure.split())[-600:] for failure in failures],
            }
        )
    )


def _share(name: str, cells: dict[tuple[str, str], Any], failures: list[str]) -> str:
    """How many of the paths that there are for an architecture it passes, or is refused on by name."""
    passed = sum(outcome.kind != "none" for (of, _), outcome in cells.items() if of == name)
    return f"{passed} of {passed + sum(failure.startswith(f'{name}, ') for failure in failures)}"


def entry(name: str) -> str:
    """Whether an architecture can be attached to under this version: "attached", "-: why" or "refused: why"."""
    from paths.subject import Subject, first_sentence, run

    import moe_route as mr
    from moe_route.routers import ModelNotSupportedError

    try:
        subject = Subject(name)
        run(subject.model, subject.inputs(subject.model))
    except Exception as error:
        return f"-: {type(error).__name__}, {first_sentence(error)}"
    try:
        mr.attach(subject.model).detach()
    except ModelNotSupportedError as error:
        return f"refused: {refusal_of(error)}"
    except Exception:  # neither attached nor refused: told with the failures
        return "failed"
    return "attached"


def refusal_of(error: Exception) -> str:
    """A refusal without what differs from model to model."""
    from paths.subject import first_sentence

    return next((what for phrase, what in _REFUSALS.items() if phrase in str(error)), first_sentence(error))


# ---- the page


def newest() -> dict[str, Any]:
    """What the support table says, in the form of the other results."""
    sys.path.insert(0, str(HERE))
    from harness.whole_models import ROWS
    from support_table import TABLE as SUPPORT
    from support_table import read_head, read_table

    text = SUPPORT.read_text()
    cells = read_table(text)
    return read_head(text) | {
        "paths": sorted({path for _, path in cells}),
        "found": {name: _share(name, cells, []) for name in ROWS},
        "outcomes": Counter(outcome.kind for outcome in cells.values()),
        "failures": [],
    }


def summary(found: dict[str, Any]) -> str:
    """In one line."""
    kinds = Counter(how.partition(":")[0] for how in found["found"].values())
    attached = len(found["found"]) - kinds["refused"] - kinds["-"] - kinds["failed"]
    of_paths = found["outcomes"]
    return (
        f"{attached} architectures attached to, {kinds['refused']} refused by name, {kinds['-']} not in it; on "
        f"{len(found['paths'])} paths {of_paths.get('passed', 0)} passed, {of_paths.get('refused', 0)} refused, "
        f"{of_paths.get('none', 0)} not there, {len(found['failures'])} failed"
    )


def section(results: list[dict[str, Any]]) -> str:
    """What docs/support.md says of each version."""
    return "".join(f"- **{r['transformers']}**, {r['day']}, torch {r['torch']}: {summary(r)}.\n" for r in results)


def table(results: list[dict[str, Any]]) -> str:
    """docs/versions.csv: how many of its paths an architecture passes under each version, or why it is refused."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["architecture", *(r["transformers"] for r in results)])
    for name in results[-1]["found"]:
        cells = [r["found"].get(name, "-") for r in results]
        writer.writerow([name, *(cell if cell.startswith("refused") else cell.partition(": ")[0] for cell in cells)])
    return text.getvalue()


def every_version() -> list[dict[str, Any]]:
    """The committed results, the oldest version first, and last what the support table says."""
    older = [json.loads(file.read_text()) for file in RESULTS.glob("transformers-*.json")]
    older.sort(key=lambda result: [int(part) for part in result["transformers"].split(".") if part.isdigit()])
    return [*older, newest()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--folder", type=File, default=File("build/matrix"))
    parser.add_argument("--inside", type=File, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.inside)
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    passed = [tested_in(version, options.folder) for version in options.versions]
    results = every_version()
    TABLE.write_text(table(results))
    PAGE.write_text(SECTION.sub(lambda _: section(results), PAGE.read_text()))
    return int(not all(passed))


if __name__ == "__main__":
    raise SystemExit(main())

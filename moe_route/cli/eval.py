"""`moe-route eval`: run a study of an evaluation, or what is left of it, with all controls."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, quiet_libraries
from moe_route.cli.interrupt import INTERRUPTED, deferred_interrupt


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "eval",
        run,
        "evaluate steering by a study: find experts, choose a setting, compare with controls; resumes where it ended",
        "moe-route eval demo --out results",
    )
    parser.add_argument("study", nargs="?", metavar="STUDY", help="name of a shipped study, or a TOML file")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the results; earlier ones are resumed")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder in which the study's paths begin (default: that of the study, for shipped ones the current one)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="KEY=VALUE",
        help="change the study, such as model.revision=HASH or tasks.sums.limit=10; may be repeated",
    )
    parser.add_argument("--force", action="store_true", help="remove earlier results in --out first")
    parser.add_argument("--list", action="store_true", help="list the shipped studies and end")
    parser.add_argument("--show", action="store_true", help="print the study's TOML and end, to write your own from it")


def run(options: argparse.Namespace) -> Answer:
    from moe_route.evaluation import evaluate, parse_assignment, read_study, shipped_studies

    shipped = shipped_studies()
    if options.list:
        return _listed(shipped)
    if options.study is None:
        raise ValueError(f"name a study: a TOML file, or one of {', '.join(shipped)} (--list)")
    path = shipped.get(options.study, Path(options.study))
    changes = dict(map(parse_assignment, options.changes))
    study = read_study(options.study, changes)
    if options.show:
        return Answer({"path": path, "study": study.to_dict()}, path.read_text(encoding="utf-8").rstrip("\n"))
    if options.out is None:
        raise ValueError("name the folder for the results: --out FOLDER")
    data = options.data or (Path() if options.study in shipped else path.parent)
    quiet_libraries()
    with deferred_interrupt(terminate=True, second="Ctrl-C again ends at once; the next run goes on from here") as stop:
        done = evaluate(study, options.out, data=data, force=options.force, stop=stop, progress=sys.stderr.isatty())
    if done.interrupted:
        text = f"interrupted: the same command goes on from here ({options.out})"
        return Answer(done.to_dict(), text, code=INTERRUPTED)
    stages = ", ".join(f"{name} {what}" for name, what in done.stages.items())
    return Answer(done.to_dict(), f"{done.report}\nstages: {stages}\nwritten to {options.out}")


def _listed(shipped: dict[str, Path]) -> Answer:
    from moe_route.base.table import table
    from moe_route.evaluation import read_study

    studies = {name: read_study(name) for name in shipped}
    rows = [(name, study.model.id, ", ".join(study.tasks), study.title) for name, study in studies.items()]
    data = [{"name": name, "model": model, "title": title} for name, model, _, title in rows]
    return Answer({"studies": data}, table(("study", "model", "tasks", ""), rows))

"""`moe-route eval` runs a study of steering with all controls, and `moe-route lm-eval` the tasks of lm-eval."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import moe_route as mr
from moe_route.base.table import table
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import quiet_libraries
from moe_route.cli.interrupt import INTERRUPTED, deferred_interrupt
from moe_route.cli.options import Parser, command, existing, made_by_a_model, out_argument


def add_eval(verbs: Any) -> None:
    parser = command(
        verbs,
        "eval",
        run_eval,
        "evaluate steering by a study: find experts, choose a setting, compare with controls; resumes where it ended",
        "moe-route eval demo --out results",
    )
    parser.add_argument("study", nargs="?", metavar="STUDY", help="name of a shipped study, or a TOML file")
    out_argument(parser, "folder for the results; earlier ones of the same study are resumed", metavar="FOLDER")
    parser.add_argument(
        "--data",
        type=existing,
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
    parser.add_argument("--list", action="store_true", help="list the shipped studies and end")
    parser.add_argument("--show", action="store_true", help="print the study's TOML and end, to write your own from it")
    made_by_a_model(parser, "eval")


def run_eval(options: argparse.Namespace) -> Answer:
    shipped = mr.evaluation.shipped_studies()
    if options.list:
        return _listed(shipped)
    if options.study is None:
        raise ValueError(f"name a study: a TOML file, or one of {', '.join(shipped)} (--list)")
    path = shipped.get(options.study, Path(options.study))
    changes = dict(map(mr.evaluation.parse_assignment, options.changes))
    study = mr.evaluation.read_study(options.study, changes)
    if options.show:
        return Answer({"path": path, "study": study.to_dict()}, path.read_text(encoding="utf-8").rstrip("\n"))
    if options.out is None:
        raise ValueError("name the folder for the results: --out FOLDER")
    data = options.data or (Path() if options.study in shipped else path.parent)
    quiet_libraries()
    with deferred_interrupt(terminate=True, second="Ctrl-C again ends at once; the next run goes on from here") as stop:
        done = mr.evaluation.evaluate(
            study, options.out, data=data, force=options.force, stop=stop, progress=sys.stderr.isatty()
        )
    if done.interrupted:
        text = f"interrupted: the same command goes on from here ({options.out})"
        return Answer(done.to_dict(), text, code=INTERRUPTED)
    stages = ", ".join(f"{name} {what}" for name, what in done.stages.items())
    return Answer(done.to_dict(), f"{done.report}\nstages: {stages}\nwritten to {options.out}")


def _listed(shipped: dict[str, Path]) -> Answer:
    studies = {name: mr.evaluation.read_study(name) for name in shipped}
    rows = [(name, study.model.id, ", ".join(study.tasks), study.title) for name, study in studies.items()]
    data = [{"name": name, "model": model, "title": title} for name, model, _, title in rows]
    return Answer({"studies": data}, table(("study", "model", "tasks", ""), rows))


_LM_EVAL = """\
example:
  moe-route lm-eval run --tasks moe_route_problems --model_args plan=plan.safetensors,record=steered.safetensors
  moe-route lm-eval run --model_args pretrained=allenai/OLMoE-1B-7B-0924 --tasks hellaswag --batch_size 8
  moe-route lm-eval run --help         # all options of lm-eval

--model_args takes those of lm-eval's model hf, and:
  pretrained=NAME   checkpoint folder or hub name (default: the demo model)
  plan=FILE         steer by this plan
  record=FILE       write the statistics of the routing
  groups=language   count by language instead of by task
  parts=True        count the tokens of continuations apart
  sequences=False   keep sums only, not each sequence
  engine=fused      how to attach (default: hook)
  cache=FOLDER      keep answers, apart for every model and plan"""


def add_lm_eval(verbs: Any) -> None:
    # The words are lm-eval's: no character begins an option of this parser.
    parser: Parser = verbs.add_parser(
        "lm-eval",
        help="run lm-eval's tasks on a model that is steered and recorded",
        description="Run lm-eval's own command, in which the model moe-route and the tasks moe_route_problems are "
        "known. Without --model, the model is moe-route.",
        usage="moe-route lm-eval {run,ls,validate} ...",
        epilog=_LM_EVAL,
        prefix_chars="\0",
        add_help=False,
    )
    parser.takes_any_word = True
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="what lm-eval's command takes")
    parser.set_defaults(run=run_lm_eval, verb=parser, json=False)


def run_lm_eval(options: argparse.Namespace) -> Answer:
    words = options.words
    if not words or words[0] in ("-h", "--help"):
        return Answer({}, options.verb.format_help().rstrip())
    from moe_route.integrations import lm_eval as integration

    integration.register()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    harness = HarnessCLI()
    with _command_line(["lm-eval", *words]):
        given = harness.parse_args()
    own = str(integration.TASKS)
    given.include_path = [given.include_path, own] if getattr(given, "include_path", None) else own
    recorded = None
    if given.command == "run" and given.config is None:
        given.model = given.model or integration.NAME
        if given.model == integration.NAME:
            given.model_args = {"pretrained": "demo", **(given.model_args or {})}
            recorded = given.model_args.get("record")
    harness.execute(given)
    return Answer({}, f"routing written to {recorded}" if recorded else "")


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """`sys.argv`, which lm-eval's parser reads and changes."""
    before, sys.argv = sys.argv, list(words)
    try:
        yield
    finally:
        sys.argv = before

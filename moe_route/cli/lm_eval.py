"""`moe-route lm-eval`: lm-eval's own command, in which the model `moe-route` and the tasks of moe-route are known."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from moe_route.cli.answer import Answer

_EXAMPLE = """\
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


def add(verbs: Any) -> None:
    # The words are lm-eval's: no character begins an option of this parser.
    parser = verbs.add_parser(
        "lm-eval",
        help="run lm-eval's tasks on a model that is steered and recorded",
        description="Run lm-eval's own command, in which the model moe-route and the tasks moe_route_problems are "
        "known. Without --model, the model is moe-route.",
        usage="moe-route lm-eval {run,ls,validate} ...",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prefix_chars="\0",
        add_help=False,
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="what lm-eval's command takes")
    parser.set_defaults(run=run, verb=parser, json=False, traceback=False)


def run(options: argparse.Namespace) -> Answer:
    words = [word for word in options.words if word != "--traceback"]
    options.traceback = len(words) < len(options.words)
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

"""The command line: `moe-route describe | record | analyze | plot | plan | steer | eval | ...`.

The commands are named after the functions in Python. Standard output carries the result (with `--json` exactly one JSON
document); progress and errors go to standard error. Exit codes: 0 success, 1 a check of `doctor` failed, a ratio of
`bench --compare` regressed, or the reader of the output has closed it, 2 the input cannot be used, 130 interrupted by
Ctrl-C.

Parsing imports neither torch nor numpy: each command imports its modules when it runs.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from moe_route.cli.options import Parser, meant

__all__ = ["main", "parser"]

# What one wants -> the commands for it, in the order of the help, with their modules. The module of a command adds it
# by its function `add_<command>`.
_COMMANDS: Mapping[str, Mapping[str, str]] = {
    "look": {"describe": "describe"},
    "record": {"record": "record", "convert": "convert"},
    "analyze": {"analyze": "analyze", "plot": "plot", "report": "report"},
    "steer": {"plan": "plan", "steer": "steer", "experiment": "experiment"},
    "change a model": {"prune": "models", "upcycle": "models", "merge": "models"},
    "evaluate": {"eval": "evaluate", "lm-eval": "evaluate"},
    "machine": {"doctor": "describe", "demo": "report", "bench": "bench", "completion": "completion"},
}
# Errors whose message names the problem and the fix. Any other error is a bug of moe-route and keeps its traceback.
USER_ERRORS = (ValueError, KeyError, OSError, ImportError)


class _Program(Parser):
    """The parser of the whole command line, whose help groups the commands by what one wants."""

    verbs: argparse._SubParsersAction[Parser]

    def format_help(self) -> str:
        verbs = {action.dest: action.help or "" for action in self.verbs._choices_actions}
        lines = ["usage: moe-route [--version] [--traceback] [--budget TIMES] COMMAND ...", "", self.description or ""]
        for purpose, names in _COMMANDS.items():
            lines += ["", f"{purpose}:"]
            for name in names:
                lines += textwrap.wrap(f"{name:<12}{verbs[name]}", 100, initial_indent="  ", subsequent_indent=" " * 14)
        return "\n".join([*lines, "", self.epilog or ""]) + "\n"


def parser() -> Parser:
    """The parser of the whole command line; the module of each command adds its own part."""
    from moe_route import __version__

    whole = _Program(
        prog="moe-route",
        description="Record, analyze and steer expert routing in Mixture-of-Experts language models.",
        epilog="Every command but lm-eval takes --json, and shows an example with --help. Without a model, the demo "
        "model is used.\nMOE_ROUTE_MODEL and MOE_ROUTE_TEXTS stand for --model and --data. --traceback shows where an "
        "error was raised.\n--budget 8 reads files that cost up to 8 times what is allowed.",
    )
    whole.add_argument("--version", action="version", version=f"moe-route {__version__}")
    whole.add_argument("--traceback", action="store_true", help="show where an error was raised")
    whole.add_argument(
        "--budget", type=float, default=1.0, metavar="TIMES", help="read files that cost so many times what is allowed"
    )
    whole.verbs = whole.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for names in _COMMANDS.values():
        for name, module in names.items():
            getattr(import_module(f"moe_route.cli.{module}"), f"add_{name.replace('-', '_')}")(whole.verbs)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with warnings.catch_warnings():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    from moe_route.base.budget import raised
    from moe_route.cli.answer import Answer, one_line
    from moe_route.cli.interrupt import INTERRUPTED

    _log_to_standard_error()
    for stream in (sys.stdout, sys.stderr):  # a result is not lost because a terminal lacks a letter
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    whole = parser()
    _refuse_unknown(whole, words)
    options = whole.parse_args(words)
    try:
        with raised(options.budget):
            for check in options.verb.checks:
                check(options)
            made: Answer = options.run(options)
            answer = made.kept(getattr(options, "out", None))
        if options.json or answer.text:
            print(answer.shown(json=options.json), flush=True)
    except BrokenPipeError:  # `moe-route ... | head`: the reader is gone, and the flush at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        if options.traceback:
            raise
        print(f"moe-route: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moe-route: interrupted", file=sys.stderr)
        return INTERRUPTED
    return int(answer.code)


def _refuse_unknown(whole: Parser, words: Sequence[str]) -> None:
    """Name the nearest command or option for one that is not there, before anything that is missing."""
    here = whole
    for index, word in enumerate(words):
        below = next((action for action in here._actions if isinstance(action, argparse._SubParsersAction)), None)
        if below is None:
            if not here.takes_any_word:
                here.refuse_unknown(words[index:])
            return
        if word.startswith("-"):
            here.refuse_unknown([word])
        elif word in below.choices:
            here = below.choices[word]
        else:
            known = list(below.choices)
            here.error(f"no command {word!r} among {', '.join(known)}{meant([word], known)}")


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from moe_route.base.table import printable

        return printable(super().format(record))


def _log_to_standard_error() -> None:
    """Print the library's warnings on standard error, one line each; those of other libraries are left alone."""
    from moe_route.cli.answer import one_line

    usual, here = warnings.showwarning, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def show(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
        ours = os.path.abspath(filename).startswith(here + os.sep) or category.__module__.startswith("moe_route.")
        if issubclass(category, RuntimeWarning) and ours:
            print(f"moe-route: {one_line(RuntimeWarning(message))}", file=sys.stderr)
        else:
            usual(message, category, filename, *where, **more)

    warnings.showwarning = show
    log = logging.getLogger("moe_route")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Line("moe-route: %(message)s"))
        log.addHandler(handler)

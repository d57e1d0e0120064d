"""The command line: `moe-route describe | record | vectors | convert | analyze | plot | plan | steer | eval | ...`.

The commands are named after the functions in Python. Standard output carries the result (with `--json` exactly one JSON
document); progress and errors go to standard error. Exit codes: 0 success, 1 a check of `doctor` failed, a ratio of
`bench --compare` regressed, or the reader of the output has closed it, 2 the input cannot be used, 130 interrupted by
Ctrl-C.

Parsing imports neither torch nor numpy: each command imports its modules when it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

__all__ = ["main", "parser"]

# Modules of the commands, in the order of the help.
_COMMANDS = (
    "describe record vectors convert analyze plot plan steer experiment prune upcycle merge eval lm_eval report demo "
    "doctor bench"
)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the module of each command adds its own part."""
    from moe_route import __version__
    from moe_route.cli import completion

    whole = argparse.ArgumentParser(
        prog="moe-route",
        description="Record, analyze and steer expert routing in Mixture-of-Experts language models.",
        epilog="Every command but lm-eval takes --json. Without --model, the demo model that moe-route brings along is "
        "used.\n"
        "`moe-route COMMAND --help` shows an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"moe-route {__version__}")
    verbs = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _COMMANDS.split():
        import_module(f"moe_route.cli.{name}").add(verbs)
    completion.add(verbs, whole)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _log_to_standard_error()
    options, unknown = parser().parse_known_args(argv)
    if unknown:
        refuse_unknown(options.verb, unknown)
    from moe_route.cli.answer import one_line
    from moe_route.cli.inputs import USER_ERRORS
    from moe_route.cli.interrupt import INTERRUPTED

    try:
        answer = options.run(options)
        if options.json or answer.text:
            print(answer.as_json() if options.json else answer.text, flush=True)
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


def refuse_unknown(verb: argparse.ArgumentParser, words: Sequence[str]) -> NoReturn:
    """End with the usage of the verb (argparse shows that of the program), and the options that may have been meant."""
    from moe_route.cli.completion import options_of

    written = (word.partition("=")[0] for word in words if word.startswith("--"))
    meant = [match for word in written for match in get_close_matches(word, options_of(verb), n=1)]
    hint = f" (did you mean {', '.join(meant)}?)" if meant else ""
    verb.error(f"unrecognized arguments: {' '.join(words)}{hint}")


def _log_to_standard_error() -> None:
    """Print the library's warnings on standard error, one line each; loggers of other libraries are left alone."""
    log = logging.getLogger("moe_route")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("moe-route: %(message)s"))
        log.addHandler(handler)

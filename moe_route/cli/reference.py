"""Write the page of the command line from its parser: `python -m moe_route.cli.reference > docs/cli.md`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from moe_route.cli import parser
from moe_route.cli.options import Parser

__all__ = ["page"]

_INTRODUCTION = """\
# Command line

`moe-route COMMAND --help` shows the options of a command, and an example.
Standard output carries the result, with `--json` exactly one JSON document; progress and errors go to standard error.
Exit codes: 0 success, 1 a check failed, 2 the input cannot be used, 130 interrupted by Ctrl-C.

`python -m moe_route.cli.reference` writes this page."""


def page() -> str:
    """The Markdown of docs/cli.md: every command with its example and its options."""
    whole = parser()
    parts = [_INTRODUCTION, f"```text\n{whole.format_help().rstrip()}\n```"]
    parts += [_section(leaf) for leaf in _leaves(whole)]
    return "\n\n".join(parts) + "\n"


def _leaves(parser: argparse.ArgumentParser) -> Iterator[Parser]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below and isinstance(parser, Parser):
        yield parser
    for action in below:
        for child in action.choices.values():
            yield from _leaves(child)


def _section(leaf: Parser) -> str:
    epilog = leaf.epilog or ""
    example, _, rest = epilog.removeprefix("example:\n").partition("\n\n")
    lines = [f"## {leaf.prog}", leaf.description or "", f"```bash\n{_dedented(example)}\n```"]
    if rest:
        lines.append(f"```text\n{rest}\n```")
    if options := [_line(leaf, action) for action in leaf._actions if action.help not in (None, argparse.SUPPRESS)]:
        lines.append("\n".join(["| option | meaning |", "|---|---|", *options]))
    return "\n\n".join(lines)


def _dedented(example: str) -> str:
    return "\n".join(line.removeprefix("  ") for line in example.splitlines())


def _line(leaf: Parser, action: argparse.Action) -> str:
    """A row of the table of a command: an option with its value, and its help."""
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
    value = value if isinstance(value, str) else " ".join(value)
    if not value and action.nargs != 0 and action.option_strings:
        value = action.dest.upper()
    name = ", ".join(action.option_strings)
    shown = f"{name} {value}".strip() if name else value
    meaning = leaf._get_formatter()._expand_help(action)
    return f"| `{shown.replace('|', chr(92) + '|')}` | {meaning.replace('|', chr(92) + '|').replace('<', '&lt;')} |"


if __name__ == "__main__":
    print(page(), end="")

"""Write the page of the command line from its parser: `python -m moe_route.cli.reference > docs/cli.md`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from moe_route.cli import parser
from moe_route.cli.options import Parser

_INTRODUCTION = """\
# Command line

`moe-route` has a command for each thing that Python can do.
Without a model it uses the demo model, and without `--data` the texts that moe-route brings.
`python -m moe_route.cli.reference > docs/cli.md` writes this page from the parser.

- MODEL and FILE come first, as in `moe-route describe Qwen/Qwen3-30B-A3B`; `--model` is the long form.
  `MOE_ROUTE_MODEL` and `MOE_ROUTE_TEXTS` stand for `--model` and `--data`, and a command says on standard error that it takes them.
- `--json`, on every command but `lm-eval`, prints one JSON document on standard output and nothing else there.
  Progress and errors go to standard error.
- `--out table.csv`, `.parquet` or `.json` keeps the result of every `analyze` and `experiment`.
- What took a model to make (recordings, models, results of `eval`) is written over only with `--force`.
  A folder that the same command made is resumed.
- A PLAN is a file, or `hub:OWNER/NAME/FILE[@REVISION]` on the Hugging Face hub.
- A word that is not known is named with the nearest one; an option that would be ignored is refused.
  `moe-route --traceback COMMAND` shows where an error was raised.
- Exit code 0: done.
  1: a check of `doctor` failed, a ratio of `bench --compare` regressed, `demo` could not restore the model, or the reader of the output closed it.
  2: the input cannot be used; one line says what is wrong and how to fix it.
  130: ended by Ctrl-C.

Ctrl-C during `record` ends it after the batch that is running, and what was recorded is written to `--out`.
A second Ctrl-C ends it at once and writes nothing.
Before its second batch, `record` checks that `--out` has room for all of its sequences.
If the disk is full when `record` writes its result, it says so, and keeps the result in memory for an hour.
It writes the file as soon as there is room; Ctrl-C drops it.
`eval`, and `record` into a folder, end after their batch, and the same command goes on from there.
`bench` has written the sections that were done.
Other commands write nothing after Ctrl-C."""  # noqa: E501 (Markdown: a sentence is a line)


_SHARED = ("model", "texts")
"""Titles of groups of options that several commands have; the page shows each once."""


def page() -> str:
    """The Markdown of docs/cli.md: every command with its example and its options."""
    whole = parser()
    leaves = list(_leaves(whole))
    parts = [_INTRODUCTION, f"```text\n{whole.format_help().rstrip()}\n```"]
    for title in _SHARED:
        shared = max((_of_group(leaf, title) for leaf in leaves), key=len)
        parts.append(f"## Options of a {title.removesuffix('s')}\n\n{_table(leaves[0], shared)}")
    return "\n\n".join(parts + [_section(leaf) for leaf in leaves]) + "\n"


def _of_group(leaf: Parser, title: str) -> list[argparse.Action]:
    return [action for group in leaf._action_groups if group.title == title for action in group._group_actions]


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
    shared = [title for title in _SHARED if _of_group(leaf, title)]
    left_out = ["help", "json", *(action.dest for title in shared for action in _of_group(leaf, title))]
    if own := [action for action in leaf._actions if action.help != argparse.SUPPRESS and action.dest not in left_out]:
        lines.append(_table(leaf, own))
    if shared:
        links = (f"[those of a {t}](#options-of-a-{t})" for t in (title.removesuffix("s") for title in shared))
        lines.append(f"And {' and '.join(links)}.")
    return "\n\n".join(lines)


def _table(leaf: Parser, actions: Sequence[argparse.Action]) -> str:
    return "\n".join(["| option | meaning |", "|---|---|", *(_line(leaf, action) for action in actions)])


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

"""Count the house: `python tests/house.py` prints each count beside its ceiling. `tests/test_house.py` holds them.

A ceiling is the most that a count may be. Lower it where you take something away, and raise it only with a reason.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moe_route"
# What each tree calls its modules: folder -> prefix of their dotted names.
TREES = {"moe_route": "moe_route", "bench": "bench", "tests": "", "examples": "examples"}


def python_files(tree: str = "moe_route") -> list[Path]:
    """The Python files of a folder of the repository, sorted."""
    return sorted(path for path in (ROOT / tree).rglob("*.py") if "__pycache__" not in path.parts)


def lines(path: Path) -> int:
    """Lines of a file, as `wc -l` counts them."""
    return path.read_text("utf-8").count("\n")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def module_name(path: Path, tree: str = "moe_route") -> str:
    """Dotted name of a file's module; a package is named for its `__init__`."""
    prefix = TREES[tree]
    parts = path.relative_to(ROOT / tree).with_suffix("").parts
    parts = parts[:-1] if parts and parts[-1] == "__init__" else parts
    return ".".join((prefix, *parts) if prefix else parts)


def imports_of(path: Path, names: frozenset[str]) -> set[str]:
    """The modules among ``names`` that a file imports anywhere: in functions and for type checkers, too."""
    return {known for dotted in _imported(parsed(path)) if (known := _longest(dotted, names))}


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _longest(dotted: str, names: frozenset[str]) -> str | None:
    """The longest module at the beginning of a dotted name, or None for other packages."""
    parts = dotted.split(".")
    while parts and ".".join(parts) not in names:
        parts.pop()
    return ".".join(parts) or None


def import_graph(tree: str) -> dict[str, set[str]]:
    """Module -> the modules of the same tree that it imports.

    A package imports its modules to show their names, and a module that imports a sibling runs the package first: the
    imports of a package's ``__init__`` from itself are left out.
    """
    files = {module_name(path, tree): path for path in python_files(tree)}
    names = frozenset(files)
    graph = {name: imports_of(path, names) - {name} for name, path in files.items()}
    for name, path in files.items():
        if path.name == "__init__.py":
            graph[name] = {other for other in graph[name] if not other.startswith(f"{name}.")}
    return graph


def circle(tree: str) -> str:
    """A circle of imports in a tree, typing imports included, as text; "" if there is none."""
    try:
        TopologicalSorter(import_graph(tree)).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return ""


def rooms() -> list[str]:
    """The names at the top of the package: its rooms and loose modules, without `__init__` and `__main__`."""
    return sorted(
        entry.stem
        for entry in PACKAGE.iterdir()
        if (entry / "__init__.py").is_file() or (entry.suffix == ".py" and not entry.stem.startswith("__"))
    )


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands that have no commands below them."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for child in dict.fromkeys(action.choices.values()):
            yield from leaves(child)


def commands() -> list[argparse.ArgumentParser]:
    from moe_route.cli import parser

    return list(leaves(parser()))


def options() -> int:
    """Options of all commands without `--help`; an option of two commands counts twice, a positional does not count."""
    return sum(
        bool(action.option_strings) and not isinstance(action, argparse._HelpAction)
        for leaf in commands()
        for action in leaf._actions
    )


def public_names() -> int:
    import moe_route

    return len(set(moe_route.__all__) - {"__version__"})


def words(word: str) -> int:
    """How often a whole word stands in the package's Python files."""
    return sum(len(re.findall(rf"\b{word}\b", path.read_text("utf-8"))) for path in python_files())


def doc_pages() -> int:
    """Markdown pages of the documentation."""
    return len(list((ROOT / "docs").glob("*.md")))


COUNTS: Mapping[str, tuple[Callable[[], int], int]] = {
    "Python files of the package": (lambda: len(python_files()), 282),
    "lines of them": (lambda: sum(map(lines, python_files())), 66_700),
    "lines of the longest": (lambda: max(map(lines, python_files())), 913),
    "files below 30 lines that are no face": (
        lambda: sum(lines(path) < 30 for path in python_files() if not path.name.startswith("__")),
        12,
    ),
    "rooms": (lambda: len(rooms()), 28),
    "modules of base": (lambda: len(python_files("moe_route/base")), 9),
    "circles of imports": (lambda: sum(bool(circle(tree)) for tree in TREES), 0),
    "names of moe_route": (public_names, 25),
    "commands": (lambda: len(commands()), 35),
    "options of commands": (options, 490),
    "the word found": (lambda: words("found"), 204),
    "pages of docs": (doc_pages, 20),
}
"""What is counted -> how, and its ceiling."""


def main() -> int:
    """Print every count beside its ceiling. Returns how many are above theirs."""
    above = 0
    for what, (count, ceiling) in COUNTS.items():
        number = count()
        above += number > ceiling
        print(f"{what:<40} {number:>7,} of at most {ceiling:,}{'  TOO MANY' if number > ceiling else ''}")
    return above


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    sys.exit(bool(main()))

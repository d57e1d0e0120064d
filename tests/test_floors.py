"""The floors of the package: an import goes down, never up, and never round in a circle.

`FLOORS` is the one list of them, from the top; docs/architecture.md shows the same. Names on one floor are siblings and
do not import each other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import moe_route

PACKAGE = Path(moe_route.__file__).parent
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo", "evaluation", "integrations", "report"),
    ("experiments",),
    ("runs",),
    ("bench", "description", "routed"),
    ("patching",),
    ("experts", "training"),
    ("convert", "nn", "plots", "routers"),
    ("analysis",),
    ("recording", "steering"),
    ("ops",),
    ("calls", "data", "merging", "reference"),
    ("contract",),
    ("base", "modules"),
    ("_C",),
)
HEIGHT = {name: len(FLOORS) - number for number, floor in enumerate(FLOORS) for name in floor}


def modules() -> Iterator[Path]:
    yield from (path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    """Dotted name below the package, such as "routers.family"; a package is named for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in modules()} | {"_C"}


def imported(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """Modules of this package that a file imports anywhere, also inside functions; with or without those that only a
    type checker reads."""
    tree = ast.parse(path.read_text("utf-8"))
    if not for_types:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and _is_for_types(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (_known(alias.name) for alias in node.names if alias.name.startswith("moe_route."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moe_route":
            assert node.level == 0
            for alias in node.names:
                if (node.module, alias.name) != ("moe_route", "__version__"):
                    yield _known(f"{node.module}.{alias.name}")


def _is_for_types(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _known(dotted: str) -> str:
    """The longest module at the beginning of a dotted name."""
    parts = dotted.split(".")[1:]
    while ".".join(parts) not in NAMES:
        parts.pop()
        assert parts, f"no module of this package begins {dotted}"
    return ".".join(parts)


def test_every_module_stands_on_a_floor() -> None:
    assert {name.split(".")[0] for name in NAMES} == HEIGHT.keys()


def test_imports_go_down() -> None:
    up = [
        f"{name_of(path)} imports {other}"
        for path in modules()
        for other in imported(path)
        if (here := name_of(path).split(".")[0]) != (there := other.split(".")[0]) and HEIGHT[here] <= HEIGHT[there]
    ]
    assert not up, "\n".join(up)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name_of(path): set(imported(path, for_types=False)) - {name_of(path)} for path in modules()}
    for package in {name for name in graph if any(other.startswith(f"{name}.") for other in graph)}:
        # a package imports its modules to show their names; a module that imports a sibling runs the package first
        graph[package] = {other for other in graph[package] if not other.startswith(f"{package}.")}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle

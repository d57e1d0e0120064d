"""The floors of the package: an import goes down, never up. `tests/house.py` refuses circles.

`FLOORS` is the one list of them, from the top; docs/architecture.md shows the same. Names on one floor are siblings and
do not import each other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import moe_route

PACKAGE = Path(moe_route.__file__).parent
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo", "evaluation", "integrations"),
    ("experiments", "report"),
    ("runs",),
    ("bench", "description", "routed"),
    ("patching",),
    ("experts", "training"),
    ("convert", "nn", "plots", "routers"),
    ("analysis", "ops"),
    ("recording", "steering"),
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


def imported(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports anywhere: inside functions and for type checkers, too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (_known(alias.name) for alias in node.names if alias.name.startswith("moe_route."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moe_route":
            assert node.level == 0
            for alias in node.names:
                if (node.module, alias.name) != ("moe_route", "__version__"):
                    yield _known(f"{node.module}.{alias.name}")


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


def test_one_module_imports_the_compiled_library() -> None:
    """By name, or by the attribute of the package."""
    by_name = {name_of(path) for path in modules() if '"moe_route._C"' in path.read_text("utf-8")}
    assert by_name | {name_of(path) for path in modules() if "_C" in imported(path)} == {"ops.library"}


def test_only_the_command_line_uses_the_front_door() -> None:
    """`import moe_route as mr` loads a name on its first use: any module below could reach any floor by it."""
    through = {
        name_of(path).split(".")[0]
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Import) and any(alias.name == "moe_route" for alias in node.names)
    }
    assert through == {"bench", "cli"}  # bench asks for the version

"""Rooms that record, read, plan and draw do without the compiled library: they import, and so do their tests.

    python tests/test_without_library.py [OPTIONS OF PYTEST]

runs the tests of these rooms with `moe_route._C` hidden, less those that are marked ``native``, and counts both.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness.hidden_library import VARIABLE

TESTS = Path(__file__).parent
ROOMS = ("base", "modules", "contract", "calls", "data", "merging", "reference", "recording", "steering", "analysis")
ROOMS += ("plots", "convert")
# Their tests, beside the folders of their names; the reference has those of the operators.
OTHERS = (
    *(
        f"ops/test_{name}.py"
        for name in ("dispatch", "route", "route_families", "route_hard_cases", "route_properties")
    ),
    *(f"test_{name}.py" for name in ("files", "hub", "languages", "texttable")),
    *(f"test_{name}.py" for name in ("expert_plots", "paper_plots", "plots", "structure_plots", "recipes")),
)
# Test functions of these rooms that need the compiled library: most of them record a live model. May only fall.
MOST_NATIVE = 184


def places() -> list[Path]:
    """Folders and files with the tests of these rooms."""
    return [*(TESTS / room for room in ROOMS if (TESTS / room).is_dir()), *(TESTS / name for name in OTHERS)]


def functions() -> Iterator[tuple[str, bool]]:
    """Each test function of these rooms, and whether it needs the compiled library."""
    for place in places():
        for path in sorted(place.rglob("test_*.py")) if place.is_dir() else [place]:
            tree = ast.parse(path.read_text("utf-8"))
            whole = any(isinstance(node, ast.Assign) and _marks(node) for node in tree.body)
            yield from ((f"{path.relative_to(TESTS)}::{name}", native) for name, native in _tests(tree, whole))


def _tests(node: ast.Module | ast.ClassDef, native: bool) -> Iterator[tuple[str, bool]]:
    for inner in node.body:
        if isinstance(inner, ast.ClassDef):
            marked = native or any(map(_is_native, inner.decorator_list))
            yield from ((f"{inner.name}::{name}", needs) for name, needs in _tests(inner, marked))
        elif isinstance(inner, ast.FunctionDef) and inner.name.startswith("test_"):
            fixture = any(argument.arg == "native" for argument in inner.args.args)
            yield inner.name, native or fixture or any(map(_is_native, inner.decorator_list))


def _marks(node: ast.Assign) -> bool:
    return ast.unparse(node.targets[0]) == "pytestmark" and any(map(_is_native, ast.walk(node.value)))


def _is_native(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.native"


_PROGRAM = f"""
import importlib, pkgutil
from harness.hidden_library import hide

hide()
import moe_route

for room in {ROOMS}:
    package = importlib.import_module(f"moe_route.{{room}}")
    for module in pkgutil.walk_packages(package.__path__, f"{{package.__name__}}."):
        importlib.import_module(module.name)
plan = moe_route.Plan.activate({{0: [1]}}) + moe_route.Plan.force_on({{1: [2]}}).only(absent=True)
plan.compile([moe_route.steering.LayerShape(4, 2)] * 2)
"""


def test_every_module_of_these_rooms_imports_without_the_library() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    ran = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr


def test_few_tests_of_these_rooms_need_the_library() -> None:
    assert not [place for place in places() if not place.exists()]
    native = [name for name, needs in functions() if needs]
    assert len(native) <= MOST_NATIVE, f"{len(native)} tests are native"


if __name__ == "__main__":
    every = dict(functions())
    print(f"{sum(every.values())} of {len(every)} tests need the compiled library, {MOST_NATIVE} may")  # noqa: T201
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "not native and not exhaustive",
        *map(str, places()),
        *sys.argv[1:],
    ]
    sys.exit(subprocess.run(command, env=os.environ | {VARIABLE: "1"}).returncode)

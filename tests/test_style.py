"""Rules of the house that a reader of the source can check."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import moe_route

PACKAGE = Path(moe_route.__file__).parent
OF_OTHER_LIBRARIES = {"_version", "_modules", "_parameters", "_buffers", "_repr_html_"}


def own_fields(each: ast.ClassDef) -> Iterator[str]:
    """Names that a class defines: its methods and class attributes, and what it assigns to ``self``."""
    for node in ast.walk(each):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def libraries(tree: ast.Module) -> set[str]:
    """Names that a file gives to whole modules: `torch._check_value` is no field of an object."""
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }


def test_a_private_field_is_used_in_its_class_only() -> None:
    """Nothing reaches for ``other._field`` where a class of ours, and not the class around it, defines the field."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    owners = defaultdict(set)
    inside = defaultdict(set)
    for each in classes:
        for field in own_fields(each):
            owners[field].add(each)
        for node in ast.walk(each):
            inside[node].add(each)
    modules = {path: libraries(tree) for path, tree in trees.items()}
    reached = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in OF_OTHER_LIBRARIES
        and not is_self(node.value)
        and not (isinstance(node.value, ast.Name) and node.value.id in modules[path])
        and not (isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super")
        and node.attr in owners
        and not owners[node.attr] & inside[node]
    ]
    assert not reached, "\n".join(reached)

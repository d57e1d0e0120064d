"""Every file and every name of this package that a comment, a docstring or a page points to is there.

A path is written from the root of the repository, from `moe_route`, `csrc`, `tests`, `bench`, `examples` or `docs`, or
from the folder of the file that names it. A lone file name has to be that of some file of the repository.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
BASES = ("", "moe_route", "csrc", "csrc/include", "csrc/include/moe_route", "tests", "bench", "examples", "docs")
# A path that ends in a suffix of sources or pages, and is no part of an address, a pattern or a longer name.
POINTER = re.compile(r"(?<![\w/.:<>*{}$~-])(?:[\w-]+/)*[\w-]+\.(?:py|md|csv|h|cuh|cu|cpp)(?![\w(/*])")
DOTTED = re.compile(r"(?<![\w/.-])moe_route(?:\.\w+)+")
READ = {".py", ".md", ".cpp", ".h", ".cu", ".cuh", ".toml", ".yml", ".sh", ".cmake"}
# Files that users or commands write, and files and programs of others.
ELSEWHERE = {
    "api/index.md",
    "flores200/README.md",
    "llama.cpp",
    "report/report.md",
    "sglang/srt/eplb/expert_distribution.py",
    "table.csv",
    "tables.md",
}


@cache
def tracked() -> frozenset[str]:
    """The files of the repository, as they would be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("the files of the repository are known in a checkout only")
    return frozenset(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


@cache
def file_names() -> frozenset[str]:
    return frozenset(PurePosixPath(name).name for name in tracked())


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what a file says to its readers: comments and docstrings of sources, and all of a page."""
    if path.suffix not in READ and path.name not in {"Makefile", "CMakeLists.txt", "run"}:
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (said := ast.get_docstring(node)):
                yield getattr(node, "lineno", 1), said
    elif path.suffix == ".md":
        yield 1, text
    elif path.suffix in {".cpp", ".h", ".cu", ".cuh"}:
        for match in re.finditer(r"//[^\n]*|/\*.*?\*/", text, re.S):
            yield text.count("\n", 0, match.start()) + 1, match[0]
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if "#" in line:
                yield number, line[line.index("#") :]


def leads_somewhere(pointer: str, source: str) -> bool:
    """Whether a path or file name in ``source`` is that of a file of the repository."""
    if "/" not in pointer and pointer in file_names():
        return True
    if "NAME" in pointer:  # to be filled in by the reader
        return True
    folders = [*BASES, *map(str, PurePosixPath(source).parents)]
    return any(str(PurePosixPath(folder, pointer)) in tracked() for folder in folders)


@cache
def names_in(module: Path) -> frozenset[str]:
    """The identifiers of a module, and the strings that are one, as in `__all__`; no word of its comments."""
    text = module.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = (tokenize.NAME, tokenize.STRING)
    return frozenset(token.string.strip("\"'") for token in tokens if token.type in kinds)


def is_defined(dotted: str) -> bool:
    """Whether the modules of a dotted name are there, and the next part stands in the last of them."""
    place = ROOT
    parts = dotted.split(".")
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place = place / part
            continue
        module = place / f"{part}.py"
        if module.is_file():
            rest = parts[number + 1 : number + 2]
            return not rest or rest[0] in names_in(module)
        face = place / "__init__.py"
        return (face.is_file() and part in names_in(face)) or (place / f"{part}.pyi").is_file()
    return True


def stale(source: str) -> Iterator[str]:
    """ "file:line: pointer" of everything that a file points to and that is not there."""
    for line, text in prose(ROOT / source):
        pointers = [match for match in POINTER.finditer(text) if not leads_somewhere(match[0], source)]
        pointers += [match for match in DOTTED.finditer(text) if not is_defined(match[0])]
        for match in pointers:
            if match[0] not in ELSEWHERE:
                yield f"{source}:{line + text.count(chr(10), 0, match.start())}: {match[0]}"


def test_what_comments_docstrings_and_pages_point_to_is_there():
    sources = (name for name in sorted(tracked()) if not name.startswith(("CHANGELOG", "bench/results/")))
    assert [pointer for source in sources for pointer in stale(source)] == []


def test_a_pointer_to_nothing_is_noticed():
    assert leads_somewhere("contract/tables.py", "docs/architecture.md")
    assert leads_somewhere("gate.h", "csrc/cpu/gate.cpp")
    assert not leads_somewhere("ops/nothing_like_it.py", "csrc/torch/operators.cpp")
    assert not leads_somewhere("nothing_like_it.py", "csrc/torch/operators.cpp")
    assert is_defined("moe_route.contract.tables.METRICS")
    assert not is_defined("moe_route.contract.nothing")
    assert not is_defined("moe_route.nothing.at_all")

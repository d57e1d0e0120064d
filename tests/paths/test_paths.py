"""Every path on every architecture, against what docs/support.csv says of it.

Cheap paths run on all architectures, those that are much alike everywhere on one a family. Costly ones run on one model
here, on one a family with the slow tests, and on all with MOE_ROUTE_MATRIX=1. Paths whose packages are not installed
are skipped by name.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache

import pytest

pytest.importorskip("transformers")

from harness.whole_models import ROWS
from support_table import TABLE, Cells, read_table

from paths.registry import FAMILIES, QUICK, Path, all_paths
from paths.subject import Subject

MATRIX = os.environ.get("MOE_ROUTE_MATRIX") == "1"


@lru_cache(maxsize=2)  # tests go architecture by architecture
def subject_of(name: str) -> Subject:
    return Subject(name)


@cache
def committed() -> Cells:
    return read_table(TABLE.read_text())


def _cases() -> list[object]:
    cases = []
    for name in ROWS:
        for each in all_paths().values():
            if each.cost != "cheap" and name not in FAMILIES and not MATRIX:
                continue
            slow = each.cost == "costly" and name not in QUICK
            together = "ranks" if each.section == "Ranks" else name  # ranks are walked for many at once
            marks = [pytest.mark.xdist_group(together), *([pytest.mark.slow] if slow else [])]
            if each.missing:
                marks.append(pytest.mark.skip(reason=f"{', '.join(each.missing)} is not installed"))
            cases.append(pytest.param(name, each, id=f"{name}-{each.name.replace(' ', '_')}", marks=marks))
    return cases


@pytest.mark.parametrize(("name", "path"), _cases())
def test_path(name: str, path: Path) -> None:
    found = path.outcome(subject_of(name))
    assert found == committed()[name, path.name], "if so, write it: python tests/support_table.py"


def test_every_cell_is_filled_and_nothing_is_refused_that_need_not_be() -> None:
    cells = committed()
    assert cells.keys() == {(name, path) for name in ROWS for path in all_paths()}
    refused = {path for (_, path), outcome in cells.items() if outcome.kind == "refused"}
    assert refused == {"pickle", "second thread", "attached twice"}

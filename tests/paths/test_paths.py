"""Every path on every architecture, against what docs/support.csv says of it.

Cheap paths run on all architectures, those that are alike everywhere and those that are costly on one a mechanism, and
with MOE_ROUTE_MATRIX=1 all run on all. Paths whose packages are not installed are skipped by name.

In `make test` cheap and alike paths run on one architecture a mechanism, and costly ones on one.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache

import pytest

pytest.importorskip("transformers")

from harness.tiny_models import MECHANISMS
from harness.whole_models import ROWS
from support_table import TABLE, Cells, read_table

from paths.registry import Path, all_paths
from paths.subject import Subject

MATRIX = os.environ.get("MOE_ROUTE_MATRIX") == "1"
QUICK = MECHANISMS[0]  # what costly paths run on in `make test`


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
            if each.cost != "cheap" and name not in MECHANISMS and not MATRIX:
                continue
            ranks = each.section == "Ranks"
            marks = [pytest.mark.xdist_group("ranks" if ranks else name)]  # ranks are walked for many at once
            if ranks or (each.cost == "costly" and name != QUICK):
                marks.append(pytest.mark.exhaustive)
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

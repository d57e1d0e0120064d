"""Parameters of which few are enough for `make test`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def exhaustive_but(quick: Iterable[object], values: Iterable[object]) -> list[Any]:
    """`values` for `pytest.mark.parametrize`; those that are not in `quick` run in `make test-all` alone."""
    known = list(quick)
    return [each if each in known else pytest.param(each, marks=pytest.mark.exhaustive) for each in values]

"""The house does not grow: each count of `tests/house.py` is at most its ceiling."""

from __future__ import annotations

import pytest
from house import COUNTS


@pytest.mark.parametrize("what", COUNTS)
def test_a_count_is_at_most_its_ceiling(what: str) -> None:
    count, ceiling = COUNTS[what]
    assert count() <= ceiling

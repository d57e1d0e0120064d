"""Limits that are written down for rooms without the compiled library."""

from __future__ import annotations

import pytest

from moe_route.contract import limits
from moe_route.ops import library


@pytest.mark.native
def test_limits_are_those_of_the_library() -> None:
    compiled = library.required()
    assert limits.MAX_EXPERTS == compiled.MAX_EXPERTS
    assert limits.MAX_CHOSEN == compiled.MAX_CHOSEN
    assert limits.MAX_ROWS == compiled.MAX_ROWS

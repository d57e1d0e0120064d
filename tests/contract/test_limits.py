"""Limits that are written down for rooms without the compiled library."""

from __future__ import annotations

import moe_route as mr
from moe_route.contract import limits


def test_limits_are_those_of_the_library() -> None:
    assert limits.MAX_EXPERTS == mr._C.MAX_EXPERTS
    assert limits.MAX_CHOSEN == mr._C.MAX_CHOSEN

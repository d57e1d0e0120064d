"""Limits that are written down for rooms without the compiled library."""

from __future__ import annotations

from moe_route import _C
from moe_route.contract import limits


def test_limits_are_those_of_the_library() -> None:
    assert limits.MAX_EXPERTS == _C.MAX_EXPERTS
    assert limits.MAX_CHOSEN == _C.MAX_CHOSEN

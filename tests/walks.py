"""Walks: through which modules and rooms of the package a call goes, as a reader of the code would follow it.

A stop is a module of the package that runs a function of its own; consecutive stops in one module are one. A room is
the first part of a module's name. What runs at import is no stop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

PACKAGE = "moe_route."


def walk(call: Callable[[], Any]) -> list[str]:
    """Run ``call``, and return the modules of the package that it enters, in order, such as "routers.discovery".

    A module that is entered again from another one stands again.
    """
    stops: list[str] = []

    def enter(frame: FrameType, event: str, argument: object) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith(PACKAGE) and frame.f_code.co_name != "<module>":
            stop = name.removeprefix(PACKAGE)
            if not stops or stops[-1] != stop:
                stops.append(stop)

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(before)
    return stops


def rooms(stops: list[str]) -> list[str]:
    """The rooms of these stops, each once, in the order of the first visit."""
    return list(dict.fromkeys(stop.split(".")[0] for stop in stops))

"""The compiled library hidden from Python, as on a machine that has no compiler."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import Any

VARIABLE = "MOE_ROUTE_HIDE_C"
HIDDEN = os.environ.get(VARIABLE) == "1"


class _Hides(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "moe_route._C":
            raise ModuleNotFoundError(f"moe_route._C is hidden, since {VARIABLE} is 1", name=fullname)


def hide() -> None:
    """Let no module import `moe_route._C` from here on. RuntimeError if one has it already."""
    if "moe_route._C" in sys.modules:
        raise RuntimeError("moe_route._C is loaded already: hide it before the first import")
    sys.meta_path.insert(0, _Hides())


class Later:
    """A module of this package that is imported when something of it is first asked for.

    Files with some tests that need the compiled library name what needs it in this way.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)

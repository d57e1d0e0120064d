"""The compiled library hidden from Python, as on a machine that has no compiler, or another one in its place."""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from typing import Any

VARIABLE = "MOE_ROUTE_HIDE_C"
HIDDEN = os.environ.get(VARIABLE) == "1"
OTHER = os.environ.get(
    "MOE_ROUTE_TEST_LIBRARY", ""
)  # the file of a library that is tested in place of the package's own


class _Hides(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "moe_route._C":
            raise ModuleNotFoundError(f"moe_route._C is hidden, since {VARIABLE} is 1", name=fullname)


def hide() -> None:
    """Let no module import `moe_route._C` from here on. RuntimeError if one has it already."""
    if "moe_route._C" in sys.modules:
        raise RuntimeError("moe_route._C is loaded already: hide it before the first import")
    sys.meta_path.insert(0, _Hides())


class _Replaces(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return spec_from_file_location(fullname, OTHER) if fullname == "moe_route._C" else None


def replace() -> None:
    """Let `moe_route._C` be the library at `OTHER`."""
    sys.meta_path.insert(0, _Replaces())


KERNEL_TESTS = (
    "bench",
    "experts/test_packing.py",
    "experts/test_paths.py",
    "ops/test_cuda.py",
    "ops/test_emulated.py",
    "ops/test_experts.py",
    "ops/test_packed_experts.py",
)
"""Files that test nothing but kernels, or measure them."""

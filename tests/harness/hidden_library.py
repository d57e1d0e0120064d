"""The compiled library hidden from Python, as on a machine that has no compiler."""

from __future__ import annotations

import os
import sys
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

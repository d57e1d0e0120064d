"""The house does not grow: each count of `tests/house.py` is at most its ceiling."""

from __future__ import annotations

import subprocess
import sys

import pytest
from house import COUNTS


@pytest.mark.parametrize("what", COUNTS)
def test_a_count_is_at_most_its_ceiling(what: str) -> None:
    count, ceiling = COUNTS[what]
    assert count() <= ceiling


EVERY_NAME_AFTER_EVERY_MODULE = """
import importlib, pkgutil, types
import torch  # finds the libraries that _C is linked with
import moe_route as mr
optional = ("moe_route._C", "moe_route.integrations.vllm.", "moe_route.integrations.lm_eval.", "moe_route.__main__")
for module in pkgutil.walk_packages(mr.__path__, "moe_route."):
    if not module.name.startswith(optional):
        importlib.import_module(module.name)
modules = {name for name in mr.__all__ if isinstance(getattr(mr, name), types.ModuleType)}
assert dir(mr) == sorted(mr.__all__), dir(mr)
print(*sorted(modules))
"""


@pytest.mark.exhaustive
def test_no_module_hides_a_name_of_the_front_door() -> None:
    """Importing a module puts it under its name into the package, where a function of that name would be lost."""
    printed = subprocess.run([sys.executable, "-c", EVERY_NAME_AFTER_EVERY_MODULE], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.split() == [
        "analysis", "convert", "data", "evaluation", "experiments", "merging", "nn", "ops", "plots", "report",
        "training", "vllm",
    ]  # fmt: skip

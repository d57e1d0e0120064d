"""What all tests share: the hypothesis profiles and the `backend` fixture."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("default", max_examples=80, derandomize=True, print_blob=True, **_COMMON)
# Looks for new cases: pytest --hypothesis-profile=search
settings.register_profile("search", max_examples=2000, derandomize=False, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` and `native` run a test on every backend, or on every native one; what cannot run here is skipped."""
    for fixture in ("backend", "native"):
        if fixture in metafunc.fixturenames:
            from backends import BACKENDS, NATIVE

            chosen = BACKENDS if fixture == "backend" else NATIVE
            parameters = [
                pytest.param(each, id=each.name, marks=[pytest.mark.skip(reason=each.missing)] if each.missing else [])
                for each in chosen
            ]
            metafunc.parametrize(fixture, parameters)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same seed and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)

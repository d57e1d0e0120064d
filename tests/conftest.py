"""What all tests share: hypothesis profiles, fixtures that run a test on several backends, the summary of skips."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from harness.hidden_library import HIDDEN, hide
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from harness.backends import Backend

if HIDDEN:
    hide()

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("default", max_examples=80, derandomize=True, print_blob=True, **_COMMON)
# Looks for new cases: pytest --hypothesis-profile=search
settings.register_profile("search", max_examples=2000, derandomize=False, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

_FIXTURES: dict[str, Callable[[Backend], bool]] = {
    "backend": lambda backend: True,
    "native": lambda backend: backend.native,
    "wide": lambda backend: backend.float64,
}


def pytest_configure() -> None:
    """Several test processes share the cores: each takes its part for torch and for the programs that tests start."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


# Files of more than half a minute, the longest first. Where files are spread over several processes, they go first:
# a process that got one of them last would go on alone.
_LONG = ("test_docs.py", "paths/test_paths.py", "examples/test_notebooks.py", "examples/test_study.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first (`make test` asks xdist to keep this order); otherwise the order stays."""
    here = Path(__file__).parent
    place = {here / name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fixtures that run a test on several backends; what cannot run here is skipped with the reason.

    `backend`: on all of them. `native`: on those that promise the same bits. `wide`: on those that take float64 logits.
    """
    for fixture, belongs in _FIXTURES.items():
        if fixture in metafunc.fixturenames:
            from harness.backends import BACKENDS

            parameters = [pytest.param(each, id=each.name, marks=_marks(each)) for each in BACKENDS if belongs(each)]
            hidden = pytest.param(None, id="hidden", marks=[pytest.mark.native])
            metafunc.parametrize(fixture, parameters or [hidden])


def _marks(backend: Backend) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.native] if backend.native else []
    marks += [pytest.mark.cuda] if backend.name == "cuda" else []
    return [*marks, pytest.mark.skip(reason=backend.missing)] if backend.missing else marks


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped: a line per reason, however many tests have it."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("skipped")
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"{number:5} {reason}")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same seed and leaves the number of threads and the gradient mode as they were."""
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if torch.is_grad_enabled() != gradients:
        torch.set_grad_enabled(gradients)
        pytest.fail(f"the test left gradients switched {'off' if gradients else 'on'}")

"""What all tests share: hypothesis profiles, fixtures that run a test on several backends, the summary of skips."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness.browser import browser as browser  # a fixture
from harness.hidden_library import HIDDEN, KERNEL_TESTS, OTHER, hide, replace
from harness.tiny_models import MECHANISMS
from harness.whole_models import ROWS
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from harness.backends import Backend

if HIDDEN:
    hide()
    collect_ignore = list(KERNEL_TESTS)
elif OTHER:
    replace()

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
    # readline, which pytest imports, tells the processes that it starts of a terminal that is not there.
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)


# ---- which tests run where: `make test` takes those without the mark `exhaustive`, `make test-all` those with it

_TARGETS = {"not exhaustive": ("make test", "make test-all"), "exhaustive": ("make test-all", "make test")}
"""What the Makefile gives to -m -> the target, and the one that runs the others."""
_LONG = ("test_packaging.py", "test_docs.py", "test_devices.py", "paths/test_paths.py", "examples/test_notebooks.py")
"""Files of half a minute that go first: a process that got one of them last would go on alone."""
_LEFT = pytest.StashKey[int]()
"""How many tests -m left out."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what multiplies out, and put long files first (the Makefile asks xdist to keep this order)."""
    for item in _of_more_architectures_than_mechanisms(items):
        item.add_marker(pytest.mark.exhaustive)
    here = Path(__file__).parent
    place = {here / name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def _of_more_architectures_than_mechanisms(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Cases that another architecture of the same mechanism stands for, of tests that run on (nearly) all of them."""
    tested: defaultdict[tuple[Path, str], set[str]] = defaultdict(set)
    cases = [(item, name) for item in items if (name := _architecture(item)) is not None]
    for item, name in cases:
        tested[item.path, item.name.partition("[")[0]].add(name)
    for item, name in cases:
        if name not in MECHANISMS and len(tested[item.path, item.name.partition("[")[0]]) > len(MECHANISMS):
            yield item


def _architecture(item: pytest.Item) -> str | None:
    """The architecture among the parameters of a test, or in one of them that is a tuple."""
    values = getattr(item, "callspec", None) and item.callspec.params.values()
    for value in values or ():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str) and each in ROWS:
                return each
    return None


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """With `--dist loadgroup`, groups of tests are kept in one process, and what is in none stays with its file."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class ByFile(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return super()._split_scope(nodeid).partition("::")[0]

    return ByFile(config, log)


def pytest_deselected(items: list[pytest.Item]) -> None:
    config = items[0].config
    config.stash[_LEFT] = config.stash.get(_LEFT, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = session.config.stash.get(_LEFT, 0)


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_testnodedown(node: Any) -> None:
    if hasattr(node, "workeroutput"):  # of a process that did not crash; all collect the same
        node.config.stash[_LEFT] = node.workeroutput["left"]


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Why tests were skipped, a line per reason, however many tests have it; how many ran, and where the others are."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("skipped")
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"{number:5} {reason}")
    if config.getoption("markexpr") in _TARGETS:
        ran = sum(len(terminalreporter.getreports(kind)) for kind in ("passed", "failed", "xfailed", "xpassed"))
        target, other = _TARGETS[config.getoption("markexpr")]
        terminalreporter.section(f"{ran:,} tests of {target} ran, {config.stash.get(_LEFT, 0):,} are left to {other}")


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

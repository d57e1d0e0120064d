"""A pytest plugin for other people's test suites (`make test-transformers`): what they evaluate is recorded.

With `--attached on`, every model that a test puts into evaluation mode is attached to, if it has routers, and recorded
until the test ends. `--outcomes FILE` writes how each test and subtest ended, one a line, so that the files of two runs
can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import moe_route as mr
from moe_route.patching.attachment import attachment_of
from moe_route.routers.discovery import ModelNotSupportedError

_COUNTED = ("models recorded", "choices counted", "models without routers")
_counts: Counter[str] = Counter()  # of one test
_sums: Counter[str] = Counter()
_outcomes: list[str] = []
_recordings = ExitStack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attached", choices=("on", "off"), default="on")
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("attached") == "on":
        PreTrainedModel.eval = _evaluated


def _evaluated(model: PreTrainedModel) -> PreTrainedModel:
    model.train(False)  # what `eval` does
    if attachment_of(model) is None:
        try:
            routed = _recordings.enter_context(mr.attach(model))
        except ModelNotSupportedError:
            _counts["models without routers"] += 1
        else:
            recorder = _recordings.enter_context(routed.record())
            _recordings.callback(lambda: _counts.update({"choices counted": _choices(recorder)}))
            _counts["models recorded"] += 1
    return model


def _choices(recorder: mr.Recorder) -> int:
    """Choices of the model's calls, which must obey the laws of counting. Many a model is loaded and never called."""
    return int(recorder.statistics().token_sum("counts").sum()) if recorder._counting.calls else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What the end of a recording raises fails the test."""
    _counts.clear()
    try:
        return (yield)
    finally:
        _recordings.close()
        item.user_properties += _counts.items()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    context = getattr(report, "context", None)  # of a subtest
    if report.when == "call" or not report.passed:
        _outcomes.append(f"{report.nodeid} {context or ''} {report.when} {report.outcome}\n")
    if report.when == "call" and context is None:
        for what, number in report.user_properties:
            _sums[what] += number if what in _COUNTED else 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How much was recorded: without it, equal outcomes would prove nothing."""
    config.getoption("outcomes").write_text("".join(sorted(_outcomes)), encoding="utf-8")
    terminalreporter.write_line(", ".join(f"{_sums[what]} {what}" for what in _COUNTED))

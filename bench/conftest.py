"""Options of `pytest bench`: those with which `moe-route bench` takes one shape."""

from __future__ import annotations

import pytest
import torch

from moe_route.cli.bench import shape_arguments


def pytest_addoption(parser: pytest.Parser) -> None:
    shape_arguments(parser.getgroup("one shape", "one shape in the place of those of public models").addoption)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

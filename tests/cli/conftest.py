"""Fixtures of command tests: run a command, parse its answer, files made by commands."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.commands import SMALL

from moe_route.cli import main


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def moe_route(capsys: pytest.CaptureFixture[str]):
    """Run one command in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse leaves by itself
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def answer(moe_route):
    """Run one command with --json and parse what it printed."""

    def run(*arguments: object) -> dict[str, Any]:
        code, out, err = moe_route(*arguments, "--json")
        assert code == 0, err
        parsed: dict[str, Any] = json.loads(out)
        return parsed

    return run


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Statistics of general and of task texts, and a plan made from them, through the command line."""
    folder = tmp_path_factory.mktemp("files")
    made = {name: folder / f"{name}.safetensors" for name in ("general", "task", "plan")}
    assert main(["record", "--out", str(made["general"]), *SMALL]) == 0
    assert main(["record", "--data", "arithmetic", "--out", str(made["task"]), *SMALL]) == 0
    experts = [str(made["task"]), "--baseline", str(made["general"]), "--group", "eng_Latn"]
    assert (
        main(["analyze", "experts", *experts, "--threshold", "0.05", "--layers", "2-5", "--plan", str(made["plan"])])
        == 0
    )
    return made

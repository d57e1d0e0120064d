"""`moe-route eval`: lists and shows studies, says what is missing, runs and resumes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from harness.commands import refused

from moe_route.cli.interrupt import deferred_interrupt

TINY = (
    "corpora.general.limit=3",
    'corpora.general.languages=["eng_Latn", "deu_Latn"]',
    "corpora.task.limit=6",
    "find.tau=0.0",
    "tasks.sums.limit=2",
    'tasks.sums.languages=["eng_Latn", "deu_Latn"]',
    "tasks.written.limit=1",
    'tasks.written.languages=["eng_Latn"]',
    "tasks.written.max_new_tokens=3",
    "controls.random=1",
    "controls.random_per_token=0",
    'controls.run=["off"]',
    "sweep.strength=[]",
    "sweep.layers=[]",
)
CHANGES = [word for change in TINY for word in ("--set", change)]


def test_list_and_show(moe_route, answer):
    code, out, _ = moe_route("eval", "--list")
    assert code == 0
    assert "qwen3-30b-a3b-mgsm" in out
    assert "demo" in {entry["name"] for entry in answer("eval", "--list")["studies"]}
    code, out, _ = moe_route("eval", "demo", "--show")
    assert code == 0
    assert "[corpora.general]" in out


def test_errors_say_what_to_do(moe_route, tmp_path: Path):
    refused(moe_route("eval", "--out", tmp_path / "r"), "name a study", "--list")
    refused(moe_route("eval", "demo"), "--out FOLDER")
    refused(moe_route("eval", "demos", "--out", tmp_path / "r"), "no study 'demos'", "demo")
    refused(moe_route("eval", "demo", "--out", tmp_path / "r", "--set", "steer.kind=x"), "steer.kind", '"soft"')
    refused(moe_route("eval", "qwen3-30b-a3b-mgsm", "--out", tmp_path / "r"), "--set model.revision=HASH")
    pinned = ("--set", f"model.revision={'0' * 40}", "--data", tmp_path)
    refused(moe_route("eval", "qwen3-30b-a3b-mgsm", "--out", tmp_path / "r", *pinned), "flores200", "--data FOLDER")
    assert not (tmp_path / "r" / "record").exists()


def test_a_run_and_its_resumption(moe_route, answer, tmp_path: Path):
    out = tmp_path / "r"
    code, text, error = moe_route("eval", "demo", "--out", out, *CHANGES)
    assert code == 0, error
    assert "## Task sums" in text
    assert f"written to {out}" in text
    again = answer("eval", "demo", "--out", out, *CHANGES)
    assert set(again["stages"].values()) == {"kept"}
    assert again["results"]["results"]["tasks"]["sums"]["items"] == 2
    refused(moe_route("eval", "demo", "--out", out, *CHANGES, "--set", "tasks.sums.batch_size=1"), "--force")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_ask_to_end(number: signal.Signals, capfd: pytest.CaptureFixture[str]):
    before = signal.getsignal(number)
    with deferred_interrupt(terminate=True, second="again: at once") as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    assert "ending after this batch; again: at once" in capfd.readouterr().err


def test_termination_is_left_alone_unless_asked_for():
    before = signal.getsignal(signal.SIGTERM)
    with deferred_interrupt():
        assert signal.getsignal(signal.SIGTERM) == before

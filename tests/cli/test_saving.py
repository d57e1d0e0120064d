"""Results of long work on a disk that has no room, and Ctrl-C while they are written."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness.commands import SMALL, refused

import moe_route as mr
from moe_route import recording
from moe_route.base import files
from moe_route.cli import saving
from moe_route.runs.language_model import LanguageModel


@pytest.fixture
def small_files():
    """Files of this process may have 20 kB, until the function is called that this gives."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize("options", [("--force",), ("--force", "--vectors", "mean")])
def test_a_result_waits_for_room(moe_route, monkeypatch, small_files, tmp_path: Path, options):
    out = tmp_path / "found.safetensors"
    out.write_bytes(b"older")
    waited = []

    def wait(seconds: float) -> None:
        waited.append(out.read_bytes())
        if len(waited) == 2:
            small_files()

    monkeypatch.setattr(saving.time, "sleep", wait)
    code, text, err = moe_route("record", "--out", out, *options, *SMALL)
    assert code == 0, err
    assert waited == [b"older", b"older"]
    assert "found.safetensors was not written (file too large)" in err
    assert "kept in memory" in err
    assert "written to" in text
    if "--vectors" not in options:
        assert mr.RoutingStatistics.load(out).sequences().sum() == 12
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("ends", ["Ctrl-C", "an hour"])
def test_waiting_ends(moe_route, monkeypatch, tmp_path: Path, ends: str):
    def wait(seconds: float) -> None:
        if ends == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            monkeypatch.setattr(saving.time, "monotonic", lambda: float("inf"))

    monkeypatch.setattr(saving.time, "sleep", wait)
    code, out, err = moe_route("record", "--out", tmp_path / "found.safetensors", *SMALL)
    assert (code, out) == (130 if ends == "Ctrl-C" else 2, "")
    assert (
        err.strip()
        .splitlines()[-1]
        .startswith(
            "moe-route: interrupted"
            if ends == "Ctrl-C"
            else f"moe-route: {tmp_path / 'found.safetensors'} was not written"
        )
    )
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_the_result_is_written_keeps_it(moe_route, monkeypatch, tmp_path: Path):
    write = files.write

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return write(*arguments, **options)

    monkeypatch.setattr(files, "write", interrupted)
    code, out, _ = moe_route("record", "--out", tmp_path / "found.safetensors", *SMALL)
    assert (code, mr.RoutingStatistics.load(tmp_path / "found.safetensors").sequences().sum()) == (0, 12)
    assert "interrupted" not in out


@pytest.mark.parametrize(("free", "where"), [(60_000, "--out"), (10_000, "TMPDIR"), (1_000_000, None)])
def test_room_is_checked_after_the_first_batch(moe_route, monkeypatch, tmp_path: Path, free: int, where: str | None):
    """The sums have 53 kB, and each sequence 1.4 kB."""
    full = Path(saving.tempfile.gettempdir()) if where == "TMPDIR" else tmp_path
    usage = shutil.disk_usage

    def measured(path: Path) -> object:
        return SimpleNamespace(free=free) if Path(path) == full else usage(path)

    ran, run = [], LanguageModel.run
    monkeypatch.setattr(shutil, "disk_usage", measured)
    monkeypatch.setattr(LanguageModel, "run", lambda *given: ran.append(given) or run(*given))
    if where == "TMPDIR":
        new_store = recording.counting.Counting._new_store
        monkeypatch.setattr(recording.counting.Counting, "_new_store", lambda self, kept, _: new_store(self, kept, 1))
    result = moe_route("record", "--out", tmp_path / "found.safetensors", *SMALL)
    if where is None:
        assert result[0] == 0
        return
    refused(result, "will need at least", "MB left: free some space")
    assert ("TMPDIR" in result[2]) == (where == "TMPDIR")
    assert len(ran) == 1
    assert not list(tmp_path.iterdir())


def test_the_size_of_a_file_is_known_after_some_sequences(answer, tmp_path: Path):
    out = tmp_path / "found.safetensors"
    answer("record", "--out", out, *SMALL)
    all_of_it = mr.RoutingStatistics.load(out)
    names = int.from_bytes(out.read_bytes()[:8], "little")
    assert all_of_it.file_bytes(12) == pytest.approx(out.stat().st_size - 8 - names, abs=8)
    without = all_of_it.file_bytes(0)
    assert all_of_it.file_bytes(24) - without == 2 * (all_of_it.file_bytes(12) - without)


def test_a_corpus_goes_on_once_there_is_room(moe_route, small_files, tmp_path: Path):
    table = tmp_path / "texts.tsv"
    table.write_text("".join(f"{a}\t{b}\n" for a, b in [("id", "eng_Latn"), *((n, f"Text {n}.") for n in range(30))]))
    record = ("record", "--data", table, "--batch-size", "1", "--checkpoint-seconds", "0", "--out")
    result = moe_route(*record, tmp_path / "stopped")
    refused(result, "was not written (file too large)", "the same command goes on from the last checkpoint")
    small_files()
    assert moe_route(*record, tmp_path / "stopped")[0] == moe_route(*record, tmp_path / "whole")[0] == 0
    found = [mr.RoutingStatistics.load(tmp_path / run / "statistics.safetensors") for run in ("stopped", "whole")]
    assert found[0] == found[1]
    assert found[0].store.content_hash() == found[1].store.content_hash()

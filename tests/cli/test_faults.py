"""Commands whose process is killed, whose disk fills up, or that run twice at once, and in odd surroundings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from harness.commands import refused

from moe_route.base import files as files_module
from moe_route.data import demo_model_folder

pytest.importorskip("transformers")

COMMANDS = ("convert", "report", "vectors", "merge", "merge again", "prune", "upcycle", "experiment")
QUIET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def may_mount(folder: Path) -> bool:
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
    return done.returncode == 0 and subprocess.run(["umount", folder], check=False).returncode == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", ["kill", "disk", "twice"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_old_or_the_new_result_is_there_and_the_next_run_is_whole(fault: str, command: str, tmp_path: Path):
    if fault == "disk" and not may_mount(tmp_path):
        pytest.skip("mounting a small disk needs the right to mount")
    script = Path(__file__).with_name("faults.py")
    line = [sys.executable, script, fault, tmp_path, command, "--times", "4"]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **QUIET}, check=False)
    assert done.returncode == 0, done.stderr
    assert command in json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("out", ["/dev/null", "/dev/full", "pipe"])
def test_a_target_that_is_no_regular_file_is_refused_and_stays(moe_route, files, out: str, tmp_path: Path):
    if out == "pipe":
        os.mkfifo(tmp_path / out)
    path = tmp_path / out  # an absolute path stays as it is
    before = path.stat().st_mode
    refused(moe_route("report", files["general"], "--out", path), "html")
    refused(moe_route("analyze", "experts", files["task"], "--baseline", files["general"], "--plan", path), "device")
    assert path.stat().st_mode == before


def test_folders_that_are_files_and_files_that_are_folders(moe_route, files, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "x.html").mkdir()
    refused(moe_route("report", files["general"], "--out", tmp_path / "file" / "x.html"), "file")
    refused(moe_route("report", files["general"], "--out", tmp_path / "x.html"), "is a folder")
    refused(moe_route("merge", demo_model_folder(), demo_model_folder(), "--out", tmp_path / "file"), "file")
    refused(moe_route("report", files["general"], "--out", "/proc/x.html"), "/proc/x.html was not written")


def started(words: Sequence[object], folder: Path, shell: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **QUIET, **more}
    line = f'exec "$@" {shell}'
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "moe_route", *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


SURROUNDINGS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "closed stdin": ("0<&-", {}),
    "closed output": ("1>&-", {}),
    "everything closed": ("0<&- 1>&- 2>&-", {}),
    "no home": ("", {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "HF_HOME": "/proc/none"}),
    "LANG=C": ("", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", SURROUNDINGS)
def test_odd_surroundings_change_no_result(what: str, files, tmp_path: Path):
    shell, environment = SURROUNDINGS[what]
    plan = ("plan", "make", "forbid", "0:1", "--groups", "\u00e9", "--out", "p.json")
    for words in (("report", files["general"], "--out", "x.html"), plan, ("plan", "show", "p.json")):
        done = started(words, tmp_path, shell, **environment)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert (tmp_path / "x.html").stat().st_size > 50_000
    assert (tmp_path / "p.json").is_file()


@pytest.mark.exhaustive
def test_a_broken_pipe_ends_without_a_word_and_with_the_result(files, tmp_path: Path):
    words = ("report", files["general"], "--out", "x.html")
    command = [sys.executable, "-m", "moe_route", *map(str, words)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    assert (tmp_path / "x.html").is_file()


def test_a_clock_that_jumps_changes_no_saved_file(moe_route, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import itertools
    import time

    clock = itertools.cycle([0.0, 4e9, 1.0, 2e9])
    made = []
    for name in ("a", "b"):
        words = ("record", "--languages", "eng_Latn", "--limit", "2", "--out", tmp_path / name)
        assert moe_route(*words)[0] == 0
        made.append((tmp_path / name / "statistics.safetensors").read_bytes())
        monkeypatch.setattr(time, "time", lambda: next(clock))
    assert made[0] == made[1]


def test_what_killed_processes_leave_of_a_folder_is_settled_by_the_next(tmp_path: Path):
    kill = "with files.new_folder(p, replace=True) as made: (made / 'a').write_text('half'); os.kill(os.getpid(), 9)"
    script = f"import os, sys; from moe_route.base import files; p = sys.argv[1]\n{kill}"
    target, old = tmp_path / "model", tmp_path / ".model.old"
    subprocess.run([sys.executable, "-c", script, target], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    old.mkdir()  # killed between the two renames: the old folder takes its name back
    (old / "a").write_text("old")
    with pytest.raises(FileExistsError), files_module.new_folder(target):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with files_module.new_folder(target, replace=True) as made:
        (made / "a").write_text("new")
        assert (target / "a").read_text() == "old"
    assert ([path.name for path in tmp_path.iterdir()], (target / "a").read_text()) == (["model"], "new")

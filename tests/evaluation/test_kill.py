"""An evaluation that is killed at random moments and started again gives the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_route.evaluation import Evaluation

KILLS = 10

# Loads the model once, and forks a process for each run: with one thread, which torch needs for that.
FORKS = '''
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from moe_route.evaluation import evaluate, read_study
from moe_route.runs.language_model import LanguageModel

torch.set_num_threads(1)
language_model = LanguageModel.load()
study, whole, killed, kills = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

def start(out):
    child = os.fork()
    if child == 0:
        evaluate(read_study(study), out, language_model=language_model)
        os._exit(0)
    return child

def progress(folder):
    """Number of files and result lines."""
    paths = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return len(paths) + sum(path.read_bytes().count(b"\\n") for path in paths if path.suffix == ".jsonl")

assert os.waitpid(start(whole), 0)[1] == 0
size, moments, signals = progress(whole), [], []
for _ in range(kills):
    child = start(killed)
    # progress decides, not time, so that on every machine the kills meet all stages
    aim, ended = progress(killed) + random.randint(0, max(1, 3 * size // (2 * kills))), 0
    while not ended and progress(killed) < aim:
        time.sleep(0.002)
        ended, _ = os.waitpid(child, os.WNOHANG)
    time.sleep(random.random() * 0.05)
    if not ended:
        os.kill(child, signal.SIGKILL)
        signals.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
    moments.append(progress(killed))
assert os.waitpid(start(killed), 0)[1] == 0
print(json.dumps({"moments": moments, "signals": signals, "size": size}))
'''


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.exhaustive
def test_killed_at_ten_random_moments(small_file: Path, tmp_path: Path, content_of: Callable[[Path], dict[str, bytes]]):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", FORKS, small_file, whole, killed, str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["signals"]) >= KILLS // 2, f"most runs ended before they were killed: {found}"
    assert len(set(found["moments"])) > 3, f"the kills met few moments: {found}"
    before, after = content_of(whole), content_of(killed)
    assert list(after) == list(before)
    assert [name for name in before if after[name] != before[name]] == []


@pytest.mark.exhaustive
def test_terminated_runs_end_after_their_batch(
    small_file: Path, tmp_path: Path, undisturbed: Evaluation, content_of: Callable[[Path], dict[str, bytes]]
):
    out = tmp_path / "results"
    command = [sys.executable, "-m", "moe_route", "eval", small_file, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    while process.poll() is None and not (out / "evaluate" / "base.jsonl").is_file():
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 130, errors.decode()
    assert "ending after this batch" in errors.decode()
    done, all_of = content_of(out), content_of(undisturbed.out)
    assert not (out / "report").exists()
    for name, content in done.items():  # nothing but whole batches
        if name.endswith(".jsonl"):
            assert content.endswith(b"\n")
            assert content.count(b"\n") <= all_of[name].count(b"\n")

"""The commands of docs/serving.md as they stand, on a free port: two groups, one steered, and a refused request."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_route as mr
from moe_route.data import load_demo_model
from moe_route.recording import RoutingStatistics

if not os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):
    pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
PROMPT = "Anna has five books. She buys"
NEW = 8


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def run_group(command: list[str], *, timeout: float, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; whatever it left behind is ended with it, also when it fails, takes too long or is interrupted."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **settings
    ) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, out, error)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the page's plan and its commands ran."""
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = blocks("console")[0].replace("\n$ ", "\n").removeprefix("$ ").replace("8000", str(port))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    # without job control, so that the server stays in the shell's group of processes
    for command in (["python", "-c", blocks("python")[0]], ["bash", "-c", script]):
        log = folder / "server.log"
        try:
            done = run_group(command, cwd=folder, env=environment, timeout=1500)
        except subprocess.TimeoutExpired:
            pytest.fail(log.read_text()[-4000:] if log.exists() else f"{command[0]} took too long")
        assert done.returncode == 0, done.stderr[-2000:] + (log.read_text()[-4000:] if log.exists() else "")
    return folder


def answer(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def test_a_server_counts_and_steers_its_requests_as_transformers_does(served: Path) -> None:
    model, tokenizer = load_demo_model()
    plan = mr.Plan.load(served / "plan.safetensors")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with mr.attach(model.float()) as routed, torch.no_grad():
        with routed.steer(plan), routed.record(groups=["plain", "steered"]) as rec:
            for group in ("plain", "steered"):
                with rec.labels(groups=group, items=["0"]):
                    made = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
                text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
                assert answer(served, group)["choices"][0]["text"] == text
        expected = rec.statistics()
    found = RoutingStatistics.load(served / "statistics.safetensors")
    for name in ("counts", "natural_counts"):
        np.testing.assert_array_equal(found.token_sum(name), expected.token_sum(name))
    np.testing.assert_array_equal(found.scalar("steered"), expected.scalar("steered"))
    np.testing.assert_array_equal(found.sequences(), expected.sequences())
    assert found.metadata["fingerprint"] == expected.metadata["fingerprint"]
    assert found.metadata["plans"] == [plan.hash]
    assert found.scalar("steered")[0].sum() == 0 < found.scalar("steered")[1].sum()


def test_a_request_of_an_unknown_group_gets_http_400_in_words(served: Path) -> None:
    error = answer(served, "refused")["error"]
    assert error["code"] == 400
    assert "none of the groups of this engine: plain, steered" in error["message"]


def running(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
def test_a_server_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    script = f"(sleep 300 & echo $! > {tmp_path}/child; wait) & wait"
    with pytest.raises(subprocess.TimeoutExpired):
        run_group(["bash", "-c", script], timeout=2)
    child = int((tmp_path / "child").read_text())
    for _ in range(600):
        if not running(child):
            return
        time.sleep(0.1)
    pytest.fail("the child is still running")

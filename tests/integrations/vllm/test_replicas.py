"""A server of two replicas that share their experts (data parallelism): each counts its own tokens; files add up.

`cpu_gaps` brings what vLLM lacks for it on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.cpu_gaps import install
from harness.vllm_demo import GROUPS, NEW, PLAN, Answers, Row

import moe_route as mr
from moe_route.data import demo_model_folder

if not os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):
    pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def post(folder: Path) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """Posts to a server of two replicas whose experts are spread over them."""
    port, plan = free_port(), folder / "plan.safetensors"
    PLAN.save(plan)
    gaps = folder / "gaps"
    gaps.mkdir()
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "moe_route,cpu_gaps"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment["PYTHONPATH"] = os.pathsep.join([*install(gaps), os.environ.get("PYTHONPATH", "")])
    books = {"save": str(folder / "books.safetensors"), "every": 3600}
    options = {"moe_route": {"groups": GROUPS, "plan": str(plan), "record": True, **books}}
    settings = {
        "model": demo_model_folder(),
        "served-model-name": "demo",
        "dtype": "float32",
        "max-model-len": 128,
        "max-num-seqs": 16,
        "max-num-batched-tokens": 48,
        "data-parallel-size": 2,
        "port": port,
        "additional-config": json.dumps(options),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--enable-expert-parallel", *(f"--{name}={value}" for name, value in settings.items())]

    def posted(path: str, body: dict[str, Any] | None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.read() if body is None else json.load(answer)

    log = folder / "server.log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True) as server,
    ):
        try:
            for _ in range(1500):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60)
                    break
                if server.poll() is not None:
                    break
                time.sleep(1)
            else:
                pytest.fail(log.read_text()[-4000:])
            assert server.poll() is None, log.read_text()[-4000:]
            yield posted
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def test_files_of_replicas_add_up_to_what_transformers_counts(
    post: Any, folder: Path, rows: list[Row], expected: dict[str, Answers]
) -> None:
    def text(row: Row) -> list[int]:
        body = {"model": "demo", "prompt": row.ids, "max_tokens": NEW, "temperature": 0, "return_token_ids": True}
        extra = {"moe_route_group": row.group, "moe_route_item": row.item}
        return post("/v1/completions", {**body, "vllm_xargs": extra})["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(rows)) as threads:
        texts = list(threads.map(text, rows))
    assert texts == expected["steered"].texts
    path = folder / "statistics.safetensors"
    answers = post("/collective_rpc", {"method": "moe_route_statistics", "args": [str(path)]})
    assert answers["results"] == [str(folder / "statistics-0.safetensors")]  # vLLM gives the first replica's answer
    replicas = [mr.RoutingStatistics.load(folder / f"statistics-{number}.safetensors") for number in range(2)]
    assert all(replica.tokens().sum() for replica in replicas)
    assert not path.exists()
    found, there = sum(replicas[1:], replicas[0]), expected["steered"].statistics
    for name in ("counts", "natural_counts"):
        for phase in ("prefill", "decode"):
            np.testing.assert_array_equal(found.token_sum(name, phase), there.token_sum(name, phase))
    for name in ("tokens", "slots", "empty", "steered", "flipped"):
        np.testing.assert_array_equal(found.scalar(name), there.scalar(name), err_msg=name)
    np.testing.assert_array_equal(found.sequences(), there.sequences())
    assert found.metadata["fingerprint"] == there.metadata["fingerprint"]
    assert found.metadata["plans"] == [PLAN.hash]


def test_a_route_answers_for_all_replicas(post: Any, folder: Path, expected: dict[str, Answers]) -> None:
    file = folder / "all.safetensors"
    file.write_bytes(post("/v1/moe_route/statistics", None))
    found, there = mr.RoutingStatistics.load(file), expected["steered"].statistics
    np.testing.assert_array_equal(found.token_sum("counts"), there.token_sum("counts"))
    assert len(json.loads(post("/v1/moe_route", None))["replicas"]) == 2


def test_every_replica_keeps_its_own_books(post: Any, folder: Path, expected: dict[str, Answers]) -> None:
    saved = post("/v1/moe_route/save", {})["saved"]
    assert [one["file"] for one in saved] == ["books.rank0.safetensors", "books.rank1.safetensors"]
    parts = [mr.RoutingStatistics.load(folder / one["file"]) for one in saved]
    assert [part.metadata["generation"] for part in parts] == ["1", "1"]
    there = expected["steered"].statistics
    np.testing.assert_array_equal((parts[0] + parts[1]).token_sum("counts"), there.token_sum("counts"))


def test_a_verb_reaches_all_replicas(post: Any, folder: Path, rows: list[Row]) -> None:
    post("/collective_rpc", {"method": "moe_route_pause"})
    for row in rows[:4]:
        extra = {"moe_route_group": row.group}
        post("/v1/completions", {"model": "demo", "prompt": row.ids, "max_tokens": 2, "vllm_xargs": extra})
    post("/collective_rpc", {"method": "moe_route_statistics", "args": [str(folder / "later.safetensors")]})
    for number in range(2):
        names = [folder / f"{name}-{number}.safetensors" for name in ("statistics", "later")]
        before, after = (mr.RoutingStatistics.load(name).tokens() for name in names)
        np.testing.assert_array_equal(before, after)

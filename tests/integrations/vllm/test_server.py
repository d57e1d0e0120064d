"""A server that keeps its books: killed, started again, interrupted; and its routes and metrics, without dev mode."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moe_route as mr
from moe_route.data import demo_model_folder
from moe_route.recording import RoutingStatistics

if not os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):
    pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

KEY = "key-of-the-test"
PROMPT = "Anna has five books. She buys"
NEW = 8
EVERY = 1.0
PLAN = mr.Plan.force_off({6: [2, 4]}).only(groups=["steered"])


class Server:
    """A server in a group of processes of its own."""

    def __init__(self, folder: Path, name: str):
        self.log = folder / f"{name}.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        environment = {**os.environ, "VLLM_PLUGINS": "moe_route"}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        options = {
            "groups": ["plain", "steered"],
            "plans": {"soft": None},
            "record": True,
            "save": str(folder / "books.safetensors"),
            "every": EVERY,
            "admin": True,
            "metrics_groups": ["steered"],
        }
        settings = {
            "model": demo_model_folder(),
            "served-model-name": "demo",
            "dtype": "float32",
            "max-model-len": 512,
            "max-num-seqs": 16,
            "host": "127.0.0.1",
            "port": self.port,
            "api-key": KEY,
            "additional-config": json.dumps({"moe_route": options}),
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        command += [f"--{name}={value}" for name, value in settings.items()]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True, cwd=folder
            )

    def wait(self) -> Server:
        for _ in range(1500):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=60)
                return self
            if self.process.poll() is not None:
                break
            time.sleep(1)
        pytest.fail(self.log.read_text()[-4000:])

    def ask(self, path: str, body: bytes | dict[str, Any] | None = None, method: str = "GET", key: str = KEY) -> Any:
        """Status and content of an answer."""
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def complete(self, group: str | None, **settings: Any) -> Any:
        extra = {} if group is None else {"moe_route_group": group}
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        status, answer = self.ask("/v1/completions", {**body, "vllm_xargs": extra, **settings}, "POST")
        return json.loads(answer)["usage"] if status == 200 else {"status": status, "answer": answer}

    def children(self) -> list[int]:
        """Processes of its group that still run, the front end's own left out."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid and fields[0] != "Z" and int(entry.name) != self.process.pid:
                    found.append(int(entry.name))
        return found

    def gone(self) -> bool:
        """Whether all of its processes end by themselves."""
        for _ in range(600):
            if self.process.poll() is not None and not self.children():
                return True
            time.sleep(0.2)
        return False

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    made = Server(folder, "first")
    try:
        yield made.wait()
    finally:
        made.kill()


def books(folder: Path) -> RoutingStatistics:
    return RoutingStatistics.load(folder / "books.safetensors")


def counted(statistics: RoutingStatistics) -> list[int]:
    return statistics.tokens()[:, 0].tolist()


def test_routes_are_guarded_and_say_what_is_on(server: Server) -> None:
    assert server.ask("/v1/moe_route", key="wrong")[0] == 401
    status, content = server.ask("/v1/moe_route")
    said = json.loads(content)
    assert status == 200
    assert said["replicas"][0]["recording"] is True
    assert said["saves"] == {"file": "books.safetensors", "every": EVERY}
    log = server.log.read_text()
    assert "8 MoE layers, 2 groups (plain, steered)" in log
    assert server.ask("/collective_rpc", {"method": "moe_route_report"}, "POST")[0] == 404  # no dev mode


def test_plans_are_put_and_refused_in_words(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    PLAN.save(file)
    body = file.read_bytes()
    far = tmp_path / "far.json"
    mr.Plan.force_off({99: [1]}).save(far)
    status, content = server.ask("/v1/moe_route/plans/soft", body, "PUT")
    assert (status, json.loads(content)) == (200, {"plan": "soft", "hash": PLAN.hash})
    for name, wrong, words in (
        ("other", body, "there is no plan"),
        ("soft", b"{}", "the plan"),
        ("soft", body[:-10], "the plan"),
        ("soft", body.replace(b'"steered"', b'"stered"'), "stered"),
        (
            "soft",
            mr.Plan.force_off({99: [1]}).save(tmp_path / "far.json") or (tmp_path / "far.json").read_bytes(),
            "99",
        ),
    ):
        status, content = server.ask(f"/v1/moe_route/plans/{name}", wrong, "PUT")
        assert status == 400, content
        assert words in json.loads(content)["error"]["message"]
        assert str(tmp_path) not in content.decode()
    log = server.log.read_text()
    assert "Traceback" not in log
    assert f"plan soft is now {PLAN.hash}" in log


def test_what_clients_do_is_in_the_books(server: Server, folder: Path) -> None:
    usage = server.complete("plain")
    length = usage["prompt_tokens"] + NEW - 1
    server.complete("steered", vllm_xargs={"moe_route_group": "steered", "moe_route_plan": "soft"})
    server.complete(None)
    assert server.complete("other")["status"] == 400
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 480, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions",
        json.dumps({**body, "vllm_xargs": {"moe_route_group": "plain"}}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer.readline()  # and goes away
    for _ in range(300):
        status, content = server.ask("/v1/moe_route/statistics")
        file = folder / "answer.safetensors"
        file.write_bytes(content)
        found = RoutingStatistics.load(file)
        if not found.metadata["running_sequences"]:
            break
        time.sleep(0.1)
    assert status == 200
    said = found.metadata
    assert (said["aborted_requests"], said["ungrouped_requests"], said["ungrouped_tokens"]) == (1, 1, length)
    assert found.sequences().tolist() == [1, 1]
    assert counted(found)[0] > length
    assert counted(found)[1] == length
    assert found.scalar("steered")[:, 6].tolist() == [0, length]
    assert [(one["plan"], one["hash"]) for one in said["plan_changes"]] == [("soft", PLAN.hash)]
    status, content = server.ask("/v1/moe_route/save", method="POST")
    assert json.loads(content)["saved"][0]["file"] == "books.safetensors"
    assert books(folder) == found
    status, content = server.ask("/v1/moe_route/report")
    assert status == 200
    assert b"<html" in content


def test_metrics_hold_the_tokens(server: Server, folder: Path) -> None:
    def series() -> dict[str, float]:
        lines = [line for line in server.ask("/metrics")[1].decode().splitlines() if line.startswith("moe_route_")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    expected = counted(books(folder))
    first = books(folder).layers[0]
    for _ in range(300):
        found = series()
        if found.get(f'moe_route_tokens_total{{group="",layer="{first}"}}') == sum(expected):
            break
        time.sleep(0.1)
    assert found[f'moe_route_tokens_total{{group="",layer="{first}"}}'] == sum(expected)
    assert found[f'moe_route_tokens_total{{group="steered",layer="{first}"}}'] == expected[1]
    assert {name.partition("{")[0] for name in found} >= {
        "moe_route_normalized_entropy",
        "moe_route_top_share",
        "moe_route_dead_experts",
        "moe_route_steered_share",
    }
    assert not any("expert=" in name for name in found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
def test_a_killed_server_is_started_again_and_one_file_holds_all(server: Server, folder: Path) -> None:
    server.complete("plain")
    for _ in range(300):  # at most `every` seconds later it is on the disk, though no other request comes
        kept = books(folder)
        if kept.sequences().tolist() == [2, 1]:
            break
        time.sleep(0.1)
    assert kept.sequences().tolist() == [2, 1]
    server.process.send_signal(signal.SIGKILL)
    assert server.gone(), "the engine core lives on after its front end"
    again = Server(folder, "second")
    try:
        again.wait()
        usage = again.complete("plain")
        assert "prompt_tokens" in usage, (usage, again.log.read_text()[-4000:])
        length = usage["prompt_tokens"] + NEW - 1
        os.killpg(again.process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        deadline = time.monotonic() + 120
        while again.children() and time.monotonic() < deadline:  # a front end sends SIGTERM once, at any moment
            for one in again.children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGTERM)
        assert again.gone()
        assert "saved" in again.log.read_text()
    finally:
        again.kill()
    last = books(folder)
    plain, steered = counted(kept)
    assert counted(last) == [plain + length, steered]
    assert last.sequences().tolist() == [3, 1]
    assert last.metadata["generation"] == "2"

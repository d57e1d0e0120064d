"""Plans and statistics on the hub: what the client is asked for, and errors that name the fix. Nothing is sent."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import errors  # noqa: E402

from moe_route.base import hub as hub_module  # noqa: E402
from moe_route.base.hub import HubError  # noqa: E402
from moe_route.recording import RoutingStatistics  # noqa: E402
from moe_route.steering import Plan  # noqa: E402

PLAN = Plan.activate({1: [2, 3]}).for_model("owner/base", num_experts=[4, 4])


class Hub:
    """Stands in for the client: keeps the files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.fails = folder, [], None  # type: tuple[Path, list[Any], BaseException | None]

    def __call__(self, token: str | None = None) -> Hub:
        self.calls.append(("HfApi", token))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.fails is not None:
            raise self.fails
        self.calls.append(("create_repo", repo_id, options))

    def file_exists(self, repo_id: str, filename: str, **options: Any) -> bool:
        return (self.folder / filename).exists()

    def upload_file(self, *, path_or_fileobj: Any, path_in_repo: str, repo_id: str, **options: Any) -> str:
        content = path_or_fileobj if isinstance(path_or_fileobj, bytes) else Path(path_or_fileobj).read_bytes()
        (self.folder / path_in_repo).write_bytes(content)
        self.calls.append(("upload_file", path_in_repo, repo_id, options))
        return f"https://hub.example/{repo_id}/{path_in_repo}"

    def download(self, repo_id: str, filename: str, **options: Any) -> str:
        self.calls.append(("download", repo_id, filename, options))
        if self.fails is not None:
            raise self.fails
        return str(self.folder / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    return made


@pytest.mark.parametrize("filename", ["plan.safetensors", "plan.json"])
def test_a_plan_goes_there_and_back(hub: Hub, filename: str) -> None:
    address = PLAN.push_to_hub("me/plans", filename, private=True, token="secret", revision="draft")
    assert address == f"https://hub.example/me/plans/{filename}"
    assert hub.calls[0] == ("HfApi", "secret")
    assert hub.calls[1] == ("create_repo", "me/plans", {"repo_type": "model", "private": True, "exist_ok": True})
    assert [call[1] for call in hub.calls[2:]] == ["README.md", filename]
    assert all(call[3]["revision"] == "draft" for call in hub.calls[2:])
    assert Plan.from_hub("me/plans", filename, revision="draft") == PLAN
    wanted = {"repo_type": "model", "revision": "draft", "token": None, "local_files_only": False}
    assert hub.calls[-1] == ("download", "me/plans", filename, wanted)


def test_the_readme_has_metadata_and_is_written_once(hub: Hub) -> None:
    PLAN.push_to_hub("me/plans")
    readme = (hub.folder / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: moe-route\ntags:\n- moe-route\n")
    assert "base_model: owner/base\n" in readme
    assert "activate 2 experts in layer 1" in readme
    assert 'mr.Plan.from_hub("me/plans", "plan.safetensors")' in readme
    (hub.folder / "README.md").write_text("mine")
    PLAN.push_to_hub("me/plans", commit_message="again")
    assert (hub.folder / "README.md").read_text() == "mine"
    assert hub.calls[-1][3]["commit_message"] == "again"
    (hub.folder / "README.md").unlink()
    PLAN.for_model("/home/somebody/model").push_to_hub("me/plans")
    assert "base_model" not in (hub.folder / "README.md").read_text()


def test_statistics_go_there_and_back(hub: Hub) -> None:
    statistics = RoutingStatistics.from_token_sums(
        ["x"], counts=np.array([[[6, 4]]]), tokens=np.array([10]), top_k=1, metadata={"model": {"name": "a/b"}}
    )
    statistics.push_to_hub("me/statistics")
    assert RoutingStatistics.from_hub("me/statistics") == statistics
    assert "base_model: a/b" in (hub.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("no"), "not in the cache; go online"),
        (errors.OfflineModeIsEnabled("no"), "not in the cache; go online"),
        (errors.EntryNotFoundError("no"), "no such file; pass its name"),
        (errors.HFValidationError("bad name"), "bad name; a repository is named owner/name"),
        (OSError("no route"), r"\(no route\): check the network and the token"),
    ],
)
def test_errors_name_the_fix(hub: Hub, error: Exception, message: str) -> None:
    hub.fails = error
    with pytest.raises(HubError, match=f"cannot get plan.safetensors from 'me/plans'.*{message}"):
        Plan.from_hub("me/plans")
    with pytest.raises(HubError, match=f"cannot put plan.safetensors into 'me/plans'.*{message}"):
        PLAN.push_to_hub("me/plans")


def test_the_cache_serves_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, in the layout of its cache."""
    commit = "0" * 40
    repository = tmp_path / "models--me--plans"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    PLAN.save(repository / "snapshots" / commit / "plan.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert Plan.from_hub("me/plans", local_files_only=True) == PLAN
    with pytest.raises(HubError, match="the file is not in the cache"):
        Plan.from_hub("me/plans", "other.safetensors", local_files_only=True)
    with pytest.raises(HubError, match="a repository is named owner/name"):
        Plan.from_hub("me/too/many", local_files_only=True)


def test_the_client_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'moe-route\[hf\]'"):
        Plan.from_hub("me/plans")


def test_a_network_without_an_answer_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup that hangs, as with a name server that is gone, and a host that takes no connection."""
    monkeypatch.setattr(hub_module, "getproxies", dict)
    assert hub_module.answers(os.curdir)
    hung = threading.Event()

    def lookup(*_: object, **__: object) -> NoReturn:
        hung.wait(600)
        raise socket.gaierror

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{address[0]}:{address[1]}")
        assert hub_module.answers("owner/model")
        monkeypatch.setattr(hub_module, "_CONNECT_SECONDS", 0.2)
        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        begin = time.monotonic()
        assert not hub_module.answers("owner/model")
        assert time.monotonic() - begin < 300  # of the 600 that the lookup takes
        hung.set()
    monkeypatch.undo()
    monkeypatch.setattr(hub_module, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{address[0]}:{address[1]}")
    assert not hub_module.answers("owner/model")  # refused at once: the server is closed

"""Who may change a plan over HTTP, and that all engine cores hold it or none; vLLM is not needed."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import moe_route as mr
from moe_route.analysis.load import LAYER_METRICS
from moe_route.integrations.serving.options import Options
from moe_route.integrations.vllm.endpoints import Front, RequestRefusedError

PLAN = mr.Plan.forbid({0: [1]})


def content(plan: mr.Plan, folder: Path) -> bytes:
    file = folder / "plan.safetensors"
    plan.save(file)
    return file.read_bytes()


class Client:
    """An engine client whose cores answer to the verb `steer` as they are told."""

    def __init__(self, *answers: tuple[str, str], servers: int = 1):
        self.calls: list[tuple[int, str]] = []
        self.engine_core = SimpleNamespace(
            core_engines=list(range(len(answers))), client_count=servers, _call_utility_async=self.call
        )
        self.input_processor = SimpleNamespace()
        self.answers = answers

    async def call(self, method: str, verb: str, args: Any, kwargs: Any, *, engine: int) -> list[Any]:
        assert method == "moe_route_answer"
        self.calls.append((engine, verb))
        return list(self.answers[engine]) if verb == "steer" else ["done", [None]]


def put(client: Client, body: bytes, *, name: str = "soft", admin: bool = True, key: str | None = "key") -> str:
    options = Options(plans={"soft": None}, admin=admin)

    async def run() -> str:
        return await Front(client, options, SimpleNamespace(api_key=[key] if key else None)).put(name, body, "here")

    return asyncio.run(run())


def test_a_plan_reaches_all_cores(tmp_path: Path) -> None:
    client = Client(("done", "hash"), ("done", "hash"))
    assert put(client, content(PLAN, tmp_path)) == PLAN.hash
    assert client.calls == [(0, "steer"), (1, "steer")]


def test_a_plan_that_one_core_refuses_steers_in_none(tmp_path: Path) -> None:
    client = Client(("done", "hash"), ("refused", "too many rows"))
    with pytest.raises(RequestRefusedError, match="too many rows") as refused:
        put(client, content(PLAN, tmp_path))
    assert refused.value.status == 400
    assert client.calls[2:] == [(0, "take_back"), (1, "take_back")]


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        ({"admin": False}, 403, '"admin": true'),
        ({"key": None}, 403, "--api-key"),
        ({"name": "other"}, 400, "there is no plan 'other'"),
    ],
)
def test_who_may_not_change_plans(
    tmp_path: Path, settings: dict[str, Any], status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    client = Client(("done", "hash"))
    with pytest.raises(RequestRefusedError, match=words) as refused:
        put(client, content(PLAN, tmp_path), **settings)
    assert refused.value.status == status
    assert not client.calls


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'{"moe_route": "plan"}', b"\x08" + bytes(40)])
def test_what_is_no_plan_is_refused_without_a_path(body: bytes) -> None:
    with pytest.raises(RequestRefusedError) as refused:
        put(Client(("done", "hash")), body)
    assert "the plan" in str(refused.value)
    assert "/" not in str(refused.value)


def test_a_group_that_the_engine_does_not_declare_is_refused_before_any_core(tmp_path: Path) -> None:
    client = Client(("done", "hash"))
    with pytest.raises(RequestRefusedError, match=r'"al".*"all"') as refused:
        put(client, content(PLAN.only(groups=["all", "al"]), tmp_path))
    assert refused.value.status == 400
    assert not client.calls


def test_values_by_item_want_one_api_server(tmp_path: Path) -> None:
    plan = mr.Plan.replace_scores(np.ones((2, 3, 1, 4), np.float32), layers=[0], items=["x", "y"])
    with pytest.raises(RequestRefusedError, match="--api-server-count 1"):
        put(Client(("done", "hash"), servers=2), content(plan, tmp_path))


def test_the_dashboard_asks_for_series_that_there_are() -> None:
    board = (Path(__file__).parents[3] / "docs" / "grafana.json").read_text(encoding="utf-8")
    asked = {name.removesuffix("_total") for name in re.findall(r"moe_route_\w+", board)}
    assert asked == {
        "moe_route_tokens",
        "moe_route_unbalanced_tokens",
        *(f"moe_route_{name}" for name in LAYER_METRICS),
    }
    assert len(json.loads(board)["panels"]) == len(asked)

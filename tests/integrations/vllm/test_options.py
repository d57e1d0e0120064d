"""Options, refusals of an engine with what mends them, and the arguments of requests; vLLM is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_route.integrations.vllm.options import Options, refuse_engine, refuse_recording, request_error
from moe_route.integrations.vllm.sites import transformers_name
from moe_route.integrations.vllm.versions import EngineNotSupportedError, check_version


def test_without_options_nothing_is_asked_for() -> None:
    assert Options.of({}) is None
    assert Options.of(None) is None
    assert Options.of({"moe_route": {}}) == Options()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"group": ["a"]}, "no option group; there are groups, plan"),
        ({"groups": "ab"}, "list of different names"),
        ({"groups": []}, "list of different names"),
        ({"groups": ["a", "a"]}, "list of different names"),
        ({"groups": [1]}, "list of different names"),
        ({"plans": {"none": None}}, "are taken"),
        ({"rows": 0}, "a number from 1"),
        ({"record": "yes"}, "true or false"),
        ({"trace": "all"}, "list of layers in order"),
        ({"trace": [2, 1]}, "list of layers in order"),
        ({"trace_limit": True}, '"trace_limit" is a number from 1'),
        ([], "options by name"),
    ],
)
def test_wrong_options_are_refused(given: Any, words: str) -> None:
    with pytest.raises(EngineNotSupportedError, match=words):
        Options.of({"moe_route": given})


def config(**changes: Any) -> SimpleNamespace:
    parallel = SimpleNamespace(decode_context_parallel_size=1, enable_elastic_ep=False, enable_dbo=False)
    made = {
        "speculative_config": None,
        "scheduler_config": SimpleNamespace(async_scheduling=False, policy="fcfs"),
        "parallel_config": parallel,
    }
    for name, value in changes.items():
        section = next(part for part in made.values() if part is not None and hasattr(part, name))
        setattr(section, name, value)
    return SimpleNamespace(**made)


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"async_scheduling": True}, "--no-async-scheduling"),
        ({"policy": "priority"}, "--scheduling-policy fcfs"),
        ({"decode_context_parallel_size": 2}, "without context parallelism"),
        ({"enable_elastic_ep": True}, "without --enable-elastic-ep"),
        ({"enable_dbo": True}, "without --enable-dbo"),
    ],
)
def test_an_engine_that_would_count_wrongly_is_refused(changes: dict[str, Any], mend: str) -> None:
    refuse_engine(config())
    with pytest.raises(EngineNotSupportedError, match=mend):
        refuse_engine(config(**changes))


def test_a_recording_of_drafts_is_refused() -> None:
    drafts = config()
    refuse_recording(drafts)
    drafts.speculative_config = object()
    refuse_engine(drafts)
    with pytest.raises(EngineNotSupportedError, match="without --speculative-config"):
        refuse_recording(drafts)


@pytest.mark.parametrize("version", ["0.29.1", "0.33.0", "1.0", "dev"])
def test_other_versions_are_refused_unless_asked_for(version: str) -> None:
    check_version("0.30.0")
    check_version("0.32.0+cpu")
    check_version(version, any_version=True)
    with pytest.raises(EngineNotSupportedError, match=r"any_version"):
        check_version(version)


OPTIONS = Options(groups=("a", "b"), plans={"soft": None})


@pytest.mark.parametrize(
    "extra",
    [
        None,
        {},
        {"other": 1},
        {"moe_route_group": "a", "moe_route_item": 3},
        {"moe_route_plan": "soft"},
        {"moe_route_plan": "none", "moe_route_group": "b"},
    ],
)
def test_requests_that_are_let_in(extra: Any) -> None:
    assert request_error(OPTIONS, extra) is None


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"moe_route_group": "c"}, "none of the groups of this engine: a, b"),
        ({"moe_route_group": ["a"]}, "none of the groups"),
        ({"moe_route_plan": 0}, "none of the plans of this engine: default, soft, none"),
        ({"moe_route_item": "x"}, "without moe_route_group"),
        ({"moe_route_group": "a", "moe_route_item": True}, "text or a whole number"),
        ({"moe_route_row": 1}, "no argument of moe_route"),
    ],
)
def test_requests_that_are_refused(extra: dict[str, Any], words: str) -> None:
    assert words in (request_error(OPTIONS, extra) or "")


@pytest.mark.parametrize(
    ("name", "model_type", "expected"),
    [
        ("model.layers.0.mlp.experts", "qwen3_moe", "model.layers.0.mlp.gate"),
        ("model.layers.0.mlp.experts", "gpt_oss", "model.layers.0.mlp.router"),
        ("model.layers.3.block_sparse_moe.experts", "mixtral", "model.layers.3.mlp.gate"),
        ("model.layers.3.block_sparse_moe.experts", "phimoe", "model.layers.3.mlp.router"),
    ],
)
def test_routers_have_the_names_of_transformers(name: str, model_type: str, expected: str) -> None:
    assert transformers_name(name, model_type) == expected

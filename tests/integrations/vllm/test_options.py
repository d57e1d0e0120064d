"""Options, refusals of an engine with what mends them, and the arguments of requests; vLLM is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_route.integrations.serving.options import EngineNotSupportedError, Options, request_error
from moe_route.integrations.serving.sites import transformers_name
from moe_route.integrations.vllm.options import check_version, refuse_engine, refuse_recording


def test_without_options_nothing_is_asked_for() -> None:
    assert Options.of({}) is None
    assert Options.of(None) is None
    assert Options.of({"moe_route": {}}) == Options()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"group": ["a"]}, 'no key "group": did you mean "groups"'),
        ({"groups": "ab"}, 'groups is "ab": give a list'),
        ({"groups": []}, "list of different names"),
        ({"groups": ["a", "a"]}, "list of different names"),
        ({"groups": [1]}, r"groups\[0\] is 1"),
        ({"plans": {"none": None}}, "are taken"),
        ({"rows": 0}, "a whole number from 1"),
        ({"record": "yes"}, "true or false"),
        ({"trace": "all"}, 'trace is "all": give true'),
        ({"trace": [2, 1]}, "list of layers in order"),
        ({"trace_limit": True}, "trace_limit is true"),
        ({"metrics_groups": ["a"]}, "at most 8 of the groups"),
        ({"groups": list("abcdefghi"), "metrics_groups": list("abcdefghi")}, "at most 8 of the groups"),
        ({"save": True}, "save is true"),
        ({"every": 0}, "seconds above 0"),
        ({"every": float("nan")}, "every is NaN"),
        ({"admin": "yes"}, "true or false"),
        ([], "give a table"),
    ],
)
def test_wrong_options_are_refused(given: Any, words: str) -> None:
    with pytest.raises(EngineNotSupportedError, match=words):
        Options.of({"moe_route": given})


def config(**changes: Any) -> SimpleNamespace:
    parallel = SimpleNamespace(
        data_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        enable_elastic_ep=False,
        enable_dbo=False,
    )
    made = {
        "speculative_config": None,
        "scheduler_config": SimpleNamespace(async_scheduling=False, policy="fcfs"),
        "parallel_config": parallel,
    }
    for name, value in changes.items():
        section = next((part for part in made.values() if hasattr(part, name)), None)
        made[name] = value if section is None else setattr(section, name, value)
    return SimpleNamespace(**made)


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"async_scheduling": True, "speculative_config": object()}, "--no-async-scheduling"),
        ({"speculative_config": SimpleNamespace(enable_adaptive_verification=True)}, "enable_adaptive_verification"),
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


@pytest.mark.parametrize("parallel", ["pipeline_parallel_size", "data_parallel_size"])
@pytest.mark.parametrize(
    ("changes", "mend"),
    [({"async_scheduling": True}, "--no-async-scheduling"), ({"speculative_config": object()}, "--speculative-config")],
)
def test_a_recording_of_what_may_not_become_text_wants_one_step_at_a_time(
    changes: dict[str, Any], mend: str, parallel: str
) -> None:
    refuse_engine(config(**changes))
    refuse_recording(config(**changes))
    refuse_recording(config(**{parallel: 2}))
    with pytest.raises(EngineNotSupportedError, match=mend):
        refuse_recording(config(**changes, **{parallel: 2}))


@pytest.mark.parametrize("version", ["0.29.1", "0.33.0", "1.0", "dev"])
def test_other_versions_are_refused_unless_asked_for(version: str) -> None:
    check_version("0.30.0")
    check_version("0.32.0+cpu")
    check_version(version, any_version=True)
    with pytest.raises(EngineNotSupportedError, match=r"any_version"):
        check_version(version)


OPTIONS = Options(groups=("a", "b"), plans={"soft": None}, routed_experts=True)


@pytest.mark.parametrize(
    "extra",
    [
        None,
        {},
        {"other": 1},
        {"moe_route_group": "a", "moe_route_item": 3},
        {"moe_route_plan": "soft"},
        {"moe_route_plan": "none", "moe_route_group": "b"},
        {"moe_route_experts": "float16", "moe_route_from": 3},
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
        ({"moe_route_experts": True}, "none of ids, float32, float16"),
        ({"moe_route_from": 3}, "beside moe_route_experts"),
        ({"moe_route_experts": "ids", "moe_route_from": -1}, "tokens from 0"),
        ({"moe_rout_plan": "soft"}, 'did you mean "moe_route_plan"'),
        ({"Moe_Route_Group": "a"}, 'did you mean "moe_route_group"'),
    ],
)
def test_requests_that_are_refused(extra: dict[str, Any], words: str) -> None:
    assert words in (request_error(OPTIONS, extra) or "")


def test_an_engine_without_room_for_experts_refuses_a_request_that_asks_for_them() -> None:
    assert '"routed_experts": true' in (request_error(Options(), {"moe_route_experts": "ids"}) or "")


@pytest.mark.parametrize(
    ("name", "model_type", "expected"),
    [
        ("model.layers.0.mlp", "qwen3_moe", "model.layers.0.mlp.gate"),
        ("model.layers.0.mlp", "gpt_oss", "model.layers.0.mlp.router"),
        ("model.layers.3.block_sparse_moe", "mixtral", "model.layers.3.mlp.gate"),
        ("model.layers.3.block_sparse_moe", "phimoe", "model.layers.3.mlp.router"),
    ],
)
def test_routers_have_the_names_of_transformers(name: str, model_type: str, expected: str) -> None:
    assert transformers_name(name, model_type) == expected

"""The place of a worker's layers in the model, and plans and errors over several workers, without processes."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moe_route as mr
from moe_route.contract.spec import RouterSpec
from moe_route.integrations.serving import answers
from moe_route.integrations.serving.answers import Failure, StagePart, answer, joined
from moe_route.integrations.serving.options import EngineNotSupportedError, Options
from moe_route.integrations.serving.plans import PlanTables
from moe_route.integrations.serving.recording import Recording
from moe_route.integrations.serving.requests import RequestTable
from moe_route.integrations.serving.sites import Site, Stage
from moe_route.integrations.vllm import sites
from moe_route.integrations.vllm.sites import find_stage
from moe_route.steering import PlanError
from moe_route.steering.cell import LayerShape

SHAPES = [[LayerShape(8, 2)], [], [LayerShape(8, 2), LayerShape(16, 4)]]


def site(number: int, experts: int = 8, top_k: int = 2) -> Any:
    return Site(f"layers.{number}.mlp.gate", None, experts, top_k, RouterSpec(), None, torch.device("cpu"))


def test_stages_know_their_layers() -> None:
    found = [Stage.among(SHAPES, index) for index in range(3)]
    assert [(stage.first, stage.count) for stage in found] == [(0, 1), (1, 0), (1, 2)]
    assert all(stage.layers == (*SHAPES[0], *SHAPES[2]) for stage in found)
    assert [stage.within([0, 2]) for stage in found] == [[0], [], [1]]
    assert [list("abc")[stage.own] for stage in found] == [["a"], [], ["b", "c"]]
    with pytest.raises(EngineNotSupportedError, match="no layer 3 to trace: the model has MoE layers 0 to 2"):
        found[0].within([1, 3])


def test_one_stage_has_all_layers() -> None:
    sites = [site(0), site(1)]
    assert find_stage(lambda: sites, 1) == (sites, Stage((LayerShape(8, 2),) * 2, 0, 2))
    with pytest.raises(EngineNotSupportedError, match="no MoE layer of vLLM's own was found"):
        find_stage(list, 1)


def test_an_error_of_one_stage_is_raised_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    def exchanged(mine: Any) -> tuple[int, list[Any]]:
        said.append(mine)
        return 1, ["moe_route: layer 3 has a kernel", mine]

    def refused() -> list[Any]:
        raise EngineNotSupportedError("moe_route: a router of its own")

    monkeypatch.setattr(sites, "_exchanged", exchanged)
    for read in (lambda: [site(4)], refused):
        with pytest.raises(EngineNotSupportedError, match="layer 3 has a kernel"):
            find_stage(read, 2)
    assert said == [(LayerShape(8, 2),), "moe_route: a router of its own"]  # it speaks before it raises


PLAN = (
    mr.Plan.forbid({0: [1], 3: [2]}) + mr.Plan.activate({1: [5]}, strength=0.5) + mr.Plan.replace_scores({2: {4: 1.0}})
)


@pytest.mark.parametrize("plan", [PLAN, mr.Plan.forbid({1: [1]}), mr.Plan.forbid({2: [0]}).random_per_token(3)])
def test_stages_take_their_part_of_a_plan(plan: mr.Plan) -> None:
    """With the rows that the whole plan has, also where it has no rule for their layers."""

    def made(sites: list[Any], stage: Stage) -> tuple[PlanTables, np.ndarray]:
        tables = PlanTables(sites, Options(groups=("a",)), stage, torch.device("cpu"))
        compiled = tables.fitted(plan.compile(stage.layers, ("a",)))
        return tables, tables.change("default", compiled).rows

    shapes = [[LayerShape(8, 2)] * 2] * 2
    whole = [site(number) for number in range(4)]
    tables, rows = made(whole, Stage.among([shapes[0] * 2], 0))
    for index in range(2):
        sites = [site(number) for number in (2 * index, 2 * index + 1)]
        own, own_rows = made(sites, Stage.among(shapes, index))
        np.testing.assert_array_equal(own_rows, rows)
        assert own.layer_rows.equal(tables.layer_rows[2 * index : 2 * index + 2])
        for mine, same in zip(sites, whole[2 * index :], strict=False):
            assert (mine.steers, mine.by_token is None) == (same.steers, same.by_token is None)
            for one, other in zip(mine.steering.packed, same.steering.packed, strict=True):
                assert one.equal(other) if isinstance(one, torch.Tensor) else one == other


def test_errors_are_handed_over_and_raised_when_all_have_answered() -> None:
    def refuse() -> None:
        raise PlanError("no such plan")

    def break_down() -> None:
        raise KeyError("x")

    assert joined([answer(lambda: "hash"), None]) == ["hash", None]
    with pytest.raises(PlanError, match="no such plan"):
        joined(["hash", answer(refuse)])
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        joined([answer(break_down), answer(refuse)])
    assert answer(refuse) == Failure(PlanError, "no such plan")


def recorded(seed: int = 0) -> mr.RoutingStatistics:
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(40, [0.25] * 4, size=(2, 3))
    return mr.RoutingStatistics.from_token_sums(["a", "b"], counts=counts, tokens=np.full(2, 20), top_k=2)


@pytest.mark.parametrize("named", [True, False])
def test_parts_of_stages_become_one_file(named: bool, tmp_path: Any) -> None:
    whole = recorded()
    path = str(tmp_path / "all.safetensors") if named else None
    parts = [
        StagePart(mr.RoutingStatistics, answers.content_of(whole.select(layers=layers)), path)
        for layers in ([0, 1], [2])
    ]
    first, *others = joined([parts[0], None, parts[1], None])
    assert others == [None] * 3
    assert first == path or not named
    assert (mr.RoutingStatistics.load(path) if path else answers.loaded(mr.RoutingStatistics, first)) == whole
    other = StagePart(mr.RoutingStatistics, answers.content_of(recorded(1).select(layers=[0])), path)
    with pytest.raises(ValueError, match=re.escape("layer 0 is in two of the parts")):
        joined([parts[0], other])


def test_replicas_write_beside_each_other() -> None:
    assert [answers.replica_path("/x/all.safetensors", n) for n in range(2)] == [
        "/x/all-0.safetensors",
        "/x/all-1.safetensors",
    ]


def test_stages_exchange_what_they_found(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(world_size=2, rank_in_group=1, cpu_group="gloo")
    monkeypatch.setattr(sites, "find", lambda place: lambda: group)

    def gather(found: list[Any], mine: Any, group: Any) -> None:
        assert group == "gloo"
        found[:] = [(LayerShape(4, 1),), mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    held = [site(7)]
    assert find_stage(lambda: held, 2) == (held, Stage((LayerShape(4, 1), LayerShape(8, 2)), 1, 1))


def test_a_stage_of_dense_layers_follows_requests_and_takes_plans() -> None:
    """It counts nothing, and nothing that a step does raises in it."""
    stage, options = Stage.among(SHAPES, 1), Options(groups=("a",), trace=(0, 2), sequences=True)
    requests = RequestTable(groups=1, plans=1, capacity=2)
    recording = Recording(
        [], options, requests, lambda name, end: np.arange(end), stage, most_requests=2, most_tokens=8
    )
    plans = PlanTables([], options, stage, torch.device("cpu"))
    rows = plans.change("default", plans.fitted(mr.Plan.forbid({0: [1], 2: [5]}).compile(stage.layers, ("a",)))).rows
    assert (rows[0, :, 1] >= 0).all()
    recording.start(())
    recording.begin(requests.begin("x", prompt=3, group=0, segment=recording.row(0), plan=0))
    table = np.zeros((8, 4), np.int32)
    assert requests.fill(table, ["x"], np.array([3]), np.array([0])) == 3
    recording.end(["x"])
    recording.refuse_gaps()
    assert not requests.running
    assert recording.trace is None
    assert recording.traced() is None

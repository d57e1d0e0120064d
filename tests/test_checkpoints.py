"""Which checkpoint a recording, a plan or a selection is of: hashes of the weights, whatever they were loaded in."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.tiny_models import MAIN, tiny_model, tokens
from torch import nn

import moe_route as mr
from moe_route.base.identity import UNKNOWN, checkpoint_of, library_versions, same_weights
from moe_route.recording.statistics import MergeError
from moe_route.routers.discovery import find_routers
from moe_route.steering import ExpertSelection, PlanError, PlanModel


def hashes(model: nn.Module) -> dict[str, str]:
    return checkpoint_of(model, [router.weights for router in find_routers(model)])


def recorded(model: Any, **options: Any) -> mr.RoutingStatistics:
    with mr.attach(model, **options) as routed, routed.record() as recorder, torch.no_grad():
        model(input_ids=tokens(2, 6))
    return recorder.statistics()


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe", head=True)


@pytest.mark.parametrize("name", MAIN)
def test_bfloat16_and_float32_loads_of_one_checkpoint_are_equal(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny_model(name, torch.bfloat16, head=True).save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    one, two = (hashes(load(tmp_path, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert one == two
    assert UNKNOWN not in one.values()
    assert hashes(load(tmp_path, dtype=torch.float16))["weights_hash"] == UNKNOWN
    other = hashes(tiny_model(name, torch.bfloat16, seed=1, head=True))
    assert same_weights(one["router_hash"], other["router_hash"]) is False
    assert same_weights(one["weights_hash"], other["weights_hash"]) is False


def test_experts_in_a_list_and_in_a_stack_are_one_layout(model: Any) -> None:
    class Expert(nn.Module):
        def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
            super().__init__()
            for name, weight in (("w1", gate), ("w3", up), ("w2", down)):
                linear = nn.Linear(*weight.shape[::-1], bias=False)
                linear.weight.data = weight.clone()
                setattr(self, name, linear)

    listed = copy.deepcopy(model)
    for module in listed.modules():
        stack = getattr(module, "experts", None)
        if hasattr(stack, "gate_up_proj"):
            pairs = zip(stack.gate_up_proj.data, stack.down_proj.data, strict=True)
            module.experts = nn.ModuleList(Expert(*both.chunk(2), down) for both, down in pairs)
    assert not any("gate_up" in name for name, _ in listed.named_parameters())
    assert hashes_of_weights(listed) == hashes_of_weights(model)


def hashes_of_weights(model: nn.Module) -> str:
    return checkpoint_of(model, [])["weights_hash"]


def test_a_wrapper_changes_nothing_an_adapter_does(model: Any) -> None:
    plain = hashes_of_weights(model)
    assert hashes_of_weights(torch.compile(model)) == plain
    layer = model.lm_head
    layer.lora_A = nn.Linear(3, 3)
    assert same_weights(plain, hashes_of_weights(model)) is False  # comparable, and another


def test_one_element_of_a_router_is_another_router(model: Any) -> None:
    before = hashes(model)
    with torch.no_grad():
        find_routers(model)[1].weights[0][3, 5] += 1
    assert same_weights(before["router_hash"], hashes(model)["router_hash"]) is False


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe"])
def test_the_correction_bias_is_part_of_the_router(name: str) -> None:
    model = tiny_model(name, head=True)
    before = hashes(model)["router_hash"]
    biases = [t for n, t in (*model.named_parameters(), *model.named_buffers()) if "correction_bias" in n]
    with torch.no_grad():
        biases[0].view(-1)[0] += 1
    assert hashes(model)["router_hash"] != before


def test_layouts_that_no_map_covers_cannot_be_compared(model: Any) -> None:
    before = hashes_of_weights(model)
    model.lm_head.renamed = model.lm_head.weight
    del model.lm_head.weight
    assert same_weights(before, hashes_of_weights(model)) is None
    model.to("meta")
    assert hashes_of_weights(model) == UNKNOWN


def test_statistics_add_only_within_one_checkpoint(model: Any) -> None:
    one, other = recorded(model), recorded(tiny_model("qwen3_moe", seed=1, head=True))
    assert recorded(model, engine="fused").metadata["model"] == one.metadata["model"]
    with pytest.raises(MergeError, match="two checkpoints"):
        one + other
    both = one.merge(other, any_model=True)
    assert both.tokens().sum() == 2 * one.tokens().sum()
    unknown = copy.copy(one)
    unknown.metadata = {**one.metadata, "model": {**one.metadata["model"], "weights_hash": UNKNOWN}}
    assert (one + unknown).tokens().sum() == 2 * one.tokens().sum()  # configuration and routers are equal
    unknown.metadata["model"]["router_hash"] = other.metadata["model"]["router_hash"]
    with pytest.raises(MergeError, match="router hash"):
        one + unknown


def test_files_of_before_are_read_add_and_say_so(model: Any, tmp_path: Path) -> None:
    now = recorded(model)
    assert "checkpoint" not in repr(now)
    before = copy.copy(now)
    before.metadata = {**now.metadata, "model": {**now.metadata["model"]}}
    for name in ("router_hash", "weights_hash"):
        del before.metadata["model"][name]
    before.save(tmp_path / "before.safetensors")
    read = mr.RoutingStatistics.load(tmp_path / "before.safetensors")
    assert "checkpoint: not known" in repr(read)
    assert "weights_hash" not in (read + now).metadata["model"]


def test_weights_that_change_during_a_recording_are_said(model: Any) -> None:
    with mr.attach(model) as routed, routed.record() as recorder, torch.no_grad():
        model(input_ids=tokens(2, 6))
        model.lm_head.weight.data.mul_(2)  # which no version counter sees
    made = recorder.statistics()
    assert made.metadata["model"]["weights_hash"] == UNKNOWN
    assert made.metadata["model"]["router_hash"] == hashes(model)["router_hash"]
    assert "weights changed during" in repr(made)


def test_a_plan_of_another_checkpoint_is_refused(model: Any, tmp_path: Path) -> None:
    plan = plan_of(recorded(model))
    plan.save(tmp_path / "plan.json")
    assert mr.Plan.load(tmp_path / "plan.json") == plan
    other = tiny_model("qwen3_moe", seed=1, head=True)
    with mr.attach(model) as routed, warnings.catch_warnings():
        warnings.simplefilter("error")
        with routed.steer(plan):
            pass
    with mr.attach(other) as routed:
        with pytest.raises(PlanError, match="another checkpoint"), routed.steer(plan):
            pytest.fail("the plan was taken")
        with routed.steer(plan.for_model()):
            pass


def plan_of(made: mr.RoutingStatistics) -> mr.Plan:
    experts = ExpertSelection({0: [1]}, model=PlanModel.of_recording(made.metadata, made.num_experts))
    return mr.Plan.activate(experts)


def test_a_plan_that_meets_unknown_weights_runs_with_one_warning(model: Any) -> None:
    plan = plan_of(recorded(model))
    model.lm_head.to(torch.float16)
    with mr.attach(model) as routed:
        with pytest.warns(RuntimeWarning, match="is unknown"), routed.steer(plan):
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with routed.steer(plan):
                pass


def test_a_source_tree_without_metadata_is_recorded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = importlib.metadata.version

    def version(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return usual(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert recorded(model).metadata["versions"] == library_versions()
    assert library_versions()["transformers"] == pytest.importorskip("transformers").__version__

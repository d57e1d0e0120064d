"""Routers inside modules that other libraries put around them, weights that are kept elsewhere, replaced methods."""

from __future__ import annotations

import copy
import pickle
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from harness.tiny_models import tiny_model, tokens

import moe_route as mr
from moe_route.modules.intercept import ReplacedMethod, resident


class Around(nn.Module):
    """As PEFT's ParamWrapper holds a layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return self.base_layer(hidden)


class Saved(nn.Module):
    """As PEFT's ModulesToSaveWrapper holds a layer and the copies of it that are trained."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict({name: copy.deepcopy(original) for name in ("one", "other")})
        self.active_adapters, self.disable_adapters = ["one"], False

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        chosen = self.original_module if self.disable_adapters else self.modules_to_save[self.active_adapters[0]]
        return chosen(hidden)


def recorded(model: nn.Module) -> mr.RoutingStatistics:
    with mr.attach(model) as routed, routed.record() as recorder, torch.no_grad():
        model(input_ids=tokens())
    return recorder.statistics()


def test_a_router_belongs_to_the_module_above_its_wrappers() -> None:
    model = tiny_model("qwen3_moe")
    expected, blocks = recorded(model), [layer.mlp for layer in model.layers]
    for block in blocks:
        block.gate = Around(Around(block.gate))
    routers = mr.routers.find_routers(model)
    assert [router.name for router in routers] == [f"layers.{i}.mlp.gate.base_layer.base_layer" for i in range(3)]
    assert [router.block for router in routers] == blocks
    assert (recorded(model).token_sum("counts") == expected.token_sum("counts")).all()


@pytest.mark.parametrize("disabled", [False, True])
def test_of_saved_copies_the_one_that_runs_is_attached_to(disabled: bool) -> None:
    model = tiny_model("qwen3_moe")
    expected = recorded(model)
    for layer in model.layers:
        layer.mlp.gate = Around(Saved(layer.mlp.gate))
        layer.mlp.gate.base_layer.disable_adapters = disabled
    running = "original_module" if disabled else "modules_to_save.one"
    assert [router.name for router in mr.routers.find_routers(model)] == [
        f"layers.{i}.mlp.gate.base_layer.{running}" for i in range(3)
    ]
    assert (recorded(model).token_sum("counts") == expected.token_sum("counts")).all()


def test_copies_made_after_attaching_are_not_counted_as_nothing() -> None:
    model = tiny_model("qwen3_moe")
    with mr.attach(model) as routed:
        for layer in model.layers:
            layer.mlp.gate = Saved(layer.mlp.gate)
        with pytest.raises(RuntimeError, match=r"none of its routers.*modules_to_save.*attach again"), routed.record():
            model(input_ids=tokens())


def test_an_offloaded_tensor_is_read_from_where_it_is_kept() -> None:
    inner = nn.Linear(2, 3, device="meta")
    outer = nn.Sequential(inner)
    with pytest.raises(RuntimeError, match=r"0\.weight of Sequential is on the meta device"):
        resident(outer, "0.weight")
    hook = SimpleNamespace(weights_map={"weight": torch.ones(3, 2)}, execution_device=torch.device("cpu"))
    inner._hf_hook = hook
    assert resident(outer, "0.weight").sum() == 6
    inner._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(), hook])
    assert resident(outer, "0.weight").sum() == 6
    assert resident(outer, "1.weight") is None


def test_tensors_of_several_devices_are_refused_not_made_up() -> None:
    """torch takes the fake of an operator as soon as one tensor is on the meta device."""
    logits, spec = torch.randn(4, 8), mr.ops.RouterSpec(score="sigmoid")
    with pytest.raises(ValueError, match="the tensors of route lie on cpu and meta: move them to one"):
        mr.ops.route(logits, 2, spec, correction_bias=torch.zeros(8, device="meta"))
    scale = torch.ones(8, device="meta")
    with pytest.raises(ValueError, match="route_weights lie on cpu and meta"):
        mr.ops.route_weights(logits, torch.zeros(4, 2, dtype=torch.int32), spec, expert_scale=scale)


class Speaker:
    def speak(self) -> str:
        return "own"


def test_a_replaced_method_ends_and_is_no_part_of_copies() -> None:
    one = Speaker()
    replaced = ReplacedMethod(one, "speak", lambda: "other")
    replaced.install()
    assert one.speak() == "other"
    other = copy.deepcopy(one)
    assert other.speak() == "own"
    assert other.speak.__self__ is other
    with pytest.raises(RuntimeError, match="speak of Speaker was replaced already"):
        ReplacedMethod(one, "speak", lambda: "third").install()
    replaced.remove()
    assert vars(one) == {}
    again = ReplacedMethod(other, "speak", lambda: "other")
    again.install()  # its own method lies on the instance
    assert other.speak() == "other"
    again.remove()
    assert isinstance(other.speak, MethodType)


def test_an_attached_model_is_not_pickled() -> None:
    model = tiny_model("olmoe")
    attachment = mr.patching.Attachment(model)
    for thing in (model, attachment):
        with pytest.raises(TypeError, match=r"cannot be pickled while moe-route is attached: detach\(\) first"):
            pickle.dumps(thing)
    attachment.detach()
    assert len(pickle.dumps(model)) > 0


def test_a_gate_that_was_wrapped_inside_its_block_is_not_read_without_the_wrapper() -> None:
    model = tiny_model("doge")
    with mr.attach(model) as routed:
        for layer in model.layers:
            layer.mlp.router_gate = Around(layer.mlp.router_gate)
        with (
            pytest.raises(RuntimeError, match=r"'layers\.0\.mlp' was wrapped after attach.*attach again"),
            routed.record(),
        ):
            model(input_ids=tokens())

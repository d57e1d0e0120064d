"""attach(pack=True): packed copies of a model's expert weights, what reads them, and what refuses them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from experts.test_experts import DECORATED, module_of, routing
from harness.tiny_models import tiny_model
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import moe_route as mr
from moe_route import _C
from moe_route.experts import register_experts
from moe_route.experts.forward import experts_forward
from moe_route.experts.layout import gate_of
from moe_route.experts.packing import ATTRIBUTE, PackedWeights, packing_obstacle
from moe_route.ops import expert_paths as paths
from moe_route.routers import ModelNotSupportedError

pytestmark = pytest.mark.skipif(not paths._CPU_HAS_WIDE_VECTORS, reason="this processor has no AVX-512")


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_experts()


@pytest.fixture(params=["portable", "avx2"])
def narrow(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set on which packing gains nothing."""
    before = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(before)


def copies(model: nn.Module) -> list[Any]:
    return [getattr(module, ATTRIBUTE) for module in model.modules() if hasattr(module, ATTRIBUTE)]


@pytest.mark.parametrize("name", DECORATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_class_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    module, inputs = module_of(name, dtype), routing(dtype=dtype)
    if packing_obstacle(module) is not None:
        assert gate_of(module) is None or name == "OpenAIPrivacyFilterExperts", packing_obstacle(module)
        return
    with torch.no_grad():
        expected = experts_forward(module, *inputs)
        setattr(module, ATTRIBUTE, PackedWeights(module))
        with paths.only(paths.PACKED):
            assert torch.equal(experts_forward(module, *inputs), expected)


def test_attach_packs_and_detach_frees() -> None:
    model, ids = tiny_model("qwen3_moe").eval(), torch.arange(48).reshape(2, 24)
    names = list(model.state_dict())
    with torch.no_grad():
        with mr.attach(model, experts_implementation="moe_route"):
            expected = model(ids).last_hidden_state
        with mr.attach(model, experts_implementation="moe_route", pack=True) as routed:
            held = copies(model)
            assert len(held) == len(routed.routers) > 0
            assert torch.equal(model(ids).last_hidden_state, expected)
            assert list(model.state_dict()) == names
            said = mr.describe(model).layers[0].experts_paths
            assert said == f"packed ({held[0].experts.nbytes / 1e6:.4g} MB of packed copies)"
            gone = [weakref.ref(one.experts.up) for one in held]
            del held
    gc.collect()
    assert not copies(model)
    assert all(each() is None for each in gone)


def test_training_leaves_the_packed_copy_alone() -> None:
    model, ids = tiny_model("qwen3_moe"), torch.arange(24).reshape(1, 24)
    plain = copy.deepcopy(model)
    with mr.attach(plain, experts_implementation="moe_route"):
        plain(ids).last_hidden_state.sum().backward()
    with mr.attach(model, experts_implementation="moe_route", pack=True):
        model(ids).last_hidden_state.sum().backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is None or torch.equal(mine.grad, other.grad)


def test_changed_weights_are_refused() -> None:
    model, ids = tiny_model("qwen3_moe").eval(), torch.arange(24).reshape(1, 24)
    state = copy.deepcopy(model.state_dict())
    with mr.attach(model, experts_implementation="moe_route", pack=True), torch.no_grad():
        model(ids)
        model.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"weights of Qwen3MoeExperts changed after they were packed.*pack=True"):
            model(ids)
    with mr.attach(model, experts_implementation="moe_route", pack=True), torch.no_grad():
        model.to(torch.float64).to(torch.float32)  # other storage
        with pytest.raises(RuntimeError, match="changed after they were packed"):
            model(ids)


def test_inference_tensors_are_known_by_their_place() -> None:
    with torch.inference_mode():
        module, inputs = module_of("Qwen3MoeExperts"), routing()
        expected = experts_forward(module, *inputs)
        setattr(module, ATTRIBUTE, PackedWeights(module))
        assert torch.equal(experts_forward(module, *inputs), expected)


def test_compiles_whole() -> None:
    module, inputs = module_of("Qwen3MoeExperts"), routing()
    with torch.no_grad():
        expected = experts_forward(module, *inputs)
        setattr(module, ATTRIBUTE, PackedWeights(module))
        compiled = torch.compile(lambda *given: experts_forward(module, *given), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), expected)


def test_what_cannot_be_packed_is_named(narrow: str) -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ModelNotSupportedError, match=f"cannot be packed: .* on {narrow} here.* Attach with pack=False"):
        mr.attach(model, experts_implementation="moe_route", pack=True)
    assert not copies(model)
    assert mr.describe(model).layers[0].experts_implementation != "moe_route"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda module: module.double(), "torch.float64"),
        (lambda module: module.to("meta"), "its weights are on meta"),
        (
            lambda module: register_parametrization(module, "down_proj", nn.Identity()),
            "its weights are computed at every access",
        ),
        (lambda module: setattr(module, "_apply_gate", None), "its activation is in none of the tables"),
    ],
    ids=["float64", "meta", "parametrized", "gate"],
)
def test_obstacles(change: Any, said: str) -> None:
    module = module_of("Qwen3MoeExperts")
    assert packing_obstacle(module) is None
    change(module)
    assert said in str(packing_obstacle(module))


def test_pack_belongs_to_our_experts() -> None:
    with pytest.raises(ValueError, match="experts_implementation='moe_route'"):
        mr.attach(tiny_model("qwen3_moe"), pack=True)

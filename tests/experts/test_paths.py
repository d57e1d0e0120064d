"""Which way experts run, and that the streamed one computes what the classes' own code does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from experts.test_experts import DECORATED, eager, gap, module_of, routing
from harness.backends import BACKENDS
from torch import Tensor, nn

from moe_route import ops
from moe_route.experts import forward, register_experts
from moe_route.experts.forward import experts_forward
from moe_route.experts.layout import gate_of
from moe_route.ops import expert_paths as paths

EMULATED = next(backend for backend in BACKENDS if backend.emulated)
# Classes whose gate no table knows, with the reason.
OWN_CODE = {
    "BeamExperts": "computes the gate in float32 and rounds",
    "Inkling2Experts": "its act_fn takes gate and up",
    "Inkling2LoopExperts": "its act_fn takes gate and up",
    "Step3p7Experts": "clamps after the activation",
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_experts()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The streamed path of CUDA takes calls on the CPU too; the slots of every call that went there."""
    streamed = replace(paths.PATHS[1], devices=None)
    monkeypatch.setattr(paths, "PATHS", (streamed, paths.PATHS[-1]))
    seen = []
    real = ops.expert_rows

    def counting(x: Tensor, slots: ops.Dispatch, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(slots.inverse.numel())
        return real(x, slots, *args, **kwargs)

    monkeypatch.setattr(forward.ops, "expert_rows", counting)
    return seen


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The path with one activation kernel takes calls on the CPU too, and no call is streamed; rows of every call."""
    one = next(path for path in paths.PATHS if path.name == paths.ACTIVATED)
    monkeypatch.setattr(paths, "PATHS", (replace(one, devices=None), *paths.PATHS))
    seen = []
    real = ops.expert_activation

    def counting(rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(rows.shape[0])
        return real(rows, *args, **kwargs)

    monkeypatch.setattr(forward.ops, "expert_activation", counting)
    return seen


def known(name: str) -> bool:
    return gate_of(module_of(name)) is not None


@pytest.mark.parametrize("name", DECORATED)
def test_streamed_experts_are_those_of_eager(name: str, streams: list[int]) -> None:
    module, inputs = module_of(name), routing()
    with torch.no_grad():
        out = experts_forward(module, *inputs)
    assert gap(out, eager(module, *inputs)) < 2e-6
    assert bool(streams) == known(name)


@pytest.mark.parametrize("name", DECORATED)
def test_one_activation_kernel_gives_the_experts_of_eager(name: str, activated: list[int]) -> None:
    module, inputs = module_of(name), routing()
    with torch.no_grad():
        out = experts_forward(module, *inputs)
    assert gap(out, eager(module, *inputs)) < 2e-6
    assert bool(activated) == known(name)


def test_one_activation_kernel_leaves_training_to_the_module(activated: list[int]) -> None:
    module, inputs = module_of("Qwen3MoeExperts"), routing()
    experts_forward(module, *inputs).sum().backward()
    assert not activated


def test_paths_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few slots are streamed, more have one activation kernel, and what trains runs in the module's own code.

    Where torch serves the device, all do.
    """
    call = paths.Call("cuda", torch.bfloat16, 2, 64, transposed=False, trains=False, row_bytes=4096, known_gate=True)
    monkeypatch.setattr("moe_route.ops.library.serves_cuda", lambda: "no CUDA kernels")
    assert paths.choose(call).name == paths.GROUPED
    monkeypatch.setattr("moe_route.ops.library.serves_cuda", lambda: "")
    wanted = ((256, False, paths.STREAMED), (257, False, paths.ACTIVATED), (257, True, paths.GROUPED))
    for slots, trains, name in wanted:
        call = paths.Call(
            "cuda", torch.bfloat16, slots, 64, transposed=False, trains=trains, row_bytes=4096, known_gate=True
        )
        assert paths.choose(call).name == name


@pytest.mark.skipif(not paths._CPU_HAS_VECTORS, reason="this processor has no AVX2")
def test_long_rows_are_streamed_for_few_slots() -> None:
    """Those of Mixtral's second product, 28 KiB in bfloat16, do not fit the first-level cache."""
    for slots, row_bytes, name in (
        (64, 28 << 10, paths.STREAMED),
        (65, 28 << 10, paths.GROUPED),
        (65, 8 << 10, paths.STREAMED),
    ):
        call = paths.Call(
            "cpu", torch.bfloat16, slots, 8, transposed=False, trains=False, row_bytes=row_bytes, known_gate=True
        )
        assert paths.choose(call).name == name
        limited = row_bytes > 16 << 10 or not paths._CPU_HAS_WIDE_VECTORS or paths._CPU_HAS_MATRICES
        ways = [paths.STREAMED, paths.GROUPED] if limited else [paths.STREAMED]
        assert [name for name, _ in paths.limits(call)] == ways


@pytest.mark.skipif(EMULATED.missing is not None, reason=str(EMULATED.missing))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_activation_kernel_on_the_emulated_device(dtype: torch.dtype, activated: list[int]) -> None:
    module, inputs = module_of("GptOssExperts", dtype), routing(6, dtype=dtype)
    with torch.no_grad():
        here = experts_forward(module, *inputs)
        with EMULATED.within():
            assert torch.equal(experts_forward(module, *inputs), here)
    assert activated == [12, 12]


def test_every_class_is_known_but_those_named_here() -> None:
    assert {name for name in DECORATED if not known(name)} <= OWN_CODE.keys()


@pytest.mark.skipif(EMULATED.missing is not None, reason=str(EMULATED.missing))
@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "AriaTextGroupedExpertsMLP", "GptOssExperts", "NemotronHExperts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_emulated_device(name: str, dtype: torch.dtype, streams: list[int]) -> None:
    if name not in DECORATED:
        pytest.skip("this transformers does not have it")
    module, inputs = module_of(name, dtype), routing(6, dtype=dtype)
    with torch.no_grad():
        here = experts_forward(module, *inputs)
        with EMULATED.within():
            there = experts_forward(module, *inputs)
    assert torch.equal(here, there)
    assert streams == [12, 12]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_the_class_itself(dtype: torch.dtype, streams: list[int]) -> None:
    module, inputs = module_of("Qwen3MoeExperts", dtype), routing(dtype=dtype)
    wide = module_of("Qwen3MoeExperts").double()
    wide.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    with torch.no_grad():
        exact = eager(wide, inputs[0].double(), inputs[1], inputs[2].double())
        ours, theirs = (gap(run(module, *inputs), exact) for run in (experts_forward, eager))
    assert streams
    assert ours < 1.5 * theirs


# ---- what is left to the grouped path


def test_many_slots_take_the_grouped_path(streams: list[int]) -> None:
    """Few are few in all, and for each expert: eight of them share a reading of its weights."""
    for experts, most in ((8, 64), (64, 256)):
        module = module_of("Qwen3MoeExperts", num_experts=experts, num_local_experts=experts)
        streams.clear()
        with torch.no_grad():
            experts_forward(module, *routing(most // 2, experts=experts))
            assert streams == [most]
            experts_forward(module, *routing(most // 2 + 1, experts=experts))
        assert streams == [most]


def test_one_path_only(streams: list[int]) -> None:
    module, many = module_of("Qwen3MoeExperts"), routing(200)
    with torch.no_grad():
        grouped = experts_forward(module, *many)
        with paths.only("streamed"):
            assert gap(experts_forward(module, *many), grouped) < 2e-6
        assert streams == [400]
        with paths.only("grouped"):
            experts_forward(module, *routing(1))
    assert streams == [400]


def test_training_takes_the_grouped_path(streams: list[int]) -> None:
    module, (hidden, ids, weights) = module_of("Qwen3MoeExperts"), routing()
    experts_forward(module, hidden, ids, weights).sum().backward()
    assert not streams
    assert module.down_proj.grad is not None
    module.requires_grad_(False)
    experts_forward(module, hidden.requires_grad_(), ids, weights).sum().backward()
    assert not streams
    experts_forward(module, hidden.detach(), ids, weights)
    assert streams


def test_autocast_and_mixed_dtypes_take_the_grouped_path(streams: list[int]) -> None:
    module, inputs = module_of("Qwen3MoeExperts"), routing()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            experts_forward(module, *inputs)
        experts_forward(module.double(), inputs[0].double(), *inputs[1:])
    assert not streams


def test_what_somebody_changed_is_left_to_the_module(streams: list[int]) -> None:
    """A hook on the activation still sees it, and a gate that was replaced still runs."""
    inputs, seen = routing(), []
    hooked, replaced = module_of("Qwen3MoeExperts"), module_of("Qwen3MoeExperts")
    hooked.act_fn.register_forward_hook(lambda *_: seen.append(1))
    replaced._apply_gate = lambda rows: rows.chunk(2, -1)[0]
    unknown = module_of("Qwen3MoeExperts")
    unknown.act_fn = nn.Mish()
    for module in (hooked, replaced, unknown):
        expected = experts_forward(module, *inputs).detach()  # gradients are on: the grouped path
        with torch.no_grad():
            assert torch.equal(experts_forward(module, *inputs), expected)
    assert seen
    assert not streams


def test_slots_of_nobody_are_skipped(streams: list[int]) -> None:
    module, (hidden, ids, weights) = module_of("Qwen3MoeExperts"), routing()
    ids[::2, 0], ids[1::3, 1] = -1, 8
    weights = weights.masked_fill((ids < 0) | (ids >= 8), float("nan"))
    with torch.no_grad():
        out = experts_forward(module, hidden, ids, weights)
        served = torch.where((ids >= 0) & (ids < 8), weights, 0.0)
        expected = eager(module, hidden, ids.clamp(0, 7), served)
    assert streams
    assert gap(out, expected) < 2e-6


def test_compiles_whole(streams: list[int]) -> None:
    module, inputs = module_of("GptOssExperts"), routing(4)
    with torch.no_grad():
        run = torch.compile(lambda *given: experts_forward(module, *given), fullgraph=True, backend="aot_eager")
        assert torch.equal(run(*inputs), experts_forward(module, *inputs))
    assert streams

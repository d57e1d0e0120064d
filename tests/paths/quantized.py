"""Quantized weights, by the packages that run on a CPU; where a format's kernels need a GPU, the classes that
transformers puts in place, with real packed weights and the kernel played by torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_route as mr
from moe_route.routers import find_routers
from paths.oracle import assert_recorded_and_steered, same_outputs
from paths.registry import path
from paths.subject import NotApplicableError, Subject, by_transformers, run


def check(subject: Subject, build: Callable[[], Any]) -> None:
    """A model with quantized weights in it is recorded and steered."""
    model = by_transformers(build)
    given = subject.inputs(model)
    plain = by_transformers(lambda: run(model, given))
    by_transformers(lambda: same_outputs(run(model, given), plain))
    with mr.attach(model) as routed:
        assert_recorded_and_steered(routed, model, given, plain)


def reloaded(subject: Subject, quantization: Any, dtype: torch.dtype, kind: str) -> Any:
    """Saved and loaded with a quantization, which must have replaced something of the module or tensor class `kind`."""
    model = subject.fresh(dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = (
            type(model).from_pretrained(folder, quantization_config=quantization, dtype=dtype, device_map="cpu").eval()
        )
    kinds = {type(module).__name__ for module in loaded.modules()}
    kinds |= {type(parameter).__name__ for parameter in loaded.parameters()}
    kinds |= {type(parameter.data).__name__ for parameter in loaded.parameters()}
    assert kind in kinds, f"nothing was quantized: {sorted(kinds)}"
    return loaded


@path(
    "Quantized", "bitsandbytes 8-bit", "loaded with load_in_8bit on the CPU", cost="costly", packages=("bitsandbytes",)
)
def eight_bits(subject: Subject) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    check(subject, lambda: reloaded(subject, config, torch.float32, "Linear8bitLt"))


@path(
    "Quantized", "bitsandbytes 4-bit", "loaded with load_in_4bit on the CPU", cost="costly", packages=("bitsandbytes",)
)
def four_bits(subject: Subject) -> None:
    from transformers import BitsAndBytesConfig

    head = subject.model.get_output_embeddings()
    linear = {name: module for name, module in subject.model.named_modules() if isinstance(module, nn.Linear)}
    kept = [name for name, module in linear.items() if module is head or not _packs(module)]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=kept or None
    )
    check(subject, lambda: reloaded(subject, config, torch.float32, "Linear4bit"))


def _packs(linear: nn.Linear) -> bool:
    """Whether bitsandbytes packs a matrix of this size for a CPU: those of real models, few of tiny ones."""
    return linear.in_features % 64 == 0 and linear.out_features % 32 == 0


@path("Quantized", "torchao", "loaded with torchao's int8 weights on the CPU", cost="costly", packages=("torchao",))
def torchao(subject: Subject) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    check(subject, lambda: reloaded(subject, config, torch.float32, "Int8Tensor"))


@path(
    "Quantized",
    "FP8",
    "transformers' FP8 classes for linear layers and experts; their kernels need a GPU, so the weights are bfloat16",
    cost="costly",
)
def fp8(subject: Subject) -> None:
    check(subject, lambda: with_fp8_classes(subject))


def with_fp8_classes(subject: Subject) -> Any:
    from transformers import FineGrainedFP8Config
    from transformers.integrations import finegrained_fp8 as integration

    model, own = subject.fresh(dtype=torch.bfloat16), subject.fresh(dtype=torch.bfloat16)
    kept = [router.name for router in find_routers(model)] + ["lm_head"]
    integration.replace_with_fp8_linear(model, kept, FineGrainedFP8Config(weight_block_size=(16, 16)))
    kinds = (integration.FP8Linear, integration.FP8Experts)
    replaced = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if not replaced:
        raise NotApplicableError("transformers replaces nothing in it by its FP8 classes")
    for name in replaced:
        for key, parameter in own.get_submodule(name).named_parameters(recurse=False):
            setattr(model.get_submodule(name), key, parameter)
    if any(isinstance(module, integration.FP8Experts) for module in model.modules()):
        model.set_experts_implementation("eager")
    return model.eval()


@path(
    "Quantized",
    "GGUF",
    "transformers' class for experts left in GGUF blocks (Q8_0), its kernel played by torch",
    cost="costly",
    packages=("gguf",),
)
def gguf(subject: Subject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        check(subject, lambda: with_gguf_experts(subject, patch))


def with_gguf_experts(subject: Subject, patch: pytest.MonkeyPatch) -> Any:
    from gguf import GGMLQuantizationType, quants
    from transformers.integrations.gguf import kernels, utils

    kind = GGMLQuantizationType.Q8_0

    def mul_mat_id(blocks: Tensor, x: Tensor, ids: Tensor, ggml_type: int, rows: int) -> Tensor:
        experts = kernels.dequantize_blocks(blocks.flatten(0, 1), ggml_type, len(blocks) * rows, x.shape[-1], x.dtype)
        return torch.einsum("th,tkoh->tko", x, experts.view(len(blocks), rows, -1)[ids.long()])

    patch.setattr(kernels, "_gguf_kernel", SimpleNamespace(mul_mat_id=mul_mat_id))
    patch.setattr(kernels, "kernel_can_read", lambda tensor: False)
    model = subject.fresh()
    names = [n for n, m in model.named_modules() if n.endswith(".experts") and _like_gguf(m)]
    if not names:
        raise NotApplicableError("transformers has no GGUF class for its experts")
    for name in names:
        own = model.get_submodule(name)
        sizes = (own.num_experts, own.down_proj.shape[1], own.down_proj.shape[2])
        packed = utils.GgufExperts(*sizes, int(kind), int(kind), own.act_fn)
        for key in ("gate_up_proj", "down_proj"):
            blocks = quants.quantize(getattr(own, key).detach().numpy(), kind)
            getattr(packed, key).data = torch.from_numpy(blocks)
        model.set_submodule(name, packed)
    return model.eval()


def _like_gguf(experts: nn.Module) -> bool:
    """Whether an experts module is of the one layout that GGUF's class has: gated, no bias, not transposed."""
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    return hasattr(experts, "gate_up_proj") and all(getattr(experts, n, None) is value for n, value in flags.items())


@path(
    "Quantized",
    "MXFP4",
    "the MXFP4 block of transformers, which routes inside a kernel (played by torch) and is led through its router",
    cost="costly",
)
def mxfp4(subject: Subject) -> None:
    if subject.name != "gpt_oss":
        raise NotApplicableError("transformers has MXFP4 for gpt-oss alone")
    from routers.test_specials import packed_model

    with pytest.MonkeyPatch.context() as patch:
        check(subject, lambda: packed_model(patch))

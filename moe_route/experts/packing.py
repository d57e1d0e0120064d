"""Packed copies of experts' weights, which CPU kernels read faster: made by `attach(pack=True)`, used by `forward`.

The weights themselves stay where they are, for `state_dict`, for training and for calls that take another path. So a
copy takes as much memory again. A module holds its copy in an attribute that is neither parameter nor buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from moe_route import ops
from moe_route.contract.experts import PackedExperts
from moe_route.experts.layout import compute_dtype, gate_of, obstacle, stored_weights, up_projection, weight_and_bias
from moe_route.ops import library
from moe_route.ops.expert_paths import PACKED_DTYPES

ATTRIBUTE = "_moe_route_packed"


class PackedWeights:
    """The packed copy of one module's weights, and what they were when it was made."""

    def __init__(self, module: Any) -> None:
        gate = gate_of(module)
        if gate is None:
            raise RuntimeError(f"the activation of {type(module).__name__} is in none of the tables")
        up, down = (weight_and_bias(module, name)[0] for name in (up_projection(module), "down_proj"))
        self.experts: PackedExperts = ops.pack_experts(up.detach(), down.detach(), pairing=gate.pairing)
        self._of = _states(module)

    def check(self, module: Any) -> None:
        """Raise `RuntimeError` if a weight was replaced or changed in place since."""
        if _states(module) != self._of:
            raise RuntimeError(
                f"the weights of {type(module).__name__} changed after they were packed. Detach, and attach again with "
                "pack=True; or attach without pack while weights change."
            )


def is_packed(module: Any) -> bool:
    """Whether a module holds a packed copy of its weights."""
    return getattr(module, ATTRIBUTE, None) is not None


def packed_bytes(module: Any) -> int:
    """Bytes of the packed copy of a module's weights; 0 without one."""
    held: PackedWeights | None = getattr(module, ATTRIBUTE, None)
    return 0 if held is None else held.experts.nbytes


def packed_weights(module: Any) -> PackedExperts:
    """The packed copy of a module's weights.

    Raises `RuntimeError` if a weight has changed since it was made. A compiled call does not look, since tracing would.
    """
    held: PackedWeights = getattr(module, ATTRIBUTE)
    if not torch.compiler.is_compiling():
        held.check(module)
    return held.experts


def packing_obstacle(module: Any) -> str | None:
    """Why a module's weights cannot be packed, or packing them would gain nothing; or None."""
    why = obstacle(module)
    if why is not None:
        return why
    if is_parametrized(module):
        return "its weights are computed at every access (torch.nn.utils.parametrize)"
    weights = stored_weights(module)
    places = sorted({weight.device.type for weight in weights} - {"cpu"})
    if places:
        return f"its weights are on {' and '.join(places)}, and packed weights are for a CPU"
    if not library.instruction_set().startswith("avx512"):
        return f"the kernels run on {library.instruction_set()} here, and packing gained time with AVX-512 only"
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1 or not dtypes <= PACKED_DTYPES or compute_dtype(module) not in dtypes:
        said = " and ".join(sorted(str(dtype) for dtype in dtypes))
        return f"its weights are {said}, computed in {compute_dtype(module)}: one of bfloat16, float16 and float32 is"
    if not all(weight.is_contiguous() for weight in weights):
        return "its weights are not contiguous"
    if gate_of(module) is None:
        return "its activation is in none of the tables of moe_route.experts.layout, so the grouped path runs it"
    return None


def _states(module: nn.Module) -> list[tuple[int, int]]:
    """Where each weight lies and how often it was changed in place; inference tensors do not count their changes."""
    return [_state(weight) for weight in stored_weights(module)]


def _state(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version

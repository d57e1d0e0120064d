"""Checks of the operators' arguments, for the torch backend: those of csrc/torch, in the same order and words.

Every function takes the arguments of its operator (`moe_route/ops/schemas.py`), less the numbers that may be anything,
and raises ValueError that names the first bad one and how to fix it. Values inside tensors are read on a CPU alone:
anywhere else that would wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from moe_route.contract.experts import ACTIVATIONS
from moe_route.contract.limits import MAX_CHOSEN, MAX_EXPERTS, MAX_ROWS
from moe_route.contract.spec import RENORMALIZATIONS, SCORES
from moe_route.contract.tables import ENTROPY_BIT, METRICS, ROW_PARAMETERS, SCALARS, STEERING_PLANES

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_INTEGERS = frozenset({torch.int32, torch.int64})
_ANY = -1
_ADDRESSED = ("cpu", "cuda")  # devices whose tensors tell where their memory lies


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


def _shape_text(shape: Sequence[int]) -> str:
    return f"[{', '.join('any' if size == _ANY else str(size) for size in shape)}]"


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        _refuse(f"{name} are {tensor.layout}; they must be dense: call .to_dense() first")


def _last_element(tensor: Tensor) -> int:
    """Where the last element of a tensor that is not empty lies, from its first one."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _check_storage(name: str, tensor: Tensor) -> None:
    if max(tensor.shape, default=0) > MAX_ROWS:
        _refuse(f"{name} has shape {_shape_text(tensor.shape)}; sizes up to {MAX_ROWS} are supported")
    if tensor.device.type not in _ADDRESSED or tensor.numel() == 0:
        return
    size = tensor.untyped_storage().nbytes()
    if size == 0:
        _refuse(
            f"{name} has no memory: its storage was freed (untyped_storage().resize_(0), as FSDP does with shards); "
            "use it before it is freed, or make it anew"
        )
    end = (tensor.storage_offset() + _last_element(tensor) + 1) * tensor.element_size()
    if end > size:
        _refuse(
            f"{name} ends at byte {end} of a storage of {size}: it was resized (untyped_storage().resize_); use it "
            "before that, or make it anew"
        )


def _check_apart(name: str, written: Tensor | None, other_name: str, other: Tensor | None) -> None:
    """Refuse a tensor that is written to and shares memory with another of the call."""
    if written is None or other is None or written.numel() == 0 or other.numel() == 0:
        return
    if written.device.type not in _ADDRESSED:
        return
    (first, end), (other_first, other_end) = (
        (tensor.data_ptr(), tensor.data_ptr() + (_last_element(tensor) + 1) * tensor.element_size())
        for tensor in (written, other)
    )
    if first < other_end and other_first < end:
        _refuse(f"{name} shares memory with {other_name}; give it memory of its own (.clone())")


def _check_place(name: str, tensor: Tensor, leader: str, place: torch.device) -> None:
    if tensor.device != place:
        _refuse(
            f"{name} (on {tensor.device}) and {leader} (on {place}) must be on one device; "
            f"move {name} with .to('{place}')"
        )


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.dim() != len(shape) or any(
        want not in (_ANY, size) for size, want in zip(tensor.shape, shape, strict=True)
    ):
        _refuse(f"{name} has shape {_shape_text(tensor.shape)}; it must be {_shape_text(shape)}")


def _check_packed(name: str, tensor: Tensor, shape: Sequence[int], leader: str, place: torch.device) -> None:
    """Check a tensor of which a contiguous copy may be made."""
    _check_storage(name, tensor)
    _check_shape(name, tensor, shape)
    _check_place(name, tensor, leader, place)


def _check_tensor(
    name: str,
    tensor: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype | None,
    leader: str,
    place: torch.device,
) -> None:
    """Check shape, place, contiguity, memory and dtype of a tensor that is read or written where it lies."""
    if tensor is None:
        return
    _check_shape(name, tensor, shape)
    _check_place(name, tensor, leader, place)
    if not tensor.is_contiguous():
        _refuse(f"{name} is not contiguous; call .contiguous() on it first")
    _check_storage(name, tensor)
    if dtype is not None and tensor.dtype is not dtype:
        word = str(dtype).removeprefix("torch.")
        _refuse(f"{name} must be {word}; convert it with .to(torch.{word})")


def _check_index(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _INTEGERS:
        _refuse(f"{name} must be int32 or int64")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        _refuse(f"{name} must be float32, bfloat16, float16 or float64")


# ---- the gate


def _check_logits(logits: Tensor, k: int, tokens: Tensor | None) -> None:
    _check_dense("logits", logits)
    if logits.dim() != 2:
        _refuse(
            f"logits have shape {_shape_text(logits.shape)}; they must be [tokens, experts] "
            "(reshape(-1, experts) first)"
        )
    _check_float("logits", logits)
    rows, experts = logits.shape
    if not 1 <= experts <= MAX_EXPERTS:
        _refuse(f"logits have {experts} experts; 1..{MAX_EXPERTS} are supported")
    most = min(experts, MAX_CHOSEN)
    if not 1 <= k <= most:
        _refuse(f"k = {k} is outside 1..{most} (at most the {experts} experts, at most {MAX_CHOSEN})")
    if tokens is not None:
        _check_tensor("tokens", tokens, (rows, 4), torch.int32, "logits", logits.device)
    _check_storage("logits", logits)


def _check_policy(policy: int, experts: int) -> None:
    if policy & 15 >= len(SCORES) or policy >> 6 & 7 >= len(RENORMALIZATIONS):
        _refuse(f"policy {policy} is not one that RouterSpec packs")
    groups, top_groups = policy >> 16 & 0xFFFF, policy >> 32 & 0xFFFF
    if groups < 1 or experts % groups:
        _refuse(f"spec.groups = {groups} does not divide the {experts} experts")
    if not 1 <= top_groups <= groups:
        _refuse(f"spec.top_groups = {top_groups} is outside 1..{groups} (spec.groups)")


def _check_steering(
    tables: Tensor | None,
    planes: int,
    row_params: Tensor | None,
    remap: Tensor | None,
    experts: int,
    place: torch.device,
) -> None:
    if not 0 <= planes < 1 << len(STEERING_PLANES):
        _refuse(f"steering_planes = {planes} has bits of no plane")
    if (tables is not None) != (planes != 0):
        _refuse("steering tables and steering_planes must come together")
    rows = 0
    for part in (tables, row_params, remap):
        if part is not None and rows == 0 and part.dim() > 0:
            rows = part.shape[0]
    shape = (rows, planes.bit_count(), experts)
    _check_tensor("steering", tables, shape, torch.float32, "logits", place)
    _check_tensor("row_params", row_params, (rows, len(ROW_PARAMETERS)), torch.float32, "logits", place)
    _check_tensor("remap", remap, (rows, experts), torch.int32, "logits", place)


def _check_given(ids: Tensor | None, weights: Tensor | None, mode: int, rows: int, k: int, place: torch.device) -> None:
    if not 0 <= mode <= 3:
        _refuse(f"choice_mode = {mode} is outside 0..3")
    if (ids is not None) != (mode != 0):
        _refuse("choice and choice_mode must come together")
    if ids is None:
        if weights is not None:
            _refuse("choice weights need choice")
        return
    _check_packed("choice ids", ids, (rows, k), "logits", place)
    _check_index("choice ids", ids)
    if weights is not None:
        _check_packed("choice weights", weights, (rows, k), "logits", place)
        _check_float("choice weights", weights)


def _check_statistics(groups: Tensor | None, layout: int, segments: Tensor | None, logits: Tensor) -> None:
    experts, place = logits.shape[1], logits.device
    planes = layout & (1 << ENTROPY_BIT) - 1
    if not 0 <= layout < 2 << ENTROPY_BIT or planes >= 1 << len(METRICS):
        _refuse(f"statistics = {layout} has bits of no plane")
    shape = (_ANY, len(SCALARS) + planes.bit_count() * experts)
    _check_tensor("group_statistics", groups, shape, torch.int64, "logits", place)
    _check_tensor("segment_statistics", segments, shape, torch.int64, "logits", place)
    _check_apart("segment_statistics", segments, "group_statistics", groups)
    _check_apart("group_statistics", groups, "logits", logits)
    _check_apart("segment_statistics", segments, "logits", logits)


_Statistics = tuple[Tensor | None, int, Tensor | None]  # of groups, layout, of segments
_Steering = tuple[Tensor | None, int, Tensor | None, Tensor | None]  # tables, planes, row parameters, remap
_Given = tuple[Tensor | None, Tensor | None, int]  # ids, weights, mode


def route(
    logits: Tensor,
    k: int,
    policy: int,
    tokens: Tensor | None,
    statistics: _Statistics,
    own: tuple[Tensor | None, Tensor | None],
    steering: _Steering,
    given: _Given,
) -> None:
    """``own`` are the model's correction_bias and expert_scale."""
    _check_logits(logits, k, tokens)
    (rows, experts), place = logits.shape, logits.device
    _check_policy(policy, experts)
    if own != (None, None):
        _check_tensor("correction_bias", own[0], (experts,), torch.float32, "logits", place)
        _check_tensor("expert_scale", own[1], (experts,), torch.float32, "logits", place)
    if steering != (None, 0, None, None):
        _check_steering(*steering, experts, place)
    if given != (None, None, 0):
        _check_given(*given, rows, k, place)
    _check_statistics(*statistics, logits)


def observe(
    logits: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    policy: int,
    tokens: Tensor | None,
    statistics: _Statistics,
    expert_scale: Tensor | None,
) -> None:
    if ids.dim() != 2:
        _refuse(f"ids have shape {_shape_text(ids.shape)}; they must be [tokens, k]")
    k = ids.shape[1]
    _check_logits(logits, k, tokens)
    (rows, experts), place = logits.shape, logits.device
    _check_policy(policy, experts)
    _check_tensor("expert_scale", expert_scale, (experts,), torch.float32, "logits", place)
    _check_given(ids, weights, 1, rows, k, place)
    _check_statistics(*statistics, logits)


def observe_layers(
    logits: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
    group_statistics: Sequence[Tensor],
    segment_statistics: Sequence[Tensor],
) -> None:
    """Check the lists alone; each layer is checked as it is observed."""
    for part in (ids, weights, group_statistics, segment_statistics):
        if len(part) != len(logits) and not (part is segment_statistics and not part):
            _refuse(f"{len(logits)} layers of logits, but a list of {len(part)}; every list needs one per layer")


def route_weights(
    logits: Tensor, ids: Tensor, policy: int, tokens: Tensor | None, expert_scale: Tensor | None, steering: _Steering
) -> None:
    if ids.dim() != 2:
        _refuse(f"ids have shape {_shape_text(ids.shape)}; they must be [tokens, k]")
    k = ids.shape[1]
    _check_logits(logits, k, tokens)
    (rows, experts), place = logits.shape, logits.device
    _check_policy(policy, experts)
    _check_tensor("expert_scale", expert_scale, (experts,), torch.float32, "logits", place)
    _check_steering(*steering, experts, place)
    _check_given(ids, None, 2, rows, k, place)


# ---- dispatch, permute, combine


def dispatch(ids: Tensor, num_experts: int, block: int) -> None:
    if ids.dim() != 2:
        _refuse(f"ids have shape {_shape_text(ids.shape)}; they must be [tokens, k]")
    if not 1 <= num_experts <= MAX_EXPERTS:
        _refuse(f"num_experts = {num_experts} is outside 1..{MAX_EXPERTS}")
    if not 1 <= block <= 65536:
        _refuse(f"block = {block} is outside 1..65536")
    capacity = ids.numel() + num_experts * (block - 1)
    if capacity > MAX_ROWS:
        _refuse(
            f"{ids.numel()} slots of {num_experts} experts take up to {capacity} rows (block = {block}), more than "
            f"the {MAX_ROWS} that are supported; dispatch the tokens in parts"
        )
    _check_storage("ids", ids)
    _check_index("ids", ids)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> None:
    if x.dim() != 2:
        _refuse(f"x has shape {_shape_text(x.shape)}; it must be [tokens, hidden]")
    _check_tensor("inverse", inverse, (x.shape[0], _ANY), torch.int64, "x", x.device)
    _check_tensor("order", order, (_ANY,), torch.int64, "x", x.device)
    _check_storage("x", x)
    _check_float("x", x)


def combine(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, residual: Tensor | None) -> None:
    if rows.dim() != 2:
        _refuse(f"rows have shape {_shape_text(rows.shape)}; they must be [dispatched rows, hidden]")
    place = rows.device
    _check_tensor("inverse", inverse, (_ANY, _ANY), torch.int64, "rows", place)
    _check_tensor("order", order, (rows.shape[0],), torch.int64, "rows", place)
    tokens, k = inverse.shape
    _check_storage("rows", rows)
    _check_storage("weights", weights)
    _check_float("rows", rows)
    _check_packed("weights", weights, (tokens, k), "rows", place)
    wide = torch.float64 if rows.dtype is torch.float64 else torch.float32
    if weights.dtype is not wide:
        word = str(wide).removeprefix("torch.")
        _refuse(f"weights must be {word}; convert it with .to(torch.{word})")
    if residual is not None:
        _check_packed("residual", residual, (tokens, rows.shape[1]), "rows", place)
        if residual.dtype is not rows.dtype:
            _refuse("residual must have the dtype of rows")


# ---- experts


def _check_product_type(name: str, tensor: Tensor) -> None:
    _check_float(name, tensor)
    if tensor.dtype is torch.float64:
        _refuse(f"{name} is float64; it must be float32, bfloat16 or float16")


def _experts_of(offsets: Tensor) -> int:
    experts = offsets.shape[0] - 1 if offsets.dim() == 1 else -1
    if not 1 <= experts <= MAX_EXPERTS:
        _refuse(f"offsets have shape {_shape_text(offsets.shape)}; they must be [experts + 1]")
    return experts


def _check_offsets(offsets: Tensor, rows: int) -> None:
    if offsets.device.type != "cpu":
        return
    values = offsets.numpy()
    wrong = np.flatnonzero((values < np.append(0, values[:-1])) | (values > rows))
    if wrong.size:
        _refuse(
            f"offsets[{wrong[0]}] = {values[wrong[0]]}; offsets must not fall, and lie in 0..{rows} (the rows): take "
            "those of moe_route.ops.dispatch"
        )


def _check_slots(offsets: Tensor, counts: Tensor, order: Tensor, tokens: int, k: int) -> None:
    """Check what the tables of a dispatch hold, where reading it does not wait."""
    _check_offsets(offsets, order.shape[0])
    if offsets.device.type != "cpu":
        return
    ranges, counted, slots = np.diff(offsets.numpy()), counts.numpy(), order.numpy()
    wrong = np.flatnonzero((counted < 0) | (counted > ranges))
    if wrong.size:
        expert = wrong[0]
        _refuse(
            f"counts[{expert}] = {counted[expert]} is outside 0..{ranges[expert]} (the rows of expert {expert} by "
            "offsets): take those of moe_route.ops.dispatch"
        )
    wrong = np.flatnonzero((slots < -1) | (slots >= tokens * k))
    if wrong.size:
        _refuse(
            f"order[{wrong[0]}] = {slots[wrong[0]]} is outside -1..{tokens * k - 1} (tokens of x times k = {k}): take "
            "that of moe_route.ops.dispatch"
        )


def _check_weight(name: str, weight: Tensor, experts: int, inner: int, x: Tensor) -> None:
    if weight.dim() != 3 or weight.shape[0] != experts or weight.shape[2] != inner:
        _refuse(
            f"{name} has shape {_shape_text(weight.shape)}; it must be [{experts}, any, {inner}] (experts, out, in)"
        )
    _check_place(name, weight, "x", x.device)
    if weight.dtype is not x.dtype:
        _refuse(f"{name} must have the dtype of x; convert one to the other")
    _check_storage(name, weight)
    if not weight.is_contiguous() and not weight.transpose(-2, -1).is_contiguous():
        _refuse(
            f"{name} is neither contiguous nor a transposed view (.transpose(-2, -1)) of a contiguous tensor; "
            "call .contiguous() on it first"
        )


def _check_bias(name: str, bias: Tensor | None, weight: Tensor, place: torch.device) -> None:
    if bias is not None:
        _check_tensor(name, bias, weight.shape[:2], None, "x", place)
        if bias.dtype is not weight.dtype:
            _refuse(f"{name} must have the dtype of its weight")


def _check_between(activation: int, pairing: int) -> int:
    """Columns of a first product that become one: 1 without a gate."""
    if not 0 <= pairing <= 2:
        _refuse(f"pairing = {pairing} is outside 0..2")
    if not 1 <= activation <= len(ACTIVATIONS):
        _refuse(f"activation {activation} is not one that moe_route.ops.Activation packs")
    return 1 if pairing == 0 else 2


def expert_rows(
    x: Tensor,
    slots: tuple[Tensor, Tensor, Tensor],
    k: int,
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    activation: int,
    pairing: int,
    panels: tuple[Tensor | None, Tensor | None],
) -> None:
    """``slots`` are offsets, counts and order; ``up`` and ``down`` each a weight and its bias."""
    if x.dim() != 2:
        _refuse(f"x has shape {_shape_text(x.shape)}; it must be [tokens, hidden]")
    place, experts = x.device, _experts_of(slots[0])
    _check_product_type("x", x)
    if k < 1 or k > MAX_ROWS:
        _refuse(f"k = {k} is below 1" if k < 1 else f"k = {k} is above {MAX_ROWS}")
    _check_storage("x", x)
    for name, tensor, size in zip(("offsets", "counts", "order"), slots, (experts + 1, experts, _ANY), strict=True):
        _check_tensor(name, tensor, (size,), torch.int64, "x", place)
    _check_slots(*slots, x.shape[0], k)
    _check_weight("up", up[0], experts, x.shape[1], x)
    factor, rows = _check_between(activation, pairing), up[0].shape[1]
    if rows % factor:
        _refuse(f"up has {rows} rows, an odd number; a gate and its columns take two each")
    _check_bias("up_bias", up[1], up[0], place)
    _check_weight("down", down[0], experts, rows // factor, x)
    _check_bias("down_bias", down[1], down[0], place)
    if panels != (None, None):
        _refuse(f"panels are packed for the kernels of a CPU, and torch serves {place} here; leave them out")


def expert_activation(rows: Tensor, offsets: Tensor, bias: Tensor | None, activation: int, pairing: int) -> None:
    if rows.dim() != 2:
        _refuse(f"rows have shape {_shape_text(rows.shape)}; they must be [dispatched rows, columns]")
    _check_product_type("rows", rows)
    factor = _check_between(activation, pairing)
    experts = _experts_of(offsets)
    _check_tensor("offsets", offsets, (experts + 1,), torch.int64, "rows", rows.device)
    if rows.shape[1] % factor:
        _refuse(f"rows have {rows.shape[1]} columns, an odd number; a gate and its columns take two each")
    _check_storage("rows", rows)
    if bias is not None:
        _check_tensor("bias", bias, (experts, rows.shape[1]), None, "rows", rows.device)
        if bias.dtype is not rows.dtype:
            _refuse("bias must have the dtype of rows")
    _check_offsets(offsets, rows.shape[0])

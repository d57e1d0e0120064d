"""Products of rows with the matrix of their expert, and gradients of them: libraries multiply, this chooses which.

The rows of an expert lie together, as `dispatch` and `permute` leave them; `ends` int32 [E] says where each range ends.
The operators here are written in torch, so that one description serves every device, fake tensors and autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from moe_route.contract.experts import Dispatch


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, slots: Dispatch) -> Tensor:
    """Multiply rows [R, in] by the weight [out, in] of their expert and add its bias: [R, out] in the rows' dtype.

    Weights [E, out, in] and biases of another dtype are converted, on the CPU one expert at a time. Under autocast rows
    are cast first, as in `torch.nn.functional.linear`.

    Rows behind the range of the last expert (skipped slots) may be undefined: neither combine nor the backward of
    permute reads them. There is no forward-mode derivative (NotImplementedError).
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "products of experts have no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use "
            "backward() or torch.func.vjp"
        )
    if torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64:
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    out = _grouped_product(rows, weight, slots.ends)
    if bias is None:
        return out
    # Rows that no expert owns use an extra bias row of zeros, so that their undefined gradient reaches no expert.
    padded = torch.cat([bias, bias.new_zeros(1, bias.shape[1])]).to(out.dtype)
    row = torch.arange(rows.shape[0], device=rows.device)
    return out + padded[torch.searchsorted(slots.offsets[1:], row, right=True)]


# ---- grouped matrix products ------------------------------------------------------------------------------------
# Operators of their own, because torch.compile can trace neither the loop nor torch.nn.functional.grouped_mm, which it
# supports in bfloat16 only.


@torch.library.custom_op("moe_route::grouped_product", mutates_args=())
def _grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows[ends[e - 1]:ends[e]] @ weight[e].T for every expert e: [R, in], [E, out, in], int32 [E] -> [R, out]."""
    return _product(rows, weight, ends)


def _product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    takes = _grouped_mm_takes(rows, weight.shape[1:])
    if rows.device.type != "cpu" and not takes:
        return _product_by_tiles(rows, weight, ends)
    if takes or _grouped_mm_pays(rows, weight):
        weight = weight.to(rows.dtype)
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    columns = weight.transpose(-2, -1)
    for expert, (begin, end) in enumerate(_ranges(ends)):
        if begin < end:
            torch.mm(rows[begin:end], columns[expert].to(rows.dtype), out=out[begin:end])
    return out


@torch.library.custom_op("moe_route::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left[range e].T @ right[range e] for every expert e: [R, out], [R, in], int32 [E] -> [E, out, in]."""
    return _outer(left, right, ends)


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    if _grouped_mm_takes(left, (left.shape[1], right.shape[1])):
        return F.grouped_mm(left.T, right, offs=ends)
    if left.device.type != "cpu":
        return _outer_by_tiles(left, right, ends)
    out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
    for matrix, (begin, end) in zip(out.unbind(0), _ranges(ends), strict=True):
        if begin < end:
            torch.mm(left[begin:end].T, right[begin:end], out=matrix)
    return out


def _grouped_mm_takes(rows: Tensor, sizes: Sequence[int]) -> bool:
    """Whether torch multiplies all groups in one CUDA kernel.

    This needs bfloat16, rows of a multiple of 16 bytes, and compute capability 9 or 10. Other devices wait for the
    offsets and loop (pytorch issue 186620).
    """
    plain = rows.is_cuda and rows.dtype == torch.bfloat16 and rows.shape[0] > 0 and _aligned(rows, sizes)
    return plain and _groups_in_one_kernel(rows.device)


@cache
def _groups_in_one_kernel(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _grouped_mm_pays(rows: Tensor, weight: Tensor) -> bool:
    """Whether `grouped_mm` is faster than our loop on the CPU, where it gives the same bits.

    It loops in C++, over experts without rows too. So it pays if there are at least as many rows as experts and it
    accepts the layout of the weights.
    """
    plain = rows.dtype == weight.dtype != torch.float64 and _aligned(rows, weight.shape[1:]) and rows.is_contiguous()
    whole = weight.is_contiguous() or weight.transpose(-2, -1).is_contiguous()
    return rows.is_cpu and plain and whole and rows.shape[0] >= weight.shape[0] and _on_cpu(rows.dtype)


@cache
def _on_cpu(dtype: torch.dtype) -> bool:
    """Whether this version of torch has `grouped_mm` for this dtype on the CPU."""
    rows, weight = torch.ones(1, 16, dtype=dtype, device="cpu"), torch.ones(1, 16, 16, dtype=dtype, device="cpu")
    try:
        F.grouped_mm(rows, weight, offs=torch.ones(1, dtype=torch.int32, device="cpu"))
    except (AttributeError, RuntimeError):
        return False
    return True


# ---- on CUDA devices for which torch has no kernel for groups: tiles ------------------------------------------------
# Rows are divided into tiles, each of which belongs to one expert. The number of tiles depends on shapes only, and the
# device computes the expert of each tile. So the host never waits, and a captured graph is valid for every routing. The
# cost is a copy of each tile's matrix, about two per expert.

_MOST_TILE_ROWS = 256
_COPIED_BYTES = 1 << 28  # largest size of matrices copied at a time


class _Tiles(NamedTuple):
    expert: Tensor  # [tiles]; any value for a tile without rows
    row: Tensor  # [tiles, size]: the rows of a tile; any value where there is no row
    used: Tensor  # bool [tiles, size]: whether there is a row
    place: Tensor  # [R]: index of a row in [tiles * size]; any value for a row that no expert owns


def _tiles(ends: Tensor, num_rows: int) -> _Tiles:
    """Choose the tile size as the mean number of rows per expert, so that tiles hold at most twice the rows."""
    experts, device, end = ends.shape[0], ends.device, ends.to(torch.int64)
    size = min(1 << max(num_rows // experts - 1, 0).bit_length(), _MOST_TILE_ROWS)
    tiles = (num_rows + min(experts, num_rows) * (size - 1)) // size
    begin = F.pad(end[:-1], (1, 0))
    after = ((end - begin + size - 1) // size).cumsum(0)  # per expert: index after its last tile
    numbers = torch.arange(tiles, device=device)
    expert = torch.searchsorted(after, numbers, right=True).clamp(max=experts - 1)
    first = after - (end - begin + size - 1) // size
    row = (begin[expert] + (numbers - first[expert]) * size)[:, None] + torch.arange(size, device=device)
    used = row < end[expert][:, None]
    rows = torch.arange(num_rows, device=device)
    owner = torch.searchsorted(end, rows, right=True).clamp(max=experts - 1)
    place = first[owner] * size + rows - begin[owner]
    return _Tiles(expert, row.clamp(max=num_rows - 1), used, place.clamp(max=tiles * size - 1))


def _product_by_tiles(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Compute `grouped_product` by tiles."""
    if rows.shape[0] == 0:
        return rows.new_zeros(0, weight.shape[1])
    tiles = _tiles(ends, rows.shape[0])
    made = [
        torch.bmm(rows[row], weight[expert].transpose(-2, -1).to(rows.dtype))
        for expert, row in zip(*(part.split(_at_a_time(weight)) for part in (tiles.expert, tiles.row)), strict=True)
    ]
    return torch.cat(made).flatten(0, 1)[tiles.place]


def _outer_by_tiles(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Compute `grouped_outer` by tiles. The order of addition varies, unless torch is set to be deterministic."""
    wide = torch.promote_types(left.dtype, torch.float32)
    out = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1], dtype=wide)
    if left.shape[0] == 0:
        return out.to(left.dtype)
    tiles = _tiles(ends, left.shape[0])
    parts = (part.split(_at_a_time(out)) for part in (tiles.expert, tiles.row, tiles.used))
    for expert, row, used in zip(*parts, strict=True):
        one, other = (torch.where(used[:, :, None], side[row], 0.0) for side in (left, right))
        out.index_add_(0, expert, torch.bmm(one.transpose(-2, -1), other).to(wide))
    return out.to(left.dtype)


def _at_a_time(matrices: Tensor) -> int:
    return max(1, _COPIED_BYTES // max(matrices[0].numel() * matrices.element_size(), 1))


def _aligned(rows: Tensor, sizes: Sequence[int]) -> bool:
    return all(size * rows.element_size() % 16 == 0 for size in sizes)


def _ranges(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends.tolist()]))


@_grouped_product.register_fake
def _grouped_product_fake(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _grouped_outer_fake(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    of_rows = of_weight = None
    if ctx.needs_input_grad[0]:
        of_rows = _grouped_product(grad, weight.transpose(-2, -1), ends)
    if ctx.needs_input_grad[1]:
        of_weight = _grouped_outer(grad, rows, ends).to(weight.dtype)
    return of_rows, of_weight, None


_grouped_product.register_autograd(_grouped_product_backward, setup_context=_keep_factors)

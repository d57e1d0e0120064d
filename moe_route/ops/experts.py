"""The experts of few rows in one operator, and what stands between two grouped products where there are many.

See csrc/include/moe_route/experts.h. They run on the CPU or a CUDA device, wherever the first tensor is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_route.contract.experts import ACTIVATIONS, PAIRINGS, Activation, Dispatch, PackedExperts
from moe_route.ops import registration  # noqa: F401 (defines the operators)
from moe_route.ops.arguments import FAILURES, refuse_types

_expert_rows = torch.ops.moe_route.expert_rows.default
_expert_activation = torch.ops.moe_route.expert_activation.default
_pack_expert_weight = torch.ops.moe_route.pack_expert_weight.default
_PLAIN = Activation()


def expert_rows(
    x: Tensor,
    dispatch: Dispatch,
    up: Tensor,
    down: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Activation | None = None,
    pairing: str = "halves",
    packed: PackedExperts | None = None,
) -> Tensor:
    """Run the expert of each dispatched row on the token of its slot: ``down(act(up(x)))``. Not differentiable.

    Made for few slots, up to about 256 on CUDA: time is then what reading the weights of the chosen experts takes, once
    for up to 8 rows. On CUDA it neither waits nor copies, whatever was routed. On a CPU with AVX2 or AVX-512 weights
    are read in place, once whatever the number of rows; without them it is right, not fast.

    Sums are float32 in an order that depends on the dtype only, so the bits do not depend on the device, the grid, the
    layout of the weights, the other rows or the number of threads. (bfloat16 dot products of a CPU take numbers below
    2^-126 for zero.) Values are rounded to the dtype of x after the activation and at the end.

    Args:
        x: [T, H], float32, bfloat16 or float16.
        dispatch: the result of `dispatch` for the same T tokens.
        up: [E, I, H] without a gate, else [E, 2 I, H], in the dtype of x; contiguous, or the transposed view of a
            contiguous [E, H, 2 I].
        down: [E, H_out, I], likewise.
        up_bias: [E, I] or [E, 2 I], or None.
        down_bias: [E, H_out], or None.
        activation: what stands between the products; default silu.
        pairing: "halves" if the first I rows of ``up`` are the gate, "alternating" if rows 0, 2, 4, ... are, "none" if
            there is no gate.
        packed: the result of `pack_experts` for these weights, or None. It is read in their place, on a CPU only, and
            gives the same bits. Whoever changes a weight packs again.

    Returns:
        [R, H_out] in the dtype of x, for `combine`. Rows that serve no slot are undefined; `combine` never reads them.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument with a wrong shape, dtype or value, or a tensor without memory.
        RuntimeError: a gradient is wanted.
    """
    activation = _PLAIN if activation is None else activation
    try:
        _refuse_pairing(pairing)
        _refuse_gradient("expert_rows", x, up, down, up_bias, down_bias)
        if packed is not None and packed.pairing != pairing:
            raise ValueError(f"packed is for pairing {packed.pairing!r}, not {pairing!r}; pack the weights again")
        return _expert_rows(
            x,
            dispatch.offsets,
            dispatch.counts,
            dispatch.order,
            max(dispatch.inverse.shape[1], 1),
            up,
            down,
            up_bias,
            down_bias,
            ACTIVATIONS.index(activation.kind) + 1,
            PAIRINGS.index(pairing),
            activation.alpha,
            activation.limit,
            activation.shift,
            *(() if packed is None else (packed.up, packed.down)),
        )
    except FAILURES:
        refuse_types(
            ("up_bias", "down_bias", "packed"),
            x=x,
            dispatch=dispatch,
            up=up,
            down=down,
            up_bias=up_bias,
            down_bias=down_bias,
            activation=activation,
            packed=packed,
        )
        raise


@torch.no_grad()
def pack_experts(up: Tensor, down: Tensor, *, pairing: str = "halves") -> PackedExperts:
    """Copy the weights of experts into the order in which `expert_rows` reads them, on a CPU.

    The copy takes as many bytes as the weights (`PackedExperts.nbytes`) and saves the kernel the work of laying them
    out, which pays from about four rows of an expert on.

    Args:
        up, down, pairing: as in `expert_rows`.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument with a wrong shape, dtype or value, or a tensor without memory.
        NotImplementedError: a weight is not on the CPU.
    """
    try:
        _refuse_pairing(pairing)
        if up.dtype != down.dtype:
            raise ValueError(f"up is {up.dtype} and down is {down.dtype}; convert one to the other")
        both = (_pack_expert_weight(up, PAIRINGS.index(pairing)), _pack_expert_weight(down, PAIRINGS.index("none")))
    except FAILURES:
        refuse_types((), up=up, down=down)
        raise
    return PackedExperts(*both, pairing)


def expert_activation(
    rows: Tensor,
    dispatch: Dispatch,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    pairing: str = "halves",
) -> Tensor:
    """Apply what an expert has between its two products to dispatched rows: bias, activation, gate. Not differentiable.

    One pass over the rows: it reads each once, computes in float32 and rounds once. On CUDA it neither waits nor reads
    the rows behind the last expert's, whatever was routed.

    Args:
        rows: [R, I] without a gate, else [R, 2 I], float32, bfloat16 or float16: the first product of the experts.
        dispatch: the result of `dispatch` for these rows.
        bias: [E, I] or [E, 2 I] in the dtype of rows, or None: each row gets that of its expert.
        activation: default silu.
        pairing: "halves" if the first I columns are the gate, "alternating" if columns 0, 2, 4, ... are, "none" if
            there is no gate.

    Returns:
        [R, I] in the dtype of rows. Rows behind the range of the last expert are undefined.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument with a wrong shape, dtype or value, or a tensor without memory.
        RuntimeError: a gradient is wanted.
    """
    activation = _PLAIN if activation is None else activation
    try:
        _refuse_pairing(pairing)
        _refuse_gradient("expert_activation", rows, bias)
        return _expert_activation(
            rows,
            dispatch.offsets,
            bias,
            ACTIVATIONS.index(activation.kind) + 1,
            PAIRINGS.index(pairing),
            activation.alpha,
            activation.limit,
            activation.shift,
        )
    except FAILURES:
        refuse_types(("bias",), rows=rows, dispatch=dispatch, bias=bias, activation=activation)
        raise


def _refuse_pairing(pairing: str) -> None:
    if pairing not in PAIRINGS:
        raise ValueError(f"unknown pairing {pairing!r}; choose one of {', '.join(PAIRINGS)}")


def _refuse_gradient(name: str, *tensors: Tensor | None) -> None:
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if wanted or forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{name} has no gradient: call it under torch.no_grad(), or train with moe_route.nn.Experts or "
            "experts_implementation='moe_route', which take another path where a gradient is wanted"
        )

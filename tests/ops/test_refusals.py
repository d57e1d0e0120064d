"""Bad arguments are refused by the kernels and by the torch backend in the same words, before any address is formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_route import ops
from moe_route.contract.limits import MAX_ROWS
from moe_route.contract.tables import StatisticsTables, SteeringTables, token_table

pytestmark = pytest.mark.native

T, E, K, H = 6, 8, 2, 4
NUMBERS = (-(2**62), -1, 0, 3, 63, 65, 4097, 65537, 2**31, 2**62)
OTHER_DTYPES = (torch.float64, torch.float16, torch.int64, torch.int32, torch.bool)
# Operators that add to these arguments: what both accept must leave the same numbers.
WRITTEN = ("group_statistics", "segment_statistics")


def route() -> dict[str, Any]:
    steering = SteeringTables(
        2, E, bias=torch.randn(2, E), temperature=torch.ones(2), remap=torch.arange(E).expand(2, E)
    )
    tables = StatisticsTables.zeros(E, groups=1, segments=2, metrics=("counts",), entropy=False)
    packed, (groups, layout, segments) = steering.packed, tables.arguments
    return {
        "logits": torch.randn(T, E),
        "k": K,
        "policy": ops.RouterSpec(renormalize="sum").policy,
        "tokens": token_table(T, steering_row=torch.arange(T) % 2),
        "group_statistics": groups,
        "statistics": layout,
        "segment_statistics": segments,
        "correction_bias": torch.randn(E),
        "expert_scale": torch.rand(E),
        "steering": packed[0],
        "steering_planes": packed[1],
        "row_params": packed[2],
        "remap": packed[3],
        "choice_ids": torch.randint(E, (T, K)),
        "choice_weights": torch.rand(T, K),
        "choice_mode": 1,
    }


def observe() -> dict[str, Any]:
    all_of = route()
    kept = ("logits", "policy", "tokens", "group_statistics", "statistics", "segment_statistics", "expert_scale")
    return {"ids": all_of["choice_ids"], "weights": all_of["choice_weights"], **{name: all_of[name] for name in kept}}


def route_weights() -> dict[str, Any]:
    all_of = route()
    kept = ("logits", "policy", "tokens", "expert_scale", "steering", "steering_planes", "row_params")
    return {"ids": all_of["choice_ids"], **{name: all_of[name] for name in kept}}


def dispatch() -> dict[str, Any]:
    return {"ids": torch.randint(E, (T, K)), "num_experts": E, "block": 2}


def slots() -> ops.Dispatch:
    return ops.dispatch(torch.randint(E, (T, K), generator=torch.Generator().manual_seed(0)), E)


def permute() -> dict[str, Any]:
    return {"x": torch.randn(T, H), "order": slots().order, "inverse": slots().inverse}


def combine() -> dict[str, Any]:
    rows, weights = torch.randn(T * K, H), torch.rand(T, K)
    of = {"order": slots().order, "inverse": slots().inverse}
    return {"rows": rows, "weights": weights, **of, "residual": torch.randn(T, H)}


BETWEEN = {"activation": 1, "pairing": 1, "alpha": 1.0, "limit": 7.0, "shift": 0.0}


def expert_rows() -> dict[str, Any]:
    of = {"offsets": slots().offsets, "counts": slots().counts, "order": slots().order, "k": K}
    weights = {"up": torch.randn(E, 2 * H, H), "down": torch.randn(E, H, H)}
    biases = {"up_bias": torch.randn(E, 2 * H), "down_bias": torch.randn(E, H)}
    return {"x": torch.randn(T, H), **of, **weights, **biases, **BETWEEN}


def expert_activation() -> dict[str, Any]:
    return {"rows": torch.randn(T * K, 2 * H), "offsets": slots().offsets, "bias": torch.randn(E, 2 * H), **BETWEEN}


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    made.__name__: made
    for made in (route, observe, route_weights, dispatch, permute, combine, expert_rows, expert_activation)
}


def tensors_in_place_of(tensor: Tensor) -> Iterator[Tensor | None]:
    """Tensors that do not fit where ``tensor`` does, and some that do."""
    yield None
    yield tensor[0]
    yield tensor[None]
    for dimension, size in enumerate(tensor.shape):
        yield tensor.narrow(dimension, 0, size - 1)
        yield torch.cat([tensor, tensor.narrow(dimension, 0, 1)], dimension)
        yield tensor.narrow(dimension, 0, 0)
        yield tensor.narrow(dimension, 0, 1).expand(tensor.shape)
    yield from (tensor.to(dtype) for dtype in OTHER_DTYPES)
    yield tensor.to("meta")
    if tensor.dim() > 1:
        yield tensor.transpose(-2, -1)
        yield tensor.transpose(-2, -1).contiguous().transpose(-2, -1)
    yield torch.stack([tensor, tensor], -1)[..., 0]
    freed = tensor.clone()
    freed.untyped_storage().resize_(0)
    yield freed


def mutations(operator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each argument in turn replaced, the others as they are; then pairs of those that must come together."""
    arguments = CALLS[operator]()
    for name, value in arguments.items():
        if isinstance(value, float):
            continue
        others = tensors_in_place_of(value) if isinstance(value, Tensor) else NUMBERS
        for number, other in enumerate(others):
            if other is not None or may_be_absent(operator, name):
                yield f"{name} #{number}", arguments | {name: other}
    for one in arguments:
        for other in arguments:
            if one < other and isinstance(arguments[one], Tensor) and isinstance(arguments[other], Tensor):
                if may_be_absent(operator, one) and may_be_absent(operator, other):
                    yield f"{one}, {other} absent", arguments | {one: None, other: None}
                yield f"{one}, {other} cut", arguments | {one: arguments[one][:1], other: arguments[other][:1]}


def may_be_absent(operator: str, name: str) -> bool:
    return any(argument.name == name and "Optional" in str(argument.type) for argument in schema_of(operator).arguments)


def schema_of(operator: str) -> Any:
    return getattr(torch.ops.moe_route, operator).default._schema


def _copied(tensor: Tensor | None) -> Tensor | None:
    """Of what an operator may write to: a tensor that does not fit is never written to."""
    if isinstance(tensor, Tensor) and tensor.is_contiguous() and tensor.untyped_storage().nbytes():
        return tensor.clone()
    return tensor


def outcome(operators: Any, operator: str, arguments: dict[str, Any]) -> tuple[str, Any]:
    """("refused", the words) or ("taken", results and what was written)."""
    given = {name: _copied(value) if name in WRITTEN else value for name, value in arguments.items()}
    try:
        made = getattr(operators, operator)(**given)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return "refused", str(error).replace("moe_route_torch::", "moe_route::")
    results = made if isinstance(made, tuple) else (made,)
    return "taken", [*results, *(given[name] for name in WRITTEN if name in given)]


@pytest.mark.parametrize("operator", list(CALLS))
def test_the_torch_backend_refuses_what_the_kernels_refuse_in_the_same_words(operator: str) -> None:
    kinds = {"refused": 0, "taken": 0}
    for what, arguments in mutations(operator):
        native, by_torch = (
            outcome(each, operator, arguments) for each in (torch.ops.moe_route, torch.ops.moe_route_torch)
        )
        assert native[0] == by_torch[0], (what, native[1], by_torch[1])
        kinds[native[0]] += 1
        if native[0] == "refused":
            assert native[1] == by_torch[1], what
            continue
        for ours, theirs in zip(by_torch[1], native[1], strict=True):
            defined = operator not in ("expert_rows", "expert_activation")  # of the others some rows are undefined
            if defined and isinstance(ours, Tensor) and ours.device.type != "meta":
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=what)
    assert min(kinds.values()) > 3, kinds


def test_layers_need_lists_of_one_length() -> None:
    made = observe()
    for missing in ("ids", "weights", "group_statistics", "segment_statistics"):
        lists = {
            name: [made[name]] * 2 for name in ("logits", "ids", "weights", "group_statistics", "segment_statistics")
        }
        rest = {name: made[name] for name in ("policy", "tokens", "statistics")}
        native, by_torch = (
            outcome(each, "observe_layers", {**lists, **rest, missing: [made[missing]]})
            for each in (torch.ops.moe_route, torch.ops.moe_route_torch)
        )
        assert native == by_torch == ("refused", "2 layers of logits, but a list of 1; every list needs one per layer")


@pytest.mark.parametrize("far", [2**62, -(2**62), MAX_ROWS + 1])
def test_offsets_from_nowhere_are_never_followed_by_torch(far: int) -> None:
    """The values of a tensor cannot be checked without a wait: they are clamped."""
    arguments = expert_rows()
    for name in ("offsets", "counts", "order"):
        torch.ops.moe_route_torch.expert_rows(**arguments | {name: torch.full_like(arguments[name], far)})
    arguments = expert_activation()
    torch.ops.moe_route_torch.expert_activation(**arguments | {"offsets": torch.full_like(arguments["offsets"], far)})

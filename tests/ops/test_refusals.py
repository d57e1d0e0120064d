"""Bad arguments are refused by the kernels and by the torch backend in the same words, before any address is formed.

What is taken is computed as a contiguous copy of it would be. `make test-sanitized` runs this file with kernels and
checks that were compiled under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness.backends import BACKENDS, ROOT
from harness.hidden_library import OTHER
from torch import Tensor

from moe_route import ops, reference
from moe_route.contract.limits import MAX_ROWS
from moe_route.contract.tables import StatisticsTables, SteeringTables, token_table

pytestmark = pytest.mark.native

T, E, K, H = 6, 8, 2, 4
NUMBERS = (-(2**62), -1, 0, 3, 63, 65, 4097, 65537, 2**31, 2**62)
FAR = (2**62, -(2**62), 2**31, MAX_ROWS + 1, -2)  # of what tensors of integers hold
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
    yield torch._neg_view(-tensor)
    yield tensor.as_strided(tensor.shape, [1] * tensor.dim())  # elements overlap
    yield tensor.flatten()[:1].reshape([1] * tensor.dim()).expand(tensor.shape)  # one element for all
    for size in (MAX_ROWS, 2**62):  # no memory, and sizes whose products need more than 64 bits
        for dimension in range(tensor.dim() if tensor.dim() > 1 else 0):
            yield tensor.new_empty([size if d == dimension else 0 for d in range(tensor.dim())])
        yield tensor.new_empty(1).expand(2 * size if size == MAX_ROWS else size, *[1] * (tensor.dim() - 1))
    for size in (0, 1, tensor.untyped_storage().nbytes() - 1):
        cut = tensor.clone()
        cut.untyped_storage().resize_(size)
        yield cut
    yield tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor.flip(0)
    if not tensor.is_floating_point():
        for far in FAR:
            if abs(far) <= torch.iinfo(tensor.dtype).max:
                yield torch.full_like(tensor, far)
                yield torch.cat([tensor[:-1], torch.full_like(tensor[-1:], far)])


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
    if isinstance(tensor, Tensor) and tensor.is_contiguous() and tensor.untyped_storage().nbytes() >= tensor.nbytes:
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


def contiguous(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in memory of their own, without gradient."""
    return {
        name: value.detach().resolve_neg().contiguous().clone()
        if isinstance(value, Tensor) and name not in WRITTEN
        else value
        for name, value in arguments.items()
    }


def defined(operator: str, arguments: dict[str, Any], results: list[Any]) -> list[Any]:
    """Results without the rows that no operator promises to write."""
    if operator == "expert_activation":
        return [results[0][: arguments["offsets"][-1]]]
    if operator == "expert_rows":
        ranges = zip(arguments["offsets"], arguments["counts"], strict=False)
        return [torch.cat([results[0][first : first + count] for first, count in ranges])]
    return results


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
        if any(isinstance(value, Tensor) and value.is_meta for value in native[1]):
            continue
        copied = outcome(torch.ops.moe_route, operator, contiguous(arguments))[1]
        results = (defined(operator, arguments, each) for each in (native[1], by_torch[1], copied))
        for theirs, ours, of_copy in zip(*results, strict=True):
            if theirs is None:
                continue
            assert torch.equal(theirs, of_copy), what
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


@pytest.mark.parametrize("operator", ["route", "observe"])
def test_tables_that_are_added_to_share_memory_with_nothing(operator: str) -> None:
    arguments = CALLS[operator]()
    tables = torch.zeros(3, arguments["group_statistics"].shape[1], dtype=torch.int64)
    numbers = tables.view(torch.float32).reshape(-1)[: T * E].view(T, E)
    apart = {"group_statistics": tables[:1], "segment_statistics": tables[1:]}
    for operators in (torch.ops.moe_route, torch.ops.moe_route_torch):
        getattr(operators, operator)(**arguments | apart)
        for other, shared in (
            ("group_statistics", apart | {"segment_statistics": tables[:2]}),
            ("logits", {"group_statistics": tables[:1], "logits": numbers}),
            ("logits", {"segment_statistics": tables[:2], "logits": numbers}),
        ):
            with pytest.raises(ValueError, match=f"shares memory with {other}"):
                getattr(operators, operator)(**arguments | shared)


def test_values_that_lead_nowhere_are_named() -> None:
    """Read on a CPU; a device never waits for it."""
    arguments = expert_rows()
    order, offsets, counts = arguments["order"], arguments["offsets"], arguments["counts"]
    for changed, words in (
        ({"offsets": offsets.index_fill(0, torch.tensor(3), 2**62)}, r"offsets\[3\] = 4611686018427387904; .*0\.\.12"),
        ({"offsets": offsets.flip(0)}, r"offsets\[1\] = .*must not fall"),
        ({"offsets": offsets - 1}, r"offsets\[0\] = -1"),
        ({"counts": counts.index_fill(0, torch.tensor(5), -1)}, r"counts\[5\] = -1 is outside 0\.\.\d"),
        ({"counts": counts + 1}, r"counts\[0\] = .*expert 0 by offsets"),
        ({"order": order.index_fill(0, torch.tensor(7), 12)}, r"order\[7\] = 12 is outside -1\.\.11"),
        ({"order": order - 2}, r"order\[\d+\] = -2"),
    ):
        for operators in (torch.ops.moe_route, torch.ops.moe_route_torch):
            with pytest.raises(ValueError, match=words):
                operators.expert_rows(**arguments | changed)


@pytest.mark.parametrize("far", [2**62, -(2**62), MAX_ROWS + 1, -1])
@pytest.mark.parametrize("by", ["emulated", "torch"])
def test_values_that_lead_nowhere_are_never_followed_on_a_device(by: str, far: int) -> None:
    """They cannot be checked there without a wait: they are cut to what was allocated."""
    for name in ("offsets", "counts", "order"):
        given = expert_rows()
        given[name] = torch.full_like(given[name], far)
        if by == "torch":
            tables = ops.Dispatch(given["offsets"], slots().ends, given["counts"], given["order"], slots().inverse)
            made = reference.expert_rows(given["x"], tables, given["up"], given["down"])
            of_rows = reference.expert_activation(torch.randn(T * K, 2 * H), tables, bias=given["up_bias"])
        else:
            emulated = next(backend for backend in BACKENDS if backend.emulated)
            if emulated.missing:
                pytest.skip(emulated.missing)
            with emulated.within():
                made = torch.ops.moe_route_emulated.expert_rows(**given)
                rows = expert_activation() | {"offsets": given["offsets"]}
                of_rows = torch.ops.moe_route_emulated.expert_activation(**rows)
        assert made.shape == of_rows.shape == (T * K, H)


_STRAY = """
from harness.hidden_library import replace

replace()
import torch
from moe_route import _C

x, rows, order = torch.zeros(4, 4), torch.zeros(4, 4), torch.arange(4)
_C.permute(x.data_ptr(), order.data_ptr(), order.data_ptr(), rows.data_ptr(), 4, 1, 1 << 12, 4)
"""


@pytest.mark.skipif(not OTHER, reason="the library is not under sanitizers: make test-sanitized")
def test_a_stray_read_would_end_the_process() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    ran = subprocess.run([sys.executable, "-c", _STRAY], env=environment, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "ERROR: AddressSanitizer" in ran.stderr

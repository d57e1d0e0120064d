"""What the torch backend asks of a device: no float64, no wait, and only operations that MPS has; and its selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from harness.stable_sort import best
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_route import ops  # noqa: F401 (registers the operators)
from moe_route.contract.spec import NUMBERS, RouterSpec
from moe_route.contract.tables import METRICS, StatisticsTables, SteeringTables, token_table
from moe_route.reference.gate import _best
from moe_route.reference.statistics import fixed

T, E, K = 9, 12, 3
OPERATORS = torch.ops.moe_route_torch
SPECS = {
    **{score: RouterSpec(score, renormalize="sum") for score in ("softmax", "sigmoid", "sqrt_softplus", "identity")},
    "sparsemixer": RouterSpec("sparsemixer", jitter=0.01),
    "groups": RouterSpec("sigmoid", groups=4, top_groups=2, renormalize="sum", eps=1e-20, scale=2.5),
    "best of a group": RouterSpec(groups=3, top_groups=2, group_score="max", group_fill=0.0),
    "chosen first": RouterSpec(order="topk_then_score"),
    "norm": RouterSpec("sqrt_softplus", renormalize="norm", norm_p=2.0),
    "capped": RouterSpec("sigmoid", renormalize="sum", softcap=1.5),
    "clamp": RouterSpec("identity", renormalize="clamp", eps=1e-3),
}
# Answered when the device is done with everything before, or of a shape that only the values tell.
_WAITING = ("_local_scalar_dense", "item", "bincount", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class Device(TorchDispatchMode):
    """Notes the operations, and refuses what makes the host wait and what some devices lack."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2].rstrip("_")
        assert not name.startswith(_WAITING) or name.startswith("eq"), f"{name} waits for the device"
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, made)):
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype is not torch.float64, f"{name} takes float64"
        if func._schema.name.startswith("aten::"):
            self.used.add(func.name().removeprefix("aten::"))
        return made


def steering() -> SteeringTables:
    planes = ("scale", "bias", "std", "magnitude", "score_bias", "weight_scale")
    force = torch.zeros(2, E)
    force[0, :6], force[1, :6] = torch.arange(-3, 3), torch.arange(2, -4, -1)
    params = {"temperature": torch.ones(2), "top_k": torch.tensor([2, 0]), "std_correction": 1, "weight_scale_after": 1}
    remap = torch.arange(E).flip(0).expand(2, E)
    tables = {name: torch.randn(2, E) for name in planes}
    return SteeringTables(2, E, **tables, force=force, **params, score_bias_weighs=1, remap=remap)


def run(spec: RouterSpec, dtype: torch.dtype) -> None:
    """Every operator, each plane and kind of statistics."""
    logits, row = torch.randn(T, E).to(dtype), torch.arange(T)
    tokens = token_table(T, steering_row=row % 3 - 1, group=row % 2, segment=row // 4, valid=row != 5)
    packed = dict(zip(("steering", "steering_planes", "row_params", "remap"), steering().packed, strict=True))
    numbers = dict(zip(NUMBERS, spec.numbers, strict=True))
    few, bias = StatisticsTables.zeros(E, groups=1, metrics=("counts",), entropy=False), torch.randn(E)
    all_of = StatisticsTables.zeros(E, groups=2, segments=3, metrics=METRICS)
    ids = torch.randint(-1, E, (T, K))
    with Device() as device:
        for table, more in (
            (few, {}),
            (all_of, {"tokens": tokens, "correction_bias": bias, "expert_scale": bias, **packed}),
        ):
            counted = dict(zip(("group_statistics", "statistics", "segment_statistics"), table.arguments, strict=True))
            weights, chosen = OPERATORS.route(logits, K, spec.policy, **counted, **numbers, **more)
        OPERATORS.route(logits, K, spec.policy, **numbers, choice_ids=ids, choice_mode=2)
        OPERATORS.observe(logits, chosen, weights, spec.policy, tokens, *all_of.arguments, *spec.numbers)
        del packed["remap"]
        OPERATORS.route_weights(logits, ids, spec.policy, tokens, **numbers, **packed)
        if dtype is torch.float32:
            offsets, _, counts, order, inverse = OPERATORS.dispatch(ids, E, 4)
            rows = OPERATORS.permute(logits, order, inverse)
            OPERATORS.combine(rows, weights, order, inverse, logits)
            up, down = torch.randn(E, 2 * E, E), torch.randn(E, E, E)
            between = (1, 1, 1.0, 7.0, 1.0)
            OPERATORS.expert_rows(logits, offsets, counts, order, K, up, down, torch.randn(E, 2 * E), None, *between)
            OPERATORS.expert_activation(torch.cat([rows, rows], 1), offsets, None, *between)
    missing = device.used - of_mps()
    assert not missing, f"MPS lacks {sorted(missing)}"


def of_mps() -> set[str]:
    """Operations with a kernel for MPS or for every device, by torch's own table."""
    table = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(table.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    functions = {entry["func"].partition("(")[0]: entry for entry in entries}

    def has(entry: dict[str, Any]) -> bool:
        delegate = entry.get("structured_delegate")
        keys = ",".join(entry.get("dispatch", {})) or ("" if delegate else "CompositeImplicitAutograd")
        return "MPS" in keys or "Composite" in keys or (delegate is not None and has(functions[delegate]))

    return {name for name, entry in functions.items() if has(entry)}


@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
def test_every_operator_runs_without_float64_and_without_a_wait(spec: RouterSpec) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        run(spec, dtype)


def test_a_wait_and_float64_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="waits"), Device():
        torch.ones(2).sum().item()
    with pytest.raises(AssertionError, match="float64"), Device():
        torch.ones(2).double()


ODD = (0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), -float("nan"), 1e-45, -1e-45, 3.4e38)


@given(
    arrays("float32", (4, 24), elements=st.sampled_from(ODD) | st.floats(width=32)),
    arrays("int64", (4, 24), elements=st.integers(0, 3)),
    st.integers(1, 24),
)
def test_one_top_k_orders_as_stable_sorts_do(values: Any, ranks: Any, k: int) -> None:
    value, rank = torch.from_numpy(values), torch.from_numpy(ranks)
    for wide in (value, value.double()):
        assert torch.equal(_best(wide, k), best(wide, k))
        assert torch.equal(_best(wide, k, rank), best(wide, k, rank))


def test_fixed_point_is_exact_in_float32() -> None:
    """Over patterns of all bits: signs, exponents, subnormals, infinities and NaN."""
    bits = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64).to(torch.int32)
    value = bits.view(torch.float32)
    wide = torch.where(torch.isnan(value), 0.0, value.double()).clamp(-(2.0**19), 2.0**19)
    assert torch.equal(fixed(value), (wide * 2.0**32).round().to(torch.int64))

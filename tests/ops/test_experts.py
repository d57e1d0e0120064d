"""expert_rows, both products of the experts of few rows, and expert_activation, on every backend."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from harness.backends import BACKENDS, Backend, available
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_route import ops, reference
from moe_route.contract.experts import ACTIVATIONS, PAIRINGS

NATIVE = available(lambda backend: backend.native)
CPU = next(backend for backend in BACKENDS if backend.name == "operators")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLAMPED = ops.Activation("silu", alpha=1.702, limit=1.5, shift=1.0)  # gpt-oss, with a limit that is reached


@dataclass
class Experts:
    """Random experts, hidden states and a choice."""

    x: Tensor
    ids: Tensor
    num_experts: int
    arguments: dict[str, Any]

    @classmethod
    def make(
        cls,
        *,
        tokens: int = 5,
        k: int = 2,
        experts: int = 4,
        hidden: int = 48,
        width: int = 24,
        dtype: torch.dtype = torch.float32,
        pairing: str = "halves",
        transposed: bool = False,
        bias: bool = False,
        activation: ops.Activation | None = None,
        seed: int = 0,
    ) -> Experts:
        make = torch.Generator().manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=make) * scale).to(dtype)

        rows = width if pairing == "none" else 2 * width
        up, down = (
            normal(experts, rows, hidden, scale=max(hidden, 1) ** -0.5),
            normal(experts, hidden, width, scale=max(width, 1) ** -0.5),
        )
        if transposed:
            up, down = (weight.mT.contiguous().mT for weight in (up, down))
        given: dict[str, Any] = {"up": up, "down": down, "pairing": pairing}
        if bias:
            given |= {"up_bias": normal(experts, rows), "down_bias": normal(experts, hidden)}
        if activation is not None:
            given["activation"] = activation
        ids = torch.randint(-1, experts + 1, (tokens, k), generator=make)  # some are nobody's
        return cls(normal(tokens, hidden), ids, experts, given)

    def slots(self, block: int = 1) -> ops.Dispatch:
        return ops.dispatch(self.ids, self.num_experts, block=block)

    def rows(self, backend: Backend | Any, slots: ops.Dispatch | None = None, **changes: Any) -> Tensor:
        """The output rows; those of no slot are left out."""
        slots = self.slots() if slots is None else slots
        found = backend.expert_rows(self.x, slots, **(self.arguments | changes))
        return found[slots.order >= 0]


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(native: Backend, dtype: torch.dtype, pairing: str, transposed: bool) -> None:
    """Every layout, with sizes that are multiples of nothing and more rows of an expert than share a reading."""
    for hidden, width, tokens in ((72, 40, 2), (33, 21, 12)):
        made = Experts.make(
            tokens=tokens,
            experts=3,
            hidden=hidden,
            width=width,
            dtype=dtype,
            pairing=pairing,
            transposed=transposed,
            bias=tokens == 12,
            activation=CLAMPED if tokens == 12 else None,
        )
        bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]
        torch.testing.assert_close(made.rows(native), made.rows(reference), rtol=bound, atol=bound)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("pairing", ["none", "halves"])
def test_activations(kind: str, pairing: str) -> None:
    made = Experts.make(tokens=40, hidden=64, pairing=pairing, activation=ops.Activation(kind, limit=2.0))
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in made.arguments.items()}
    exact = Experts(made.x.double(), made.ids, made.num_experts, wide).rows(reference)
    torch.testing.assert_close(made.rows(CPU).double(), exact, rtol=2e-6, atol=2e-6)


PROBLEMS = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 12),
        "k": st.integers(1, 4),
        "experts": st.sampled_from([1, 3, 40]),
        "hidden": st.sampled_from([1, 8, 31, 64, 264]),
        "width": st.sampled_from([1, 8, 20, 32]),
        "dtype": st.sampled_from(DTYPES),
        "pairing": st.sampled_from(PAIRINGS),
        "transposed": st.booleans(),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)
DEVICES = st.fixed_dictionaries(
    {
        "MOE_ROUTE_EMULATOR_ORDER": st.sampled_from(["reverse"]) | st.integers(0, 2**31).map(str),
        "MOE_ROUTE_EMULATOR_MULTIPROCESSORS": st.integers(1, 9).map(str),
    }
)


@settings(max_examples=30)
@given(problem=PROBLEMS, device=DEVICES, block=st.sampled_from([1, 16]))
def test_every_backend_has_the_same_bits(problem: dict[str, Any], device: dict[str, str], block: int) -> None:
    """In any order of threads, and on any number of multiprocessors, which decides the grid."""
    made = Experts.make(**problem)
    slots = made.slots(block)
    expected = made.rows(CPU, slots)
    with mock.patch.dict(os.environ, device):
        for backend in NATIVE:
            assert same(made.rows(backend, slots), expected), (backend.name, problem, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_layout_nor_on_other_rows(native: Backend, dtype: torch.dtype) -> None:
    made = Experts.make(tokens=11, hidden=300, width=16, dtype=dtype)
    whole = made.rows(native)
    turned = {name: made.arguments[name].mT.contiguous().mT for name in ("up", "down")}
    assert same(made.rows(native, **turned), whole)
    slots = made.slots()
    for token in (0, 10):
        alone = Experts(made.x[token : token + 1], made.ids[token : token + 1], made.num_experts, made.arguments)
        expected = whole[(slots.order[slots.order >= 0] // 2) == token]
        assert same(alone.rows(native), expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_weights_of_experts_without_rows_are_never_read(native: Backend, transposed: bool) -> None:
    """Nor are rows of skipped slots: they may be written over, and NaN there reaches nothing."""
    made = Experts.make(tokens=3, experts=6, transposed=transposed, bias=True)
    made.ids[:] = torch.tensor([[1, -1], [4, 6], [1, 99]])
    clean = made.rows(native)
    for name in ("up", "down", "up_bias", "down_bias"):
        poisoned = made.arguments[name].clone(memory_format=torch.preserve_format)
        poisoned[[0, 2, 3, 5]] = float("nan")
        made.arguments[name] = poisoned
    slots = made.slots()
    assert same(made.rows(native, slots), clean)
    out = native.combine(native.expert_rows(made.x, slots, **made.arguments), torch.ones(3, 2), slots)
    assert out.isfinite().all()


def test_strange_numbers_stay_in_their_row_and_column(native: Backend) -> None:
    made = Experts.make(tokens=4, experts=2, hidden=40, width=16, pairing="none", activation=ops.Activation("relu"))
    made.ids[:] = torch.tensor([[0, 1]] * 4)
    clean = made.rows(native)
    made.x[2, 39] = float("nan")
    found = made.rows(native)
    token = made.slots().order // 2
    assert found[token == 2].isnan().all()
    assert same(found[token != 2], clean[token != 2])


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"width": 0}, {"hidden": 0}], ids=str)
def test_empty(native: Backend, sizes: dict[str, int]) -> None:
    made = Experts.make(**({"bias": True} | sizes))
    torch.testing.assert_close(made.rows(native), made.rows(reference))


def test_no_slot_at_all() -> None:
    made = Experts.make()
    made.ids.fill_(-1)
    for backend in NATIVE:
        assert made.rows(backend).shape == (0, 48)


VECTORS = [backend for backend in NATIVE if not backend.emulated and backend.name != "cuda"]


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_have_the_bits_of_one(dtype: torch.dtype, pairing: str, transposed: bool) -> None:
    """Several tiles, the last of them not full, and more rows of an expert than any kernel takes at a time; few too."""
    made = Experts.make(
        tokens=70, k=3, experts=4, hidden=397, width=77, dtype=dtype, pairing=pairing, transposed=transposed, bias=True
    )
    made.ids[:, 0], made.ids[:, 1], made.ids[:, 2] = 3, -1, 4  # nobody's
    made.ids[:7, 1], made.ids[5:6, 2] = 0, 1  # expert 2 has no row
    slots, found = made.slots(), {}
    for backend in VECTORS:
        if backend.missing is None:
            found[backend.name] = made.rows(backend, slots)
    expected = found["portable"]
    assert all(same(rows, expected) for rows in found.values()), list(found)
    torch.testing.assert_close(expected, made.rows(reference), rtol=1e-2, atol=1e-2)
    token = slots.order[slots.order >= 0] // 3
    alone = Experts(made.x[5:6], made.ids[5:6], made.num_experts, made.arguments)
    assert same(alone.rows(CPU), expected[token == 5])


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_wide_columns(transposed: bool) -> None:
    """More columns than a tile of either layout has, at the sizes that threads divide them into."""
    made = Experts.make(
        tokens=9, k=2, experts=3, hidden=40, width=1300, dtype=torch.bfloat16, transposed=transposed, pairing="halves"
    )
    found = [made.rows(backend) for backend in VECTORS if backend.missing is None]
    assert all(same(rows, found[0]) for rows in found)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads(dtype: torch.dtype, transposed: bool) -> None:
    made = Experts.make(tokens=30, k=2, hidden=512, width=96, dtype=dtype, transposed=transposed)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found += [made.rows(CPU) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert all(same(rows, found[0]) for rows in found)


def test_bfloat16_below_the_normal_numbers() -> None:
    """Only the dot products of bfloat16 take them for zero; next to numbers of any other size nobody can tell."""
    made = Experts.make(tokens=6, hidden=64, width=32, dtype=torch.bfloat16, pairing="none")
    made.arguments["activation"] = ops.Activation("relu")
    made.x[:, ::2] *= 2.0**-130
    sets = [backend for backend in VECTORS if backend.missing is None]
    assert all(same(made.rows(backend), made.rows(CPU)) for backend in sets)
    made.x *= 2.0**-20
    rows = {backend.name: made.rows(backend) for backend in sets}
    exact = made.rows(reference)
    for name, found in rows.items():
        torch.testing.assert_close(found, exact, rtol=0.02, atol=2.0**-120, msg=name)


def test_long_rows_share_a_reading_by_fewer() -> None:
    """Rows of x that do not fit into shared memory eight at a time: the same bits."""
    made = Experts.make(tokens=9, k=1, experts=1, hidden=9000, width=2, dtype=torch.bfloat16)
    made.ids.fill_(0)
    assert all(same(made.rows(backend), made.rows(CPU)) for backend in available(lambda each: each.emulated))


# ---- the operator in torch


def test_opcheck_and_compile() -> None:
    made = Experts.make(bias=True, activation=CLAMPED)
    made.ids.clamp_(0, 3)  # undefined rows differ from call to call
    slots = made.slots()

    def run(x: Tensor) -> Tensor:
        return ops.expert_rows(x, slots, **made.arguments)

    with mock.patch.object(sys.modules["moe_route.ops.experts"], "_expert_rows") as seen:
        run(made.x)
    torch.library.opcheck(torch.ops.moe_route.expert_rows.default, seen.call_args.args)
    with torch.no_grad():
        assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(made.x), run(made.x))


def test_gradients_are_refused() -> None:
    made = Experts.make()
    made.arguments["up"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"expert_rows has no gradient.*moe_route\.nn\.Experts"):
        made.rows(ops)
    with torch.no_grad():
        made.rows(ops)


REFUSED = {
    "float64": ({"x": torch.zeros(5, 48, dtype=torch.float64)}, ValueError, "x is float64"),
    "dtype": ({"up": torch.zeros(4, 48, 48).half()}, ValueError, "up must have the dtype of x"),
    "shape": ({"up": torch.zeros(4, 48, 47)}, ValueError, r"up has shape \[4, 48, 47\]; it must be \[4, any, 48\]"),
    "inner": ({"down": torch.zeros(4, 48, 23)}, ValueError, r"it must be \[4, any, 24\]"),
    "odd": ({"up": torch.zeros(4, 47, 48)}, ValueError, "an odd number"),
    "layout": ({"up": torch.zeros(4, 48, 96)[..., ::2]}, ValueError, "neither contiguous nor a transposed view"),
    "bias": ({"up_bias": torch.zeros(4, 24)}, ValueError, r"up_bias has shape \[4, 24\]; it must be \[4, 48\]"),
    "pairing": ({"pairing": "thirds"}, ValueError, "unknown pairing 'thirds'"),
    "activation": ({"activation": "silu"}, TypeError, "activation must be an Activation, not str"),
    "type": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused_by_name(name: str) -> None:
    changes, error, message = REFUSED[name]
    made = Experts.make()
    slots = made.slots()
    arguments = {"x": made.x, "dispatch": slots} | made.arguments | changes
    with pytest.raises(error, match=message):
        ops.expert_rows(**arguments)


@pytest.mark.parametrize(
    "wrong", [{"kind": "swish"}, {"kind": "relu", "alpha": 2.0}, {"limit": 0.0}, {"limit": float("nan")}], ids=str
)
def test_activations_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"activation|limit"):
        ops.Activation(**wrong)


# ---- what stands between two grouped products


def product(
    made: Experts, slots: ops.Dispatch, width: int, dtype: torch.dtype, pairing: str, bias: bool
) -> tuple[Tensor, dict[str, Any]]:
    """Rows of a first product, with NaN behind the last expert's, and the arguments that go with them."""
    make, columns = torch.Generator().manual_seed(1), width if pairing == "none" else 2 * width
    rows = (2 * torch.randn(slots.order.shape[0], columns, generator=make)).to(dtype)
    rows[int(slots.offsets[-1]) :] = float("nan")
    given: dict[str, Any] = {"pairing": pairing}
    if bias:
        given["bias"] = torch.randn(made.num_experts, columns, generator=make).to(dtype)
    return rows, given


@pytest.mark.parametrize("width", [1, 7, 24, 600])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_against_the_reference(native: Backend, dtype: torch.dtype, pairing: str, width: int) -> None:
    made = Experts.make(tokens=9, experts=5)
    for block, bias, activation in ((1, False, None), (8, True, CLAMPED)):
        slots = made.slots(block)
        used = int(slots.offsets[-1])
        rows, given = product(made, slots, width, dtype, pairing, bias)
        found = native.expert_activation(rows, slots, **given, activation=activation)
        expected = reference.expert_activation(rows, slots, **given, activation=activation)
        bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]
        torch.testing.assert_close(found[:used], expected[:used], rtol=bound, atol=bound)
        assert found.shape == (rows.shape[0], width)


@settings(max_examples=30)
@given(
    width=st.integers(0, 70) | st.sampled_from([256, 1032]),
    tokens=st.integers(0, 20),
    kind=st.sampled_from(ACTIVATIONS),
    pairing=st.sampled_from(PAIRINGS),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([1, 16]),
    bias=st.booleans(),
    device=DEVICES,
)
def test_activation_has_the_same_bits_on_every_backend(
    width: int,
    tokens: int,
    kind: str,
    pairing: str,
    dtype: torch.dtype,
    block: int,
    bias: bool,
    device: dict[str, str],
) -> None:
    made = Experts.make(tokens=tokens, experts=40)
    slots = made.slots(block)
    rows, given = product(made, slots, width, dtype, pairing, bias)
    given["activation"] = ops.Activation(kind, limit=1.5)
    used = slice(0, int(slots.offsets[-1]))
    expected = CPU.expert_activation(rows, slots, **given)[used]
    with mock.patch.dict(os.environ, device):
        for backend in NATIVE:
            assert same(backend.expert_activation(rows, slots, **given)[used], expected), backend.name


def test_activation_of_rows_in_memory_of_any_alignment(native: Backend) -> None:
    """A view that begins one element into its storage is read element by element, with the same bits."""
    made = Experts.make(tokens=9)
    slots = made.slots()
    rows, given = product(made, slots, 32, torch.bfloat16, "halves", True)
    shifted = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view_as(rows)
    used = slice(0, int(slots.offsets[-1]))
    wanted = native.expert_activation(rows, slots, **given)[used]
    assert same(native.expert_activation(shifted, slots, **given)[used], wanted)


def test_activation_in_torch() -> None:
    made = Experts.make(tokens=9)
    made.ids.clamp_(0, 3)
    slots = made.slots()
    rows, given = product(made, slots, 24, torch.float32, "alternating", True)

    def run(rows: Tensor) -> Tensor:
        return ops.expert_activation(rows, slots, **given, activation=CLAMPED)

    with mock.patch.object(sys.modules["moe_route.ops.experts"], "_expert_activation") as seen:
        run(rows)
    torch.library.opcheck(torch.ops.moe_route.expert_activation.default, seen.call_args.args)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(rows), run(rows))
    with pytest.raises(RuntimeError, match=r"expert_activation has no gradient.*moe_route\.nn\.Experts"):
        run(rows.requires_grad_())


REFUSED_ACTIVATIONS = {
    "float64": ({"rows": torch.zeros(10, 48, dtype=torch.float64)}, ValueError, "rows is float64"),
    "odd": ({"rows": torch.zeros(10, 47)}, ValueError, "an odd number"),
    "bias": ({"bias": torch.zeros(4, 24)}, ValueError, r"bias has shape \[4, 24\]; it must be \[4, 48\]"),
    "dtype": ({"bias": torch.zeros(4, 48).half()}, ValueError, "bias must have the dtype of rows"),
    "pairing": ({"pairing": "thirds"}, ValueError, "unknown pairing 'thirds'"),
    "type": ({"rows": [1.0]}, TypeError, "rows must be a torch.Tensor"),
}


@pytest.mark.parametrize("name", REFUSED_ACTIVATIONS)
def test_arguments_of_the_activation_are_refused_by_name(name: str) -> None:
    changes, error, message = REFUSED_ACTIVATIONS[name]
    arguments = {"rows": torch.zeros(10, 48), "dispatch": Experts.make().slots()} | changes
    with pytest.raises(error, match=message):
        ops.expert_activation(**arguments)

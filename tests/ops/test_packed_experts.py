"""Packed experts: `pack_experts`, and `expert_rows` from its panels, on every instruction set."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import pytest
import torch
from harness.backends import Backend, available
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_experts import CLAMPED, CPU, DTYPES, Experts, same
from torch import Tensor

from moe_route import ops, reference
from moe_route.contract.experts import PAIRINGS

SETS = available(lambda backend: backend.native and not backend.emulated and backend.name != "cuda")


def packed(made: Experts) -> ops.PackedExperts:
    weights = made.arguments
    return ops.pack_experts(weights["up"], weights["down"], pairing=weights["pairing"])


def panel_words(weight: Tensor, expert: int, rows: list[int | None]) -> Tensor:
    """Int32 [words, 64], from the words of the header: stripes with reversed bits, 16 bytes of a row each in turn."""
    columns, size = weight.shape[2], weight.element_size()
    line = torch.zeros(64, -(-columns * size // 16) * 16 // size, dtype=weight.dtype)
    for j, row in enumerate(rows):
        if row is not None:
            line[j, :columns] = weight[expert, row]
    groups = line.view(torch.int32).reshape(64, -1, 4)
    turns = [int(f"{turn:05b}"[::-1], 2) for turn in range(32)]
    order = [group for stripe in turns for group in range(stripe, groups.shape[1], 32)]
    return groups[:, order].flatten(1).T


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_hold_the_words_of_the_weights(dtype: torch.dtype, pairing: str, transposed: bool) -> None:
    made = Experts.make(hidden=397, width=45, dtype=dtype, pairing=pairing, transposed=transposed)
    found, up = packed(made), made.arguments["up"]
    there = up.shape[1]
    for panel in range(found.up.shape[1]):
        if pairing == "halves":
            gate = [c if c < 45 else None for c in range(32 * panel, 32 * panel + 32)]
            rows = [*gate, *(None if c is None else 45 + c for c in gate)]
        else:
            rows = [r if r < there else None for r in range(64 * panel, 64 * panel + 64)]
        assert torch.equal(found.up[1, panel], panel_words(up, 1, rows)), panel
    assert found.nbytes == found.up.nbytes + found.down.nbytes


PROBLEMS = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 40),
        "k": st.integers(1, 3),
        "experts": st.sampled_from([1, 3, 9]),
        "hidden": st.sampled_from([1, 8, 31, 264, 600]),
        "width": st.sampled_from([1, 20, 32, 70]),
        "dtype": st.sampled_from(DTYPES),
        "pairing": st.sampled_from(PAIRINGS),
        "transposed": st.booleans(),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


@settings(max_examples=60)
@given(problem=PROBLEMS, block=st.sampled_from([1, 16]))
def test_the_same_bits_as_from_the_weights_themselves(problem: dict[str, Any], block: int) -> None:
    made = Experts.make(**problem)
    slots, panels = made.slots(block), packed(made)
    expected = made.rows(CPU, slots)
    for backend in SETS:
        assert same(made.rows(backend, slots, packed=panels), expected), backend.name


@pytest.mark.parametrize("vectors", SETS, ids=lambda each: each.name)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_long_rows_are_taken_in_parts(vectors: Backend, pairing: str) -> None:
    """Panels beyond the second-level cache: some turns at a time, for more rows than registers hold, and for few."""
    made = Experts.make(
        tokens=40, k=1, experts=2, hidden=9001, width=37, dtype=torch.bfloat16, pairing=pairing, activation=CLAMPED
    )
    made.ids.clamp_(0, 1)
    made.ids[:3], made.ids[3:] = 1, 0
    expected = made.rows(next(one for one in SETS if one.name == "portable"))
    assert same(made.rows(vectors), expected)
    assert same(made.rows(vectors, packed=packed(made)), expected)
    torch.testing.assert_close(expected, made.rows(reference), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads(dtype: torch.dtype) -> None:
    made = Experts.make(tokens=60, k=2, hidden=512, width=96, dtype=dtype)
    panels, before, found = packed(made), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(one, other) for one, other in zip(packed(made)[:2], panels[:2], strict=True))
            found += [made.rows(CPU, packed=panels) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert all(same(rows, found[0]) for rows in found)


def test_weights_of_experts_without_rows_are_never_read() -> None:
    made = Experts.make(tokens=20, experts=4, hidden=80, width=70)
    made.ids.clamp_(0, 1)
    panels, expected = packed(made), made.rows(CPU)
    for weight in panels[:2]:
        weight[2:] = -1  # words that are no number
    assert same(made.rows(CPU, packed=panels), expected)


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"width": 0}, {"hidden": 0}], ids=str)
def test_empty(sizes: dict[str, int]) -> None:
    made = Experts.make(**sizes)
    assert same(made.rows(CPU, packed=packed(made)), made.rows(CPU))


def test_opcheck_and_compile() -> None:
    made = Experts.make(hidden=96, width=40)
    made.ids.clamp_(0, 3)  # undefined rows differ from call to call
    slots, panels = made.slots(), packed(made)
    pack = torch.ops.moe_route.pack_expert_weight.default
    for pairing in range(3):
        torch.library.opcheck(pack, (made.arguments["up"], pairing))

    def run(x: Tensor) -> Tensor:
        return ops.expert_rows(x, slots, **made.arguments, packed=panels)

    with mock.patch.object(sys.modules["moe_route.ops.experts"], "_expert_rows") as seen:
        run(made.x)
    torch.library.opcheck(torch.ops.moe_route.expert_rows.default, seen.call_args.args)
    with torch.no_grad():
        assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(made.x), run(made.x))


def test_arguments_are_refused_by_name() -> None:
    made = Experts.make()
    weights, panels = made.arguments, packed(made)
    with pytest.raises(ValueError, match="packed is for pairing 'halves', not 'none'"):
        made.rows(ops, packed=panels, pairing="none")
    with pytest.raises(ValueError, match="up_panels"):
        made.rows(ops, packed=panels._replace(up=panels.up[:2]))
    with pytest.raises(ValueError, match="down_panels"):
        made.rows(ops, packed=panels._replace(down=panels.down.float()))
    with pytest.raises(TypeError, match="packed must be PackedExperts, not tuple"):
        made.rows(ops, packed=(panels.up, panels.down))
    with pytest.raises(ValueError, match="odd number"):
        ops.pack_experts(weights["up"][:, 1:].contiguous(), weights["down"])
    with pytest.raises(ValueError, match=r"up is torch\.float32 and down is torch\.float64"):
        ops.pack_experts(weights["up"], weights["down"].double())
    with pytest.raises(ValueError, match="float64"):
        ops.pack_experts(weights["up"].double(), weights["down"].double())
    with pytest.raises(ValueError, match="unknown pairing"):
        ops.pack_experts(weights["up"], weights["down"], pairing="thirds")
    with pytest.raises(TypeError, match=r"up must be a torch\.Tensor"):
        ops.pack_experts([1.0], weights["down"])

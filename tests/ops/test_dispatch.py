"""dispatch, permute, combine: the layout they promise, hard cases 18 to 22 of the kernels, gradients, determinism."""

from __future__ import annotations

import pytest
import torch
from harness.backends import Backend, available
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import moe_route as mr
from moe_route import reference
from moe_route.contract.experts import Dispatch

NATIVE = available(lambda backend: backend.native)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_layout(slots: Dispatch, ids: Tensor, num_experts: int, block: int) -> None:
    """Every promise of `Dispatch`, told from the ids alone."""
    flat = ids.reshape(-1).tolist()
    by_expert = [[s for s, expert in enumerate(flat) if expert == e] for e in range(num_experts)]
    assert slots.counts.tolist() == [len(served) for served in by_expert]
    order, inverse = slots.order.tolist(), slots.inverse.reshape(-1).tolist()
    start, used = 0, set()
    for e, served in enumerate(by_expert):
        assert slots.offsets[e] == start
        assert start % block == 0
        assert order[start : start + len(served)] == served  # stable: slots in their own order
        used.update(range(start, start + len(served)))
        start += -(-len(served) // block) * block
    assert slots.offsets[num_experts] == start <= len(order)
    assert torch.equal(slots.ends, slots.offsets[1:].int())
    assert all(order[r] == -1 for r in range(len(order)) if r not in used)
    assert all(order[r] == s for s, r in enumerate(inverse) if r >= 0)
    assert [r >= 0 for r in inverse] == [0 <= expert < num_experts for expert in flat]


@given(
    tokens=st.integers(0, 40),
    k=st.integers(1, 9),
    num_experts=st.integers(1, 70),
    block=st.sampled_from((1, 2, 16)),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_layout(tokens: int, k: int, num_experts: int, block: int, wide: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, num_experts + 2, (tokens, k), generator=generator).to(torch.int64 if wide else torch.int32)
    expected = reference.dispatch(ids, num_experts, block=block)
    for backend in NATIVE:
        slots = backend.dispatch(ids, num_experts, block=block)
        check_layout(slots, ids, num_experts, block)
        for got, want in zip(slots, expected, strict=True):
            assert torch.equal(got, want)


def test_18_no_tokens(backend: Backend) -> None:
    slots = backend.dispatch(torch.empty(0, 2, dtype=torch.int32), 4, block=8)
    assert slots.counts.tolist() == [0, 0, 0, 0]
    assert slots.offsets.tolist() == [0, 0, 0, 0, 0]
    assert bool((slots.order == -1).all())
    rows = backend.permute(torch.empty(0, 5), slots)
    assert rows.shape == (slots.order.numel(), 5)
    assert bool((rows == 0).all())
    assert backend.combine(rows, torch.empty(0, 2), slots).shape == (0, 5)


@pytest.mark.parametrize("hidden", [0, 1, 3, 7, 9, 127, 1025, 2051])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_19_hidden_size_not_a_multiple_of_eight(native: Backend, hidden: int, dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 6, (11, 3))
    x = torch.randn(11, hidden).to(dtype)
    weights = torch.rand(11, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    slots, oracle = native.dispatch(ids, 6), reference.dispatch(ids, 6)
    rows = native.permute(x, slots)
    assert torch.equal(rows, reference.permute(x, oracle))
    assert torch.equal(native.combine(rows, weights, slots, x), reference.combine(rows, weights, oracle, x))


def test_19_strided_and_offset_inputs(backend: Backend) -> None:
    ids = torch.randint(0, 5, (3, 8)).t()[1:7]
    x = torch.randn(9, 8).t()[1:7, 2:9]
    weights = torch.rand(3, 8).t()[1:7]
    slots = backend.dispatch(ids, 5)
    rows = backend.permute(x, slots)
    assert torch.equal(rows, x.repeat_interleave(3, 0)[slots.order])
    wide = torch.full((rows.shape[0], 20), float("nan"))
    wide[:, 3:10] = rows
    assert torch.allclose(backend.combine(wide[:, 3:10], weights, slots), x * weights.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("block", [1, 4])
def test_20_empty_experts_and_all_tokens_on_one(backend: Backend, block: int) -> None:
    ids = torch.full((10, 1), 3, dtype=torch.int32)
    slots = backend.dispatch(ids, 7, block=block)
    check_layout(slots, ids, 7, block)
    assert slots.counts.tolist() == [0, 0, 0, 10, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_20_ids_out_of_range_are_skipped_never_wrapped(backend: Backend, dtype: torch.dtype) -> None:
    edge = torch.iinfo(dtype)
    ids = torch.tensor([[0, edge.min], [edge.max, 3], [4, -1], [2, 5]], dtype=dtype)
    slots = backend.dispatch(ids, 4)
    check_layout(slots, ids, 4, 1)
    assert (slots.inverse >= 0).tolist() == [[True, False], [False, True], [False, False], [True, False]]
    out = backend.combine(backend.permute(torch.ones(4, 3), slots), torch.ones(4, 2), slots)
    assert out[:, 0].tolist() == [1.0, 1.0, 0.0, 1.0]


def test_21_padding_tokens_reach_nothing(backend: Backend) -> None:
    logits = torch.randn(6, 8)
    logits[2], logits[5] = float("nan"), float("inf")
    valid = torch.tensor([1, 1, 0, 1, 1, 0])
    tokens = mr.ops.token_table(6, valid=valid)
    weights, ids = backend.route(logits, 2, mr.ops.RouterSpec(), tokens=tokens)
    slots = backend.dispatch(ids, 8)
    x = torch.randn(6, 4)
    x[2], x[5] = float("nan"), float("inf")
    rows = backend.permute(x, slots)
    assert bool(rows.isfinite().all())
    out = backend.combine(rows, weights, slots)
    assert bool((out[valid == 0] == 0).all())
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_22_rows_never_written_are_never_read(backend: Backend, dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, -1], [9, 1], [-1, -1]])
    slots = backend.dispatch(ids, 2, block=4)
    rows = torch.full((slots.order.numel(), 20), float("nan"), dtype=dtype)
    used = slots.order >= 0
    rows[used] = 1.0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = backend.combine(rows, torch.full((3, 2), 0.5, dtype=wide), slots)
    assert out.float()[:, 0].tolist() == [0.5, 0.5, 0.0]
    assert bool(out.isfinite().all())


def test_22_gradients_ignore_rows_never_written() -> None:
    ids = torch.tensor([[0, -1], [5, 1]])
    slots = mr.ops.dispatch(ids, 2)
    rows = torch.full((4, 3), float("nan"))
    rows[slots.order >= 0] = 2.0
    rows.requires_grad_()
    weights = torch.rand(2, 2, requires_grad=True)
    mr.ops.combine(rows, weights, slots).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[6.0, 0.0], [0.0, 6.0]]
    assert rows.grad is not None
    assert bool(rows.grad.isfinite().all())
    assert bool((rows.grad[slots.order < 0] == 0).all())


@pytest.mark.parametrize("hidden", [1024, 1032, 1030])
def test_rows_too_large_for_the_caches(hidden: int) -> None:
    """Written past the caches where their alignment allows it; the same rows either way."""
    x, ids = torch.randn(600, hidden), torch.randint(-1, 9, (600, 4))
    slots = mr.ops.dispatch(ids, 9, block=8)
    assert x.numel() * 4 * x.element_size() > 8 << 20
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(mr.ops.permute(x, slots), reference.permute(x, slots))


@pytest.mark.parametrize("tokens", [1, 5, 3000])
def test_23_the_same_bits_for_any_number_of_threads(tokens: int) -> None:
    ids = torch.randint(-1, 40, (tokens, 8))
    x = torch.randn(tokens, 72).bfloat16()
    weights = torch.rand(tokens, 8)
    results = []
    for threads in (1, 2, 3, 2, 1):
        torch.set_num_threads(threads)
        slots = mr.ops.dispatch(ids, 40, block=2)
        rows = mr.ops.permute(x, slots)
        results.append((*slots, rows, mr.ops.combine(rows, weights, slots, x)))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_combine_rounds_once(native: Backend, dtype: torch.dtype) -> None:
    """Every half that exists goes through; the sum is rounded to nearest even, NaN stays NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = torch.stack([every, every.flip(0)]).contiguous()
    slots = native.dispatch(torch.tensor([[0, 1]]), 2)
    weights = torch.tensor([[0.3, 0.9]])
    total = 0.0 + weights[0, 0] * rows[0].float()
    total = total + weights[0, 1] * rows[1].float()
    got, want = native.combine(rows, weights, slots)[0], total.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(got[number].view(torch.int16), want[number].view(torch.int16))


def test_the_same_bits_on_every_native_backend() -> None:
    x = torch.randn(50, 333)
    ids, weights = torch.randint(-1, 16, (50, 4)), torch.rand(50, 4)
    for dtype in DTYPES:
        slots = mr.ops.dispatch(ids, 16)
        rows = mr.ops.permute(x.to(dtype), slots)
        factors = weights.double() if dtype == torch.float64 else weights
        found = [each.combine(rows, factors, slots, x.to(dtype)) for each in NATIVE]
        assert all(torch.equal(got, found[0]) for got in found)


def test_gradcheck() -> None:
    ids = torch.tensor([[0, 2], [2, -1], [1, 0]])
    slots = mr.ops.dispatch(ids, 3, block=2)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(slots.order.numel(), 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: mr.ops.permute(a, slots), (x,))
    assert torch.autograd.gradcheck(lambda a, b, c: mr.ops.combine(a, b, slots, c), (rows, weights, residual))
    assert torch.autograd.gradcheck(
        lambda a, b: mr.ops.combine(torch.tanh(mr.ops.permute(a, slots)), b, slots), (x, weights)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_those_of_the_reference(dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 5, (7, 3))
    x, weights = torch.randn(7, 6).to(dtype), torch.rand(7, 3)
    upstream = torch.randn(7, 6).to(dtype)
    grads = []
    for module in (mr.ops, reference):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        slots = module.dispatch(ids, 5)
        out = module.combine(module.permute(leaves[0], slots), leaves[1], slots, leaves[0])
        grads.append(torch.autograd.grad(out, leaves, upstream))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda s: mr.ops.dispatch(torch.zeros(4, dtype=torch.int32), 3), "ids"),
        (lambda s: mr.ops.dispatch(torch.zeros(4, 2), 3), "ids"),
        (lambda s: mr.ops.dispatch(torch.zeros(4, 2, dtype=torch.int32), 0), "num_experts"),
        (lambda s: mr.ops.dispatch(torch.zeros(4, 2, dtype=torch.int32), 3, block=0), "block"),
        (lambda s: mr.ops.permute(torch.zeros(3, 5), s), "inverse"),
        (lambda s: mr.ops.permute(torch.zeros(4, 5, dtype=torch.int8), s), "x"),
        (lambda s: mr.ops.combine(torch.zeros(7, 5), torch.zeros(4, 2), s), "order"),
        (lambda s: mr.ops.combine(torch.zeros(8, 5), torch.zeros(4, 3), s), "weights"),
        (lambda s: mr.ops.combine(torch.zeros(8, 5), torch.zeros(4, 2), s, torch.zeros(4, 6)), "residual"),
        (lambda s: mr.ops.combine(torch.zeros(8, 5), torch.zeros(4, 2), s, torch.zeros(4, 5).half()), "residual"),
        (lambda s: mr.ops.permute(torch.zeros(4, 5), s._replace(inverse=s.inverse.int())), "inverse"),
        (lambda s: mr.ops.combine(torch.zeros(8, 5), torch.zeros(4, 2), s._replace(order=s.order.double())), "order"),
        (lambda s: mr.ops.combine(torch.zeros(8, 5), torch.zeros(4, 2), s._replace(order=s.order.int())), "order"),
    ],
)
def test_bad_arguments_are_named(call, names: str) -> None:
    slots = mr.ops.dispatch(torch.zeros(4, 2, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=names):
        call(slots)


def test_more_rows_than_the_kernels_number_are_refused(native: Backend) -> None:
    """Before anything is copied or allocated."""
    with pytest.raises(ValueError, match=r"1073741825 rows.* dispatch the tokens in parts"):
        native.dispatch(torch.zeros(1, 1, dtype=torch.int32).expand(2**30 + 1, 1), 4)


def test_rows_out_of_range_are_never_touched(native: Backend) -> None:
    """A forged inverse must not read or write outside the rows."""
    slots = native.dispatch(torch.tensor([[0, 1]]), 2)
    forged = slots._replace(inverse=torch.tensor([[2**40, 1]]))
    rows = native.permute(torch.ones(1, 4), forged)
    assert rows[1].tolist() == [1.0] * 4
    assert native.combine(torch.ones(2, 4), torch.ones(1, 2), forged).tolist() == [[1.0] * 4]


def test_an_order_of_another_dispatch_leaves_no_row_unwritten(backend: Backend) -> None:
    """Rows on which order and inverse disagree are zero, whatever was in that memory before."""
    ids = torch.randint(-1, 5, (9, 3))
    slots = backend.dispatch(ids, 5, block=2)
    x = torch.randn(9, 40)
    forged = slots.order.clone()
    forged[:20] = forged[:20].flip(0)
    forged[21], forged[22] = 27, 2**40
    used = [r for r, slot in enumerate(forged.tolist()) if 0 <= slot < 27 and slots.inverse.view(-1)[slot] == r]
    expected = torch.zeros(len(forged), 40)
    expected[used] = x[forged[used] // 3]
    assert 0 < len(used) < 20
    for _ in range(3):
        torch.full((len(forged), 40), float("nan"))  # memory that the allocator hands out again
        assert torch.equal(backend.permute(x, slots._replace(order=forged)), expected)

"""The hard cases of routing, one named test each; `HARD_CASES.md` says which runs where and why."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from harness.backends import Backend
from harness.expectations import assert_ulp
from harness.problems import INF, NAN, SCORES, Problem, assert_same_bits, check_conservation, check_ids
from torch import Tensor

from moe_route.contract.experts import Dispatch
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import METRICS, Force, StatisticsTables, SteeringTables, token_table

FLT_MAX = torch.finfo(torch.float32).max
SOFTMAX_SUM = RouterSpec(renormalize="sum")
EXPERT_NUMBERS = (1, 6, 60, 67, 72, 160, 257, 384, 896, 1536)


def spec_of(score: str) -> RouterSpec:
    return RouterSpec(score, jitter=0.1)  # type: ignore[arg-type]


def statistics(num_experts: int, **kwargs: Any) -> StatisticsTables:
    return StatisticsTables.zeros(num_experts, groups=1, metrics=METRICS, **kwargs)


def steer_all(num_tokens: int, num_experts: int, **tables: Any) -> dict[str, Any]:
    """Arguments of a call in which every token has row 0 of one-row steering tables."""
    made = {
        name: value[None] if isinstance(value, Tensor) and value.dim() == 1 and len(value) == num_experts else value
        for name, value in tables.items()
    }
    return {
        "steering": SteeringTables(1, num_experts, **made),
        "tokens": token_table(num_tokens, steering_row=0),
    }


def force_codes(num_experts: int, codes: dict[int, int]) -> Tensor:
    table = torch.zeros(num_experts)
    for expert, code in codes.items():
        table[expert] = code
    return table


# ---- selection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_01_all_nan_row(backend: Backend, score: str) -> None:
    logits = torch.randn(3, 20)
    logits[1] = NAN
    table = statistics(20)
    weights, ids = backend.route(logits, 2, spec_of(score), statistics=table)
    assert ids[1].tolist() == [0, 1]
    assert weights[1].tolist() == [0.0, 0.0]
    assert table.scalar("unscored").item() == (1 if score != "identity" else 3 - _all_positive(logits))
    alone, _ = backend.route(logits[[0, 2]], 2, spec_of(score))
    assert torch.equal(weights[[0, 2]], alone)


def _all_positive(logits: Tensor) -> int:
    return int(((logits >= 0).all(1) & (logits.sum(1) > 0)).sum())


@pytest.mark.parametrize("renormalize", ["none", "sum"])
@pytest.mark.parametrize("score", SCORES[:4])
def test_02_partly_nan_row(backend: Backend, score: str, renormalize: str) -> None:
    spec = RouterSpec(score, renormalize=renormalize)
    logits = torch.rand(5, 37) + 0.1
    missing = torch.rand(5, 37) < 0.4
    missing[4, 3:] = True  # fewer numbers than k
    missing[4, :3] = False
    poisoned = torch.where(missing, NAN, logits)
    weights, ids = backend.route(poisoned, 4, spec)
    for t in range(5):
        kept = (~missing[t]).nonzero().flatten()
        k = min(4, len(kept))
        own_weights, own_ids = backend.route(logits[t, kept][None], k, spec)
        assert ids[t, :k].tolist() == kept[own_ids[0].long()].tolist()
        assert_ulp(weights[t, :k], own_weights[0], 8)
    assert ids[4].tolist() == [*ids[4, :3].tolist(), 3]
    assert weights[4, 3] == 0


def test_03_infinities(backend: Backend) -> None:
    logits = torch.tensor(
        [
            [0.0, INF, 1.0, 2.0, 3.0],
            [INF, 0.0, INF, -INF, 3.0],
            [0.0, 1.0, -INF, -INF, -INF],
            [-INF, -INF, -INF, -INF, -INF],
            [INF, INF, INF, INF, INF],
            [-INF, NAN, -INF, -INF, -INF],
        ]
    )
    weights, ids = backend.route(logits, 3, RouterSpec())
    assert ids.tolist() == [[1, 4, 3], [0, 2, 4], [1, 0, 2], [0, 1, 2], [0, 1, 2], [0, 2, 3]]
    expected = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 0], [0, 0, 0], [0.2, 0.2, 0.2], [0, 0, 0]])
    expected[2, :2] = torch.softmax(torch.tensor([1.0, 0.0]), 0)
    assert_ulp(weights, expected, 4)
    for spec in (SOFTMAX_SUM, RouterSpec(order="topk_then_score")):
        weights, ids = backend.route(logits, 2, spec)
        assert ids[1].tolist() == [0, 2]
        assert weights[1].tolist() == [0.5, 0.5]
        assert weights[3].tolist() == [0, 0]
    weights, ids = backend.route(logits, 5, RouterSpec("sigmoid"))
    assert ids[5].tolist() == [0, 2, 3, 4, 1]
    assert not weights.isnan().any()
    assert weights[0, 0] == 1


@pytest.mark.parametrize("score", SCORES)
def test_04_ties(backend: Backend, score: str) -> None:
    k = 2
    equal = torch.zeros(2, 50)
    equal[1] = 0.7
    weights, ids = backend.route(equal, k, spec_of(score))
    assert ids.tolist() == [[0, 1]] * 2
    if score == "sparsemixer":
        assert_ulp(weights, torch.tensor([1 / 50, 1 / 49]).expand(2, 2), 4)
    zeros = torch.zeros(1, 40)
    zeros[0, ::2] = -0.0
    assert backend.route(zeros, k, spec_of(score))[1].tolist() == [[0, 1]]
    assert backend.route(zeros.roll(1, 1), k, spec_of(score))[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("k", [1, 4, 12, 40])
def test_04_ties_of_bfloat16(backend: Backend, k: int) -> None:
    logits = torch.randn(64, 128).mul(3).to(torch.bfloat16)
    assert (logits.sort(1).values.diff(dim=1) == 0).any(1).all()  # every row has ties
    _, ids = backend.route(logits, k, RouterSpec())
    expected = logits.float().argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(ids.long(), expected)


@pytest.mark.parametrize("num_experts", EXPERT_NUMBERS)
def test_05_sizes(backend: Backend, num_experts: int) -> None:
    wanted = {1, num_experts - 1, num_experts, 2, 8, 9, 12, 17, 33, 64}
    for spread in (4.0, 0.0):  # the second: nothing but ties between a few values
        logits = torch.randn(7, num_experts) * 4 if spread else torch.randint(3, (7, num_experts)).float()
        order = logits.argsort(dim=1, descending=True, stable=True)
        for k in sorted(k for k in wanted if 1 <= k <= min(num_experts, 64)):
            weights, ids = backend.route(logits, k, SOFTMAX_SUM)
            assert torch.equal(ids.long(), order[:, :k])
            assert_ulp(weights, torch.softmax(logits.double().gather(1, order[:, :k]), 1), 8 + 2 * spread)


@pytest.mark.parametrize("k", [0, -1, 7, 65])
def test_05_k_out_of_range(backend: Backend, k: int) -> None:
    with pytest.raises(ValueError, match="k"):
        backend.route(torch.randn(2, 6), k, RouterSpec())


def test_06_two_orders_of_softmax(backend: Backend) -> None:
    logits = torch.randn(50, 64) * 5
    one = backend.route(logits, 8, SOFTMAX_SUM)
    other = backend.route(logits, 8, RouterSpec(order="topk_then_score"))
    assert torch.equal(one[1], other[1])
    if backend.native:
        assert torch.equal(one[0], other[0])
    assert_ulp(one[0], other[0], 4)
    biased = steer_all(50, 64, score_bias=torch.rand(64) * 0.1, score_bias_weighs=1)
    one = backend.route(logits, 8, SOFTMAX_SUM, **biased)
    other = backend.route(logits, 8, RouterSpec(order="topk_then_score"), **biased)
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("order", ["score_then_topk", "topk_then_score"])
def test_07_spread_of_200(backend: Backend, order: str) -> None:
    logits = torch.linspace(0, -200, 64)[None].repeat(3, 1)
    weights, ids = backend.route(logits, 64, RouterSpec(order=order, renormalize="sum"))
    assert ids[0].tolist() == list(range(64))
    assert_ulp(weights, torch.softmax(logits.double(), 1), 16)
    # The last four alone: their scores over all experts underflow, their weights do not.
    low = torch.tensor([[60, 61, 62, 63]]).expand(3, 4).contiguous()
    weights, ids = backend.route(
        logits, 4, RouterSpec(order=order, renormalize="sum"), choice=low, choice_mode="replay"
    )
    assert torch.equal(ids.long(), low)
    assert_ulp(weights, torch.softmax(logits[:, 60:].double(), 1), 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES)
def test_08_half_precision_logits(backend: Backend, score: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(40, 72) * 4).to(dtype)
    logits[0, 0], logits[1, 1], logits[2, 2], logits[3, :4] = NAN, INF, -INF, 1e-7
    for k in (1, 2):
        narrow, wide = Problem(logits, k, spec_of(score)), Problem(logits.float(), k, spec_of(score))
        assert_same_bits(narrow.run(backend), wide.run(backend))


# ---- steering ---------------------------------------------------------------------------------------------------


def test_09_fewer_than_k_are_left(backend: Backend) -> None:
    logits = torch.randn(4, 10)
    codes = force_codes(10, {e: Force.FORBID for e in range(10) if e not in (2, 5, 7)})
    table = statistics(10)
    weights, ids = backend.route(logits, 5, SOFTMAX_SUM, statistics=table, **steer_all(4, 10, force=codes))
    assert torch.equal(ids[:, :3].sort(1).values, torch.tensor([[2, 5, 7]] * 4, dtype=torch.int32))
    assert (ids[:, 3:] == -1).all()
    assert (weights[:, 3:] == 0).all()
    assert_ulp(weights[:, :3], torch.softmax(logits.double().gather(1, ids[:, :3].long()), 1), 8)
    assert table.scalar("empty").item() == 8
    assert table.scalar("slots").item() == 20
    # Forced off is not forbidden: those are chosen before a slot stays empty.
    codes[[0, 1]] = float(Force.OFF_NATURAL)
    _, ids = backend.route(logits, 5, SOFTMAX_SUM, **steer_all(4, 10, force=codes))
    assert torch.equal(ids[:, 3:].sort(1).values, torch.tensor([[0, 1]] * 4, dtype=torch.int32))
    # All forbidden.
    weights, ids = backend.route(logits, 5, RouterSpec(), **steer_all(4, 10, force=torch.full((10,), -4.0)))
    assert (ids == -1).all()
    assert (weights == 0).all()


def test_09_top_k_by_row(backend: Backend) -> None:
    logits = torch.randn(4, 10)
    steering = SteeringTables(4, 10, top_k=torch.tensor([0, 1, 3, 5]))
    tokens = token_table(4, steering_row=torch.arange(4))
    table = statistics(10)
    weights, ids = backend.route(logits, 4, SOFTMAX_SUM, steering=steering, tokens=tokens, statistics=table)
    for t, k in enumerate((4, 1, 3, 4)):
        own_weights, own_ids = backend.route(logits[t : t + 1], k, SOFTMAX_SUM)
        assert ids[t].tolist() == own_ids[0].tolist() + [-1] * (4 - k)
        assert torch.equal(weights[t, :k], own_weights[0])
        assert (weights[t, k:] == 0).all()
    assert table.scalar("slots").item() == 12
    assert table.scalar("empty").item() == 0


@pytest.mark.parametrize("code", [Force.ON_PAPER, Force.ON_STEERMOE, Force.ON_NATURAL])
def test_10_more_than_k_forced_on(backend: Backend, code: Force) -> None:
    logits = torch.randn(6, 20)
    forced = [1, 4, 9, 13, 17]
    _, ids = backend.route(
        logits, 3, SOFTMAX_SUM, **steer_all(6, 20, force=force_codes(20, dict.fromkeys(forced, code)))
    )
    if code == Force.ON_NATURAL:
        best = logits[:, forced].argsort(dim=1, descending=True, stable=True)[:, :3]
        assert torch.equal(ids.long(), torch.tensor(forced)[best])
    else:  # all have the same value: lower index first
        assert ids.tolist() == [forced[:3]] * 6


@pytest.mark.parametrize("off", [Force.OFF_PAPER, Force.OFF_STEERMOE, Force.OFF_NATURAL, Force.FORBID])
def test_11_off_wins_over_every_value(backend: Backend, off: Force) -> None:
    """One code per expert, so the operators cannot be asked for on and off at once (a plan compiles that to off).
    What is left to hold here: off beats the largest logit and the largest bias, on beats the smallest."""
    logits = torch.randn(5, 12)
    logits[:, 3], logits[:, 8] = 50.0, -50.0
    bias = torch.zeros(12)
    bias[3], bias[8] = 1e9, -1e9
    codes = force_codes(12, {3: off, 8: Force.ON_NATURAL})
    steering = steer_all(5, 12, force=codes, bias=bias)
    _, ids = backend.route(logits, 4, RouterSpec(), **steering)
    assert (ids[:, 0] == 8).all()
    assert (ids != 3).all()
    _, ids = backend.route(logits, 12, RouterSpec(), **steering)
    assert (ids[:, -1] == (-1 if off == Force.FORBID else 3)).all()


@pytest.mark.parametrize("plane", ["bias", "score_bias"])
@pytest.mark.parametrize("size", [1e4, -1e4, 1e9, -1e9, FLT_MAX, -FLT_MAX, INF, -INF, NAN])
@pytest.mark.parametrize("score", SCORES[:4])
def test_12_extreme_biases(backend: Backend, score: str, size: float, plane: str) -> None:
    spec = RouterSpec(score)
    logits = torch.randn(8, 24).abs()
    bias = torch.zeros(1, 24)
    bias[0, [1, 5, 6]] = size
    tokens = token_table(8, steering_row=torch.arange(8) % 2 - 1)
    steering = SteeringTables(1, 24, **{plane: bias})
    routed = Problem(logits, 6, spec, {plane: bias}, tokens).run(backend)
    check_ids(routed, 24)
    check_conservation(routed)
    plain_weights, plain_ids = backend.route(logits, 6, spec)
    assert torch.equal(routed.weights[::2], plain_weights[::2])
    assert torch.equal(routed.ids[::2], plain_ids[::2])
    biased = {1, 5, 6}
    for row in routed.ids[1::2].tolist():
        if size > 0:
            assert set(row[:3]) == biased
        elif size < 0 or math.isnan(size):
            assert not biased & set(row)
    if plane == "score_bias":  # choosing only: the weight of every expert is what it would be without
        everyone = torch.arange(24, dtype=torch.int32).expand(8, 24).contiguous()
        alone = backend.route_weights(logits, everyone, spec)
        assert torch.equal(routed.weights, alone.gather(1, routed.ids.long()))
        assert torch.equal(
            backend.route_weights(logits, routed.ids, spec, steering=steering, tokens=tokens), routed.weights
        )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_13_negative_bias_on_the_score_scale(backend: Backend, score: str) -> None:
    logits = torch.randn(9, 16)
    best = 11
    logits[:, best] = 6.0
    bias = torch.zeros(16)
    bias[best] = -5.0
    spec = RouterSpec(score)
    weights, ids = backend.route(logits, 16, spec, **steer_all(9, 16, score_bias=bias))
    assert (ids[:, -1] == best).all()
    everyone = torch.arange(16, dtype=torch.int32).expand(9, 16).contiguous()
    assert torch.equal(weights, backend.route_weights(logits, everyone, spec).gather(1, ids.long()))
    weighing, ids = backend.route(logits, 16, spec, **steer_all(9, 16, score_bias=bias, score_bias_weighs=1))
    assert_ulp(weighing[:, -1], weights[:, -1] - 5.0, 4)


# What each placement does, written out in float64 without the reference. z, v: the row and the plane's entries.
PLACEMENTS = {
    "scale": lambda z, v: z * v,
    "bias": lambda z, v: z + v,
    "std": lambda z, v: z + v * ((z - z.mean()) ** 2).mean().sqrt(),
    "magnitude": lambda z, v: z + v * z.abs(),
}


@pytest.mark.parametrize("plane", PLACEMENTS)
def test_14_placements_on_logits(backend: Backend, plane: str) -> None:
    logits, values = torch.randn(6, 18) * 2, torch.randn(18)
    z = torch.stack([PLACEMENTS[plane](row, values.double()) for row in logits.double()])
    weights, ids = backend.route(logits, 5, RouterSpec(), **steer_all(6, 18, **{plane: values}))
    assert torch.equal(ids.long(), z.argsort(1, descending=True)[:, :5])
    assert_ulp(weights, torch.softmax(z, 1).gather(1, ids.long()), 40)


def test_14_placement_all_on_logits(backend: Backend) -> None:
    logits = torch.randn(6, 18)
    scale, bias, std, magnitude = torch.rand(4, 18) + 0.5
    z = logits.double()
    deviation = ((z - z.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True).sqrt()
    z = z * scale / 0.7 + bias + std * deviation + magnitude * z.abs()
    tables = {"scale": scale, "bias": bias, "std": std, "magnitude": magnitude, "temperature": 0.7}
    weights, ids = backend.route(logits, 5, RouterSpec(), **steer_all(6, 18, **tables))
    assert torch.equal(ids.long(), z.argsort(1, descending=True)[:, :5])
    assert_ulp(weights, torch.softmax(z, 1).gather(1, ids.long()), 60)


@pytest.mark.parametrize("weighs", [0, 1])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_14_placement_score_bias(backend: Backend, score: str, weighs: int) -> None:
    logits, bias = torch.randn(6, 18), torch.rand(18) * 0.3
    z = logits.double()
    scores = torch.softmax(z, 1) if score == "softmax" else torch.sigmoid(z)
    value = scores + bias
    spec = RouterSpec(score, renormalize="sum", eps=1e-20)
    weights, ids = backend.route(logits, 5, spec, **steer_all(6, 18, score_bias=bias, score_bias_weighs=weighs))
    order = value.argsort(1, descending=True)[:, :5]
    assert torch.equal(ids.long(), order)
    expected = (value if weighs else scores).gather(1, order)
    assert_ulp(weights, expected / expected.sum(1, keepdim=True), 16)


@pytest.mark.parametrize("after", [0, 1])
def test_14_placement_weight_scale(backend: Backend, after: int) -> None:
    logits, factor = torch.randn(6, 18), torch.rand(18) + 0.5
    weights, ids = backend.route(
        logits, 5, SOFTMAX_SUM, **steer_all(6, 18, weight_scale=factor, weight_scale_after=after)
    )
    scores = torch.softmax(logits.double(), 1)
    order = scores.argsort(1, descending=True)[:, :5]
    assert torch.equal(ids.long(), order)
    expected, factor = scores.gather(1, order), factor.double()[order]
    if after:
        expected = expected / expected.sum(1, keepdim=True) * factor
    else:
        expected = expected * factor / (expected * factor).sum(1, keepdim=True)
    assert_ulp(weights, expected, 16)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "code",
    [Force.ON_PAPER, Force.OFF_PAPER, Force.ON_STEERMOE, Force.OFF_STEERMOE, Force.ON_NATURAL, Force.OFF_NATURAL],
)
def test_14_placement_force(backend: Backend, code: Force, score: str) -> None:
    logits = torch.randn(6, 18)
    forced, forbidden = [2, 7], 4
    codes = force_codes(18, {**dict.fromkeys(forced, code), forbidden: Force.FORBID})
    weights, ids = backend.route(logits, 17, RouterSpec(score), **steer_all(6, 18, force=codes))
    z = logits.double().clone()
    z[:, forbidden] = -INF
    allowed = [e for e in range(18) if e != forbidden]
    if code in (Force.ON_STEERMOE, Force.OFF_STEERMOE):
        z = torch.log_softmax(z, 1)
    low, high = z[:, allowed].amin(1), z[:, allowed].amax(1)
    value = {
        Force.ON_PAPER: high,
        Force.OFF_PAPER: low,
        Force.ON_STEERMOE: high + 0.01,
        Force.OFF_STEERMOE: low - 0.01,
    }.get(code)
    if value is not None:
        z[:, forced] = value[:, None]
    scores = torch.softmax(z, 1) if score == "softmax" else torch.sigmoid(z)
    assert_ulp(weights, scores.gather(1, ids.long()), 40)
    place = ids[:, :2] if code > 0 else ids[:, -2:]
    assert torch.equal(place.sort(1).values, torch.tensor([forced] * 6, dtype=torch.int32))


def test_14_placement_remap(backend: Backend) -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    remap = torch.tensor([[0, 0, 3, 3, -1]], dtype=torch.int32)
    table = statistics(5)
    steering, tokens = SteeringTables(1, 5, remap=remap), token_table(2, steering_row=0)
    weights, ids = backend.route(logits, 3, SOFTMAX_SUM, steering=steering, tokens=tokens, statistics=table)
    natural = torch.softmax(torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64), 0)
    # Row 0 chose 0, 1, 2: 1 joins 0. Row 1 chose 4, 3, 2: 4 is dropped, 2 joins 3.
    assert ids.tolist() == [[0, 3, -1], [3, -1, -1]]
    expected = [[natural[0] + natural[1], natural[2], 0], [natural[1] + natural[2], 0, 0]]
    assert_ulp(weights, torch.tensor(expected), 8)
    assert table.metric("counts").tolist() == [[1, 0, 0, 2, 0]]
    assert table.scalar("empty").item() == 3


@pytest.mark.parametrize("correction", [0, 1])
def test_15_standard_deviation(backend: Backend, correction: int) -> None:
    """The weight of a row steered by std on one expert tells what the deviation was."""
    logits = torch.randn(5, 9)
    logits[1] = 3.3  # a constant row
    logits[2, 4] = -INF  # not finite: left out
    codes, step = force_codes(9, {8: Force.FORBID}), torch.zeros(9)
    step[0] = 1.0
    steering = steer_all(5, 9, std=step, force=codes, std_correction=correction)
    everyone = torch.arange(9, dtype=torch.int32).expand(5, 9).contiguous()
    weights = backend.route_weights(logits, everyone, RouterSpec(), **steering)
    for t in range(5):
        used = logits[t, :8][logits[t, :8].isfinite()].double()
        z = logits[t].double()
        z[0] += used.std(correction=correction)
        z[8] = -INF
        assert_ulp(weights[t], torch.softmax(z, 0), 16)
    alone = steer_all(3, 1, std=torch.ones(1), std_correction=correction)
    weights, ids = backend.route(torch.randn(3, 1), 1, RouterSpec(), **alone)
    assert weights.flatten().tolist() == [1, 1, 1]
    assert ids.flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_experts", [4, 67, 300, 1537])
@pytest.mark.parametrize("correction", [0, 1])
def test_15_standard_deviation_of_huge_logits(backend: Backend, correction: int, num_experts: int) -> None:
    """It does not overflow on the way while it is itself a float32, beside rows of usual logits and of infinities."""
    largest = torch.finfo(torch.float32).max
    logits = torch.randn(7, num_experts)
    logits[0, 0] = 3e19
    logits[1] *= 1e30
    logits[2] = torch.where(torch.arange(num_experts) % 2 == 0, largest / 2, -largest / 2)
    logits[3, 1:3] = torch.tensor([INF, 2e38])
    logits[4] = largest
    step = torch.full((num_experts,), 0.125)
    step[0] = 0
    everyone = torch.arange(2, dtype=torch.int32).expand(7, 2).contiguous()
    steering = steer_all(7, num_experts, std=step, std_correction=correction)
    weights = backend.route_weights(logits, everyone, RouterSpec("identity"), **steering)
    for t in range(7):
        z = logits[t].double()
        expected = torch.stack([z[0], z[1] + 0.125 * z[z.isfinite()].std(correction=correction)])
        expected = torch.where(expected.abs() > largest, expected.sign() * INF, expected)
        torch.testing.assert_close(weights[t].double(), expected, rtol=1e-5, atol=0)
    _, ids = backend.route(
        torch.tensor([[3e19, 1.0, 2.0, 0.0]]), 2, RouterSpec(), **steer_all(1, 4, std=torch.tensor([0, 0.5, 0.5, 0]))
    )
    assert ids.tolist() == [[0, 1]]  # the second becomes 1.5e19 / sqrt(12) + 1, as large as the third


def test_15_standard_deviation_of_huge_float64_logits(wide: Backend) -> None:
    logits = torch.tensor([[1e300, -1e300, 3.0, 1e-3]], dtype=torch.float64)
    everyone = torch.arange(2, dtype=torch.int32).expand(1, 2).contiguous()
    steering = steer_all(1, 4, std=torch.tensor([0.0, 1.0, 0.0, 0.0]))
    weights = wide.route_weights(logits, everyone, RouterSpec("identity"), **steering)
    torch.testing.assert_close(weights[0, 1], -1e300 + torch.tensor(1e300 / 2**0.5, dtype=torch.float64))


def test_16_indices_out_of_range(backend: Backend) -> None:
    logits = torch.randn(8, 12)
    codes = force_codes(12, {4: Force.ON_PAPER})[None].repeat(2, 1)
    tokens = torch.tensor(
        [
            [-1, 0, 0, 1],
            [0, 1, 0, 1],
            [1, -1, 2, 1],
            [2, 1, 1, 1],  # no such row: unsteered
            [-7, 2, 3, 1],  # no such group
            [1, -9, 4, 1],  # no such group, no such segment
            [0, 0, -1, 0],  # padding
            [-1, 2**31 - 1, -(2**31), 1],
        ],
        dtype=torch.int32,
    )
    table = StatisticsTables.zeros(12, groups=2, segments=4, metrics=METRICS)
    _, ids = backend.route(
        logits, 3, RouterSpec(), steering=SteeringTables(2, 12, force=codes), tokens=tokens, statistics=table
    )
    _, plain = backend.route(logits, 3, RouterSpec())
    for t in (0, 3, 4, 7):
        assert torch.equal(ids[t], plain[t])
    for t in (1, 2, 5):
        assert ids[t, 0] == 4
    assert table.scalar("tokens").tolist() == [1, 2]
    assert table.scalar("tokens", of="segments").tolist() == [2, 1, 1, 1]  # every segment here had a token ...
    assert table.scalar("steered").tolist() == [0, 1]
    before = table.segments.clone()
    backend.route(logits, 3, RouterSpec(), tokens=token_table(8, segment=1), statistics=table)
    assert torch.equal(table.segments[[0, 2, 3]], before[[0, 2, 3]])  # ... and none has one here, but number 1


@pytest.mark.parametrize("poison", [INF, -INF, NAN, FLT_MAX])
@pytest.mark.parametrize("score", SCORES)
def test_16_rows_do_not_touch_each_other(backend: Backend, score: str, poison: float) -> None:
    logits = torch.randn(9, 33)
    poisoned = logits.clone()
    poisoned[4] = poison
    poisoned[6, 2] = poison
    bias = torch.randn(1, 33)
    tokens = token_table(9, steering_row=torch.arange(9) % 2 - 1)
    steering = SteeringTables(1, 33, std=bias, magnitude=bias)
    one = backend.route(logits, 2, spec_of(score), steering=steering, tokens=tokens)
    other = backend.route(poisoned, 2, spec_of(score), steering=steering, tokens=tokens)
    clean = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(one[0][clean], other[0][clean])
    assert torch.equal(one[1][clean], other[1][clean])


@pytest.mark.parametrize("code", [Force.ON_PAPER, Force.ON_STEERMOE, Force.OFF_PAPER, Force.OFF_STEERMOE])
def test_17_bfloat16_logits_with_forced_experts(backend: Backend, code: Force) -> None:
    """Near 10 a bfloat16 step is 0.06, so +-0.01 would be lost in bfloat16."""
    logits = (torch.randn(16, 32) * 0.2 + 10).to(torch.bfloat16)
    logits[:, 30] = 10.0
    codes = force_codes(32, {30: code})
    steering = steer_all(16, 32, force=codes)
    weights, ids = backend.route(logits, 32, RouterSpec(), **steering)
    assert (ids[:, 0 if code > 0 else -1] == 30).all()
    wide, wide_ids = backend.route(logits.float(), 32, RouterSpec(), **steering)
    assert torch.equal(weights, wide)
    assert torch.equal(ids, wide_ids)
    if code in (Force.ON_STEERMOE, Force.OFF_STEERMOE):
        forced, extreme = (weights[:, 0], weights[:, 1]) if code > 0 else (weights[:, -1], weights[:, -2])
        assert_ulp(forced / extreme, torch.full((16,), math.exp(0.01 if code > 0 else -0.01)), 40)


# ---- shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 33])
def test_18_few_tokens(backend: Backend, num_tokens: int) -> None:
    logits = torch.randn(num_tokens, 40)
    table = statistics(40)
    weights, ids = backend.route(logits, 6, SOFTMAX_SUM, statistics=table)
    assert weights.shape == ids.shape == (num_tokens, 6)
    assert table.scalar("tokens").item() == num_tokens
    sorted_rows = backend.dispatch(ids, 40)
    assert sorted_rows.counts.sum().item() == num_tokens * 6
    x = torch.randn(num_tokens, 5)
    out = backend.combine(backend.permute(x, sorted_rows), weights, sorted_rows)
    assert out.shape == (num_tokens, 5)
    torch.testing.assert_close(out, x)
    backend.observe(logits, ids, weights, SOFTMAX_SUM, statistics=table)
    assert table.scalar("tokens").item() == 2 * num_tokens


def test_18_more_than_2_to_31_logits(native: Backend) -> None:
    """T * E past 2^31 through stride-0 storage: one row of memory, seen half a million times."""
    num_experts, num_tokens = 4096, 2**31 // 4096 + 3
    if native.instruction_set in ("portable", "avx2") or native.emulated:
        pytest.skip("the same index arithmetic as the fastest set, or as on a device, at many times the cost")
    row = torch.randn(1, num_experts)
    table = StatisticsTables.zeros(num_experts, groups=1, metrics=("counts",), entropy=False)
    weights, ids = native.route(row.expand(num_tokens, num_experts), 1, RouterSpec(), statistics=table)
    best = row.argmax().item()
    assert (ids == best).all()
    assert table.metric("counts")[0, best].item() == num_tokens
    assert (weights == weights[0]).all()


def test_18_rows_further_than_2_to_31_apart(native: Backend) -> None:
    """Row offsets past 2^31 elements, in memory that is reserved but never touched between the rows."""
    stride, num_experts = 2**31 // 2 + 64, 40
    storage = torch.empty(3 * stride + num_experts, dtype=torch.bfloat16)
    logits = storage.as_strided((4, num_experts), (stride, 1))
    values = torch.randn(4, num_experts).to(torch.bfloat16)
    for t in range(4):
        logits[t].copy_(values[t])
    far, near = native.route(logits, 4, SOFTMAX_SUM), native.route(values, 4, SOFTMAX_SUM)
    assert torch.equal(far[0], near[0])
    assert torch.equal(far[1], near[1])


def test_18_combine_and_permute_past_2_to_31(native: Backend) -> None:
    hidden = 2**20
    rows_number = 2**31 // hidden + 8
    storage = torch.empty(rows_number, hidden, dtype=torch.bfloat16)
    for row in (-1, -2, 0):
        storage[row] = torch.randn(hidden).to(torch.bfloat16)
    order = torch.full((rows_number,), -1, dtype=torch.int64)
    inverse = torch.tensor([[rows_number - 1, 0], [-1, rows_number - 2]])
    for slot, row in enumerate(inverse.flatten().tolist()):
        if row >= 0:
            order[row] = slot
    offsets = torch.tensor([0, rows_number])
    weights = torch.tensor([[0.5, 2.0], [3.0, 0.25]])
    out = native.combine(storage, weights, Dispatch(offsets, offsets[1:].int(), offsets[1:], order, inverse))
    expected = [storage[-1].float() * 0.5 + storage[0].float() * 2, storage[-2].float() * 0.25]
    torch.testing.assert_close(out.float(), torch.stack(expected), rtol=2**-8, atol=1e-6)
    # permute: the last rows of x go to the first rows of the experts.
    back = torch.full((rows_number, 1), -1, dtype=torch.int64)
    back[-1], back[-2] = 0, 1
    order = torch.tensor([rows_number - 1, rows_number - 2])
    moved = native.permute(storage, Dispatch(offsets, offsets[1:].int(), offsets[1:], order, back))
    assert torch.equal(moved, storage[[-1, -2]])


@pytest.mark.parametrize("hidden", [1, 3, 7, 8, 24, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_19_layouts_of_rows(backend: Backend, hidden: int, dtype: torch.dtype) -> None:
    x = torch.randn(hidden, 9).to(dtype).T  # transposed storage
    ids = torch.stack([torch.randperm(5)[:3] for _ in range(9)])
    weights = torch.rand(3, 9).T
    table = backend.dispatch(ids, 5)
    rows = backend.permute(x, table)
    expected = torch.zeros_like(rows)
    for row, slot in enumerate(table.order.tolist()):
        if slot >= 0:
            expected[row] = x[slot // 3]
    assert torch.equal(rows, expected)
    wide = torch.cat([rows, rows], 1)[:, :hidden]
    out = backend.combine(wide, weights, table, residual=x)
    exact = x.double() * (1 + weights.double().sum(1, keepdim=True))
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance * 0.1)


def test_19_layouts_of_logits(backend: Backend) -> None:
    plain = torch.randn(11, 37)
    wide = torch.full((11, 50), NAN)
    wide[:, 5:42] = plain
    offset = torch.cat([torch.full((3,), NAN), plain.flatten()])[3:].view(11, 37)
    expected = Problem(plain, 5).run(backend)
    for logits in (wide[:, 5:42], plain.T.contiguous().T, offset, plain.repeat_interleave(2, 0)[::2]):
        assert torch.equal(logits, plain)
        assert_same_bits(Problem(logits, 5).run(backend), expected)


@pytest.mark.parametrize("block", [1, 4])
def test_20_uneven_experts_and_ids_out_of_range(backend: Backend, block: int) -> None:
    one = torch.full((50, 2), 3)
    table = backend.dispatch(one, 9, block=block)
    assert table.counts.tolist() == [0, 0, 0, 100, 0, 0, 0, 0, 0]
    assert table.order[:100].tolist() == list(range(100))
    wild = torch.tensor([[0, -1], [9, 2], [-9, 8], [2**31 - 1, -(2**31)]], dtype=torch.int32)
    for ids in (wild, wild.long(), torch.where(wild < 0, wild.long() - 2**40, wild.long() + 2**40 * (wild > 8))):
        table = backend.dispatch(ids, 9, block=block)
        assert table.counts.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 1]
        assert (table.inverse.flatten() >= 0).tolist() == [True, False, False, True, False, True, False, False]
        assert sorted(table.order[table.order >= 0].tolist()) == [0, 3, 5]
        assert (table.offsets % block == 0).all()
    logits = torch.randn(4, 9)
    weights, ids = backend.route(logits, 2, SOFTMAX_SUM, choice=wild.clamp(min=-1).contiguous(), choice_mode="replay")
    assert ids[:3].tolist() == [[0, -1], [-1, 2], backend.route(logits[2:3], 2, SOFTMAX_SUM)[1][0].tolist()]
    assert weights[0].tolist() == [1, 0]
    assert weights[1].tolist() == [0, 1]


@pytest.mark.parametrize("score", SCORES)
def test_21_padding(backend: Backend, score: str) -> None:
    logits = torch.randn(10, 30)
    valid = torch.arange(10) % 3 != 1
    garbage = logits.clone()
    garbage[~valid] = torch.tensor([NAN, INF, -INF, 1e38]).repeat(8)[:30]
    tokens = token_table(10, valid=valid, segment=0)
    tables = [StatisticsTables.zeros(30, groups=1, segments=1, metrics=METRICS) for _ in range(2)]
    weights, ids = backend.route(garbage, 2, spec_of(score), tokens=tokens, statistics=tables[0])
    assert (ids[~valid] == -1).all()
    assert (weights[~valid] == 0).all()
    kept = token_table(int(valid.sum()), segment=0)
    alone = backend.route(logits[valid], 2, spec_of(score), tokens=kept, statistics=tables[1])
    assert torch.equal(weights[valid], alone[0])
    assert torch.equal(ids[valid], alone[1])
    assert torch.equal(tables[0].groups, tables[1].groups)
    assert torch.equal(tables[0].segments, tables[1].segments)
    given = torch.zeros(10, 2, dtype=torch.int64)
    given[:, 1] = 1
    _, ids = backend.route(garbage, 2, spec_of(score), tokens=tokens, choice=given, choice_mode="replay")
    assert (ids[~valid] == -1).all()


def test_22_rows_never_written_are_never_read(backend: Backend) -> None:
    ids = torch.tensor([[0, -1], [2, 0], [-1, -1]])
    table = backend.dispatch(ids, 4, block=4)
    rows = backend.permute(torch.ones(3, 6), table)
    unused = torch.ones(rows.shape[0], dtype=torch.bool)
    unused[table.inverse[table.inverse >= 0]] = False
    assert (rows[unused] == 0).all()
    rows[unused] = NAN
    weights = torch.tensor([[2.0, NAN], [0.25, 0.5], [NAN, INF]])
    out = backend.combine(rows, weights, table)
    assert out.tolist() == [[2.0] * 6, [0.75] * 6, [0.0] * 6]
    rows.requires_grad_()
    weights.requires_grad_()
    backend.combine(rows, weights, table).sum().backward()
    assert (rows.grad[unused] == 0).all()
    assert weights.grad.tolist() == [[6.0, 0.0], [6.0, 6.0], [0.0, 0.0]]


# ---- execution --------------------------------------------------------------------------------------------------


def _rich_problem(num_tokens: int = 501, num_experts: int = 96) -> Problem:
    steering = {
        "std": torch.randn(3, num_experts),
        "force": torch.randint(-4, 4, (3, num_experts)) * (torch.rand(3, num_experts) < 0.1).float(),
        "weight_scale": torch.rand(3, num_experts),
        "temperature": torch.rand(3) + 0.5,
    }
    tokens = token_table(
        num_tokens,
        steering_row=torch.randint(-1, 3, (num_tokens,)),
        group=torch.randint(-1, 3, (num_tokens,)),
        segment=torch.arange(num_tokens) * 4 // num_tokens,
        valid=torch.rand(num_tokens) < 0.9,
    )
    spec = RouterSpec("sigmoid", renormalize="sum", groups=8, top_groups=4, scale=2.5)
    bias = torch.rand(num_experts) * 0.2
    return Problem(torch.randn(num_tokens, num_experts), 7, spec, steering, tokens, correction_bias=bias)


def test_23_runs_and_threads(native: Backend) -> None:
    problem = _rich_problem()
    torch.set_num_threads(1)
    first = problem.run(native)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for _ in range(native.times(25)):
            assert_same_bits(problem.run(native), first)


def test_23_dispatch_and_combine(native: Backend) -> None:
    ids = torch.randint(-1, 60, (700, 6))
    x, weights = torch.randn(700, 40).to(torch.bfloat16), torch.rand(700, 6)

    def whole() -> list[Tensor]:
        table = native.dispatch(ids, 60, block=8)
        rows = native.permute(x, table)
        return [*table, rows, native.combine(rows, weights, table, residual=x)]

    torch.set_num_threads(1)
    first = whole()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for _ in range(native.times(25)):
            assert all(torch.equal(one, other) for one, other in zip(whole(), first, strict=True))


def test_25_merge_is_exact(backend: Backend) -> None:
    problem = _rich_problem()
    whole = problem.run(backend)
    cuts = [0, 1, 100, 101, 350, 501]
    parts = [problem.rows(a, b).run(backend).statistics for a, b in pairwise(cuts)]
    for of in ("groups", "segments"):
        merged, expected = sum(getattr(part, of) for part in parts), getattr(whole.statistics, of)
        if backend.native:
            assert torch.equal(merged, expected)
        else:  # torch's vectorised functions round by position, so the terms themselves differ by an ulp
            assert torch.equal(merged[:, :4], expected[:, :4])
            torch.testing.assert_close(merged.double(), expected.double(), rtol=1e-6, atol=2.0**12)


def test_25_counters_are_64_bits_wide(backend: Backend) -> None:
    problem = Problem(torch.randn(30, 16), 4)
    plain = problem.run(backend)
    table = problem.statistics()
    table.groups.fill_(2**45 + 1)
    assert torch.equal(problem.run(backend, table).statistics.groups, plain.statistics.groups + 2**45 + 1)


DIFFERENTIATED = [("sparsemixer", "score_then_topk", "none")] + [
    (score, order, renormalize)
    for score in SCORES[:4]
    for order in ("score_then_topk", "topk_then_score")
    for renormalize in ("none", "sum", "clamp", "norm")
]


@pytest.mark.parametrize(("score", "order", "renormalize"), DIFFERENTIATED)
def test_26_gradcheck(wide: Backend, score: Any, order: Any, renormalize: Any) -> None:
    """Gradients of the weights in the logits and expert_scale, float64."""
    spec = RouterSpec(score, order=order, renormalize=renormalize, eps=1e-3, norm_p=2.0, scale=1.5, jitter=0.4)
    logits = (torch.rand(4, 9, dtype=torch.float64) + 0.2).requires_grad_()
    factor = (torch.rand(9) + 0.5).requires_grad_()
    _, ids = wide.route(logits.detach(), 2, spec)
    ids[3, 1] = -1

    def weigh(z: Tensor) -> Tensor:
        return wide.route_weights(z, ids, spec, expert_scale=factor)

    assert torch.autograd.gradcheck(weigh, (logits,))
    wide.route_weights(logits, ids, spec, expert_scale=factor).sum().backward()
    plain = wide.route_weights(logits.detach(), ids, spec)
    expected = torch.zeros(10, dtype=torch.float64).index_add(0, ids.long().flatten() % 10, plain.flatten())[:9]
    torch.testing.assert_close(factor.grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["scale", "bias", "std", "magnitude", "score_bias", "weight_scale", "temperature"])
def test_26_gradients_of_steering_tables(wide: Backend, name: str) -> None:
    """Against central differences in float64 logits (tables are float32, so the step is large)."""
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    shape = (2,) if name == "temperature" else (2, 8)
    table = (torch.rand(shape) + 0.5).requires_grad_()
    extra = {"score_bias_weighs": 1} if name == "score_bias" else {}
    tokens = token_table(6, steering_row=torch.tensor([0, 1, -1, 1, 0, 5]), valid=torch.tensor([1, 1, 1, 1, 0, 1]) > 0)
    spec = RouterSpec("sigmoid", renormalize="sum")
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(6)])
    mix = torch.randn(6, 3, dtype=torch.float64)

    def loss(values: Tensor, z: Tensor) -> Tensor:
        steering = SteeringTables(2, 8, **{name: values}, **extra)
        return (wide.route_weights(z, ids, spec, steering=steering, tokens=tokens) * mix).sum()

    loss(table, logits).backward()
    step, base = 2.0**-9, table.detach()
    numeric = torch.zeros_like(base)
    for at in range(base.numel()):
        delta = torch.zeros(base.numel())
        delta[at] = step
        high, low = (loss(base + sign * delta.view(shape), logits.detach()) for sign in (1, -1))
        numeric.view(-1)[at] = (high - low) / (2 * step)
    torch.testing.assert_close(table.grad, numeric, rtol=1e-3, atol=2e-5)
    assert (logits.grad[4] == 0).all()  # padding
    assert table.grad.abs().sum() > 0


def test_26_gradient_at_neutral_tables(backend: Backend) -> None:
    """Training starts at tables that steer nothing: the gradient must not vanish there."""
    for name in ("bias", "std", "magnitude"):
        table = torch.zeros(1, 8, requires_grad=True)
        ids = torch.arange(3).expand(5, 3).contiguous()
        weights = backend.route_weights(
            torch.randn(5, 8),
            ids,
            RouterSpec(),
            steering=SteeringTables(1, 8, **{name: table}),
            tokens=token_table(5, steering_row=0),
        )
        weights[:, 0].sum().backward()
        assert table.grad[0, 0] > 0 or name == "magnitude"
        assert table.grad.abs().sum() > 0


def test_26_gradients_stay_finite(backend: Backend) -> None:
    logits = torch.randn(6, 8)
    logits[0], logits[1, 2], logits[2, 3], logits[3], logits[4] = NAN, INF, -INF, -INF, 2.0
    logits.requires_grad_()
    step = torch.full((1, 8), 0.5, requires_grad=True)
    ids = torch.arange(3).expand(6, 3).contiguous()
    for score in ("softmax", "sigmoid", "sqrt_softplus"):
        weights = backend.route_weights(
            logits,
            ids,
            RouterSpec(score, renormalize="sum"),
            steering=SteeringTables(1, 8, std=step),
            tokens=token_table(6, steering_row=0),
        )
        assert weights.isfinite().all()
        grads = torch.autograd.grad(weights.square().sum(), (logits, step))
        assert all(grad[row].isfinite().all() for grad in grads[:1] for row in (4, 5))
        assert grads[0][0].isfinite().all()

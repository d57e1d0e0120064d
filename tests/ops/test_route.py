"""route, observe, route_weights: what each argument means, checked against code written out in full."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness.backends import Backend
from harness.expectations import assert_ulp
from harness.problems import INF, NAN, Problem, check_conservation, check_ids

from moe_route import reference
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import FIXED_POINT, METRICS, Force, StatisticsTables, SteeringTables, token_table

SUM = RouterSpec(renormalize="sum")


def tables(num_experts: int, groups: int = 1, segments: int = 0, **kwargs: Any) -> StatisticsTables:
    return StatisticsTables.zeros(num_experts, groups=groups, segments=segments, metrics=METRICS, **kwargs)


# ---- statistics -------------------------------------------------------------------------------------------------


def test_statistics_against_a_loop(backend: Backend) -> None:
    """Every plane and scalar, token by token in Python, from the ids and weights that came out."""
    num_tokens, num_experts, k = 40, 12, 3
    logits = torch.randn(num_tokens, num_experts)
    logits[7] = NAN
    steering = SteeringTables(2, num_experts, bias=torch.randn(2, num_experts) * 2, top_k=torch.tensor([0, 2]))
    tokens = token_table(
        num_tokens,
        steering_row=torch.arange(num_tokens) % 3 - 1,
        group=torch.arange(num_tokens) % 4 - 1,
        segment=torch.arange(num_tokens) // 15,
        valid=torch.arange(num_tokens) % 5 != 2,
    )
    table = tables(num_experts, groups=3, segments=3)
    weights, ids = backend.route(logits, k, SUM, steering=steering, tokens=tokens, statistics=table)
    _, natural = backend.route(logits, k, SUM)
    bias = steering.tables["bias"]
    expected = {
        of: {name: torch.zeros(3, num_experts, dtype=torch.float64) for name in METRICS}
        for of in ("groups", "segments")
    }
    scalars = {of: {} for of in ("groups", "segments")}
    for t in range(num_tokens):
        row, group, segment, valid = tokens[t].tolist()
        if not valid:
            continue
        z = logits[t].double() + (bias[row] if row >= 0 else 0)
        p = torch.softmax(z, 0)
        slots = 2 if row == 1 else k
        chosen = [i for i in ids[t].tolist() if i >= 0]
        flipped = [j for j, i in enumerate(chosen) if i not in natural[t].tolist()]
        total = weights[t].double().sum().item()
        unscored = bool(p.isnan().any())
        entropy = 0.0 if unscored else -(p * p.log()).sum().item()
        moved = sum(weights[t, j].item() for j in flipped) / total if total else 0.0
        for of, index in (("groups", group), ("segments", segment)):
            if index < 0:
                continue
            for j, expert in enumerate(chosen):
                expected[of]["counts"][index, expert] += 1
                expected[of]["weight"][index, expert] += weights[t, j].item()
                expected[of]["weight_share"][index, expert] += weights[t, j].item() / total if total else 0.0
            expected[of]["probability"][index] += 0 if unscored else p
            for expert in natural[t].tolist():
                expected[of]["natural_counts"][index, expert] += 1
            values = (1, slots, slots - len(chosen), unscored, entropy, row >= 0, len(flipped), moved)
            held = scalars[of].setdefault(index, [0.0] * 8)
            scalars[of][index] = [a + b for a, b in zip(held, values, strict=True)]
    for of in ("groups", "segments"):
        for name, want in expected[of].items():
            unit = 1 if name.endswith("counts") else FIXED_POINT
            torch.testing.assert_close(table.metric(name, of=of) * unit, want, rtol=1e-6, atol=1e-6, check_dtype=False)
        got = getattr(table, of)[:, :8].double()
        got[:, [4, 7]] *= FIXED_POINT
        for index, want in scalars[of].items():
            torch.testing.assert_close(got[index].tolist(), [float(x) for x in want], rtol=1e-5, atol=1e-6)


def test_mass_of_a_token_sums_to_one(backend: Backend) -> None:
    for score in ("softmax", "sigmoid", "sqrt_softplus"):
        table = tables(128)
        backend.route(torch.randn(100, 128) * 5, 8, RouterSpec(score), statistics=table)  # type: ignore[arg-type]
        assert abs(table.metric("probability").sum().item() * FIXED_POINT - 100) < 1e-4
        assert abs(table.metric("weight_share").sum().item() * FIXED_POINT - 100) < 1e-4


def test_entropy_of_a_uniform_and_of_a_sharp_row(backend: Backend) -> None:
    table = tables(64, groups=3)
    sharp = torch.full((1, 64), -200.0)
    sharp[0, 3] = 0
    infinite = torch.zeros(1, 64)
    infinite[0, :2] = INF
    logits = torch.cat([torch.zeros(1, 64), sharp, infinite])
    backend.route(logits, 1, RouterSpec(), tokens=token_table(3, group=torch.arange(3)), statistics=table)
    entropy = table.scalar("entropy") * FIXED_POINT
    assert entropy.tolist() == pytest.approx([math.log(64), 0.0, math.log(2)], abs=1e-5)


def test_identity_scores_that_are_no_distribution_are_unscored(backend: Backend) -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.5, -0.1, 0.6], [0.0, 0.0, 0.0], [INF, 0.0, 0.0]])
    table = tables(3, groups=4)
    backend.route(logits, 1, RouterSpec("identity"), tokens=token_table(4, group=torch.arange(4)), statistics=table)
    assert table.scalar("unscored").tolist() == [0, 1, 1, 1]
    assert (table.metric("probability") * FIXED_POINT).tolist() == [[0.5, 0.25, 0.25]] + [[0.0] * 3] * 3


def test_planes_and_entropy_are_optional(backend: Backend) -> None:
    logits = torch.randn(20, 16)
    full = Problem(logits, 4, SUM).run(backend).statistics
    for metrics in (("counts",), ("counts", "weight_share"), ("probability", "natural_counts"), ()):
        for entropy in (True, False):
            table = StatisticsTables.zeros(16, groups=1, metrics=metrics, entropy=entropy)
            backend.route(logits, 4, SUM, statistics=table)
            assert table.groups.shape[1] == 8 + len(metrics) * 16
            for name in metrics:
                assert torch.equal(table.metric(name)[0], full.metric(name)[0])
            assert table.scalar("entropy").item() == (full.scalar("entropy")[0].item() if entropy else 0)
            assert table.scalar("slots").item() == 80


# ---- choices that exist already ---------------------------------------------------------------------------------


def test_natural_choice_is_returned_to_unsteered_rows(backend: Backend) -> None:
    logits = torch.randn(6, 10)
    given = torch.stack([torch.randperm(10)[:3] for _ in range(6)])
    given[5, 0] = -1  # no choice: routed
    choice_weights = torch.rand(6, 3)
    weights, ids = backend.route(logits, 3, SUM, choice=given, choice_weights=choice_weights)
    assert torch.equal(ids[:5].long(), given[:5])
    assert torch.equal(weights[:5], choice_weights[:5])
    plain_weights, plain_ids = backend.route(logits, 3, SUM)
    assert torch.equal(ids[5], plain_ids[5])
    assert torch.equal(weights[5], plain_weights[5])
    recomputed, _ = backend.route(logits, 3, SUM, choice=given)
    assert_ulp(recomputed[:5], torch.softmax(logits.double().gather(1, given.clamp(min=0)), 1)[:5], 8)


def test_natural_choice_is_what_steered_rows_are_compared_with(backend: Backend) -> None:
    logits = torch.randn(4, 10)
    _, given = backend.route(logits, 3, SUM)
    code = torch.zeros(1, 10)
    absent = next(e for e in range(10) if not (given == e).any())
    code[0, absent] = Force.ON_PAPER
    table = tables(10)
    weights, ids = backend.route(
        logits,
        3,
        SUM,
        steering=SteeringTables(1, 10, force=code),
        tokens=token_table(4, steering_row=0),
        choice=given,
        statistics=table,
    )
    assert (ids[:, 0] == absent).all()
    assert table.scalar("flipped").item() == 4
    assert table.scalar("moved").item() * FIXED_POINT == pytest.approx(weights[:, 0].sum().item(), abs=1e-6)
    assert torch.equal(table.metric("natural_counts")[0], torch.bincount(given.flatten(), minlength=10))


def test_replay_recomputes_the_weights(backend: Backend) -> None:
    logits = torch.randn(5, 10)
    given = torch.stack([torch.randperm(10)[:4] for _ in range(5)]).to(torch.int32)
    given[4, 0] = -1
    bias = torch.randn(1, 10)
    tokens = token_table(5, steering_row=torch.tensor([0, -1, 0, -1, 0]))
    steering = SteeringTables(1, 10, bias=bias, top_k=1)
    weights, ids = backend.route(
        logits,
        4,
        SUM,
        steering=steering,
        tokens=tokens,
        choice=given,
        choice_weights=torch.zeros(5, 4),
        choice_mode="replay",
    )
    assert torch.equal(ids[:4], given[:4])
    z = logits.double() + torch.where(tokens[:, :1] >= 0, bias, 0)
    assert_ulp(weights[:4], torch.softmax(z.gather(1, given.long().clamp(min=0)), 1)[:4], 16)
    assert ids[4].tolist() == [z[4].argmax().item(), -1, -1, -1]  # falls through, to a row with one slot


def test_a_baseline_is_compared_with_and_never_chosen(backend: Backend) -> None:
    """Logits that a function changed: the natural choice is the one that was made before, for unsteered rows too."""
    natural, changed = torch.randn(2, 6, 10)
    changed[0] = natural[0]
    codes = torch.zeros(1, 10)
    codes[0, 9] = Force.ON_NATURAL
    tokens = token_table(6, steering_row=torch.tensor([-1, -1, -1, 0, 0, 0]))
    own = backend.route(natural, 3, SUM)[1]
    given = own.clone()
    given[5] = -2  # the model dropped this token
    table = tables(10)
    steering = SteeringTables(1, 10, force=codes)
    weights, ids = backend.route(
        changed, 3, SUM, steering=steering, tokens=tokens, choice=given, choice_mode="baseline", statistics=table
    )
    expected_weights, expected = backend.route(changed, 3, SUM, steering=steering, tokens=tokens)
    assert torch.equal(ids, expected)
    assert torch.equal(weights, expected_weights)
    assert torch.equal(table.metric("natural_counts")[0], own[:5].flatten().bincount(minlength=10))
    assert torch.equal(table.metric("counts")[0], ids.flatten().bincount(minlength=10))
    outside = (ids[:, :, None] != given[:, None]).all(2)
    assert outside[0].sum() == 0
    assert outside[5].all()
    assert table.scalar("flipped")[0] == outside.sum()
    total = (weights * outside).sum(1) / weights.sum(1)
    torch.testing.assert_close(table.scalar("moved")[0].double() * 2.0**-32, total.double().sum(), rtol=1e-6, atol=0)


def test_replay_of_a_forbidden_expert_weighs_nothing(backend: Backend) -> None:
    codes = torch.zeros(1, 6)
    codes[0, 2] = Force.FORBID
    table = tables(6)
    weights, ids = backend.route(
        torch.zeros(1, 6),
        2,
        SUM,
        steering=SteeringTables(1, 6, force=codes),
        tokens=token_table(1, steering_row=0),
        choice=torch.tensor([[2, 4]]),
        choice_mode="replay",
        statistics=table,
    )
    assert weights.tolist() == [[0.0, 1.0]]
    assert ids.tolist() == [[2, 4]]
    assert table.metric("probability")[0, 2].item() == 0


def test_observe_takes_the_weights_of_the_model(backend: Backend) -> None:
    logits = torch.randn(8, 12).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(12)[:2] for _ in range(8)])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = torch.rand(8, 2).to(dtype)
        table = tables(12)
        backend.observe(logits, ids, weights, RouterSpec(), statistics=table)
        expected = torch.zeros(12).index_add(0, ids.flatten(), weights.float().flatten())
        torch.testing.assert_close(table.metric("weight")[0] * FIXED_POINT, expected, rtol=1e-6, atol=1e-8)
        assert torch.equal(table.metric("counts")[0], torch.bincount(ids.flatten(), minlength=12))
    table = tables(12)
    backend.observe(logits, ids, None, SUM, statistics=table)
    assert table.metric("weight").sum().item() * FIXED_POINT == pytest.approx(8, abs=1e-5)


# ---- the model's own tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus", "identity"])
def test_correction_bias_chooses_and_does_not_weigh(backend: Backend, score: Any) -> None:
    logits, bias, factor = torch.rand(20, 16) + 0.1, torch.randn(16), torch.rand(16) + 0.5
    weights, ids = backend.route(logits, 4, RouterSpec(score), correction_bias=bias, expert_scale=factor)
    z = logits.double()
    scores = {
        "softmax": torch.softmax(z, 1),
        "sigmoid": torch.sigmoid(z),
        "sqrt_softplus": torch.nn.functional.softplus(z).sqrt(),
        "identity": z,
    }[score]
    assert torch.equal(ids.long(), (scores + bias).argsort(1, descending=True)[:, :4])
    assert_ulp(weights, (scores * factor).gather(1, ids.long()), 12)


@pytest.mark.parametrize("fill", [-INF, 0.0])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_group_limit(backend: Backend, group_score: Any, fill: float) -> None:
    """Against the two published ways to write it down: best groups by max or by the sum of the two best."""
    spec = RouterSpec("sigmoid", groups=4, top_groups=2, group_score=group_score, group_fill=fill)
    logits, bias = torch.randn(60, 24), torch.randn(24) * 0.4
    _, ids = backend.route(logits, 9, spec, correction_bias=bias)
    value = torch.sigmoid(logits.double()) + bias
    groups = value.view(60, 4, 6)
    worth = groups.amax(2) if group_score == "max" else groups.topk(2, 2).values.sum(2)
    keep = torch.zeros(60, 4).scatter(1, worth.topk(2, 1).indices, 1).bool().repeat_interleave(6, 1)
    value = torch.where(keep, value, fill)
    assert torch.equal(ids.long(), value.argsort(dim=1, descending=True, stable=True)[:, :9])


def test_group_limit_with_nan_and_forbidden(backend: Backend) -> None:
    """NaN ranks last even in an excluded group whose fill is 0, and forbidden experts stay out of the group's worth."""
    spec = RouterSpec("identity", groups=2, top_groups=1, group_score="max", group_fill=0.0)
    logits = torch.tensor([[-1.0, -2.0, -3.0, NAN, -9.0, -9.0]])
    _, ids = backend.route(logits, 6, spec)
    assert ids.tolist() == [[4, 5, 0, 1, 2, 3]]
    codes = torch.zeros(1, 6)
    codes[0, 0] = Force.FORBID
    logits = torch.tensor([[9.0, 1.0, 1.0, 2.0, 2.0, 3.0]])
    steering = {"steering": SteeringTables(1, 6, force=codes), "tokens": token_table(1, steering_row=0)}
    _, ids = backend.route(logits, 4, spec, **steering)
    assert ids.tolist() == [[5, 3, 4, 1]]


def test_forced_on_beats_the_group_limit(backend: Backend) -> None:
    spec = RouterSpec("sigmoid", groups=2, top_groups=1)
    codes = torch.zeros(1, 8)
    codes[0, 7] = Force.ON_NATURAL
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 0.0, -1.0, -2.0, -3.0]])
    _, ids = backend.route(
        logits, 3, spec, steering=SteeringTables(1, 8, force=codes), tokens=token_table(1, steering_row=0)
    )
    assert ids.tolist() == [[7, 0, 1]]


def test_sparsemixer_threshold(backend: Backend) -> None:
    """Slot by slot: the second softmax runs over what is left, within 2 * jitter of its own best."""
    logits = torch.tensor([[4.0, 3.9, 2.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-2.0, -2.01, -5.0, -2.02]])
    weights, ids = backend.route(logits, 2, RouterSpec("sparsemixer", jitter=0.05))
    assert ids.tolist() == [[0, 1], [0, 1], [0, 1]]
    close = math.exp(-0.1)
    third = [1 / (1 + math.exp(-0.01) + math.exp(-0.02)), 1 / (1 + math.exp(-0.01))]
    assert_ulp(weights, torch.tensor([[1 / (1 + close), 1.0], [0.25, 1 / 3], third]), 40)


@pytest.mark.parametrize(("norm_p", "expected"), [(1.0, [0.625, 0.375]), (2.0, [5 / 34**0.5, 3 / 34**0.5])])
def test_renormalize_by_norm(backend: Backend, norm_p: float, expected: list[float]) -> None:
    logits = torch.tensor([[0.3, 0.5, -1.0]])
    weights, _ = backend.route(logits, 2, RouterSpec("identity", renormalize="norm", norm_p=norm_p))
    assert_ulp(weights, torch.tensor([expected]), 4)


def test_renormalize_with_epsilon(backend: Backend) -> None:
    logits = torch.tensor([[0.3, 0.5, 0.0]])
    weights, _ = backend.route(logits, 2, RouterSpec("identity", renormalize="sum", eps=0.2, scale=2.0))
    assert_ulp(weights, torch.tensor([[1.0, 0.6]]), 4)
    weights, _ = backend.route(logits, 2, RouterSpec("identity", renormalize="clamp", eps=1.6))
    assert_ulp(weights, torch.tensor([[0.3125, 0.1875]]), 4)
    weights, _ = backend.route(torch.zeros(1, 3), 2, RouterSpec("identity", renormalize="sum"))
    assert weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("experts", [6, 32])
def test_softcap(backend: Backend, experts: int) -> None:
    """Infinities become the cap, NaN and -0 stay, and every other logit is within 2 units of c tanh(z / c)."""
    logits = torch.randn(5, experts) * torch.tensor([[0.01], [0.5], [1.0], [4.0], [60.0]])
    logits[0, :5] = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1e-40])
    for cap in (0.75, 3.0, 30.0):
        weights, ids = backend.route(logits, experts, RouterSpec("identity", softcap=cap))
        capped = torch.zeros_like(weights).scatter(1, ids.long(), weights)
        assert capped[0, :3].tolist() == [cap, -cap, 0.0]  # NaN is chosen last, and weighs nothing
        zero = capped[0, 3] if backend.native else reference.capped(logits, RouterSpec(softcap=cap))[0, 3]
        assert (zero.item(), math.copysign(1.0, zero.item())) == (0.0, -1.0)
        assert ids[0, -1] == 2
        exact = (torch.tanh(logits.double() / cap) * cap).nan_to_num(0.0)
        assert_ulp(capped, exact, 2)
        assert (capped.abs() <= cap).all()


# ---- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 8).to(dtype)
    weights, ids = backend.route(logits, 2, SUM)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ids.dtype == torch.int32


def test_the_gradient_of_the_weights_reaches_the_logits(backend: Backend) -> None:
    logits, upstream = torch.randn(3, 8, requires_grad=True), torch.randn(3, 2)
    weights, ids = backend.route(logits, 2, SUM)
    plain = torch.softmax(logits.gather(1, ids.long()), 1)
    torch.testing.assert_close(weights, plain)
    (found,), (expected,) = (torch.autograd.grad(made, logits, upstream) for made in (weights, plain))
    torch.testing.assert_close(found, expected)
    assert not ids.requires_grad
    with torch.no_grad():
        assert not backend.route(logits, 2, SUM)[0].requires_grad


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"logits": torch.zeros(4)}, "logits"),
        ({"logits": torch.zeros(4, 8, dtype=torch.int64)}, "logits"),
        ({"tokens": torch.zeros(3, 4, dtype=torch.int32)}, "tokens"),
        ({"spec": RouterSpec(groups=3)}, "groups"),
        ({"statistics": StatisticsTables.zeros(9, groups=1)}, "statistics"),
        ({"steering": SteeringTables(1, 9, bias=torch.zeros(1, 9))}, "steering"),
        ({"choice": torch.zeros(4, 3, dtype=torch.int64)}, "choice"),
    ],
)
def test_arguments_that_do_not_fit(backend: Backend, arguments: dict[str, Any], word: str) -> None:
    call: dict[str, Any] = {"logits": torch.zeros(4, 8), "spec": SUM, **arguments}
    logits, spec = call.pop("logits"), call.pop("spec")
    with pytest.raises(ValueError, match=word):
        backend.route(logits, 2, spec, **call)


def test_everything_at_once(backend: Backend) -> None:
    """All planes, forbidden experts, remap, given ids and padding in one call keep the laws."""
    num_tokens, num_experts = 64, 40
    steering = {
        name: torch.rand(2, num_experts) for name in ("scale", "bias", "std", "magnitude", "score_bias", "weight_scale")
    }
    steering["force"] = torch.randint(-4, 4, (2, num_experts)).float()
    steering["remap"] = torch.randint(-1, num_experts, (2, num_experts), dtype=torch.int32)
    tokens = token_table(
        num_tokens, steering_row=torch.arange(num_tokens) % 3 - 1, valid=torch.arange(num_tokens) % 7 > 0
    )
    given = torch.rand(num_tokens, num_experts).argsort(1)[:, :6].contiguous()
    problem = Problem(torch.randn(num_tokens, num_experts), 6, SUM, steering, tokens, choice=given)
    routed = problem.run(backend)
    check_ids(routed, num_experts)
    check_conservation(routed)


# ---- tokens that were dropped ----------------------------------------------------------------------------------


def test_observe_counts_a_dropped_token_as_empty_slots(backend: Backend) -> None:
    logits = torch.randn(3, 6)
    ids = torch.tensor([[-1, -1], [2, 4], [-1, 5]])
    weights = torch.tensor([[0.0, 0.0], [0.75, 0.25], [0.0, 0.5]])
    table = StatisticsTables.zeros(6, groups=1, metrics=METRICS)
    backend.observe(logits, ids, weights, RouterSpec(), statistics=table)
    assert table.metric("counts")[0].tolist() == [0, 0, 1, 0, 1, 1]
    assert table.metric("natural_counts")[0].tolist() == [0, 0, 1, 0, 1, 1]
    assert (table.scalar("slots").item(), table.scalar("empty").item()) == (6, 3)
    torch.testing.assert_close(table.metric("weight")[0] * FIXED_POINT, torch.tensor([0, 0, 0.75, 0, 0.25, 0.5]))


def test_route_weights_of_rows_with_empty_slots(backend: Backend) -> None:
    logits = torch.randn(3, 6)
    ids = torch.tensor([[-1, -1], [-1, 4], [3, -1]])
    weights = backend.route_weights(logits, ids, RouterSpec())
    scores = torch.softmax(logits, -1)
    torch.testing.assert_close(
        weights, torch.stack([torch.zeros(2), scores[1, 4] * torch.tensor([0, 1]), scores[2, 3] * torch.tensor([1, 0])])
    )

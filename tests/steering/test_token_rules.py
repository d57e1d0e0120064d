"""Rules that look at more than a token's row, each against a plain reading of what it says, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness.model_decisions import look_last
from harness.tiny_models import EVERY, MAIN, inputs, tiny_model, tokens
from torch import Tensor, nn

import moe_route as mr
from moe_route import ops, reference
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import FIXED_POINT, StatisticsTables, token_table
from moe_route.contract.token_tables import TokenTables
from moe_route.ops import token_rules
from moe_route.routers import adapter
from moe_route.steering import LayerShape, Plan, PlanError

E, K, T = 8, 3, 64
SITES = [LayerShape(E, K)] * 2
SOFTMAX = RouterSpec(renormalize="sum")
SIGMOID = RouterSpec(score="sigmoid", renormalize="sum", scale=2.0)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2


def best(values: np.ndarray, k: int = K) -> list[int]:
    """The k largest, ties to the lower index."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def scored(z: np.ndarray, spec: RouterSpec) -> np.ndarray:
    if spec.score == "sigmoid":
        return 1 / (1 + np.exp(-z))
    if spec.score == "sqrt_softplus":
        return np.sqrt(np.log1p(np.exp(z)))
    if spec.score == "identity":
        return z
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def weighed(scores: np.ndarray, ids: list[int], spec: RouterSpec) -> np.ndarray:
    weights = scores[ids]
    if spec.order == "topk_then_score":
        weights = weights / weights.sum()  # a softmax over the chosen
    return spec.scale * (weights / weights.sum() if spec.renormalize == "sum" else weights)


def routed(
    plan: Plan,
    logits: Tensor,
    spec: RouterSpec = SOFTMAX,
    *,
    layer: int = 0,
    rows: Tensor | int | None = None,
    statistics: StatisticsTables | None = None,
    bias: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and ids under the plan, and the natural ids."""
    compiled = plan.compile(SITES)
    steering = compiled.tables[layer]
    assert isinstance(steering, TokenTables)
    steering = token_rules.fitted(steering, "here", spec)
    row = compiled.row("prefill") if rows is None else rows
    tokens = token_table(len(logits), steering_row=row)
    natural = ops.route(logits, K, spec, correction_bias=bias)[1]
    counter = token_rules.token_counter(torch.arange(len(logits)), torch.arange(len(logits)) * 7)
    weights, ids, _ = token_rules.route_tokens(
        steering,
        logits,
        K,
        spec,
        tokens=tokens,
        counter=more.pop("counter", counter),
        choice=natural,
        correction_bias=bias,
        statistics=statistics,
    )
    return weights, ids.long(), natural.long()


def check(
    plan: Plan,
    logits: Tensor,
    literal: Callable[[np.ndarray, list[int], int], tuple[list[int], np.ndarray]],
    spec: RouterSpec = SOFTMAX,
    rtol: float = 1e-9,
    **more: Any,
) -> None:
    """Every token is chosen and weighed as `literal(z, natural ids, token)` says, and counted so."""
    statistics = StatisticsTables.zeros(E, groups=1, metrics=ops.METRICS)
    weights, ids, natural = routed(plan, logits, spec, statistics=statistics, **more)
    counts, flipped = np.zeros(E), 0
    for token, z in enumerate(logits.numpy()):
        own = natural[token].tolist()
        wanted, expected = literal(z, own, token)
        found = [expert for expert in ids[token].tolist() if expert >= 0]
        assert found == wanted, f"token {token}: {found}, not {wanted}"
        np.testing.assert_allclose(weights[token, : len(wanted)].numpy(), expected, rtol=rtol)
        assert not weights[token, len(wanted) :].any()
        counts[wanted] += 1
        flipped += len(set(wanted) - set(own))
    assert statistics.metric("counts")[0].tolist() == counts.tolist()
    assert statistics.metric("natural_counts")[0].tolist() == np.bincount(natural.reshape(-1), minlength=E).tolist()
    assert statistics.scalar("tokens").item() == statistics.scalar("steered").item() == len(logits)
    assert statistics.scalar("flipped").item() == flipped
    slots = counts.sum() + statistics.scalar("empty").item()
    assert statistics.scalar("slots").item() == slots
    total = statistics.metric("weight").sum().item() * FIXED_POINT
    assert total == pytest.approx(weights.sum().item(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Only where the router does not choose the expert by itself.

SOFT, CHOSEN = 0.75, [1, 5]


def absent_literal(change: Callable[[np.ndarray, int], float]) -> Any:
    def literal(z: np.ndarray, own: list[int], token: int) -> tuple[list[int], np.ndarray]:
        steered = z.copy()
        for expert in CHOSEN:
            if expert not in own:
                steered[expert] = change(z, expert)
        ids = best(steered)
        return ids, weighed(scored(steered, SOFTMAX), ids, SOFTMAX)

    return literal


@pytest.mark.parametrize(
    ("plan", "change"),
    [
        (Plan.activate({0: CHOSEN}, strength=SOFT), lambda z, e: z[e] + SOFT * z.std()),
        (Plan.activate({0: CHOSEN}, strength=SOFT, correction=1), lambda z, e: z[e] + SOFT * z.std(ddof=1)),
        (Plan.bias({0: CHOSEN}, strength=1.5), lambda z, e: z[e] + 1.5),
        (Plan.magnitude({0: CHOSEN}, strength=0.5), lambda z, e: z[e] + 0.5 * abs(z[e])),
        (Plan.scale_logits({0: CHOSEN}, strength=2.0), lambda z, e: z[e] * 2),
        (Plan.force_off({0: CHOSEN}), lambda z, e: z.min()),
    ],
)
def test_only_if_absent(logits, plan, change):
    check(plan.only(absent=True), logits, absent_literal(change))


def test_forced_only_if_absent(logits):
    def literal(z, own, token):
        steered, forced = z.copy(), [e for e in CHOSEN if e not in own]
        steered[forced] = z.max()
        rest = [e for e in best(z, E) if e not in forced]
        ids = [*forced, *rest][:K]
        return ids, weighed(scored(steered, SOFTMAX), ids, SOFTMAX)

    check(Plan.force_on({0: CHOSEN}).only(absent=True), logits, literal)


def test_absent_rules_beside_others(logits):
    """A bias on all tokens, and one more only where the expert was not the router's own choice."""
    plan = Plan.bias({0: [1, 2]}, strength=0.5) + Plan.bias({0: [1]}, strength=1.0).only(absent=True)

    def literal(z, own, token):
        steered = z.copy()
        steered[[1, 2]] += 0.5
        steered[1] += 0.0 if 1 in own else 1.0
        ids = best(steered)
        return ids, weighed(scored(steered, SOFTMAX), ids, SOFTMAX)

    check(plan, logits, literal)


def test_a_token_whose_condition_never_holds_keeps_its_bits(logits):
    weights, ids, natural = routed(Plan.bias({0: [1]}, strength=4.0).only(absent=True), logits)
    own, _ = ops.route(logits, K, SOFTMAX)
    kept = (natural == 1).any(1)
    assert kept.any()
    assert not kept.all()
    assert torch.equal(ids[kept], natural[kept])
    assert torch.equal(weights[kept], own[kept])
    assert (ids[~kept] == 1).any(1).float().mean() > 0.5


# ---------------------------------------------------------------------------------------------------------------
# Scores in the place of the router's.

SCORES = {0: 0.1, 2: 0.3, 3: 0.05, 6: 0.25, 7: 0.3}


@pytest.mark.parametrize(
    "spec",
    [
        SOFTMAX,
        RouterSpec(),
        RouterSpec(order="topk_then_score"),
        SIGMOID,
        RouterSpec(score="sqrt_softplus", renormalize="sum"),
        RouterSpec(score="identity"),
    ],
    ids=lambda spec: f"{spec.score}-{spec.order}-{spec.renormalize}",
)
def test_replaced_scores(logits, spec):
    def literal(z, own, token):
        p = np.array([SCORES.get(e, 0.0) for e in range(E)])
        ids = best(p)
        return ids, weighed(p / p.sum() if spec.score == "softmax" else p, ids, spec)

    check(Plan.replace_scores({0: SCORES}), logits, literal, spec, rtol=1e-5)


def test_replaced_scores_are_chosen_and_steered_as_the_routers_own(logits):
    """With a correction bias for choosing, a bias on a logit, and a temperature."""
    correction = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0])

    def corrected(z, own, token):
        p = np.array([SCORES.get(e, 0.0) for e in range(E)])
        ids = best(p + correction.numpy())
        return ids, weighed(p, ids, SIGMOID)

    check(Plan.replace_scores({0: SCORES}), logits, corrected, SIGMOID, rtol=1e-5, bias=correction)

    def steered(z, own, token):
        with np.errstate(divide="ignore"):
            z = np.log(np.array([SCORES.get(e, 0.0) for e in range(E)])) / 2.0
        z[3] += 1.0
        ids = best(z)
        return ids, weighed(scored(z, SOFTMAX), ids, SOFTMAX)

    plan = Plan.replace_scores({0: SCORES}) + Plan.bias({0: [3]}, strength=1.0) + Plan.temperature(2.0, layers=0)
    check(plan, logits, steered, rtol=1e-5)


def test_replaced_scores_are_refused_by_the_name_of_the_router():
    def fit(plan: Plan, **spec: Any) -> None:
        steering = plan.compile(SITES).tables[0]
        assert isinstance(steering, TokenTables)
        token_rules.fitted(steering, "layers.0.gate", RouterSpec(**spec))

    with pytest.raises(ValueError, match=r"'layers\.0\.gate' cannot take replaced scores: SparseMixer"):
        fit(Plan.replace_scores({0: {1: 1.0}}), score="sparsemixer")
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit(Plan.replace_scores({0: {1: 1.5}}), score="sigmoid")


# ---------------------------------------------------------------------------------------------------------------
# Choices by name: the last slot, and replay.


@pytest.mark.parametrize("spec", [SOFTMAX, SIGMOID, RouterSpec(), RouterSpec(order="topk_then_score")], ids=str)
def test_the_last_slot_goes_to_the_expert_if_absent(logits, spec):
    def literal(z, own, token):
        ids = list(own) if 4 in own else [*own[:-1], 4]
        return ids, weighed(scored(z, spec), ids, spec)

    check(Plan.reserve_slot({0: [4]}), logits, literal, spec)


def test_the_last_slot_after_other_rules(logits):
    """The slot looks at the steered choice; forbidden experts do not take it; fewer slots have another last one."""
    plan = Plan.bias({0: [2]}, strength=2.0) + Plan.reserve_slot({0: [4]}) + Plan.top_k(2, layers=0)

    def literal(z, own, token):
        z = z + np.eye(E)[2] * 2.0
        ids = best(z, 2)
        ids = ids if 4 in ids else [ids[0], 4]
        return ids, weighed(scored(z, SOFTMAX), ids, SOFTMAX)

    check(plan, logits, literal)
    for off in (Plan.forbid({0: [4]}), Plan.force_off({0: [4]})):
        _, ids, _ = routed(Plan.reserve_slot({0: [4]}) + off, logits)
        assert not (ids == 4).any()


def test_replayed_experts_weigh_by_the_routers_own_scores(logits):
    def literal(z, own, token):
        return [6, 0, 3], weighed(scored(z, SOFTMAX), [6, 0, 3], SOFTMAX)

    check(Plan.fix_choice({0: [6, 0, 3]}), logits, literal)

    def fewer(z, own, token):
        return [5], weighed(scored(z, SOFTMAX), [5], SOFTMAX)

    check(Plan.fix_choice({0: [5]}), logits, fewer)


@pytest.mark.parametrize("plan", [Plan.reserve_slot({0: [4]}), Plan.fix_choice({0: [6, 0, 3]})], ids=str)
def test_sparsemixer_weighs_choices_by_name_slot_by_slot(logits, plan):
    spec = RouterSpec(score="sparsemixer", jitter=0.2)
    weights, ids, natural = routed(plan, logits, spec)
    expected = reference.route_weights(logits, ids, spec)
    moved = (ids != natural).any(1)
    assert moved.any()
    torch.testing.assert_close(weights[moved], expected[moved], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "plan", [Plan.fix_choice({0: [6, 0, 3]}), Plan.top_k(4, layers=0), Plan.gumbel(3, layers=0)], ids=str
)
def test_rules_see_capped_logits(logits, plan):
    capped = replace(SIGMOID, softcap=0.7)
    found, expected = routed(plan, logits, capped), routed(plan, reference.capped(logits, capped), SIGMOID)
    assert all(torch.equal(mine, own) for mine, own in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# More experts than the router has slots.


@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize("spec", [SOFTMAX, SIGMOID, RouterSpec()], ids=str)
def test_more_experts_a_token(logits, spec, k):
    def literal(z, own, token):
        ids = best(z, k)
        return ids, weighed(scored(z, spec), ids, spec)

    check(Plan.top_k(k, layers=0), logits, literal, spec)


def test_only_the_tokens_of_the_row_get_more(logits):
    rows = torch.where(torch.arange(T) % 2 == 0, 0, -1)
    statistics = StatisticsTables.zeros(E, groups=1, metrics=ops.METRICS)
    weights, ids, natural = routed(Plan.top_k(5, layers=0), logits, rows=rows, statistics=statistics)
    own, _ = ops.route(logits, K, SOFTMAX)
    odd = rows < 0
    assert ids.shape == (T, 5)
    assert torch.equal(ids[odd, :K], natural[odd])
    assert torch.equal(weights[odd, :K], own[odd])
    assert (ids[odd, K:] == -1).all()
    assert (ids[~odd] >= 0).all()
    assert statistics.scalar("slots").item() == T // 2 * (5 + K)
    assert statistics.scalar("empty").item() == 0
    assert statistics.scalar("steered").item() == T // 2


# ---------------------------------------------------------------------------------------------------------------
# Random experts for each token.


def splitmix(bits: int) -> int:
    """The last step of SplitMix64, in Python's own numbers."""
    mask = (1 << 64) - 1
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
    return bits ^ bits >> 31


def test_the_draw_is_splitmix_of_seed_layer_and_token():
    mask, step = (1 << 64) - 1, 0x9E3779B97F4A7C15
    for seed, layer, token in ((0, 0, 0), (7, 3, 12345), (-1, 40, (9 << 32) | 77)):
        number = (seed * 0xD1342543DE82EF95 + (layer + 1) * step) & mask
        state = splitmix(token ^ number)
        drawn = [splitmix((state + (expert + 1) * step) & mask) for expert in range(E)]
        signed = [value - (1 << 64) if value >> 63 else value for value in drawn]
        order = token_rules.permutations(seed, layer, torch.tensor([token]), E)[0].tolist()
        assert order == sorted(range(E), key=signed.__getitem__)


def test_every_token_draws_its_own_experts(logits):
    plan = Plan.force_on({0: CHOSEN}).random_per_token(5)
    counter = torch.arange(T)
    orders = token_rules.permutations(5, 0, counter, E)

    def literal(z, own, token):
        forced = [e for e in range(E) if int(orders[token, e]) in CHOSEN]
        steered = z.copy()
        steered[forced] = z.max()
        ids = [*forced, *(e for e in best(z, E) if e not in forced)][:K]
        return ids, weighed(scored(steered, SOFTMAX), ids, SOFTMAX)

    check(plan, logits, literal, counter=counter)


def test_the_draw_is_uniform_seeded_and_the_same_for_any_batch():
    counter = torch.arange(20_000)
    orders = token_rules.permutations(1, 2, counter, E)
    assert (orders.sort(1).values == torch.arange(E)).all()
    for place in range(E):
        share = torch.bincount(orders[:, place], minlength=E) / len(counter)
        assert (share - 1 / E).abs().max() < 0.01
    pairs = torch.bincount(orders[:, 0] * E + orders[:, 1], minlength=E * E) / len(counter)
    assert (pairs[pairs > 0] - 1 / (E * (E - 1))).abs().max() < 0.005
    assert torch.equal(token_rules.permutations(1, 2, counter[777:900], E), orders[777:900])
    for other in (token_rules.permutations(2, 2, counter, E), token_rules.permutations(1, 3, counter, E)):
        assert (other == orders).all(1).float().mean() < 0.01


@pytest.mark.parametrize(
    ("plan", "where"),
    [(Plan.reserve_slot({0: [4]}), -1), (Plan.fix_choice({0: [4]}), 0), (Plan.replace_scores({0: {4: 1.0}}), 0)],
    ids=str,
)
def test_named_experts_can_be_drawn_too(logits, plan, where):
    orders = token_rules.permutations(9, 0, torch.arange(T), E)
    _, ids, natural = routed(plan.random_per_token(9), logits, counter=torch.arange(T))
    drawn = (orders == 4).int().argmax(1)
    absent = ~(natural == drawn[:, None]).any(1)
    assert torch.equal(ids[absent, where], drawn[absent])
    assert len(drawn.unique()) == E


def test_drawn_and_absent_together(logits):
    plan = Plan.bias({0: [2]}, strength=3.0).only(absent=True).random_per_token(4)
    orders = token_rules.permutations(4, 0, torch.arange(T), E)

    def literal(z, own, token):
        expert = int((orders[token] == 2).int().argmax())
        steered = z.copy()
        steered[expert] += 0.0 if expert in own else 3.0
        ids = best(steered)
        return ids, weighed(scored(steered, SOFTMAX), ids, SOFTMAX)

    check(plan, logits, literal, counter=torch.arange(T))


# ---------------------------------------------------------------------------------------------------------------
# What the plan says, keeps and refuses.

RULES = [
    Plan.activate({0: [1]}).only(absent=True),
    Plan.replace_scores({0: {1: 0.25, 2: 0.75}}),
    Plan.reserve_slot({0: [3]}),
    Plan.fix_choice({0: [5, 2]}),
    Plan.force_on({0: [1]}).random_per_token(3),
    Plan.bias({0: [1]}).only(positions=[0, 2, range(5, 9)]),
    Plan.bias({0: [1]}).only(positions=slice(4, None)),
    Plan.top_k(4, layers=0),
    Plan.gumbel(3, temperature=0.5, layers=0),
]


@pytest.mark.parametrize("plan", RULES, ids=str)
def test_rules_are_saved_hashed_and_compiled_alike(plan, tmp_path):
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert again == plan
    assert again.hash == plan.hash
    assert again.describe() == plan.describe()
    assert not plan.compile(SITES).is_null
    assert (plan + Plan.bias({1: [0]})) - Plan.bias({1: [0]}) != plan  # they add up like any others
    assert len({other.hash for other in RULES}) == len(RULES)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (RULES[0], "activate 1 expert in layer 0: logit + 0.5 * std(logits) [only experts not chosen already]"),
        (RULES[1], "replace scores 2 experts in layer 0: router scores replaced by 0.25 to 0.75"),
        (RULES[2], "reserve slot 1 expert in layer 0: takes the last slot where not chosen"),
        (RULES[3], "fix choice 2 experts in layer 0: exactly these experts chosen, in this order"),
        (RULES[4], "[other experts for each token, drawn with seed 3]"),
        (RULES[5], "[positions 0, 2, 5-8]"),
        (RULES[6], "[positions from 4]"),
        (RULES[7], "top k in layer 0: 4 experts per token"),
    ],
)
def test_rules_say_themselves_in_words(plan, words):
    assert words in plan.describe()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan.temperature(2).only(absent=True), "cannot be left out for experts that are chosen already"),
        (lambda: Plan.reserve_slot({0: [1]}).only(absent=True), "cannot be left out"),
        (lambda: Plan.top_k(1).random_per_token(), "names no experts that could be drawn"),
        (lambda: Plan.remap({0: {1: 2}}).random_per_token(), "names no experts that could be drawn"),
        (lambda: Plan.replace_scores({0: {1: -0.5}}), "0 or more"),
        (lambda: Plan.replace_scores({0: {1: 0.0}}), "one of them above 0"),
        (lambda: Plan.fix_choice({0: [1, 1]}), "slots 0 to 0"),
        (lambda: Plan.fix_choice({0: [1, 2, 3, 4]}).compile(SITES), "4 experts are fixed in layer 0, which has 3"),
        (lambda: Plan.reserve_slot({0: [1, 2]}).compile(SITES), "two own experts"),
        (lambda: (Plan.reserve_slot({0: [1]}) + Plan.reserve_slot({0: [2]})).compile(SITES), "two own experts"),
        (
            lambda: (Plan.replace_scores({0: {1: 1}}) + Plan.replace_scores({0: {2: 1}})).compile(SITES),
            "two replaced scores",
        ),
        (
            lambda: (Plan.reserve_slot({0: [1]}) + Plan.remap({0: {1: 2}})).compile(SITES),
            "a reserve_slot rule and a remap meet",
        ),
        (lambda: (Plan.fix_choice({0: [1]}) + Plan.top_k(5)).compile(SITES), "a fix_choice rule and a top_k above"),
        (lambda: Plan.reserve_slot({0: [1]}) * 2, "no strength to scale"),
        (lambda: Plan.bias({0: [1]}).only(positions=[]), "at least one"),
        (lambda: Plan.bias({0: [1]}).only(positions=-1), "count from 0"),
        (lambda: Plan.bias({0: [1]}).only(positions=range(0, 9, 2)), "steps of 1"),
        (lambda: Plan.bias({0: [1]}).only(positions="first"), "numbers, ranges"),
        (
            lambda: (Plan.force_on({0: [1]}) + Plan.force_on({0: [2]}, weight="natural").only(absent=True)).compile(
                SITES
            ),
            "may meet on one expert",
        ),
        (
            lambda: (Plan.forbid([0, 1, 2, 3], 0) + Plan.forbid([4, 5, 6, 7], 0).random_per_token()).compile(SITES),
            "may forbid all 8",
        ),
        (lambda: Plan.replace_scores({0: {1: 0.5}}).with_experts({0: [2]}), "coefficient for each expert"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_positions_narrow_each_other_and_pick_rows():
    plan = Plan.bias({0: [1]}).only(positions=[(2, 6), (8, None)]).only(positions=range(4, 10))
    assert plan.rules[0].positions == ((4, 6), (8, 10))
    assert plan.only(positions=range(6, 8)) == Plan()
    compiled = (plan + Plan.bias({0: [2]}).only(groups="sw")).compile(SITES, ["sw"])
    assert compiled.bounds == (4, 6, 8, 10)
    at = [compiled.row("prefill", -1, position) for position in (0, 3, 4, 5, 6, 8, 9, 10, 99)]
    assert [row >= 0 for row in at] == [False, False, True, True, False, True, True, False, False]
    assert len({compiled.row("prefill", 0, position) for position in (0, 4)}) == 2


# ---------------------------------------------------------------------------------------------------------------
# On models.

transformers = pytest.importorskip("transformers")


PLANS = {
    "absent": Plan.activate({0: [1, 2], 1: [5]}, strength=1.5).only(absent=True),
    "slot": Plan.reserve_slot({0: [3], 1: [4]}),
    "replay": Plan.fix_choice({0: [3, 1], 1: [4, 0]}),
    "scores": Plan.replace_scores({0: {3: 0.5, 1: 0.25, 6: 0.125}}),
    "drawn": Plan.force_on({0: [1], 1: [2]}).random_per_token(11),
    "more": Plan.top_k(4, layers=[0, 1]),
    "gumbel": Plan.gumbel(3, layers=[0, 1]),
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model(name, dtype, head=True)
    model.set_experts_implementation("eager")
    return model


def seen_by(model: nn.Module, routed: mr.RoutedModel) -> list[list[tuple[Tensor, ...]]]:
    """What each router returns, from now on."""
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in routed.routers]
    for router in routed.routers:
        look_last(router.module, lambda _, args, output, at=router.layer: seen[at].append(output))
    return seen


def expected_ids(kind: str, natural: list[int], z: np.ndarray, layer: int, token: int, counter: Tensor) -> set[int]:
    rule = PLANS[kind].rules[0]
    experts = dict(rule.in_layer(layer))
    if kind == "slot":
        own = next(iter(experts))
        return set(natural) if own in natural else {*natural[:-1], own}
    if kind in ("replay", "scores"):
        return set(list(experts)[:2] if kind == "replay" else sorted(experts, key=experts.get)[-len(natural) :])
    order = token_rules.permutations(11, layer, counter[token : token + 1], E)[0].tolist()
    forced = [e for e in range(E) if order[e] in experts]
    return {*forced, *[e for e in natural if e not in forced][: len(natural) - len(forced)]}


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("kind", ["slot", "replay", "drawn"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "phimoe"])
def test_attached_models_choose_as_the_rule_says(name, kind, engine):
    model, ids = model_of(name), tokens(2, 6)
    with mr.attach(model, engine=engine) as routed, torch.no_grad():
        seen = seen_by(model, routed)
        with routed.steer(PLANS[kind]), routed.record() as recorder:
            model(input_ids=ids)
        statistics = recorder.statistics()
    counter = token_rules.token_counter(torch.arange(6).expand(2, 6), ids).reshape(-1)
    for layer in (0, 1):
        logits, _, chosen = seen[layer][0]
        router = routed.routers[layer]
        natural = reference.route(logits, router.top_k, router.spec)[1]
        wanted = [
            expected_ids(kind, natural[t].tolist(), logits[t].numpy(), layer, t, counter) for t in range(len(logits))
        ]
        assert [set(row) for row in chosen.tolist()] == wanted
        counts = np.bincount([e for row in wanted for e in row], minlength=E)
        assert (statistics.token_sum("counts")[0, layer] == counts).all()
        own = np.bincount(natural.reshape(-1), minlength=E)
        assert (statistics.token_sum("natural_counts")[0, layer] == own).all()


@pytest.mark.parametrize("kind", [kind for kind in PLANS if kind != "scores"])
@pytest.mark.parametrize("name", MAIN)
def test_engines_agree_and_other_tokens_keep_their_bits(name, kind):
    """Tokens of a group that the plan does not name are routed as ever, whatever happens to the others."""
    if name == "deepseek_v3" and kind == "more":
        kind = "slot"
    counts = []
    for engine in ("hook", "fused"):
        model, ids = model_of(name), tokens(2, 6)
        with mr.attach(model, engine=engine) as routed, torch.no_grad():
            seen = seen_by(model, routed)
            model(input_ids=ids)
            plan = PLANS[kind].only(groups="x", layers=0)
            with routed.steer(plan), routed.record(groups=["x", "y"]) as recorder, recorder.labels(["x", "y"]):
                model(input_ids=ids)
            counts.append(recorder.statistics())
        (_, weights, chosen), (_, now, ids_now) = seen[0]
        k = weights.shape[1]
        assert torch.equal(ids_now[6:, :k], chosen[6:])
        assert torch.equal(now[6:, :k], weights[6:])
        assert not now[6:, k:].any()
        assert not torch.equal(ids_now[:6, :k], chosen[:6]) or kind == "more"
    one, other = counts
    assert (one.token_sum("counts")[:, 0] == other.token_sum("counts")[:, 0]).all()
    assert (one.scalar("slots") == other.scalar("slots")).all()
    assert one.scalar("steered")[:, 0].tolist() == [6, 0]


def test_replaced_scores_on_models():
    for name in ("qwen3_moe", "gpt_oss", "deepseek_v3"):
        model = model_of(name)
        with mr.attach(model) as routed, torch.no_grad():
            seen = seen_by(model, routed)
            with routed.steer(PLANS["scores"].only(positions=[1, 2])), routed.record() as recorder:
                model(input_ids=tokens(2, 6))
            k = routed.routers[0].top_k
            steered = [1, 2, 7, 8]
            if name != "deepseek_v3":  # its correction bias has a say
                assert all(set(row) == set([3, 1, 6][:k]) for row in seen[0][0][2][steered].tolist())
            assert recorder.statistics().scalar("steered")[0].tolist()[0] == 4
    with mr.attach(model_of("phimoe")) as routed, pytest.raises(ValueError, match=r"mlp\.router.*SparseMixer"):
        routed.steer(PLANS["scores"]).__enter__()


@pytest.mark.parametrize("kind", ["drawn", "absent", "slot"])
def test_what_is_drawn_and_chosen_does_not_depend_on_the_batch(kind):
    """Prefill and decode, left-padded in a batch and alone: the same experts, token by token."""
    prompts = [tokens(1, length, seed) for seed, length in enumerate((3, 6, 5))]
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    model = model_of("qwen3_moe", torch.float64)
    model.generation_config.pad_token_id = 0
    padded = torch.cat([torch.nn.functional.pad(ids, (6 - ids.shape[1], 0)) for ids in prompts])
    mask = torch.arange(6) >= torch.tensor([[6 - ids.shape[1]] for ids in prompts])
    plan = PLANS[kind].only(positions=slice(1, None))

    def traced(batches: list[tuple[Tensor, Tensor]]) -> list[list[list[int]]]:
        with mr.attach(model) as routed, torch.no_grad(), routed.steer(plan), routed.record(trace=True) as recorder:
            for ids, valid in batches:
                with recorder.labels(["x"] * len(ids)):
                    model.generate(ids, attention_mask=valid.long(), **options)
            trace = recorder.trace()
        order = np.lexsort((trace.position, trace.sequence))
        return trace.ids[order].tolist()

    together = traced([(padded, mask)])
    alone = traced([(ids, torch.ones_like(ids).bool()) for ids in prompts])
    assert len(together) == 14 + 9
    assert together == alone


def test_a_gradient_flows_through_rules_by_token():
    model, ids = model_of("qwen3_moe"), tokens(1, 6)
    with mr.attach(model) as routed, routed.steer(PLANS["absent"] + PLANS["slot"]):
        model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_more_experts_in_a_trace():
    with mr.attach(model_of("olmoe")) as routed, torch.no_grad():
        with routed.steer(Plan.top_k(4, layers=1)), routed.record(trace=True) as recorder:
            routed.model(input_ids=tokens(1, 5))
        trace = recorder.trace()
    assert trace.ids.shape == (5, 3, 4)
    assert (trace.ids[:, 1] >= 0).all()
    assert (trace.ids[:, 0, 2:] == -1).all()


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_takes_the_rules_or_refuses_them_by_name(name):
    """One rule looks at the router's own choice, one is drawn, one chooses by name; and one wants more slots."""
    model = tiny_model(name)
    given = inputs(name, model)
    with mr.attach(model) as routed, torch.no_grad():
        first = next((router for router in routed.routers if router.steerable), None)
        if first is None:
            with pytest.raises(ValueError, match="cannot be steered"):
                routed.steer(Plan.reserve_slot({0: [1]})).__enter__()
            return
        at = first.layer
        plan = Plan.bias({at: [1]}, strength=2.0).only(absent=True) + Plan.bias({at: [2]}).random_per_token(1)
        with routed.steer(plan + Plan.reserve_slot({at: [3]})), routed.record() as recorder:
            model(**given)
        statistics = recorder.statistics()  # which checks the laws of conservation
        assert statistics.scalar("steered")[0, at] > 0
        assert statistics.scalar("flipped")[0, at] > 0
        assert not np.delete(statistics.scalar("steered")[0], at).any()
        wide = Plan.top_k(first.top_k + 1, layers=at)
        if type(first.adapter).write is not adapter.Adapter.write:
            with pytest.raises(ValueError, match=f"{re.escape(first.name)}.*has no more slots"):
                routed.steer(wide).__enter__()
            return
        with routed.steer(wide), routed.record() as recorder:
            model(**given)
        more = recorder.statistics()
        assert more.scalar("slots")[0, at] == more.tokens()[0, at] * (first.top_k + 1)
        assert more.scalar("empty")[0, at] == 0


def test_positions_are_read_from_what_the_call_says():
    from moe_route.calls import Call

    def positions(past: int = 0, **given: Any) -> list[list[int]]:
        return Call(2, 3, past, None, "prefill", torch.device("cpu"), **given).positions().tolist()

    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions() == [[0, 1, 2]]
    assert positions(past=4) == [[4, 5, 6]]
    assert positions(past=4, counter=torch.tensor(9)) == [[9, 10, 11]]
    assert positions(past=2, mask=mask) == [[1, 2, 3], [2, 3, 4]]
    assert positions(position_ids=torch.tensor([[7, 8, 9]])) == [[7, 8, 9]]
    assert positions(mask=mask, position_ids=torch.zeros(3, 2, 3).long()) == [[1, 2, 3], [2, 3, 4]]


def test_steering_in_inference_mode_and_then_with_gradients():
    model, ids = model_of("qwen3_moe"), tokens(2, 40)
    with mr.attach(model) as routed, routed.steer(PLANS["absent"] + PLANS["slot"]):
        with torch.inference_mode():
            model(input_ids=ids)
        model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0

"""Experts drawn by Gumbel noise: against the formula in float64, and against the distribution it stands for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import token_table
from moe_route.contract.token_tables import TokenTables, stream_of
from moe_route.ops import token_rules
from moe_route.steering import LayerShape, Plan, PlanError

E, K, T = 6, 2, 40
SPECS = {
    "softmax": RouterSpec(renormalize="sum"),
    "sigmoid": RouterSpec(score="sigmoid", renormalize="sum", scale=2.0),
    "sparsemixer": RouterSpec(score="sparsemixer"),
}


def draw(plan: Plan, logits: torch.Tensor, spec: RouterSpec, counter: torch.Tensor, rows: object = 0, bias=None):
    steering = plan.compile([LayerShape(E, K)], ["a", "b"]).tables[0]
    assert isinstance(steering, TokenTables)
    natural = ops.route(logits, K, spec, correction_bias=bias)[1]
    tokens = token_table(len(logits), steering_row=rows)
    weights, ids, _ = token_rules.route_tokens(
        token_rules.fitted(steering, "here", spec),
        logits,
        K,
        spec,
        tokens=tokens,
        counter=counter,
        choice=natural,
        correction_bias=bias,
    )
    return weights, ids, natural


def splitmix(bits: int) -> int:
    mask = (1 << 64) - 1
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
    return bits ^ bits >> 31


def noise_of(seed: int, layer: int, token: int) -> list[float]:
    """The noise of one token, in Python integers."""
    mask, step = (1 << 64) - 1, 0x9E3779B97F4A7C15
    state = splitmix(token ^ ((seed * 0xD1342543DE82EF95 + (layer + 1) * step) & mask))
    drawn = [splitmix((state + (expert + 1) * step) & mask) for expert in range(E)]
    return [-math.log(-math.log(((bits >> 12) + 0.5) * 2.0**-52)) for bits in drawn]


def test_noise_is_that_of_seed_layer_and_token():
    counter = torch.tensor([0, 12345, (9 << 32) | 77])
    for seed, layer in ((0, 0), (7, 3), (-1, 40)):
        found = token_rules.gumbel_noise(torch.full((3,), stream_of(seed, layer)), counter, E)
        np.testing.assert_allclose(found.numpy(), [noise_of(seed, layer, int(t)) for t in counter], rtol=1e-12)


def test_noise_has_the_moments_of_the_gumbel_distribution():
    found = token_rules.gumbel_noise(torch.full((50_000,), stream_of(1, 0)), torch.arange(50_000), E)
    assert torch.isfinite(found).all()
    assert found.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert found.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_the_experts_are_those_of_the_noisy_logits_and_the_weights_those_of_the_own_scores(name, biased):
    if biased and name == "sparsemixer":
        pytest.skip("SparseMixer has no correction bias")
    spec, temperature = SPECS[name], 0.7
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-0.2, 0.2, E) if biased else None
    counter = torch.arange(T) * 31
    weights, ids, natural = draw(Plan.gumbel(5, temperature=temperature), logits, spec, counter, bias=bias)
    noisy = logits + temperature * torch.tensor([noise_of(5, 0, int(t)) for t in counter], dtype=torch.float64)
    wanted = ops.route(noisy, K, spec, correction_bias=bias)[1]
    assert torch.equal(ids, wanted)
    assert not torch.equal(ids, natural)
    if name == "softmax" and not biased:  # the k largest, and softmax renormalized over them
        assert torch.equal(ids.long(), noisy.topk(K, dim=1).indices)
        expected = logits.gather(1, ids.long()).softmax(1)
    else:
        expected = ops.route_weights(logits, ids, spec)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


def test_little_noise_gives_the_natural_choice_bit_for_bit():
    logits = torch.randn(T, E)
    for spec in SPECS.values():
        natural_weights = ops.route(logits, K, spec)[0]
        weights, ids, natural = draw(Plan.gumbel(5, temperature=1e-9), logits, spec, torch.arange(T))
        assert torch.equal(ids, natural)
        assert torch.equal(weights, natural_weights)


def test_the_first_expert_follows_the_softmax_at_the_temperature():
    """Gumbel-max: the first of the top k is a draw from softmax(z / temperature), the next one from the rest."""
    many = 40_000
    z = torch.tensor([1.0, 0.0, -1.0, 0.5, 2.0, -3.0])
    spec, temperature = RouterSpec(), 1.5
    logits = z.expand(many, E).contiguous()
    _, ids, _ = draw(Plan.gumbel(2, temperature=temperature), logits, spec, torch.arange(many))
    p = (z / temperature).softmax(0).numpy().astype(float)
    first = np.bincount(ids[:, 0], minlength=E) / many
    np.testing.assert_allclose(first, p, atol=0.01)
    second = sum(p[e] * np.where(np.arange(E) == e, 0, p) / (1 - p[e]) for e in range(E))
    np.testing.assert_allclose(np.bincount(ids[:, 1], minlength=E) / many, second, atol=0.01)


def test_groups_have_routes_of_their_own_and_forbidden_experts_stay_out():
    plan = Plan.gumbel(1).only(groups="a") + Plan.gumbel(2, temperature=3.0).only(groups="b") + Plan.forbid({0: [4]})
    compiled = plan.compile([LayerShape(E, K)], ["a", "b"])
    steering = compiled.tables[0]
    assert sum("gumbel" in part.named for part in steering.parts) == 1  # one part draws for all seeds
    logits, counter = torch.randn(T, E), torch.arange(T)
    own = torch.tensor([compiled.row("prefill", g) for g in (0, 1, -1)])
    rows = own.repeat(T)[:T].to(torch.int32)
    natural = ops.route(logits, K, RouterSpec())[1]
    tokens = token_table(T, steering_row=rows)
    _, ids, _ = token_rules.route_tokens(
        steering, logits, K, RouterSpec(), tokens=tokens, counter=counter, choice=natural
    )
    assert not (ids == 4).any()
    for token in range(T):
        z = logits[token].numpy().astype(float)
        if token % 3 < 2:
            z = z + (1.0, 3.0)[token % 3] * np.array(noise_of(1 + token % 3, 0, token))
        z[4] = -np.inf
        assert ids[token].tolist() == np.argsort(-z)[:K].tolist()


def test_it_is_data():
    plan = Plan.gumbel(3, temperature=0.5, layers=[0, 2])
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan != Plan.gumbel(4, temperature=0.5, layers=[0, 2])
    assert plan.in_layers([1]).rules[0].draw == 3
    assert str(plan.rules[0]) == (
        "gumbel in layers 0, 2: chosen by logit + 0.5 * Gumbel noise [drawn for each token with seed 3]"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan.gumbel(temperature=0.0), "temperature must be above 0"),
        (lambda: Plan.gumbel() * 2.0, "no strength to scale"),
        (lambda: Plan.gumbel().only(absent=True), "cannot be left out"),
        (lambda: (Plan.gumbel(1) + Plan.gumbel(2)).compile([LayerShape(E, K)]), "two fixed, replayed or drawn choices"),
        (lambda: (Plan.gumbel(1) + Plan.top_k(4)).compile([LayerShape(E, K)]), "a gumbel rule and a top_k above"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()

"""Regret against drawn routes, against a plain loop over tokens with one plan at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from harness.tiny_texts import tiny_language_model, tiny_texts

import moe_route as mr
from moe_route.analysis import AnalysisError, effects_by_group, expected_maximum
from moe_route.data import Corpus
from moe_route.data.batches import texts_of
from moe_route.experiments import regret
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import Plan, PlanError

FEW = {"resamples": 50, "permutations": 300}


def log_p(language_model: LanguageModel, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return language_model.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def test_the_expected_maximum_is_that_of_all_signs():
    changes = np.random.default_rng(0).normal(size=(5, 4))
    for row, found in zip(changes, expected_maximum(changes), strict=True):
        best = [np.max(np.abs(row) * signs) for signs in itertools.product((1, -1), repeat=4)]
        assert found == pytest.approx(np.mean(best))
    assert expected_maximum(np.array([3.0])) == 0
    with pytest.raises(AnalysisError, match="no value"):
        expected_maximum(np.zeros((3, 0)))


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_is_the_plain_loop(name):
    language_model, texts = tiny_language_model(name), tiny_texts()
    options = {"routes": 3, "temperature": 0.5, "layers": [0, 2], "confidence": [0.2], "seed": 5}
    found = regret(language_model, texts, batch_size=7, **options, **FEW)
    rows = language_model.encode(texts).ids
    sums, counts = np.zeros((len(texts), 3, 6)), np.zeros((len(texts), 3, 6))
    with mr.attach(language_model.model) as routed:
        for n, ids in enumerate(rows):
            natural, drawn = log_p(language_model, ids), []
            for route in range(3):
                with routed.steer(Plan.gumbel(5 + route, temperature=0.5, layers=[0, 2])):
                    drawn.append(log_p(language_model, ids))
            true = list(ids[1:])
            gain = np.array([[(d[t, y] - natural[t, y]).item() for d in drawn] for t, y in enumerate(true)])
            totals = [gain[start::2].sum(0) for start in (0, 1)]
            best_on = [(total >= total.max() - 1e-5).argmax() for total in totals]
            for t in range(len(true)):
                best, chance = gain[t].max(), expected_maximum(gain[t])
                held_out = gain[t, best_on[1 - t % 2]]
                values = [best, chance, best - chance, held_out, gain[t].mean(), best > 1e-5]
                kind = int(natural[t].exp().max() >= 0.2)
                for cell in (kind, 2):
                    sums[n, cell] += values
                    counts[n, cell] += 1
    groups, wanted = effects_by_group([t.group for t in texts], [t.item for t in texts], sums, counts, seed=5, **FEW)
    assert (found.groups, found.classes) == (groups, ("0-0.2", "0.2-1", "all"))
    for place, measure in enumerate(("regret", "by_chance", "excess", "held_out", "random", "gains")):
        effects = getattr(found, measure)
        np.testing.assert_allclose(effects.mean, wanted.mean[..., place], atol=3e-5)
        np.testing.assert_allclose(effects.low, wanted.low[..., place], atol=3e-5)
    np.testing.assert_array_equal(found.regret.tokens, wanted.tokens[..., 0])


def test_batches_do_not_change_the_routes():
    language_model, texts = tiny_language_model("mixtral"), tiny_texts(items=3)
    one, many = (regret(language_model, texts, routes=3, batch_size=size, **FEW) for size in (1, 64))
    np.testing.assert_allclose(one.regret.mean, many.regret.mean, atol=2e-5)


def test_on_the_demo_model():
    """At little noise nothing changes; at much, random routes hurt, and a route chosen in advance helps less."""
    language_model = LanguageModel.load()
    texts = texts_of(Corpus.read("general", languages=["eng_Latn"], limit=10))
    still = regret(language_model, texts, routes=2, temperature=1e-6, **FEW)
    assert abs(still.regret.mean[0, -1]) < 1e-4
    found = regret(language_model, texts, routes=4, **FEW)
    assert found.random.mean[0, -1] < 0 < found.regret.mean[0, -1]
    assert found.held_out.mean[0, -1] < found.regret.mean[0, -1]
    assert found.gains.mean[0, -1] < 1
    np.testing.assert_allclose(found.excess.mean, found.regret.mean - found.by_chance.mean)
    assert found.regret.tokens[0, :-1].sum() == found.regret.tokens[0, -1]
    assert "drawn routes" in repr(found)
    assert len(found.to_pandas()) == 5
    assert found.to_dict()["classes"][-1] == "all"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"routes": 1}, ValueError, "at least 2"),
        ({"confidence": [0.5, 0.2]}, ValueError, "must increase"),
        ({"confidence": [1.5]}, ValueError, "must increase"),
        ({"temperature": 0}, PlanError, "above 0"),
        ({"layers": [7]}, PlanError, "3 MoE layers"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        regret(tiny_language_model("mixtral"), tiny_texts(items=1), **options, **FEW)

"""Transplanted routes, against plain loops over texts with the choice worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from harness.tiny_texts import tiny_language_model, tiny_texts

import moe_route as mr
from moe_route.analysis import AnalysisError, effects_by_group
from moe_route.data import Corpus
from moe_route.data.batches import Text, texts_of
from moe_route.experiments import record_trace, transplant
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import Plan, PlanError

FEW = {"resamples": 50, "permutations": 300}


def summed(language_model: LanguageModel, ids: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = language_model.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return -sum(logits[t, token].item() for t, token in enumerate(ids[1:]))


def averages(routed: mr.RoutedModel, language_model: LanguageModel, ids: tuple[int, ...]) -> list[torch.Tensor]:
    """Mean scores of a text by layer, from the routers' own logits."""
    seen: list[torch.Tensor] = []
    hooks = [
        router.module.register_forward_hook(lambda module, args, output: seen.append(output[0].double().softmax(-1)))
        for router in routed.routers
    ]
    with torch.no_grad():
        language_model.model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return [scores.mean(0) for scores in seen]


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_is_the_plain_loop(name):
    language_model, texts = tiny_language_model(name), tiny_texts(items=3)
    kinds, bands = ("own", "pooled", "choice", "other", "scores"), {"late": [1, 2]}
    found = transplant(language_model, texts, reference="a", kinds=kinds, bands=bands, batch_size=4, **FEW)
    assert (found.groups, found.routes, found.bands) == (("a", "b"), kinds, ("all", "late"))
    rows, changes = language_model.encode(texts).ids, np.zeros((len(texts), 5, 2))
    with mr.attach(language_model.model) as routed:
        q = {(t.group, t.item): averages(routed, language_model, i) for t, i in zip(texts, rows, strict=True)}
        items = sorted({text.item for text in texts})
        before = {item: items[number - 1] for number, item in enumerate(items)}
        for n, (text, ids) in enumerate(zip(texts, rows, strict=True)):
            natural = summed(language_model, ids)
            keys = [(text.group, text.item), ("a", text.item), ("a", before[text.item])]
            fixed = [{layer: of.topk(2).indices.tolist() for layer, of in enumerate(q[key])} for key in keys]
            plans = [Plan(), *(Plan.fix_choice(experts) for experts in fixed)]
            scores = {layer: dict(enumerate(of.tolist())) for layer, of in enumerate(q["a", text.item])}
            plans.append(Plan.replace_scores(scores))
            for r, plan in enumerate(plans):
                for b, layers in enumerate(([0, 1, 2], [1, 2])):
                    with routed.steer(plan.only(layers=layers)):
                        changes[n, r, b] = summed(language_model, ids) - natural
    counts = np.broadcast_to(np.array([len(ids) - 1.0 for ids in rows])[:, None, None], changes.shape)
    _, wanted = effects_by_group([t.group for t in texts], [t.item for t in texts], changes, counts, **FEW)
    for measure in ("mean", "low", "high"):
        np.testing.assert_allclose(getattr(found.effect, measure), getattr(wanted, measure), atol=3e-5)
    np.testing.assert_allclose(found.mediated[:, 1:, 0], 1)
    # the own average of "a" is that of "a"
    np.testing.assert_allclose(found.effect.mean[0, 1], found.effect.mean[0, 2], atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "phimoe", "gpt_oss"])
def test_the_own_route_changes_nothing(name):
    found = transplant(tiny_language_model(name), tiny_texts(), reference="a", kinds=["own"], **FEW)
    assert (found.effect.mean == 0).all()
    assert (found.effect.p_value == 1).all()


def test_another_checkpoint():
    """Its recorded choices, token by token, with this model's weights."""
    language_model, donor, texts = (*(tiny_language_model("mixtral", seed=seed) for seed in (0, 1)), tiny_texts())
    trace = record_trace(donor, texts, batch_size=3)
    found = transplant(language_model, texts, kinds=(), routes={"donor": trace, "plan": Plan.top_k(1)}, **FEW)
    rows = language_model.encode(texts).ids
    for r, plan in enumerate((Plan.replay(trace), Plan.top_k(1))):
        change, tokens = 0.0, 0
        with mr.attach(language_model.model) as routed:
            for text, ids in zip(texts, rows, strict=True):
                if text.group != "b":
                    continue
                natural = summed(language_model, ids)
                with routed.steer(plan), routed.labels(groups=["b"], items=[text.item]):
                    change += summed(language_model, ids) - natural
                tokens += len(ids) - 1
        assert found.effect.mean[1, r, 0] == pytest.approx(change / tokens, abs=2e-5)
        assert abs(change) > 1e-3


def test_on_the_demo_model():
    """Its own route costs a text nothing, one route for all tokens something, and that of another text more."""
    texts = texts_of(Corpus.read("general", languages=["eng_Latn", "deu_Latn"], limit=12))
    found = transplant(LanguageModel.load(), texts, bands={"ends": [0, 1, 6, 7], "middle": range(2, 6)})
    effect = dict(zip(found.routes, found.effect.mean.swapaxes(0, 1), strict=True))
    assert (effect["own"] == 0).all()
    assert (effect["pooled"][:, 0] > 0).all()
    # English is its own reference; the two are sums of the same numbers in another order
    np.testing.assert_allclose(effect["choice"][0], effect["pooled"][0], rtol=1e-5)
    assert effect["other"][0, 0] > effect["choice"][0, 0]
    assert "[+" in repr(found)
    assert len(found.to_pandas()) == 2 * 4 * 3
    assert found.to_dict()["bands"] == ["all", "ends", "middle"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kinds": ["mean"]}, ValueError, "kinds are different ones"),
        ({"kinds": []}, ValueError, "kinds are different ones"),
        ({"kinds": ["own"], "routes": {"own": Plan()}}, ValueError, "other names"),
        ({"routes": {"x": 3}}, TypeError, "give a Trace"),
        ({"reference": "c"}, AnalysisError, "no text in 'c'"),
        ({"texts": tiny_texts(items=1)}, AnalysisError, "one item only"),
        ({"texts": tiny_texts() + tiny_texts()}, ValueError, "share their group and item"),
        ({"texts": [*tiny_texts(), Text("b", "alone", "abcd")]}, AnalysisError, "item 'alone' has no text"),
        ({"bands": {"late": [9]}, "kinds": ["own"]}, PlanError, "3 MoE layers"),
        ({"bands": {"all": [0]}, "kinds": ["own"]}, ValueError, "all layers already"),
        ({"texts": ["abcd"]}, ValueError, "must be Text"),
    ],
)
def test_bad_input(options, error, message):
    given = {"texts": tiny_texts(), "reference": "a"} | options
    with pytest.raises(error, match=message):
        transplant(tiny_language_model("mixtral"), given.pop("texts"), **given, **FEW)

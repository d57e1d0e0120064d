"""Knock-outs, against a plain loop: one plan at a time, one text at a time, losses in float64."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from harness.tiny_texts import tiny_language_model, tiny_texts

import moe_route as mr
from moe_route.analysis import AnalysisError, benjamini_hochberg, mean_effects
from moe_route.data import Corpus
from moe_route.data.batches import Text, texts_of
from moe_route.experiments import knockout
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import Plan, PlanError

FEW = {"resamples": 50, "permutations": 300}


def nats_of(language_model: LanguageModel, ids: tuple[int, ...]) -> np.ndarray:
    """Loss of every predicted token of one text."""
    with torch.no_grad():
        logits = language_model.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return np.array([-logits[t, ids[t + 1]].item() for t in range(len(ids) - 1)])


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_is_the_plain_loop(name):
    language_model, texts = tiny_language_model(name), tiny_texts()
    experts = {0: [1, 5], 1: [0]}
    found = knockout(language_model, texts, experts=experts, batch_size=5, **FEW)
    rows = language_model.encode(texts).ids
    with mr.attach(language_model.model) as routed:
        for layer, expert in [(0, 1), (0, 5), (1, 0)]:
            for g, group in enumerate(("a", "b")):
                direct, total = [], []
                for text, ids in zip(texts, rows, strict=True):
                    if text.group != group:
                        continue
                    with routed.record(trace=True) as recorder, recorder.labels(items=[0]):
                        before = nats_of(language_model, ids)
                    chose = (recorder.trace().ids[:-1, layer] == expert).any(1)
                    with routed.steer(Plan.forbid({layer: [expert]})):
                        change = nats_of(language_model, ids) - before
                    direct.append((change[chose].sum(), chose.sum()))
                    total.append((change.sum(), len(change)))
                at = (g, layer, expert)
                for effects, loop in ((found.effect, direct), (found.total, total)):
                    sums, counts = np.array(loop, float).T
                    if not counts.any():
                        assert np.isnan(effects.mean[at])
                        continue
                    assert effects.mean[at] == pytest.approx(sums.sum() / counts.sum(), abs=2e-5)
                    expected = mean_effects(sums, counts, **FEW)
                    assert effects.high[at] == pytest.approx(float(expected.high), abs=2e-5, nan_ok=True)
                tokens = sum(count for _, count in direct)
                assert found.frequency[at] == pytest.approx(tokens / sum(count for _, count in total))
    tested = np.zeros(found.total.mean.shape, bool)
    tested[:, [0, 0, 1], [1, 5, 0]] = True
    np.testing.assert_array_equal(np.isnan(found.total.mean), ~tested)
    np.testing.assert_allclose(found.adjusted[0], benjamini_hochberg(found.effect.p_value[0]))


def test_batches_do_not_matter_and_the_model_is_restored():
    language_model, texts = tiny_language_model("mixtral"), tiny_texts(items=3)
    before = [nats_of(language_model, ids) for ids in language_model.encode(texts).ids]
    one, many = (knockout(language_model, texts, layers=1, batch_size=size, **FEW) for size in (1, 64))
    np.testing.assert_allclose(one.total.mean, many.total.mean, atol=2e-5)
    np.testing.assert_allclose(one.effect.mean, many.effect.mean, atol=2e-5)
    after = [nats_of(language_model, ids) for ids in language_model.encode(texts).ids]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_on_the_demo_model():
    """A loss per token that agrees with `LanguageModel.losses`, and some experts that the model misses."""
    language_model = LanguageModel.load()
    texts = texts_of(Corpus.read("general", languages=["eng_Latn", "swh_Latn"], limit=8))
    with language_model.attach() as routed:
        found = knockout(language_model, texts, experts={5: range(8, 16)}, routed=routed)
        assert routed.attachment.attached
    losses = language_model.losses(texts)
    for g in range(2):
        mine = losses[8 * g : 8 * g + 8]
        assert found.loss[g] == pytest.approx(mine[:, 0].sum() / mine[:, 1].sum(), abs=1e-5)
    assert (found.total.mean[1, 5, 8:] > 0).any()
    table = found.agreement({"frequency twice": 2 * found.frequency})
    assert table.rho[0].tolist() == table.rho[1].tolist()
    assert "Knock-outs" in repr(found)
    assert len(found.to_pandas()) == 16
    assert found.to_dict()["groups"] == ["eng_Latn", "swh_Latn"]
    useful = np.flatnonzero(found.effect.mean[1, 5] > 0).tolist()
    assert list(found.needed("swh_Latn", limit=1.0)[5]) == useful
    assert set(found.needed("swh_Latn", limit=0.2).get(5, ())) <= set(useful)
    with pytest.raises(AnalysisError, match="name one of"):
        found.needed()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"experts": {7: [0]}}, PlanError, "3 MoE layers"),
        ({"experts": {0: [8]}}, PlanError, "8 experts"),
        ({"experts": {0: [-1]}}, PlanError, "no expert -1"),
        ({"layers": [9]}, PlanError, "3 MoE layers"),
        ({"layers": [1], "experts": {0: [1]}}, ValueError, "no expert to switch off"),
        ({"texts": []}, ValueError, "second token"),
        ({"texts": [Text("a", "0", "x")]}, ValueError, "second token"),
        ({"routed": "other"}, ValueError, "another model"),
        ({"routed": "steered"}, ValueError, "steered already"),
    ],
)
def test_bad_input(options, error, message):
    language_model, other = tiny_language_model("mixtral"), tiny_language_model("mixtral")
    given = {"texts": tiny_texts(items=1)} | options
    texts, wanted = given.pop("texts"), given.pop("routed", None)
    with mr.attach((other if wanted == "other" else language_model).model) as routed:
        if wanted is None:
            routed.detach()
        steered = routed.steer(Plan.top_k(1)) if wanted == "steered" else contextlib.nullcontext()
        with steered, pytest.raises(error, match=message):
            knockout(language_model, texts, routed=routed if wanted else None, **given, **FEW)

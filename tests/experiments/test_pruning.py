"""Losses of pruned models on the shipped model, against losses under each plan and under the exported checkpoint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("transformers")

import moe_route as mr
from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.data import Corpus
from moe_route.data.batches import texts_of
from moe_route.experiments import export_pruned, pruning_curve, router_weights
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts
from moe_route.steering import Plan


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel.load()


@pytest.fixture(scope="module")
def texts() -> list:
    return texts_of(Corpus.read("general", languages=["eng_Latn", "swh_Latn"], limit=4))


@pytest.fixture(scope="module")
def statistics(language_model, texts):
    with language_model.attach() as routed:
        with routed.record(sequences=True, expert_outputs=True, hidden=True) as recorder:
            record_texts(recorder, language_model, texts)
        return recorder.statistics()


def test_the_curve_is_the_loss_under_each_plan(language_model, texts, statistics, tmp_path) -> None:
    options = {"criteria": ["reap", "random"], "keep": [0.75, 0.5], "seed": 2}
    found = pruning_curve(language_model, texts, statistics, **options)
    assert found.loss.shape == (2, 2, 2)
    assert found.groups == ("eng_Latn", "swh_Latn")

    def loss() -> list[float]:
        sums = language_model.losses(texts)
        return [sums[part, 0].sum() / sums[part, 1].sum() for part in (slice(0, 4), slice(4, 8))]

    np.testing.assert_allclose(found.base, loss())
    dropped = analysis.prune(statistics, keep=0.5, criterion="reap")
    with language_model.attach() as routed:
        with routed.steer(Plan.forbid(dropped)):
            np.testing.assert_allclose(found.loss[0, 1], loss())
        again = pruning_curve(language_model, texts, statistics, routed=routed, **options)
        assert routed.attachment.attached
    np.testing.assert_array_equal(found.loss, again.loss)
    np.testing.assert_allclose(found.increase, found.loss - found.base)
    assert (found.low <= found.increase + 1e-9).all()
    assert (found.high >= found.increase - 1e-9).all()
    assert len(found.to_pandas()) == 8
    assert "loss in nats per token" in repr(found)
    assert found.to_dict()["unit"] == "nats per token"

    export_pruned(language_model.model, dropped, tmp_path, tokenizer=language_model.tokenizer)
    pruned = replace(language_model, model=type(language_model.model).from_pretrained(tmp_path).eval())
    sums = pruned.losses(texts)
    np.testing.assert_allclose(sums[:4, 0].sum() / sums[:4, 1].sum(), found.loss[0, 1, 0], rtol=1e-4)


def test_the_curve_refuses_before_the_model_runs(language_model, texts, statistics) -> None:
    for options in ({"criteria": ["luck"]}, {"criteria": []}, {"keep": []}, {"keep": [0.01]}, {"group": "de"}):
        with pytest.raises(AnalysisError):
            pruning_curve(language_model, texts, statistics, **options)


def test_geometry_of_the_shipped_model(language_model, statistics) -> None:
    with language_model.attach() as routed:
        weights = router_weights(routed)
        assert [weight.shape[0] for weight in weights] == [router.num_experts for router in routed.routers]
    found = analysis.geometry(statistics, "eng_Latn", weights=weights)
    assert found.groups == ("swh_Latn",)
    for values in (found.cosine, found.row_cosine, found.null_cosine):
        assert (np.abs(values) <= 1).all()
    assert ((found.row_share > 0) & (found.row_share < 1)).all()
    saliency = analysis.saliency(statistics)
    assert np.nanmin(saliency.values) > 0
    assert len(analysis.super_experts(statistics, quantile=0.9)) > 0


def test_weights_of_a_router_that_is_more_than_a_matrix() -> None:
    from harness.tiny_models import tiny_model

    with mr.attach(tiny_model("phimoe")) as routed, pytest.raises(ValueError, match=r"PhimoeTopKRouter.*samples"):
        router_weights(routed)

"""Learning the routing from texts of the shipped model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from moe_route.data import demo_corpus
from moe_route.data.batches import Text, texts_of
from moe_route.experiments import learn_routing
from moe_route.runs.language_model import LanguageModel


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel.load("demo")


def test_the_loss_of_the_texts_falls(language_model: LanguageModel) -> None:
    texts = texts_of(demo_corpus().subset(["swh_Latn"], 6))
    before = {key: value.clone() for key, value in language_model.model.state_dict().items()}
    base = language_model.losses(texts)
    losses = learn_routing(language_model, texts, layers=[2, 3], steps=5, lr=0.05).losses
    assert losses[0] == pytest.approx(base[:, 0].sum() / base[:, 1].sum(), rel=1e-4)
    best = int(np.argmin(losses))
    assert best > 0
    learned = learn_routing(language_model, texts, layers=[2, 3], steps=best, lr=0.05)
    assert all(torch.equal(value, before[key]) for key, value in language_model.model.state_dict().items())
    assert np.array_equal(language_model.losses(texts), base)
    with language_model.attach() as routed, routed.steer(learned.plan):
        steered = language_model.losses(texts)
    assert steered[:, 0].sum() / steered[:, 1].sum() == pytest.approx(losses[best], rel=1e-4)
    assert steered[:, 0].sum() < base[:, 0].sum()


def test_groups_get_numbers_of_their_own(language_model: LanguageModel) -> None:
    texts = texts_of(demo_corpus().subset(["eng_Latn", "swh_Latn"], 2))
    learned = learn_routing(
        language_model, [*texts, Text("deu_Latn", "x", "")], by_group=True, layers=2, steps=2, what="scale"
    )
    assert learned.groups == ("eng_Latn", "swh_Latn")
    assert {rule.groups for rule in learned.plan.rules} == {("eng_Latn",), ("swh_Latn",)}


def test_texts_without_a_token_to_predict_are_refused(language_model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="nothing to predict"):
        learn_routing(language_model, [])

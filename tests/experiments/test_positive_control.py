"""The positive control: the shift against plain hooks, what is chosen on which languages, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import moe_route as mr
from moe_route.data import demo_corpus, demo_problems
from moe_route.data.batches import texts_of
from moe_route.experiments import PositiveControl, positive_control
from moe_route.experiments.positive_control import _shifts
from moe_route.experiments.text_run import TextRun
from moe_route.steering import ExpertSelection, Plan

LANGUAGES = ["eng_Latn", "deu_Latn", "swh_Latn"]
EXPERTS = ExpertSelection({2: [5], 5: [1, 4]}, num_experts=[16] * 8)


@pytest.fixture(scope="module")
def language_model():
    return mr.LanguageModel.load()


@pytest.fixture(scope="module")
def texts():
    problems = demo_problems().subset(languages=LANGUAGES, limit=4)
    return problems.subset("seen"), demo_corpus().subset(LANGUAGES, limit=5), problems.subset("unseen")


@pytest.fixture(scope="module")
def result(language_model, texts) -> PositiveControl:
    return positive_control(
        language_model,
        *texts,
        EXPERTS,
        chosen_on=["deu_Latn"],
        damages=(0.5, 1.0),
        strengths=(0.5, 1.0),
        draws=2,
        sampled=3,
    )


def test_the_shift_is_the_difference_of_mean_logits(language_model, texts):
    task, general, _ = texts

    def mean_logits(corpus):
        """Mean logit of every expert over the German tokens, in float64, by hooks on the gates."""
        seen: dict[int, list[torch.Tensor]] = {}
        gates = [module for name, module in language_model.model.named_modules() if name.endswith("mlp.gate")]
        hooks = [
            gate.register_forward_pre_hook(
                lambda module, given, number=number: seen.setdefault(number, []).append(
                    given[0].reshape(-1, given[0].shape[-1]).double() @ module.weight.double().T
                )
            )
            for number, gate in enumerate(gates)
        ]
        with torch.inference_mode():
            for text in corpus["deu_Latn"]:
                language_model.model(**language_model.tokenizer(text, return_tensors="pt"))
        for hook in hooks:
            hook.remove()
        return np.stack([torch.cat(seen[number]).mean(0).numpy() for number in range(len(gates))])

    expected = mean_logits(general) - mean_logits(task.corpus())
    recorded = []
    with language_model.attach() as routed:
        for corpus in (task.corpus(), general):
            with TextRun(language_model, texts_of(corpus), routed) as run:
                recorded.append(run.record("", groups=LANGUAGES, sequences=True, hidden=True).statistics())
        plan = _shifts(routed, *recorded, ["deu_Latn"])["deu_Latn"]
        tables = plan.compile(routed.routers).tables
    for layer, table in enumerate(tables):
        np.testing.assert_allclose(table.tables["bias"][0].numpy(), expected[layer], atol=2e-5)


def test_levels_changes_and_sets_are_those_of_single_runs(result, language_model, texts):
    assert result.languages == ("deu_Latn", "swh_Latn")
    assert result.correct.shape == (3, 3, 4, 2)
    questions = texts[2].subset(languages=["swh_Latn"]).questions
    with language_model.attach() as routed, routed.steer(Plan.activate(EXPERTS, strength=1.0)):
        alone = language_model.answers(questions, batch_size=64).correct
    np.testing.assert_array_equal(result.correct[0, 2, :, 1], alone)
    gains = (result.correct[1:, 1:, :, 0] - result.correct[1:, :1, :, 0]).mean(2)
    place = tuple(number + 1 for number in np.unravel_index(gains.argmax(), gains.shape))
    assert result.chosen == place
    assert (result.chosen_on, result.told) == (("deu_Latn",), ("swh_Latn",))
    assert set(result.sets) == {(damage, strength) for damage in (0, place[0]) for strength in (1, 2)}
    assert all(one.shape == (2, 3, 2) for one in result.sets.values())
    beside = result.beside(0, 1)
    sampled = result.correct[0][:, result.sampled]
    assert beside.plan == pytest.approx((sampled[1] - sampled[0]).mean())
    assert result.beside(next(d for d in (1, 2) if d != place[0]), 1) is None
    assert set(result.headroom) == set(LANGUAGES)
    json.dumps(result.to_dict(), allow_nan=False)
    assert len(result.to_pandas()) == 3 * 3 * 2
    assert "headroom" in repr(result)


def made(repairs: dict[float, float], items: int = 60) -> PositiveControl:
    """A result in which raising gives back so much under each damage."""
    rng = np.random.default_rng(0)
    damages = (0.0, *repairs)
    draws = rng.random((items, 3))
    before = {0.0: 0.8, **{damage: 0.8 - 0.3 * damage for damage in repairs}}
    correct = np.stack(
        [np.stack([draws < before[d], draws < before[d] + repairs.get(d, 0.0)]).astype(float) for d in damages]
    )
    sets = {(len(damages) - 1, 1): np.repeat(correct[-1, :1], 9, axis=0)}
    languages = ("a", "b", "c")
    every = np.arange(items)
    return PositiveControl(
        languages,
        "en",
        damages,
        (0.0, 1.0),
        EXPERTS,
        correct,
        {},
        sets,
        every,
        (len(damages) - 1, 1),
        ("a",),
        {"en": 0.3},
    )


def test_the_sentence_names_the_smallest_damage_that_was_detected_or_the_failure():
    shown = made({0.25: 0.0, 0.5: 0.2, 1.0: 0.25})
    assert shown.smallest == 2
    assert "smallest damage" in shown.sentence
    assert "is 0.5 of that" in shown.sentence
    assert "none of 9 random sets" in shown.sentence
    failed = made({0.25: 0.0, 0.5: 0.0, 1.0: 0.0})
    assert failed.smallest is None
    assert "failed" in failed.sentence


def test_a_damage_that_cancels_is_refused(language_model, texts):
    for damage in (Plan.deactivate(EXPERTS, strength=0.5), Plan.deactivate(EXPERTS, strength=3.0)):
        with pytest.raises(ValueError, match="circular"):
            positive_control(language_model, *texts, EXPERTS, damage=damage, draws=0)
    other = Plan.deactivate({2: [5], 5: [1]}, strength=0.5)
    found = positive_control(language_model, *texts, EXPERTS, damage=other, damages=(1.0,), strengths=(0.5,), draws=0)
    assert found.damages == (0.0, 1.0)


def test_what_cannot_be_measured_is_refused(language_model, texts):
    found, text, measured = texts
    with pytest.raises(ValueError, match="in found and in measured"):
        positive_control(language_model, measured, text, measured, EXPERTS)
    with pytest.raises(ValueError, match="damages must be"):
        positive_control(language_model, found, text, measured, EXPERTS, damages=(1.0, 0.5))
    with pytest.raises(ValueError, match="chosen_on names 'fra_Latn'"):
        positive_control(language_model, found, text, measured, EXPERTS, chosen_on=["fra_Latn"])
    with pytest.raises(ValueError, match="task experts to raise"):
        positive_control(language_model, found, text, measured, ExpertSelection({}))

"""Strength sweeps on the shipped model: against one run per strength, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("transformers")

from moe_route.analysis import paired_difference
from moe_route.data import demo_corpus
from moe_route.data.batches import Text, texts_of
from moe_route.experiments import strength_sweep
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts
from moe_route.steering import Plan, PlanError

PLAN = Plan.activate({2: [1, 5], 4: [0]}, strength=1.0)


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel.load("demo")


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return texts_of(demo_corpus().subset(["eng_Latn", "swh_Latn"], 3))


def test_it_is_one_run_for_each_strength(language_model: LanguageModel, texts: list[Text]) -> None:
    plan = PLAN + Plan.bias({3: [2]}, strength=2.0).only(groups="swh_Latn")
    found = strength_sweep(language_model, texts, plan, [0.5, 1, 2], controls=2, batch_size=20)
    groups = np.array([text.group for text in texts])
    base = language_model.losses(texts)
    with language_model.attach() as routed:
        for s, strength in enumerate(found.strengths):
            nats = np.zeros(len(texts))
            for group in found.groups:
                mine = [text for text in texts if text.group == group]
                with routed.steer(plan * strength), routed.labels(groups=group):
                    nats[groups == group] = language_model.losses(mine, batch_size=len(mine))[:, 0]
            for g, group in enumerate(found.groups):
                at = groups == group
                assert found.loss[g, s] == pytest.approx(nats[at].sum() / base[at, 1].sum(), rel=1e-4)
                change = paired_difference(nats[at], base[at, 0], base[at, 1])
                cell = found.change[g][s]
                assert (cell.value, cell.low, cell.high) == pytest.approx(
                    (change.value, change.low, change.high), abs=1e-4
                )
        assert routed.plan is None
    assert found.natural == pytest.approx(
        [base[groups == g, 0].sum() / base[groups == g, 1].sum() for g in found.groups]
    )
    assert found.texts == (3, 3)
    assert all(len(cell.random) == 2 for row in found.control for cell in row)
    assert len(found.to_pandas()) == 6
    assert json.dumps(found.to_dict(), allow_nan=False)
    assert "random experts" in repr(found)


def test_a_strength_of_nothing_changes_nothing(language_model: LanguageModel, texts: list[Text]) -> None:
    found = strength_sweep(language_model, texts[:2], PLAN, [0], batch_size=4)
    assert found.loss[0, 0] == pytest.approx(found.natural[0], rel=1e-6)
    assert found.change[0][0].value == pytest.approx(0, abs=1e-6)
    assert found.control == ()


def test_forced_experts_have_one_strength(language_model: LanguageModel, texts: list[Text]) -> None:
    plan = Plan.force_on({2: [1]})
    assert strength_sweep(language_model, texts[:2], plan, [1]).loss.shape == (1, 1)
    with pytest.raises(PlanError, match="no strength to scale"):
        strength_sweep(language_model, texts[:2], plan, [1, 2])


def test_what_it_refuses(language_model: LanguageModel, texts: list[Text]) -> None:
    for strengths in ([], [1, 1], [float("nan")]):
        with pytest.raises(ValueError, match="different finite numbers"):
            strength_sweep(language_model, texts, PLAN, strengths)
    with pytest.raises(ValueError, match="controls must be 0 or more"):
        strength_sweep(language_model, texts, PLAN, [1], controls=-1)
    with pytest.raises(ValueError, match="nothing to predict"):
        strength_sweep(language_model, [], PLAN, [1])
    with pytest.raises(PlanError, match="steers layer 9"):
        strength_sweep(language_model, texts, Plan.forbid({9: [1]}), [1])
    with language_model.attach() as routed, routed.steer(PLAN), pytest.raises(ValueError, match="steered already"):
        strength_sweep(language_model, texts, PLAN, [1], routed=routed)


def test_more_strengths_than_rows_give_the_same(language_model: LanguageModel, texts: list[Text]) -> None:
    strengths = [0.5, 1.0, 1.5, 2.0]
    found, narrow = (strength_sweep(language_model, texts, PLAN, strengths, batch_size=size) for size in (30, 2))
    np.testing.assert_allclose(narrow.loss, found.loss, rtol=1e-5)
    np.testing.assert_allclose(narrow.natural, found.natural, rtol=1e-5)


def test_scores_by_item_are_swept_and_choices_by_group_are_refused(
    language_model: LanguageModel, texts: list[Text]
) -> None:
    items = sorted({text.item for text in texts})
    scores = np.random.default_rng(0).uniform(0.1, 1, (len(items), 8, 16)).astype(np.float32)
    plan = Plan.replace_scores(scores, items=items, per="sequence").only(groups="eng_Latn")
    found = strength_sweep(language_model, texts, plan, [1], batch_size=4)
    assert found.loss[0, 0] != pytest.approx(found.natural[0], rel=1e-3)
    assert found.loss[1, 0] == pytest.approx(found.natural[1], rel=1e-5)
    pair = [text for text in texts if text.item == items[0]]
    with language_model.attach() as routed, routed.record(trace=True, sequences=True) as recorder:
        record_texts(recorder, language_model, language_model.encode(pair), batch_size=2)
    with pytest.raises(PlanError, match="finds its sequences by group"):
        strength_sweep(language_model, pair, Plan.replay(recorder.trace()), [1])

"""What a plan reached: rules whose group, phase or positions never came are named when the block ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness.tiny_models import tiny_model, tokens
from torch import nn

import moe_route as mr
from moe_route.calls.call import Call
from moe_route.data import Question
from moe_route.data.batches import Text
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import Reach

ON = mr.Plan.force_on({0: [3]})


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("qwen3_moe", head=True)


@pytest.fixture
def routed(model: nn.Module) -> Iterator[mr.RoutedModel]:
    with mr.attach(model) as routed:
        yield routed


def padded(side: str) -> dict[str, torch.Tensor]:
    """Two texts of 6 and 4 tokens."""
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    return {"input_ids": tokens(2, 6), "attention_mask": mask}


def failing(model: nn.Module) -> None:
    model(input_ids=tokens(1, 6))
    raise KeyError("here")


def told(routed: mr.RoutedModel, plan: mr.Plan, run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with routed.steer(plan), torch.no_grad():
            run()
    assert all(issubclass(one.category, RuntimeWarning) and one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(
    ("conditions", "reached"),
    [
        ({}, True),
        ({"groups": "eng"}, True),
        ({"groups": "swh"}, False),
        ({"phase": "prefill"}, True),
        ({"phase": "decode"}, False),
        ({"positions": [5]}, True),
        ({"positions": [6]}, False),
        ({"positions": [5], "groups": "eng"}, True),
        ({"positions": [5], "groups": "deu"}, False),  # that text has four tokens
        ({"positions": [3], "groups": "deu"}, True),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_conditions_that_never_came_are_named(
    model: nn.Module, routed: mr.RoutedModel, conditions: dict[str, Any], reached: bool, side: str
) -> None:
    def run() -> None:
        with routed.labels(["eng", "deu"]):
            model(**padded(side))

    said = told(routed, ON.only(**conditions), run)
    assert len(said) == (not reached)
    if said:
        assert "force on 1 expert in layer 0" in said[0]
        assert all(str(value) in said[0] for value in conditions.values() if isinstance(value, str))
        assert ("groups eng, deu" in said[0]) == ("groups" in conditions)


def test_what_was_seen_is_in_the_warning(model: nn.Module, routed: mr.RoutedModel) -> None:
    (said,) = told(routed, ON.only(groups="swh"), lambda: model(input_ids=tokens(1, 6)))
    assert "no labels" in said
    (said,) = told(routed, ON.only(positions=range(20, 30)), lambda: model(input_ids=tokens(1, 6)))
    assert "positions 20-29" in said
    assert "at most 5" in said


@pytest.mark.parametrize(("position", "reached"), [(6, True), (2, False), (8, False)])
def test_decoded_tokens(position: int, reached: bool) -> None:
    plan = ON.only(phase="decode", positions=[position])
    reach, cpu = Reach(plan.rules), torch.device("cpu")
    for call in (Call(1, 6, 0, None, "prefill", cpu), *(Call(1, 1, past, None, "decode", cpu) for past in (6, 7))):
        reach.note(call, None)
    assert (reach.unreached == []) == reached
    if not reached:
        with pytest.warns(RuntimeWarning, match="prefill and decode"):
            reach.warn()


def test_drafts_and_captured_calls_count_as_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    reach = Reach(ON.only(phase="decode", positions=[8]).rules)
    reach.note(Call(1, 9, 0, None, "decode", cpu, prompt=8, drafted=1), None)
    assert reach.unreached == []
    reach = Reach(ON.only(positions=[100]).rules)
    monkeypatch.setattr("moe_route.steering.reach.capturing", lambda device: True)
    reach.note(Call(1, 1, 5, None, "decode", cpu), None)  # its replays are not seen
    assert reach.unreached == []


def test_labels_per_token_are_looked_at_by_token(model: nn.Module, routed: mr.RoutedModel) -> None:
    def run() -> None:
        with routed.labels([["a"] * 3 + ["b"] * 3]):
            model(input_ids=tokens(1, 6))

    assert told(routed, ON.only(groups="b", positions=[3]), run) == []
    assert len(told(routed, ON.only(groups="b", positions=[2]), run)) == 1


def test_only_the_rule_that_reached_nothing_is_named(model: nn.Module, routed: mr.RoutedModel) -> None:
    plan = ON.only(groups="eng") + mr.Plan.force_on({1: [2], 2: [2]}).only(groups="swh") + mr.Plan.forbid({2: [1]})

    def run() -> None:
        with routed.labels(["eng", "deu"]):
            model(input_ids=tokens(2, 6))
        with routed.labels(["deu", "deu"]):
            model(input_ids=tokens(2, 6))

    (said,) = told(routed, plan, run)
    assert "layers 1-2" in said
    (said,) = told(routed, plan + mr.Plan.forbid({0: [7]}).only(groups="swh"), run)
    assert said.startswith("2 rules")


def test_nothing_is_said_without_a_call_after_an_error_or_where_blocks_are_gathered(
    model: nn.Module, routed: mr.RoutedModel
) -> None:
    plan = ON.only(groups="swh")
    assert told(routed, plan, lambda: None) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="here"), routed.steer(plan), torch.no_grad():
            failing(model)
        reach = Reach(plan.rules)
        for group in ("eng", "deu", "swh"):
            with routed.steer(plan, reach=reach), routed.labels(group), torch.no_grad():
                model(input_ids=tokens(1, 6))
            assert reach.unreached == ([] if group == "swh" else list(plan.rules))
        reach.warn()


class TestTexts:
    """Losses and answers label their texts, so that a plan for one language steers that language."""

    @pytest.fixture
    def language_model(self) -> LanguageModel:
        return LanguageModel.load()

    texts = tuple(Text(group, "1", f"One and two are three. {group}") for group in ("eng_Latn", "deu_Latn"))
    questions = tuple(Question("1", group, "One plus two is", " 3") for group in ("eng_Latn", "deu_Latn"))

    def test_a_plan_for_one_language_changes_it_alone(self, language_model: LanguageModel) -> None:
        with language_model.attach() as routed:
            base = language_model.losses(self.texts)[:, 0], language_model.answers(self.questions).nats
            with routed.steer(ON.only(groups="deu_Latn")):
                now = language_model.losses(self.texts)[:, 0], language_model.answers(self.questions).nats
            changed = [(abs(a - b) > 1e-3).tolist() for a, b in zip(base, now, strict=True)]
            assert changed == [[False, True]] * 2
            with pytest.warns(RuntimeWarning, match="groups eng_Latn, deu_Latn"), routed.steer(ON.only(groups="swh")):
                language_model.answers(self.questions)

    def test_a_recording_has_their_languages(self, language_model: LanguageModel) -> None:
        with language_model.attach() as routed, routed.record(sequences=True) as recorder:
            for _ in range(2):  # the same texts again
                language_model.losses(self.texts)
        assert sorted(recorder.statistics().groups) == ["deu_Latn", "eng_Latn"]
        assert len(recorder.statistics().store) == 4

    def test_the_users_own_labels_stay(self, language_model: LanguageModel) -> None:
        with language_model.attach() as routed:
            with routed.record() as recorder, recorder.labels(["mine", "mine"]):
                language_model.losses(self.texts)
            steered = routed.steer(ON.only(groups="deu_Latn"))
            with routed.labels("mine"), pytest.warns(RuntimeWarning, match="groups mine"), steered:
                language_model.losses(self.texts)
        assert recorder.statistics().groups == ("mine",)

    def test_several_strengths_at_once_say_it_once(self, language_model: LanguageModel) -> None:
        plan = mr.Plan.activate({0: [3]}).only(positions=[500])
        with pytest.warns(RuntimeWarning) as caught:
            mr.experiments.strength_sweep(language_model, self.texts, plan, [1.0, 2.0], controls=1)
        said = [str(one.message) for one in caught if "reached no token" in str(one.message)]
        assert len(said) == 1
        assert "positions 0 to" in said[0]

    def test_a_sweep_refuses_layers_that_the_model_lacks(self, language_model: LanguageModel) -> None:
        with pytest.raises(mr.steering.PlanError, match="steers layer 20"):
            mr.experiments.strength_sweep(language_model, self.texts, mr.Plan.forbid({20: [1]}), [1.0], controls=1)

    def test_a_sweep_refuses_a_plan_for_groups_of_no_text(self, language_model: LanguageModel) -> None:
        plan = mr.Plan.activate({0: [3]}).only(groups=["eng_Latn", "deu_Latm"])
        with pytest.raises(mr.steering.PlanError, match=r'"deu_Latm".*"deu_Latn"'):
            mr.experiments.strength_sweep(language_model, self.texts, plan, [1.0, 2.0], controls=1)


def test_a_misspelt_group_beside_one_that_came_is_named(model: nn.Module, routed: mr.RoutedModel) -> None:
    def run() -> None:
        for group in ("eng", "deu"):
            with routed.labels(group):
                model(input_ids=tokens(1, 3))

    assert told(routed, ON.only(groups=["eng", "swh"]), run) == []
    (said,) = told(routed, ON.only(groups=["eng", "dou"]), run)
    assert '"dou"' in said
    assert '"deu"' in said

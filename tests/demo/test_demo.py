"""The demonstration: its numbers on known data, its words, and the whole of it on the demo model."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_route.analysis import Difference, RandomControl
from moe_route.data import demo_corpus, demo_problems
from moe_route.demo import DemoReport, demo
from moe_route.demo.language_experts import LanguageExpertsOff
from moe_route.demo.measurement import Losses, Scores, random_sets, sample_corpus, sample_task, shares_of
from moe_route.demo.task_experts import THRESHOLDS, TaskExperts, TaskExpertsOff, find_task_experts
from moe_route.demo.wording import WIDTH
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import ExpertSelection, Plan

LANGUAGES = ("eng_Latn", "deu_Latn", "jpn_Jpan")
EXPERTS = ExpertSelection({1: [0], 2: [3, 5], 5: [2], 7: [1, 4]}, num_experts=[16] * 8)


def scores(match: float, languages: int = 3, items: int = 40, seed: int = 0) -> Scores:
    """Random scores with this probability of an exact match."""
    rng = np.random.default_rng(seed)
    return Scores((rng.random((items, languages)) < match).astype(float), rng.exponential(1, (items, languages)))


def losses(change: np.ndarray | float = 0.0, languages: int = 3) -> Losses:
    """Losses of 20 sentences of 10 tokens each, changed by so many nats per token."""
    nats = np.random.default_rng(0).uniform(20, 30, (20, languages))
    return Losses(nats + 10 * np.asarray(change), np.full(nats.shape, 10.0))


def on_one_line(result: object) -> str:
    return " ".join(str(result).split())


class TestSamples:
    def test_every_subset_is_drawn_from_in_every_language(self):
        task = demo_problems().subset("english_only", "unseen")
        few, places = sample_task(task, 5)
        assert few.languages == task.languages
        assert len(places) == 10
        items = [question.item for question in few.questions]
        per_language = np.array(items).reshape(len(task.languages), 10)
        assert (per_language == per_language[0]).all()
        first = [question.item for question in task.questions[:240]]
        assert [first[place] for place in places] == list(per_language[0])
        assert {item.rpartition("-")[0] for item in per_language[0]} == {"english_only", "unseen"}
        assert sample_task(task, 1000)[0] == task

    def test_sentences(self):
        corpus, places = sample_corpus(demo_corpus(), 4)
        assert [demo_corpus().items[place] for place in places] == list(corpus.items)
        assert len(sample_corpus(demo_corpus(), 1000)[0]) == len(demo_corpus())


class TestRandomSets:
    def test_draws_tell_which_experts_they_share(self):
        plan = Plan.forbid(EXPERTS)
        plans, enumerated = random_sets(plan, 40)
        assert not enumerated
        assert plans == [plan.random(seed) for seed in range(40)]
        shares = shares_of(plans, EXPERTS)
        expected = [len(drawn.touching(EXPERTS)) / 6 for drawn in plans]
        np.testing.assert_allclose(shares, expected)
        assert 0 < (shares > 0).mean() < 1, "a draw may hold a tested expert"
        np.testing.assert_allclose(shares_of([plan], EXPERTS), 1)

    def test_all_sets_are_taken_where_they_are_few(self):
        plans, enumerated = random_sets(Plan.forbid(ExpertSelection({4: [7]}, num_experts=[16] * 8)), 99)
        assert enumerated
        assert len(plans) == 15
        assert random_sets(Plan.forbid(ExpertSelection({2: range(4)}, num_experts=[4] * 8)), 99) == ([], True)


class TestTaskExpertsOff:
    found = TaskExperts(EXPERTS, 0.3, dict.fromkeys(THRESHOLDS, 6), 128)

    def outcome(self, after: float, before: float = 0.8) -> TaskExpertsOff:
        subsets = ("english_only",) * 20 + ("unseen",) * 20
        text = losses()
        return TaskExpertsOff(self.found, LANGUAGES, subsets, scores(before), scores(after), text, text)

    def test_the_sentence_follows_the_interval(self):
        assert "lowers exact match" in self.outcome(0.2).sentence
        assert "raises exact match" in self.outcome(0.8, before=0.2).sentence
        assert "no more than these problems can show" in self.outcome(0.8).sentence

    def test_a_model_without_skill_has_nothing_to_lose(self):
        found = self.outcome(0.0, before=0.0)
        assert "little to lose" in found.sentence
        assert "little to lose" not in self.outcome(0.2).sentence

    def test_numbers_by_hand(self):
        found = self.outcome(0.2)
        assert found.change.value == pytest.approx(scores(0.2).correct.mean() - scores(0.8).correct.mean())
        assert found.text_change.value == 0
        by_language = [match.value for match, _, _ in found.by_language]
        assert np.mean(by_language) == pytest.approx(found.change.value)
        assert "no other experts" in on_one_line(found)

    @pytest.mark.parametrize(
        ("counts", "threshold"),
        [((6, 9, 20), 0.3), ((1, 9, 20), 0.2), ((0, 2, 4), 0.2), ((0, 0, 0), 0.1), ((1, 2, 5), 0.1)],
    )
    def test_the_threshold_is_the_largest_that_finds_five(self, monkeypatch, counts, threshold):
        """A single expert above the largest threshold is no set; where five are nowhere, one is enough."""
        sizes = dict(zip(THRESHOLDS, counts, strict=True))
        monkeypatch.setattr(
            "moe_route.demo.task_experts.task_experts",
            lambda *_, threshold, **__: ExpertSelection({0: range(sizes[threshold])} if sizes[threshold] else {}),
        )
        found = find_task_experts(SimpleNamespace(), SimpleNamespace(num_experts=[64]))
        assert found.threshold == threshold
        assert len(found.experts) == sizes[threshold]
        assert {t: len(one) for t, one in found.others.items()} == {
            t: n for t, n in sizes.items() if n and t != threshold
        }
        assert ("the largest threshold that finds 5" in " ".join(str(found).split())) is (len(found.experts) >= 5)

    def test_other_thresholds_stand_beside(self):
        fewer = (scores(0.4).change_of_match(scores(0.8)), losses().change(losses()))
        found = replace(self.outcome(0.2), others={0.2: fewer})
        assert "6 experts above 0.2 off" in str(found)
        assert found.to_dict()["other_thresholds"]["0.2"]["exact_match"]["value"] == pytest.approx(fewer[0].value)
        assert "At other thresholds" not in str(self.outcome(0.2))

    def test_sets_that_come_as_far_are_asked_what_they_cost_text(self):
        none = Difference(0.0, 0.0, 0.0)

        def found(matches: tuple[float, ...], texts: tuple[float, ...]) -> TaskExpertsOff:
            sets = {
                "exact match": RandomControl(-0.5, matches, none, enumerated=False),
                "text": RandomControl(0.02, texts, none, enumerated=False, larger=True),
            }
            return replace(self.outcome(0.2), sets=sets, sampled=(24, 12))

        costly = found((-0.6, -0.5, -0.1, 0.0), (0.1, 0.3, 0.0, 0.0))
        assert costly.as_selective == 0
        assert "2 of the 4 sets come as far" in costly._against_sets()
        assert "Of those, 0 cost general text as little" in costly._against_sets()
        assert "the least of those +0.100 (p = 0.200 for both)" in costly._against_sets()
        assert found((-0.6, -0.5, -0.1, 0.0), (0.1, 0.02, 0.0, 0.0)).as_selective == 1
        single = found((-0.5, 0.0), (0.1, 0.0))._against_sets()
        assert "1 of the 2 sets comes as far" in single
        assert "It costs general text +0.100, the task experts cost it +0.020" in single
        assert "Of those" not in found((-0.4, 0.0), (0.0, 0.0))._against_sets()

    def test_without_task_experts_there_is_nothing_to_switch_off(self):
        none = TaskExperts(ExpertSelection({}), 0.1, dict.fromkeys(THRESHOLDS, 0), 128)
        found = TaskExpertsOff(none, LANGUAGES, (), scores(0.5), scores(0.5), losses(), losses())
        assert found.sentence.startswith("No task expert")
        assert "table" not in found.to_dict()
        assert str(found).count("\n\n") == 1


class TestLanguageExpertsOff:
    def outcome(self, matrix: np.ndarray, random: np.ndarray | None = None) -> LanguageExpertsOff:
        one = ExpertSelection({0: [1]})
        return LanguageExpertsOff(
            dict.fromkeys(LANGUAGES, one), LANGUAGES, losses(), tuple(losses(row) for row in matrix), random
        )

    def test_matrix_and_who_is_hit(self):
        matrix = np.array([[0.5, 0.1, 0.0], [0.6, 0.2, 0.0], [0.0, 0.0, 0.3]])
        found = self.outcome(matrix, np.full((19, 3), 0.01))
        np.testing.assert_allclose(found.matrix, matrix)
        np.testing.assert_allclose(found.own, [0.5, 0.2, 0.3])
        assert found.hit_first == ["eng_Latn", "jpn_Jpan"]
        assert found.p_value == 1 / 20
        assert found.selectivity.value == pytest.approx(np.mean([0.5 - 0.05, 0.2 - 0.3, 0.3]))
        assert found.selectivity.verdict == "higher"
        assert "2 of 3 languages" in found.sentence

    def test_different_numbers_of_experts_are_told(self):
        found = self.outcome(np.eye(3))
        assert "the 1 expert of a language" in on_one_line(found)
        some = dict(found.experts) | {"jpn_Jpan": ExpertSelection({0: [1, 2], 3: [0]})}
        assert "the 1 to 3 experts of a language" in on_one_line(replace(found, experts=some))

    def test_what_hits_others_is_told_as_such(self):
        found = self.outcome(0.4 * (1 - np.eye(3)))
        assert found.selectivity.verdict == "lower"
        assert found.hit_first == []
        assert "more than its own" in found.sentence
        assert np.isnan(found.p_value)
        json.dumps(found.to_dict(), allow_nan=False)


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel.load()


@pytest.fixture(scope="module")
def made(language_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoReport, Path]:
    """The whole demonstration on a part of its texts: the report, and the folder with the pictures."""
    out = tmp_path_factory.mktemp("demo")
    languages = ["eng_Latn", "deu_Latn", "jpn_Jpan", "rus_Cyrl", "swh_Latn"]
    return demo(language_model, languages=languages, limit=6, draws=3, out=out), out


class TestDemo:
    def test_the_model_is_restored(self, made):
        assert made[0].restored

    def test_a_picture_for_each_finding_and_the_report(self, made):
        report, out = made
        names = {path.name for path in report.pictures}
        assert {path.name for path in out.iterdir()} == names | {"report.json", "report.txt"}
        assert [path.stem for path in report.pictures] == [name for name, _ in report.findings()]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.pictures)
        assert json.loads((out / "report.json").read_text())["restored"] is True

    def test_findings_come_in_order_and_begin_with_their_sentence(self, made):
        report, _ = made
        text = str(report)
        assert [name for name, _ in report.findings()] == [
            "task_experts_off",
            "language_experts_off",
        ]
        begins = [text.index(f"\n\n{number}. {finding.sentence[:20]}") for number, (_, finding) in numbered(report)]
        assert begins == sorted(begins)
        assert "equal bit for bit" in text.splitlines()[-1]

    def test_the_text_fits_and_names_languages(self, made):
        text = str(made[0])
        assert max(map(len, text.splitlines())) <= WIDTH
        assert "nan" not in text
        assert "Japanese" in text
        assert "jpn_Jpan" not in text

    def test_languages_without_problems_are_not_said_to_have_them(self, made):
        report, _ = made
        assert "6 sentences and 18 problems in 5 languages." in on_one_line(report)
        wider = replace(report, languages=(*report.languages, "kor_Hang"))
        assert "6 sentences in 6 languages, 18 problems in 5 of them." in on_one_line(wider)

    def test_json_holds_the_same(self, made):
        content = json.loads(json.dumps(made[0].to_dict(), allow_nan=False))
        for name, finding in made[0].findings():
            assert content[name]["sentence"] == finding.sentence
        off = content["task_experts_off"]
        sets = off["random_sets"]["exact match"]
        assert sets["p_value"] == sets["rank"] / (len(sets["random"]) + 1)
        assert len(off["shares_of_task_experts"]) == len(sets["random"])

    def test_experts_are_found_in_other_texts_than_they_are_measured_on(self, made):
        report, _ = made
        off = report.task_experts_off
        assert set(off.subsets) == {"english_only", "unseen"}
        assert len(off.text_before.nats) == report.sentences // 2

    def test_what_leaves_nothing_to_compare(self):
        with pytest.raises(ValueError, match="eng_Latn"):
            demo(languages=["deu_Latn", "jpn_Jpan"], limit=2)
        with pytest.raises(ValueError, match="two or more"):
            demo(languages=["eng_Latn", "deu_Latn"], limit=1)
        with pytest.raises(ValueError, match="draws"):
            demo(draws=0)


def numbered(report: DemoReport):
    return list(enumerate(report.findings(), 1))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_shallow_model_gives_no_finding_that_it_cannot_show(layers: int, tmp_path: Path):
    """Nothing is nan, nothing is warned of."""
    shallow = LanguageModel.load()
    shallow.model.model.layers = shallow.model.model.layers[:layers]
    shallow.model.config.num_hidden_layers = layers
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        report = demo(shallow, languages=["eng_Latn", "deu_Latn"], limit=2, draws=2, out=tmp_path)
    assert "nan" not in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_model_without_task_experts(language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("moe_route.demo.task_experts.THRESHOLDS", (0.99,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        report = demo(language_model, languages=["eng_Latn", "deu_Latn"], limit=2, out=tmp_path)
    assert report.task_experts_off.sentence.startswith("No task expert")
    assert {path.stem for path in report.pictures} == {"language_experts_off"}
    assert "nan" not in str(report)


def test_a_difference_is_told_with_its_interval():
    from moe_route.demo.wording import told

    assert told(Difference(-0.5, -0.6, -0.4)) == "-0.50 [-0.60, -0.40]"
    assert told(Difference(-0.5, float("nan"), float("nan"))) == "-0.50 (no interval)"

"""The demonstration: its numbers on known data, its words, and the whole of it on the demo model."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_route.analysis import Difference, Divergence, RandomControl
from moe_route.data import demo_corpus, demo_problems
from moe_route.demo import DemoReport, demo
from moe_route.demo.association import LOSS, SHARE, Association, associate
from moe_route.demo.depth import Depth, profile_of, untrained_model
from moe_route.demo.language_experts import LanguageExpertsOff
from moe_route.demo.measurement import Losses, Measurement, Scores, sample_corpus, sample_task
from moe_route.demo.raising import Raising, raising_plans
from moe_route.demo.random_sets import random_sets, shares_of
from moe_route.demo.skill import Share, Skill, shares_in_training
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
        assert "no other experts" in str(found)

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
        assert "the 1 expert of a language" in str(found)
        some = dict(found.experts) | {"jpn_Jpan": ExpertSelection({0: [1, 2], 3: [0]})}
        assert "the 1 to 3 experts of a language" in str(replace(found, experts=some))

    def test_what_hits_others_is_told_as_such(self):
        found = self.outcome(0.4 * (1 - np.eye(3)))
        assert found.selectivity.verdict == "lower"
        assert found.hit_first == []
        assert "more than its own" in found.sentence
        assert np.isnan(found.p_value)
        json.dumps(found.to_dict(), allow_nan=False)


class TestSkill:
    def test_share_is_wilson_s(self):
        share = Share.of(np.array([1.0] * 8 + [0.0] * 2))
        assert share == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-3)
        every = Share.of(np.ones(10))
        assert every.high == 1
        assert every.low < 0.8, "ten of ten do not prove certainty"

    def skill(self, english_only: float, unseen: float, languages: tuple[str, ...] = LANGUAGES) -> Skill:
        number = len(languages)
        parts = {"seen": 0.9, "english_only": english_only, "unseen": unseen}
        return Skill(languages, {k: scores(v, number, 100, seed) for seed, (k, v) in enumerate(parts.items())}, {})

    def test_transfer_leaves_english_out(self):
        found = self.skill(0.9, 0.3)
        columns = [1, 2]
        means = [found.scores[subset].correct[:, columns].mean() for subset in ("english_only", "unseen")]
        assert found.transfer(*found.others).value == pytest.approx(means[0] - means[1])
        assert "English transfers" in found.sentence
        assert "nothing transfers" in self.skill(0.3, 0.9).sentence
        assert "cannot be told from none" in self.skill(0.5, 0.5).sentence

    def test_english_alone(self):
        found = self.skill(0.5, 0.5, LANGUAGES[:1])
        assert "mean of the others" not in str(found)
        assert found.to_dict()["mean_transfer"] is None

    def test_shares_come_from_the_record_of_the_training(self, tmp_path: Path):
        assert shares_in_training(str(tmp_path)) == {}
        assert shares_in_training("someone/their-model") == {}
        (tmp_path / "training.json").write_text('{"seed": 1}', encoding="utf-8")
        assert shares_in_training(str(tmp_path)) == {}
        (tmp_path / "training.json").write_text('{"shares": {"deu_Latn": 0.25}}', encoding="utf-8")
        assert shares_in_training(str(tmp_path)) == {"deu_Latn": 0.25}
        for foreign in ("{", "[1]", '{"shares": [0.5]}', '{"shares": {"deu_Latn": null}}', '{"shares": {"gpu": 8}}'):
            (tmp_path / "training.json").write_text(foreign, encoding="utf-8")
            assert shares_in_training(str(tmp_path)) == {}, "other programs write files of this name, too"


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel.load()


class TestDepth:
    def test_untrained_is_the_same_configuration_and_the_same_every_time(self, language_model: LanguageModel):
        first, reason = untrained_model(language_model)
        second, _ = untrained_model(language_model)
        assert reason == ""
        shapes = [{k: v.shape for k, v in one.model.state_dict().items()} for one in (language_model, first, second)]
        assert shapes[0] == shapes[1]
        assert all((a == b).all() for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))

    def test_a_large_model_has_no_untrained_one_and_the_reason_is_told(
        self, language_model: LanguageModel, monkeypatch
    ):
        monkeypatch.setattr("moe_route.demo.depth.LARGEST", 1000)
        assert untrained_model(language_model)[0] is None
        with language_model.attach() as routed:
            statistics = Measurement(language_model, routed).record(demo_corpus().subset(LANGUAGES, 3), "text")
        found = Depth(profile_of(statistics), *untrained_model(language_model))
        assert "billion random weights" in str(found)
        assert found.beyond_untrained is None

    def test_the_interval_of_the_difference_is_paired(self, language_model: LanguageModel):
        """The same model beside itself: no difference, and no width."""
        with language_model.attach() as routed:
            profile = profile_of(Measurement(language_model, routed).record(demo_corpus().subset(LANGUAGES, 4), "text"))
        beyond = Depth(profile, profile).beyond_untrained
        assert (beyond.low, beyond.value, beyond.high) == (0, 0, 0)


class TestAssociation:
    languages = ("deu_Latn", "fra_Latn", "rus_Cyrl", "jpn_Jpan", "hin_Deva", "swh_Latn", "ind_Latn")

    def found(self, slope: float, number: int = 7, covariates: bool = True) -> Association | None:
        """Divergence of a layer that follows exact match, and of one that is noise."""
        rng = np.random.default_rng(1)
        names = self.languages[:number]
        match = np.linspace(0.2, 0.9, number)
        values = np.stack([0.5 + slope * match, rng.uniform(0.3, 0.4, number)], axis=1)
        pairs = values[:, None] + rng.normal(0, 0.01, (number, 6, 2))
        made = Divergence(values, names, "eng_Latn", ("0", "1"), pair_values=pairs, pairs=6, pairing="paired")

        class Recorded:
            groups = ("eng_Latn", *names)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moe_route.demo.association.divergence", lambda *_, **__: made)
            shares = dict(zip(names, match**2, strict=True)) if covariates else {}
            loss = dict(zip(names, rng.uniform(50, 60, number), strict=True))
            return associate(Recorded(), dict(zip(names, match, strict=True)), {SHARE: shares, LOSS: loss})

    def test_the_layer_is_corrected_for_and_the_mean_is_no_layer(self):
        found = self.found(-0.3)
        assert found.strongest == 0
        assert found.raw.layers == ("0", "1", "mean")
        assert found.raw.pearson[0] == pytest.approx(-1)
        assert (found.raw.p_corrected >= found.raw.p_value).all()
        assert "answer better" in found.sentence

    def test_confounders_are_told(self):
        found = self.found(-0.3)
        assert list(found.partial) == [(SHARE,), (LOSS,), (SHARE, LOSS)]
        assert found.explained_by(SHARE) > 0.9
        assert "given" in str(found)
        assert list(self.found(-0.3, covariates=False).partial) == [(LOSS,)]
        json.dumps(found.to_dict(), allow_nan=False)

    def test_a_covariate_that_leaves_the_other_sign_explains_it_all(self):
        found = self.found(-0.3)
        (held, given), sign = list(found.partial.items())[-1], np.array([-0.9, 0.1, -0.5])
        clear = np.array([0.01, 0.9, 0.5])

        def told(pearson: np.ndarray) -> str:
            changed = replace(given, pearson=pearson, p_corrected=clear)
            return replace(found, partial={**found.partial, held: changed}).sentence

        assert "also given" in told(sign)
        assert "no layer is clear once" in told(-sign), "a clear correlation of the other sign is another finding"

    def test_every_largest_set_of_covariates_must_leave_it(self):
        found = self.found(-0.3)
        clear = replace(found.raw, p_corrected=np.full(3, 0.01))
        gone = replace(found.raw, p_corrected=np.full(3, 0.9))
        told = replace(found, partial={(SHARE,): gone, (LOSS,): clear}).sentence
        assert f"no layer is clear once the {SHARE} is held constant" in told
        assert "also given" in replace(found, partial={(SHARE,): clear, (LOSS,): clear}).sentence

    def test_divergence_without_values_is_no_correlation(self):
        found = self.found(float("nan"))
        assert found.raw is not None, "the other layer has values"
        names = self.languages
        flat = Divergence(np.full((7, 2), np.nan), names, "eng_Latn", ("0", "1"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moe_route.demo.association.divergence", lambda *_, **__: flat)
            match = dict(zip(names, np.linspace(0.1, 0.7, 7), strict=True))
            none = associate(SimpleNamespace(groups=("eng_Latn", *names)), match, {})
        assert none.raw is None
        assert "undefined" in str(none)
        json.dumps(none.to_dict(), allow_nan=False)

    def test_few_languages_say_nothing(self):
        found = self.found(-0.3, number=3)
        assert found.raw is None
        assert "too few" in found.sentence


class TestRaising:
    def test_plans_and_their_controls(self):
        found = raising_plans(EXPERTS, 8, 1)
        assert list(found) == ["+0.5", "+1", "forced on", "+0.5, layers 2-5", "+0.5, other layers", "-0.5"]
        assert found["+0.5"] == Plan.activate(EXPERTS, strength=0.5)
        assert found["+0.5, layers 2-5"] == Plan.activate(EXPERTS.restrict(range(2, 6)), strength=0.5)
        assert found["-0.5"] == Plan.deactivate(EXPERTS, strength=0.5)
        inside = raising_plans(ExpertSelection({3: [1]}, num_experts=[16] * 8), 8, 2)
        assert list(inside) == ["+0.5", "+1", "forced on", "-0.5"]
        assert raising_plans(ExpertSelection({}), 8, 2) == {}

    def test_the_sentence_follows_the_interval(self):
        def raised(after: float) -> str:
            return Raising(EXPERTS, LANGUAGES, scores(0.5), {"+0.5": scores(after)}).sentence

        assert "raises exact match" in raised(0.9)
        assert "lowers exact match" in raised(0.1)
        assert "no more than" in raised(0.5)
        assert Raising(ExpertSelection({}), LANGUAGES, scores(0.5)).sentence == "There is no task expert to raise."


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
            "skill",
            "depth",
            "association",
            "raising",
        ]
        begins = [text.index(f"\n\n{number}. {found.sentence[:20]}") for number, (_, found) in numbered(report)]
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
        assert "6 sentences and 18 problems in 5 languages." in str(report)
        wider = replace(report, languages=(*report.languages, "kor_Hang"))
        assert "6 sentences in 6 languages, 18 problems in 5 of them." in str(wider)

    def test_json_holds_the_same(self, made):
        content = json.loads(json.dumps(made[0].to_dict(), allow_nan=False))
        for name, found in made[0].findings():
            assert content[name]["sentence"] == found.sentence
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
    """Where no layer lies outside the middle, nothing is said of a U; nothing is nan, nothing is warned of."""
    shallow = LanguageModel.load()
    shallow.model.model.layers = shallow.model.model.layers[:layers]
    shallow.model.config.num_hidden_layers = layers
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        report = demo(shallow, languages=["eng_Latn", "deu_Latn"], limit=2, draws=2, out=tmp_path)
    assert "nan" not in str(report)
    assert ("too few layers" in report.depth.sentence) is (layers < 3)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_model_without_task_experts(language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("moe_route.demo.task_experts.THRESHOLDS", (0.99,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        report = demo(language_model, languages=["eng_Latn", "deu_Latn"], limit=2, out=tmp_path)
    assert report.task_experts_off.sentence.startswith("No task expert")
    assert not report.raising.after
    assert {path.stem for path in report.pictures} == {"language_experts_off", "skill", "depth"}
    assert "nan" not in str(report)


def test_a_difference_is_told_with_its_interval():
    from moe_route.demo.wording import told

    assert told(Difference(-0.5, -0.6, -0.4)) == "-0.50 [-0.60, -0.40]"
    assert told(Difference(-0.5, float("nan"), float("nan"))) == "-0.50 (no interval)"

"""The demonstration: its numbers on known data, its words, and the whole of it on the demo model."""

from __future__ import annotations

import hashlib
import io
import json
import re
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import moe_route
from moe_route.analysis import Difference, RandomControl
from moe_route.data import demo_controls, demo_corpus, demo_findings, demo_model_folder, demo_numbers, demo_problems
from moe_route.demo import DemoReport, demo
from moe_route.demo.circle import DemoTexts
from moe_route.demo.language_experts import LanguageExpertsOff
from moe_route.demo.measurement import Losses, Reading, Scores, random_sets, sample_corpus, sample_task, shares_of
from moe_route.demo.report import YOURS
from moe_route.demo.task_experts import OTHER_HALF, TaskExperts, TaskExpertsOff, find_task_experts
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


def reading(
    sums: float, copying: float = 0.9, counting: float = 0.9, text: float = 0.0, numbers: float = 0.0, seed: int = 0
) -> Reading:
    """40 sums, 24 copies, 24 counts with these probabilities of an exact match, and texts changed by so many nats."""
    levels = {"sums": (sums, 40), "copying": (copying, 24), "counting": (counting, 24)}
    tasks = {name: scores(match, items=items, seed=seed) for name, (match, items) in levels.items()}
    return Reading(tasks, {"text": losses(text), "numbers": losses(numbers, languages=1)})


class TestFindTaskExperts:
    def of(self, difference: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> TaskExperts:
        monkeypatch.setattr("moe_route.demo.task_experts.expert_difference", lambda *_, **__: difference)
        return find_task_experts(
            SimpleNamespace(), SimpleNamespace(num_experts=[difference.shape[1]] * len(difference))
        )

    @pytest.mark.parametrize(("layers", "number"), [(8, 13), (1, 2), (48, 77)])
    def test_their_number_is_a_tenth_whatever_the_differences(self, layers, number, monkeypatch):
        difference = np.random.default_rng(0).uniform(0.001, 0.002, (layers, 16))
        found = self.of(difference, monkeypatch)
        assert len(found.experts) == number
        chosen = [difference[layer, expert] for layer, ids in found.experts.items() for expert in ids]
        assert sorted(chosen) == sorted(np.sort(difference.ravel())[-number:])
        assert found.threshold == min(chosen)
        assert found.others == {}

    def test_an_expert_that_the_task_does_not_choose_more_is_none_of_its(self, monkeypatch):
        difference = np.full((2, 16), -0.1)
        assert not self.of(difference, monkeypatch).experts
        assert json.loads(json.dumps(self.of(difference, monkeypatch).to_dict()))["threshold"] is None
        difference[1, 3], difference[0] = 0.25, np.nan
        found = self.of(difference, monkeypatch)
        assert dict(found.experts) == {1: (3,)}
        assert {threshold: len(one) for threshold, one in found.others.items()} == {0.2: 1, 0.1: 1}


class TestTaskExpertsOff:
    experts = TaskExperts(EXPERTS, 0.2, 128)
    copying = TaskExperts(ExpertSelection({1: [0, 3]}, num_experts=[16] * 8), 0.2, 128)

    def outcome(self, after: Reading, before: Reading | None = None, copying: Reading | None = None) -> TaskExpertsOff:
        before = before or reading(0.8)
        gone = copying or reading(0.8, copying=0.1)
        gone = Reading({**gone.tasks, "copying": gone.tasks["copying"].of(OTHER_HALF)}, gone.texts)
        subsets = ("english_only",) * 20 + ("unseen",) * 20
        return TaskExpertsOff(self.experts, LANGUAGES, subsets, before, after, self.copying, gone)

    def test_the_sentence_follows_the_interval(self):
        assert "lowers the exact match" in self.outcome(reading(0.2)).sentence
        assert "raises the exact match" in self.outcome(reading(0.8), reading(0.2)).sentence
        same = self.outcome(reading(0.8))
        assert "no more than these problems can show" in same.sentence
        assert same.title == "Unclear"
        assert self.outcome(reading(0.8), reading(0.2)).title == "No sums lost"

    def test_a_model_without_skill_has_nothing_to_lose(self):
        assert "little to lose." in self.outcome(reading(0.0), reading(0.0)).sentence
        assert "little to lose" not in self.outcome(reading(0.2)).sentence

    def test_numbers_by_hand(self):
        found = self.outcome(reading(0.2, text=0.05))
        assert found.changes["sums"].value == pytest.approx(scores(0.2).correct.mean() - scores(0.8).correct.mean())
        assert found.changes["text"].value == pytest.approx(0.05)
        assert found.changes["copying"].value == 0
        by_language = [one.value for one in found.by_language["sums"]]
        assert np.mean(by_language) == pytest.approx(found.changes["sums"].value)
        assert "no other experts" in str(found)

    def test_a_double_dissociation_needs_both_sides(self):
        found = self.outcome(reading(0.2))
        assert (found.title, found.selective, found.double) == ("Sums", True, True)
        assert "a double dissociation" in str(found)
        assert "(1 shared)" in str(found)
        for copying in (reading(0.2, copying=0.1), reading(0.8, copying=0.9)):
            one_sided = self.outcome(reading(0.2), copying=copying)
            assert (one_sided.selective, one_sided.double) == (True, False)
            assert "no double dissociation" in str(one_sided)

    def test_copying_that_falls_too_makes_them_experts_of_number_tasks(self):
        found = self.outcome(reading(0.2, copying=0.5))
        assert (found.title, found.selective, found.double) == ("Number tasks", False, False)
        assert "experts of number tasks" in found.sentence
        assert found.also_lost == ["copying"]
        assert self.outcome(reading(0.2, counting=0.3)).also_lost == ["counting"]

    def test_what_the_model_cannot_do_is_no_control(self):
        found = self.outcome(reading(0.2, copying=0.05), reading(0.8, copying=0.05))
        assert (found.title, found.unable, found.selective) == ("Sums or digits", ["copying"], False)
        assert "not told from digits" in found.sentence
        assert "not told from digits" in str(found)
        assert "double" not in str(found)

    def test_random_sets_as_selective_take_the_claim_away(self):
        none = Difference(0.0, 0.0, 0.0)

        def found(matches: tuple[float, ...], texts: tuple[float, ...]) -> TaskExpertsOff:
            sets = {
                "exact match": RandomControl(-0.6, matches, none, enumerated=False),
                "text": RandomControl(0.02, texts, none, enumerated=False, larger=True),
            }
            sampled = {"sums": np.arange(40), "text": np.arange(20)}
            return replace(self.outcome(reading(0.2)), sets=sets, shares=np.zeros(len(matches)), sampled=sampled)

        costly = found((-0.7, -0.6, -0.1, 0.0), (0.1, 0.3, 0.0, 0.0))
        assert (costly.as_selective, costly.selective) == (0, True)
        assert "2 as far" in str(costly)
        assert "2 as far, 0 as kind" in str(costly)
        alike = found((-0.7, -0.6, -0.1, 0.0), (0.1, 0.02, 0.0, 0.0))
        assert (alike.as_selective, alike.title, alike.selective) == (1, "As random sets", False)
        assert "none as far" in str(found((-0.4, 0.0), (0.0, 0.0)))
        few = found((-0.7,) + (0.0,) * 98, (0.0,) * 99)
        assert (few.as_selective, few.selective) == (1, True), "2 in 100 are fewer than one in twenty"

    def test_a_line_a_language_with_a_bar(self):
        found = self.outcome(reading(0.2))
        rows = {line.split()[0]: line for line in str(found).splitlines()}
        level = [scores(match).correct[:, 1].mean() for match in (0.8, 0.2)]
        row = rows["German"]
        assert row.split()[1] == f"{level[0]:.2f}"
        assert f" {level[1]:.2f}   0." in row
        assert (row.count("█"), row.count("█") + row.count("░")) == (round(30 * level[1]), round(30 * level[0]))

    def test_without_task_experts_there_is_nothing_to_switch_off(self):
        none = TaskExperts(ExpertSelection({}), float("nan"), 128)
        one = reading(0.5)
        found = TaskExpertsOff(none, LANGUAGES, (), one, one, none, one)
        assert found.sentence.startswith("No task expert")
        assert set(found.to_dict()) == {"sentence", "task_experts"}
        assert str(found) == found.sentence


class TestLanguageExpertsOff:
    def outcome(self, matrix: np.ndarray, random: np.ndarray | None = None) -> LanguageExpertsOff:
        one, sampled = ExpertSelection({0: [1]}), np.arange(0, 20, 2)
        after = tuple(losses(row) for row in matrix)
        return LanguageExpertsOff(dict.fromkeys(LANGUAGES, one), LANGUAGES, losses(), after, sampled, random)

    def test_matrix_and_who_is_hit(self):
        matrix = np.array([[0.5, 0.1, 0.0], [0.6, 0.2, 0.0], [0.0, 0.0, -0.3]])
        found = self.outcome(matrix, np.full((19, 3), 0.01))
        np.testing.assert_allclose(found.matrix, matrix)
        np.testing.assert_allclose(found.own, [0.5, 0.2, -0.3])
        np.testing.assert_allclose(found.own_sampled, found.own)
        assert found.hurt == ["eng_Latn", "deu_Latn"]
        assert found.hit_first == ["eng_Latn"]
        assert found.p_value == 1 / 20
        assert found.selectivity.value == pytest.approx(np.mean([0.5 - 0.05, 0.2 - 0.3, -0.3]))
        assert "1 of 3 languages" in found.sentence
        first, *rows = str(found).splitlines()
        assert "2 of 3" in first
        assert [row.split()[0] for row in rows] == ["English", "German", "Japanese"]
        assert "also English +0.60" in rows[1]
        assert rows[1].startswith("German    +0.20 ")
        assert "also" not in rows[0]
        assert "random +0.01" in rows[0]
        assert rows[0].count("█") == 30
        assert rows[1].count("█") == 12

    def test_random_sets_are_compared_on_the_same_sentences(self):
        sentences = np.repeat([0.1, 0.7], 10)[:, None]  # the sampled half loses less than the whole
        found = self.outcome([sentences * np.eye(3)[i] for i in range(3)], np.full((19, 3), 0.3))
        found = replace(found, sampled=np.arange(10))
        np.testing.assert_allclose(found.own, 0.4)
        np.testing.assert_allclose(found.own_sampled, 0.1)
        assert found.p_value == 1

    def test_many_languages_are_cut(self):
        names = tuple(f"x{i:02d}_Latn" for i in range(14))
        after = tuple(losses(0.1 * np.eye(14)[i], languages=14) for i in range(14))
        experts = dict.fromkeys(names, ExpertSelection({0: [1]}))
        found = LanguageExpertsOff(experts, names, losses(languages=14), after, np.arange(3), None)
        lines = str(found).splitlines()
        assert len(lines) == 11
        assert "5 more" in lines[-1]

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

    def test_the_report_is_written(self, made):
        report, out = made
        assert {"report.json", "report.txt"} <= {path.name for path in out.iterdir()}
        assert json.loads((out / "report.json").read_text())["restored"] is True
        assert (out / "report.txt").read_text(encoding="utf-8") == f"{report}\n"

    def test_findings_come_in_order(self, made):
        report, _ = made
        text = str(report)
        assert [name for name, _ in report.findings()] == ["published_u", "task_experts_off", "language_experts_off"]
        begins = [f"\n\n{text}".index(f"\n\n{number}. {str(one)[:20]}") for number, (_, one) in numbered(report)]
        assert begins == sorted(begins)

    def test_the_text_fits_and_names_languages(self, made, monkeypatch):
        for columns in (200, 100, 80):
            monkeypatch.setenv("COLUMNS", str(columns))
            text = str(made[0])
            assert max(map(len, text.splitlines())) <= WIDTH
            prose = text.replace(YOURS, "")
            assert max(map(len, prose.splitlines())) <= columns, "lines of code are not broken"
        assert "nan" not in text
        assert "Japanese" in text
        assert "jpn_Jpan" not in text

    def test_ten_languages_are_45_lines(self, made):
        """Each language more is a line in two findings."""
        lines = str(replace(made[0], page=Path("demo/index.html"), seconds=45.0)).splitlines()
        assert "equal bit for bit" in lines[-1]
        assert lines[-1].endswith("demo/index.html")
        assert len(lines) + 2 * (10 - len(made[0].languages)) <= 45

    def test_ascii_where_the_output_has_no_blocks(self, made, monkeypatch):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert str(made[0]).isascii()
        assert "#" in str(made[0])

    def test_languages_without_problems_are_told(self, made):
        report, _ = made
        assert "5 of" not in str(report)
        wider = replace(report, languages=(*report.languages, "kor_Hang"))
        assert "5 of 6 languages" in str(wider)

    def test_what_is_not_measured_here_is_read_from_what_ships(self, made, monkeypatch):
        report, _ = made
        for one in demo_findings()["claims"]:
            assert f"{one['claim']} ({one['value']:+.2f})" in " ".join(str(report).split())
            assert one["shown"] is False or one["verdict"] == "higher"
        claims = [{"claim": "a U", "shown": True, "value": 0.3}, {"claim": "gain", "shown": False, "value": 0.0}]
        monkeypatch.setattr("moe_route.demo.report.demo_findings", lambda: {"claims": claims})
        assert "Shown at this size: a U (+0.30). Not shown at this size: gain (+0.00)" in " ".join(str(report).split())
        other = str(replace(report, model="theirs"))
        assert "Not measured here" in other
        assert "at this size" not in other

    def test_what_ships_is_of_the_weights_that_ship(self):
        """Whoever trains the model anew runs the command."""
        weights = hashlib.sha256((demo_model_folder() / "model.safetensors").read_bytes()).hexdigest()
        assert demo_findings()["weights"] == weights, demo_findings()["command"]

    def test_the_lines_for_other_models_run(self, language_model):
        tokens = language_model.tokenizer("5 plus 24 is", return_tensors="pt")
        names = {"mr": moe_route, "model": language_model.model, "tokenizer": language_model.tokenizer}
        with moe_route.attach(language_model.model) as routed:
            exec(textwrap.dedent(YOURS), names | {"routed": routed, "prompt": {**tokens, "max_new_tokens": 1}}, names)
        assert len(names["experts"])

    def test_json_holds_the_same(self, made):
        content = json.loads(json.dumps(made[0].to_dict(), allow_nan=False))
        for name, finding in made[0].findings():
            assert content[name]["sentence"] == finding.sentence
        off = content["task_experts_off"]
        sets = off["random_sets"]["exact match"]
        assert sets["p_value"] == sets["rank"] / (len(sets["random"]) + 1)
        assert len(off["shares_of_task_experts"]) == len(sets["random"])
        assert set(off["other_tasks"]["before"]) == {"copying", "counting"}

    def test_experts_are_found_in_other_texts_than_they_are_measured_on(self, made):
        report, _ = made
        off = report.task_experts_off
        assert set(off.subsets) == {"english_only", "unseen"}
        assert len(off.before.texts["text"].nats) == report.sentences // 2
        study = DemoTexts.read(None, None, None)
        assert not set(study.contrast["eng_Latn"]) & set(study.texts["numbers"]["eng_Latn"])
        assert len(off.copying_after.tasks["copying"].correct) == len(off.before.tasks["copying"].correct) // 2

    def test_what_leaves_nothing_to_compare(self):
        with pytest.raises(ValueError, match="eng_Latn"):
            demo(languages=["deu_Latn", "jpn_Jpan"], limit=2)
        with pytest.raises(ValueError, match="two or more"):
            demo(languages=["eng_Latn", "deu_Latn"], limit=1)
        with pytest.raises(ValueError, match="draws"):
            demo(draws=0)


def test_the_sentences_with_numbers_are_varied():
    sentences = demo_numbers()["eng_Latn"]
    numbers = [int(one) for sentence in sentences for one in re.findall(r"\d+", sentence)]
    assert len(set(sentences)) == 150
    assert all(re.search(r"\d", sentence) for sentence in sentences)
    assert max(numbers) < 100
    assert len(set(numbers)) > 60
    assert len({sentence.split()[0] for sentence in sentences}) > 40, "no templates"
    asked = {question.prompt for question in (*demo_problems().questions, *demo_controls().questions)}
    assert not asked & set(sentences)


def test_colors_are_for_terminals_alone(monkeypatch):
    from moe_route.cli.report import _painted

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = "2. Sums.\nEnglish ██░░"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert _painted(text) == text
    monkeypatch.setattr("sys.stdout", Terminal())
    assert _painted(text) == "\033[1m2. Sums.\033[0m\nEnglish ██\033[31m░░\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert _painted(text) == text


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
    monkeypatch.setattr("moe_route.demo.task_experts.expert_difference", lambda *_, **__: np.zeros((8, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        report = demo(language_model, languages=["eng_Latn", "deu_Latn"], limit=2, draws=2, out=tmp_path)
    assert report.task_experts_off.sentence.startswith("No task expert")
    assert "nan" not in str(report)


def test_a_difference_is_told_with_its_interval():
    from moe_route.demo.wording import told

    assert told(Difference(-0.5, -0.6, -0.4)) == "-0.50 [-0.60, -0.40]"
    assert told(Difference(-0.5, float("nan"), float("nan"))) == "-0.50 (no interval)"

"""The scripts that make the demonstration model: problems, documents, training, gates and choice."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from moe_route.analysis.stats import pearson, ranks
from moe_route.data import demo_controls, demo_problems
from moe_route.data.batches import Text
from moe_route.runs.language_model import LanguageModel

pytest.importorskip("transformers", reason="the demonstration model needs transformers")
pytest.importorskip("tokenizers", reason="its tokenizer needs tokenizers")

SCRIPTS = Path(__file__).parents[2] / "examples" / "demo_model"
if not SCRIPTS.is_dir():
    pytest.skip("examples/demo_model is not here (a source checkout has it)", allow_module_level=True)


def script(name: str) -> ModuleType:
    """A module of that folder, whose scripts import each other by their bare names."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


problems, controls, text, train, tables, measures, judge, choose = map(
    script, ("problems", "controls", "text", "train", "tables", "measures", "judge", "choose")
)
OTHERS = measures.OTHERS


class TestProblems:
    @pytest.mark.parametrize("language", problems.LANGUAGES)
    def test_templates_of_every_language_ask_for_both_numbers(self, language):
        for operation in problems.OPERATIONS:
            templates = problems.TEMPLATES[language][operation]
            assert len(templates) == len(problems.TEMPLATES["eng_Latn"][operation])
            assert len(set(templates)) == len(templates)
            for template in templates:
                assert sorted(re.findall(r"\{.*?\}", template)) == ["{a}", "{b}"]

    def test_answers_are_right(self):
        for operation, expected in (("add", 31), ("sub", 13), ("cmp", 22)):
            for swap in (False, True):
                problem = problems.Problem(operation, 1, 22, 9, swap)
                assert problem.answer == expected
                for language in problems.LANGUAGES:
                    assert {int(n) for n in re.findall(r"\d+", problem.text(language))} == {22, 9}

    def test_swapping_turns_the_numbers_round_except_in_a_difference(self):
        for operation, turned in (("add", True), ("sub", False), ("cmp", True)):
            plain, swapped = (problems.Problem(operation, 0, 22, 9, swap).text("eng_Latn") for swap in (False, True))
            assert (plain != swapped) == turned

    def test_subsets_are_disjoint(self):
        found = [set(problems.pairs(subset)) for subset in problems.SUBSETS]
        assert all(found)
        assert not any(a & b for i, a in enumerate(found) for b in found[:i])

    @pytest.mark.parametrize("order", range(len(problems.ORDERS)))
    def test_subsets_are_what_their_names_say(self, order):
        seen = {language: set(problems.pairs(share=share)) for language, share in problems.shares(order).items()}
        assert set(problems.pairs("seen")) == set.intersection(*seen.values())
        others = set.union(*(found for language, found in seen.items() if language != "eng_Latn"))
        assert set(problems.pairs("english_only")) == seen["eng_Latn"] - others
        assert not set(problems.pairs("unseen")) & (seen["eng_Latn"] | others)

    @pytest.mark.parametrize("order", range(len(problems.ORDERS)))
    def test_shares_are_nested(self, order):
        found = problems.shares(order)
        assert sorted(found) == sorted(problems.LANGUAGES)
        sets = [set(problems.pairs(share=share)) for share in sorted(found.values())]
        assert all(small < large for small, large in itertools.pairwise(sets))

    def test_orders_say_nothing_about_size_script_or_each_other(self):
        size = np.arange(len(OTHERS), 0, -1.0)  # LANGUAGES go from the most to the least text
        latin = np.array([language.endswith("_Latn") for language in OTHERS], float)
        share = [np.array([problems.shares(order)[language] for language in OTHERS]) for order in (0, 1)]
        for one, other in ((share[0], size), (share[1], size), (share[0], latin), (share[1], latin), tuple(share)):
            assert abs(float(pearson(ranks(one), ranks(other)))) < 0.1

    def test_the_task_has_as_many_different_problems_of_each_subset(self):
        made = list(problems.task_set(40, seed=1))
        assert [subset for _, subset, _ in made] == [s for s in problems.SUBSETS for _ in range(40)]
        for language in problems.LANGUAGES:
            assert len({problem.text(language) for _, _, problem in made}) == len(made)
        for _, subset, problem in made:
            assert (problem.larger, problem.smaller) in problems.pairs(subset)


NOUNS = ("tree", "house", "river", "window", "letter", "garden", "bridge", "engine", "teacher", "doctor")


@pytest.fixture(scope="module")
def tatoeba(tmp_path_factory) -> Path:
    """A folder like that of the Tatoeba Challenge, with words that are marked with their language."""
    folder = tmp_path_factory.mktemp("tatoeba")
    for code in text.TATOEBA.values():
        rows = []
        for number in range(360):
            words = [NOUNS[number % 10], NOUNS[number // 10 % 10], NOUNS[number // 100]]
            rows.append((f"The {words[0]} is near the {words[1]} {words[2]}.", " ".join(f"{code}{w}" for w in words)))
        rows += [(f"A short {noun}.", f"{code}short") for noun in NOUNS * 2]  # one sentence for many English ones
        content = "\n".join("\t".join(row) for row in rows)
        (folder / f"eng-{code}.tsv").write_text(content + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(tatoeba):
    return text.read(tatoeba, ["The tree is near the house tree."])


@pytest.fixture(scope="module")
def tokenizer(corpus):
    sentences = sorted({sentence for found in corpus[0].values() for pair in found for sentence in pair})
    return text.train_tokenizer(sentences, 700)


@pytest.fixture(scope="module")
def documents(tokenizer, corpus):
    return text.Documents(tokenizer, corpus[0], 0, 60, seed=0)


class TestDocuments:
    def test_no_held_out_sentence_is_in_training(self, corpus):
        training, held = (
            {sentence for found in part.values() for pair in found for sentence in pair} for part in corpus
        )
        assert training
        assert held
        assert not training & held

    def test_left_out_sentences_are_nowhere(self, corpus):
        assert not any(
            "The tree is near the house tree." in pair for part in corpus for found in part.values() for pair in found
        )

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(SystemExit, match=r"eng-rus\.tsv is missing"):
            text.read(tmp_path, [])

    def test_numbers_below_100_are_one_token_wherever_they_stand(self, tokenizer):
        numbers = [tokenizer.token_to_id(str(number)) for number in range(100)]
        for language in problems.LANGUAGES:
            problem = problems.Problem("add", 0, 47, 8)
            ids = tokenizer.encode(f"{problem.text(language)}{problems.separator(language)}{problem.answer}").ids
            assert [i for i in ids if i in numbers] == [numbers[n] for n in (47, 8, 55)]

    def test_documents_are_framed_and_answers_weigh_more(self, documents, tokenizer):
        kinds = set()
        for _ in range(400):
            before = documents.count.copy()
            ids, weights = documents.draw()
            (kind,) = documents.count - before
            kinds.add(kind.split(" ")[0])
            assert (ids[0], ids[-1]) == (documents.bos, documents.eos)
            assert len(ids) == len(weights) <= text.WINDOW
            heavy = [place for place, weight in enumerate(weights) if weight == text.ANSWER_WEIGHT]
            assert weights[0] == 0
            assert set(weights[1:]) <= {1.0, text.ANSWER_WEIGHT}
            name, _, language = kind.partition(" ")
            if name in ("task", "copy", "count"):
                *numbers, answer = [int(n) for n in re.findall(r"\d+", tokenizer.decode(ids))]
                if name == "task":
                    assert (max(numbers), min(numbers)) in problems.pairs(share=problems.shares(0)[language])
                    assert answer in (sum(numbers), abs(numbers[0] - numbers[1]), max(numbers))
                else:
                    assert answer == numbers[-1] + (name == "count")
                assert heavy == [len(ids) - 2]
                assert ids[-2] == tokenizer.token_to_id(str(answer))
            else:
                assert not heavy
        assert kinds == set(text.KINDS)

    def test_translations_have_the_tag_of_their_target(self, documents, tokenizer, corpus):
        known = {language: set(found) for language, found in corpus[0].items()}
        tags = {documents.tags[language]: language for language in problems.LANGUAGES}
        directions = set()
        for _ in range(300):
            ids, _ = documents.draw()
            places = [place for place, one in enumerate(ids) if one in tags]
            if places:
                target = tags[ids[places[0]]]
                source, goal = tokenizer.decode(ids[: places[0]]), tokenizer.decode(ids[places[0] + 1 :])
                if target == "eng_Latn":
                    assert any((goal, source) in found for found in known.values())
                else:
                    assert (source, goal) in known[target]
                directions.add(target == "eng_Latn")
        assert directions == {True, False}

    def test_windows_hold_whole_documents(self, documents, tokenizer):
        ids, weights, parts = text.Windows(documents, tokenizer.token_to_id(text.PAD)).batch(4)
        assert ids.shape == weights.shape == parts.shape == (4, text.WINDOW)
        for row, part in zip(ids, parts, strict=True):
            for number in range(1, int(part.max()) + 1):
                own = row[part == number].tolist()
                assert (own[0], own[-1]) == (documents.bos, documents.eos)
                assert own.count(documents.bos) == 1
        assert not weights[parts == 0].any()


class TestControls:
    @pytest.mark.parametrize("language", problems.LANGUAGES)
    def test_templates_of_every_language_show_the_number(self, language):
        for kind, fields in (("copy", ["{a}"]), ("count", ["{a}", "{b}", "{c}"])):
            templates = controls.TEMPLATES[language][kind]
            assert len(set(templates)) == len(templates) == len(controls.TEMPLATES["eng_Latn"][kind])
            assert all(re.findall(r"\{.*?\}", template) == fields for template in templates)

    def test_answers_are_right(self):
        assert controls.Control("copy", 0, 47).answer == 47
        assert controls.Control("count", 0, 12).answer == 15
        assert "12, 13, 14" in controls.Control("count", 0, 12).text("swh_Latn")

    def test_training_draws_none_that_is_held_out(self, documents):
        for kind in controls.KINDS:
            everything = list(controls.controls(kind))
            held = [one for one in everything if one.held_out]
            assert 0.15 < len(held) / len(everything) < 0.25
            assert set(documents.controls[kind]) == set(everything) - set(held)

    def test_the_shipped_ones_are_held_out(self):
        task = demo_controls()
        assert task.languages == problems.LANGUAGES
        for question in task.questions:
            matches = [
                one
                for one in controls.controls(question.subset)
                if one.text(question.language) == question.prompt.strip() and str(one.answer) == question.answer.strip()
            ]
            assert [one.held_out for one in matches] == [True]


class TestLosses:
    def test_router_losses_are_those_of_each_layer_by_itself(self):
        torch.manual_seed(0)
        layers = tuple(torch.randn(30, 6, dtype=torch.float64) for _ in range(3))
        valid = torch.arange(30) % 4 > 0
        balance, z = [], []
        for logits in layers:
            rows = [row.tolist() for row in logits[valid]]
            chosen, mass = [0.0] * 6, [0.0] * 6
            for row in rows:
                scores = np.exp(row) / np.exp(row).sum()
                for expert in np.argsort(row)[-train.TOP_K :]:
                    chosen[expert] += 1 / len(rows)
                mass = [m + s / len(rows) for m, s in zip(mass, scores, strict=True)]
            balance.append(6 * sum(c * m for c, m in zip(chosen, mass, strict=True)))
            z.append(np.mean([np.log(np.exp(row).sum()) ** 2 for row in rows]))
        found = train.router_losses(layers, valid)
        assert float(found[0]) == pytest.approx(np.mean(balance), rel=1e-6)
        assert float(found[1]) == pytest.approx(np.mean(z), rel=1e-6)

    def test_layers_that_collapse_in_turn_are_not_balanced(self):
        """Summed over the layers, the experts of these two are used alike."""
        first = torch.tensor([[9.0, 9.0, 0.0, 0.0]]).repeat(8, 1)
        collapsed, _ = train.router_losses((first, first.flip(1)), torch.ones(8, dtype=torch.bool))
        even, _ = train.router_losses((torch.cat([first[:4], first.flip(1)[:4]]),) * 2, torch.ones(8, dtype=torch.bool))
        assert float(collapsed) > 1.9 * float(even)

    def test_the_learning_rate_rises_and_falls(self):
        rates = [train.learning_rate(step, step / 1000, 1.0) for step in range(1001)]
        assert max(rates) == max(rates[150:250])
        assert rates[-1] == pytest.approx(0.05)


def run_training(tatoeba: Path, out: Path, *options: str) -> Path:
    """Train with a small vocabulary; the folder that was written."""
    argv = ["train.py", "--data", str(tatoeba), "--out", str(out), "--batch", "2", "--no-compile", "--seed", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "VOCABULARY", 700)
        patch.setattr(train, "SWITCHES", 50)
        patch.setattr(sys, "argv", [*argv, "--threads", str(torch.get_num_threads()), *options])
        train.main()
    return out


@pytest.fixture(scope="module")
def trained(tatoeba, tmp_path_factory) -> Path:
    """The folder of a run of three steps."""
    return run_training(tatoeba, tmp_path_factory.mktemp("trained"), "--steps", "3")


class TestTraining:
    def test_saves_a_model_that_loads(self, trained):
        language_model = LanguageModel.load(str(trained))
        assert language_model.model.dtype == torch.bfloat16
        assert len(language_model.tokenizer) == language_model.model.config.vocab_size == 700
        assert language_model.tokenizer("A tree.")["input_ids"][0] == language_model.tokenizer.bos_token_id
        losses = language_model.losses([Text("eng_Latn", "1", "A short tree.")])
        assert np.isfinite(losses).all()

    def test_learns_and_reports(self, trained):
        report = json.loads((trained / "training.json").read_text(encoding="utf-8"))
        assert (report["steps"], report["progress"], report["seed"], report["order"]) == (3, 1.0, 1, 1)
        assert 0 < report["tokens"] <= 3 * 2 * text.WINDOW
        assert sum(report["documents"].values()) >= 3 * 2
        language_model = LanguageModel.load(str(trained), dtype="float32")
        blank = language_model.untrained(1)
        assert blank.model.config.vocab_size == 700
        assert not torch.equal(blank.model.lm_head.weight, language_model.model.lm_head.weight)

    def test_goes_on_from_an_earlier_run(self, tatoeba, trained, tmp_path):
        options = ("--from", str(trained), "--learning-rate", "1e-3")
        first = json.loads((trained / "training.json").read_text(encoding="utf-8"))
        longer = run_training(tatoeba, tmp_path, "--steps", "2", *options)
        report = json.loads((longer / "training.json").read_text(encoding="utf-8"))
        assert [run["steps"] for run in report["runs"]] == [3, 2]
        assert [run["learning_rate"] for run in report["runs"]] == [2e-3, 1e-3]
        assert report["steps"] == 5
        assert report["tokens"] == sum(run["tokens"] for run in report["runs"]) > first["tokens"]
        assert sum(report["documents"].values()) > sum(first["documents"].values())
        # Without a step the weights are those of the earlier run, rounded to bfloat16 once.
        same = run_training(tatoeba, tmp_path / "same", "--steps", "2", "--minutes", "1e-9", *options)
        assert (same / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()

    def test_refuses_an_earlier_run_of_another_seed_or_tokenizer(self, tatoeba, trained, tmp_path):
        for name, value, message in (("seed", 3, "--seed 3"), ("vocabulary", "</s>", "another tokenizer")):
            folder = tmp_path / name
            shutil.copytree(trained, folder)
            changed = folder / ("training.json" if name == "seed" else "tokenizer.json")
            content = changed.read_text(encoding="utf-8")
            replaced = (
                content.replace('"seed": 1', f'"seed": {value}') if name == "seed" else content.replace(value, "</S>")
            )
            assert replaced != content
            changed.write_text(replaced, encoding="utf-8")
            with pytest.raises(ValueError, match=message):
                run_training(tatoeba, tmp_path / "out", "--steps", "2", "--from", str(folder))

    def test_held_out_pairs_repeat_no_sentence(self, trained):
        found = measures.held_out_pairs(trained, LanguageModel.load(str(trained)), 8)
        assert list(found) == list(OTHERS)
        for pairs in found.values():
            sentences = [sentence for pair in pairs for sentence in pair]
            assert len(set(sentences)) == len(sentences)
        assert found == measures.held_out_pairs(trained, LanguageModel.load(str(trained)), 8)


def measured(value: float, languages: dict[str, float]) -> dict:
    """Measures of a model in which every gate but those of exact match has one value."""
    layers = {"entropy": [value, 1.0], "least": [value, 1.0], "largest": [1.0, 1.0]}
    way = {"gain": value}
    return {
        "load": {"text": layers, "tasks": layers},
        "skill": {"english_only": {language: {"exact_match": em} for language, em in languages.items()}},
        "translation": {language: {"from_english": way, "to_english": {"gain": 99.0}} for language in OTHERS},
        "retrieval": {what: {key: [0.0, value] for key in OTHERS} for what in ("routing", "hidden")},
        "controls": {kind: {key: {"exact_match": min(value, 1.0)} for key in languages} for kind in controls.KINDS},
        "text": {key: {"nats_per_token": 4.0} for key in languages},
    }


class TestGates:
    def test_pass_from_the_value_asked_for(self):
        skilled = dict.fromkeys(problems.LANGUAGES, 0.5) | {"eng_Latn": 0.95}
        for value, passed in ((0.0, 2), (0.3, 6), (0.95, 10), (12.0, 11)):
            found = judge.gates(measured(value, skilled), measured(0.0, dict.fromkeys(problems.LANGUAGES, 0.0)))
            assert sum(gate["passed"] for gate in found) == passed
            assert all(gate["untrained"] == 0 for gate in found)
        assert len(found) == len(judge.GATES)

    def test_the_table_shows_every_seed(self):
        skilled = dict.fromkeys(problems.LANGUAGES, 0.5) | {"eng_Latn": 0.95}
        blank = measured(0.0, dict.fromkeys(problems.LANGUAGES, 0.0))
        results = [
            {"seed": seed, "gates": judge.gates(measured(value, skilled), blank)}
            for seed, value in ((4, 12.0), (5, 0.0))
        ]
        rows = tables.gates_table(results).splitlines()[2:]
        assert len(rows) == len(judge.GATES)
        assert sum("passed |" in row.split("|", 4)[3] + "|" for row in rows) == len(rows) - 1  # nine languages at .5
        assert sum("failed" in row for row in rows) == 10

    def test_worse_is_a_lost_gate_a_lower_value_or_a_higher_loss(self):
        def judged(value: float, nats: float = 4.0) -> dict:
            found = measured(value, dict.fromkeys(problems.LANGUAGES, 0.8))
            found["text"]["eng_Latn"] = {"nats_per_token": nats}
            return {"gates": judge.gates(found, found), "trained": found}

        assert judge.worse(judged(0.95), judged(0.95, 4.4)) == []
        assert [line.split(":")[0] for line in judge.worse(judged(0.95), judged(0.95, 4.6))] == ["loss of text"]
        assert any("copying" in line for line in judge.worse(judged(0.95), judged(0.89)))  # passed before
        assert not any("counting" in line for line in judge.worse(judged(0.5), judged(0.45)))
        assert any("counting" in line for line in judge.worse(judged(0.5), judged(0.4)))  # by more than a tenth


class TestChoice:
    def test_is_the_median_and_does_not_look_at_the_u(self):
        def result(em: float, depth: float) -> dict:
            skill = {language: {"exact_match": em} for language in problems.LANGUAGES}
            divergence = {"own": {"depth": {"mean": {"depth": depth}}}}
            return {"trained": {"skill": {"english_only": skill}, "divergence": divergence}}

        for depths in ((0.0, 0.1, 0.2), (0.2, 0.1, 0.0), (0.1, 0.2, 0.0)):
            results = [result(em, depth) for em, depth in zip((0.9, 0.5, 0.7), depths, strict=True)]
            assert choose.choose(results) == 2

    def test_english_has_no_part_in_the_score(self):
        skill = {language: {"exact_match": 0.5} for language in problems.LANGUAGES} | {"eng_Latn": {"exact_match": 1.0}}
        assert choose.score({"trained": {"skill": {"english_only": skill}}}) == 0.5

    def test_fill_replaces_what_stands_between_markers(self):
        card = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
        once = choose.fill(card, {"x": "new"})
        assert "old" not in once
        assert choose.fill(once, {"x": "new"}) == once
        with pytest.raises(ValueError, match="<!-- y -->"):
            choose.fill(card, {"y": "new"})

    def test_refuses_what_was_not_judged(self, tmp_path, trained):
        with pytest.raises(SystemExit, match=r"run judge\.py"):
            choose.read([tmp_path])
        folder = tmp_path / "seed"
        shutil.copytree(trained, folder)
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        judged = {name: training[name] for name in ("seed", "steps", "tokens")} | {"limit": 12}
        (folder / "judged.json").write_text(json.dumps(judged), encoding="utf-8")
        with pytest.raises(SystemExit, match="trial with --limit 12"):
            choose.read([folder])
        (folder / "judged.json").write_text(json.dumps(judged | {"steps": 2}), encoding="utf-8")
        with pytest.raises(SystemExit, match="another checkpoint"):
            choose.read([folder])

    @pytest.mark.exhaustive
    def test_judge_choose_and_install(self, trained, tmp_path, monkeypatch):
        result = judge.judge(trained, 12, 1)
        json.dumps(result, allow_nan=False)
        assert "failed" in judge.show(result)
        assert set(result["trained"]["skill"]) == set(demo_problems().subsets)
        assert len(result["single_experts"]) == 2 * 16
        folders = []
        for seed, score in ((0, 0.9), (1, 0.2), (2, 0.5)):
            folders.append(tmp_path / str(seed))
            shutil.copytree(trained, folders[-1])
            training = json.loads((trained / "training.json").read_text(encoding="utf-8")) | {"seed": seed}
            (folders[-1] / "training.json").write_text(json.dumps(training), encoding="utf-8")
            found = json.loads(json.dumps(result)) | {"seed": seed, "limit": None}
            for one in found["trained"]["skill"]["english_only"].values():
                one["exact_match"] = score
            (folders[-1] / "judged.json").write_text(json.dumps(found), encoding="utf-8")
        target = tmp_path / "model"
        monkeypatch.setattr(sys, "argv", ["choose.py", *map(str, folders), "--install", str(target)])
        choose.main()
        training, judged = (json.loads((target / f"{name}.json").read_text()) for name in ("training", "judged"))
        assert training["seed"] == judged["chosen"] == 2
        assert training["shares"] == problems.shares(training["order"])
        assert [one["seed"] for one in judged["seeds"]] == [0, 1, 2]
        assert not (target / "held_out.json").exists()
        card = (target / "MODEL_CARD.md").read_text(encoding="utf-8")
        assert not re.search(r"<!-- (\w+) -->\s*<!-- /\1 -->", card)
        for gate in result["gates"]:
            assert f"| {gate['gate']} |" in card
        assert LanguageModel.load(str(target)).model.config.num_experts == 16


def test_exact_match_is_in_the_order_of_the_languages():
    scores = {language: number / 10 for number, language in enumerate(problems.LANGUAGES)}
    skill = {language: {"exact_match": scores[language]} for language in reversed(problems.LANGUAGES)}
    assert judge.english_only({"skill": {"english_only": skill}}).tolist() == list(scores.values())

"""The demonstration model, the shipped corpora and the readers of parallel text."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moe_route.data import (
    Corpus,
    CorpusError,
    demo_corpus,
    demo_model_folder,
    demo_problems,
    demo_task,
    load_demo_model,
)

LANGUAGES = (
    "eng_Latn",
    "rus_Cyrl",
    "deu_Latn",
    "fra_Latn",
    "jpn_Jpan",
    "zho_Hans",
    "arb_Arab",
    "hin_Deva",
    "ind_Latn",
    "swh_Latn",
)
DATA = demo_model_folder().parent
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def problems() -> ModuleType:
    path = EXAMPLES / "demo_model" / "problems.py"
    if not path.is_file():
        pytest.skip("examples/demo_model/problems.py is not here (a source checkout has it)")
    spec = importlib.util.spec_from_file_location("demo_model_problems", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_model_problems"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo() -> tuple:
    pytest.importorskip("transformers", reason="the demonstration model needs transformers")
    return load_demo_model()


def test_the_demonstration_model_loads_in_silence(capfd: pytest.CaptureFixture[str]):
    logging = pytest.importorskip("transformers.utils.logging", reason="the demonstration model needs transformers")
    logging.enable_progress_bar()
    load_demo_model()
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()


class TestShippedText:
    @pytest.mark.parametrize(("read", "least"), [(demo_corpus, 64), (demo_task, 40)])
    def test_is_complete(self, read, least):
        corpus = read()
        assert corpus.languages == LANGUAGES
        assert len(corpus) >= least
        for language in LANGUAGES:
            assert len(set(corpus[language])) == len(corpus)
            assert all(text == text.strip() for text in corpus[language])

    def test_general_sentences_are_everyday_length(self):
        assert all(8 <= len(text.split()) <= 20 for text in demo_corpus()["eng_Latn"])

    @pytest.mark.parametrize("read", [demo_corpus, demo_task])
    @pytest.mark.parametrize(
        ("language", "first", "last"),
        [
            ("rus_Cyrl", "а", "я"),
            ("jpn_Jpan", "ぁ", "ヿ"),
            ("zho_Hans", "一", "龥"),
            ("arb_Arab", "ء", "ي"),
            ("hin_Deva", "ऀ", "ॿ"),
        ],
    )
    def test_every_text_is_in_its_script(self, read, language, first, last):
        for text in read()[language]:
            assert any(first <= character <= last for character in text.lower()), text
            assert not any("a" <= character <= "z" for character in text.lower()), text

    def test_problems_are_what_the_example_writes(self, problems, tmp_path, monkeypatch):
        out = tmp_path / "problems.tsv"
        monkeypatch.setattr(sys, "argv", ["problems.py", "--out", str(out)])
        problems.main()
        assert out.read_text(encoding="utf-8") == (DATA / "corpus" / "problems.tsv").read_text(encoding="utf-8")

    def test_the_task_is_the_problems_that_every_language_saw(self):
        seen = demo_problems().subset("seen")
        assert set(demo_problems().subsets) == {"seen", "english_only", "unseen"}
        for language in LANGUAGES:
            questions = [question for question in seen.questions if question.language == language]
            assert demo_task()[language] == tuple(q.prompt + q.answer for q in questions)
            assert demo_task().items == tuple(q.item for q in questions)

    def test_answers_follow_from_the_numbers(self):
        """The answer is the sum or the difference of the two numbers, the same in every language."""
        answers: dict[str, set[str]] = {}
        for question in demo_problems().questions:
            first, second = (int(number) for number in re.findall(r"\d+", question.prompt))
            assert int(question.answer) in (first + second, abs(first - second)), question.prompt
            answers.setdefault(question.item, set()).add(question.answer.strip())
        assert all(len(found) == 1 for found in answers.values())


class TestCorpus:
    def test_subset(self):
        corpus = demo_corpus()
        small = corpus.subset(["swh_Latn", "eng_Latn"], limit=5)
        assert small.languages == ("swh_Latn", "eng_Latn")
        assert small.items == corpus.items[:5]
        assert small["eng_Latn"] == corpus["eng_Latn"][:5]
        assert corpus.subset(limit=10**6) == corpus
        assert corpus.subset("eng_Latn").languages == ("eng_Latn",)

    @pytest.mark.parametrize("limit", [0, -3])
    def test_subset_refuses_a_limit_below_one(self, limit):
        with pytest.raises(ValueError, match="at least 1"):
            demo_corpus().subset(limit=limit)

    def test_unknown_language_names_those_there_are(self):
        for ask in (lambda c: c["xxx_Latn"], lambda c: c.subset(["xxx_Latn"])):
            with pytest.raises(KeyError, match=r"xxx_Latn.*swh_Latn"):
                ask(demo_corpus())

    def test_texts_and_languages_must_agree(self):
        with pytest.raises(CorpusError, match="languages are"):
            Corpus(("eng_Latn",), ("a",), {"deu_Latn": ("Eins.",)})
        with pytest.raises(CorpusError, match="2 texts in eng_Latn for 1 items"):
            Corpus(("eng_Latn",), ("a",), {"eng_Latn": ("One.", "Two.")})

    def test_shows_itself_in_one_line(self):
        assert repr(demo_corpus()) == str(demo_corpus()) == "Corpus(general.tsv: 72 items x 10 languages)"


class TestDemoModel:
    def test_shape(self, demo):
        model, tokenizer = demo
        config = model.config
        assert config.model_type == "qwen3_moe"
        assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (8, 16, 2)
        assert len(tokenizer) == config.vocab_size
        assert not model.training
        assert next(model.parameters()).dtype == torch.float32

    def test_is_small_on_disk(self):
        assert sum(path.stat().st_size for path in demo_model_folder().iterdir()) < 17e6

    def test_dtype(self, demo):
        assert next(load_demo_model(torch.bfloat16)[0].parameters()).dtype == torch.bfloat16

    def test_tokenizer_returns_every_text(self, demo):
        _, tokenizer = demo
        texts = [text for corpus in (demo_corpus(), demo_task()) for language in LANGUAGES for text in corpus[language]]
        texts += ["  two  spaces\n", "😀 e\u0301 ß", "2 + 3 = 5"]
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True) == text

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_predicts_every_language(self, demo, language):
        """Far below the loss of a uniform model, on text it was not trained on."""
        assert loss(*demo, demo_corpus()[language]) < 0.7 * uniform(demo[1])

    def test_high_resource_is_learned_better_than_low_resource(self, demo):
        assert loss(*demo, demo_corpus()["eng_Latn"]) < loss(*demo, demo_corpus()["swh_Latn"])

    def test_knows_the_task_in_english(self, demo):
        """The answers of problems whose numbers it was trained on."""
        questions = demo_problems().subset("seen", languages=["eng_Latn"], limit=40).questions
        from moe_route.runs.language_model import LanguageModel

        answers = LanguageModel("demo", *demo).answers(questions)
        assert answers.nats.mean() < 0.5 * uniform(demo[1])
        assert answers.correct.mean() > 0.3

    def test_is_deterministic(self, demo):
        text = demo_corpus()["eng_Latn"][:8]
        assert loss(*demo, text) == loss(*load_demo_model(), text)

    def test_card_and_training_are_of_this_model(self, demo):
        figures = json.loads((demo_model_folder() / "training.json").read_text(encoding="utf-8"))
        assert figures["parameters"] == sum(parameter.numel() for parameter in demo[0].parameters())
        assert set(figures["shares"]) == set(LANGUAGES)
        assert max(figures["shares"], key=figures["shares"].get) == "eng_Latn"

    def test_card_shows_every_gate_of_every_seed(self):
        judged = json.loads((demo_model_folder() / "judged.json").read_text(encoding="utf-8"))
        card = (demo_model_folder() / "MODEL_CARD.md").read_text(encoding="utf-8")
        assert judged["chosen"] in [one["seed"] for one in judged["seeds"]]
        for number, gate in enumerate(judged["seeds"][0]["gates"]):
            (row,) = [line for line in card.splitlines() if line.startswith(f"| {gate['gate']} ")]
            verdicts = ["passed" if one["gates"][number]["passed"] else "failed" for one in judged["seeds"]]
            assert re.findall("passed|failed", row) == verdicts

    def test_without_transformers_the_error_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r"moe-route\[hf\]"):
            load_demo_model()


def uniform(tokenizer) -> float:
    """Nats per token of a model that knows nothing."""
    return math.log(len(tokenizer))


def loss(model, tokenizer, texts) -> float:
    """Mean nats per predicted token over ``texts``, in float64."""
    nats, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return nats / tokens

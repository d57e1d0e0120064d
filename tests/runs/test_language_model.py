"""Language models on texts: losses, encoding, and what files say of texts that were cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_route.data import Corpus, Question
from moe_route.data.batches import EncodedTexts, Text, texts_of
from moe_route.recording import RoutingStatistics
from moe_route.runs.language_model import LanguageModel, ModelNotFoundError
from moe_route.runs.record import record_texts


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel.load()


class TestLanguageModel:
    def test_losses_do_not_depend_on_the_batch(self, language_model: LanguageModel):
        texts = texts_of(Corpus.read("general", languages=["eng_Latn", "jpn_Jpan"], limit=5))
        alone, together = language_model.losses(texts, batch_size=1), language_model.losses(texts, batch_size=10)
        assert (alone[:, 1] == together[:, 1]).all()
        np.testing.assert_allclose(alone[:, 0], together[:, 0], rtol=1e-4)

    def test_an_answer_that_is_not_there_is_refused(self, language_model: LanguageModel):
        """Else the last token of the prompt would be judged in its place."""
        with pytest.raises(ValueError, match="'sum' in eng_Latn has an empty answer"):
            language_model.answers([Question("sum", "eng_Latn", "5 plus 3 is", "")])

    def test_loss_is_the_model_s_own(self, language_model: LanguageModel):
        text = "The last bus leaves at half past nine."
        ids = language_model.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = language_model.model(input_ids=ids, labels=ids, output_router_logits=False).loss.item()
        ((nats, tokens),) = language_model.losses([Text("eng_Latn", "1", text)])
        assert tokens == ids.shape[1] - 1
        assert nats / tokens == pytest.approx(expected, rel=1e-5)

    def test_order_of_texts_is_kept(self, language_model: LanguageModel):
        texts = texts_of(Corpus.read("general", languages=["eng_Latn"], limit=6))
        forth, back = language_model.losses(texts, batch_size=2), language_model.losses(texts[::-1], batch_size=2)
        np.testing.assert_allclose(forth, back[::-1], rtol=1e-4)

    def test_cut_texts_are_counted(self, language_model: LanguageModel, tmp_path: Path, recwarn):
        texts = [
            Text("eng_Latn", "long", "one two three " * 400),
            Text("eng_Latn", "short", "One."),
            *texts_of(Corpus.read("general", languages=["eng_Latn"], limit=3)),
        ]
        encoded = language_model.encode(texts, max_length=20)
        lengths = [len(language_model.tokenizer(text.text)["input_ids"]) for text in texts]
        assert encoded.cut == sum(length > 20 for length in lengths) >= 1
        assert [len(ids) for ids in encoded.ids] == [min(length, 20) for length in lengths]
        assert encoded.note == f"{encoded.cut} of 5 texts cut to 20 tokens"
        np.testing.assert_array_equal(language_model.losses(encoded), language_model.losses(texts, max_length=20))
        with pytest.raises(ValueError, match="encoded already"):
            language_model.losses(encoded, max_length=20)
        whole = language_model.encode(texts[1:2])
        assert (whole.cut, whole.note, whole.metadata) == (0, "", {})
        assert language_model.encode(texts).limit == language_model.model.config.max_position_embeddings
        assert language_model.encode([]).ids == ()

    def test_files_say_how_many_texts_were_cut(self, language_model: LanguageModel, tmp_path: Path):
        texts = texts_of(Corpus.read("general", languages=["eng_Latn"], limit=4))
        kept = []
        with language_model.attach() as routed:
            for part, length in ((texts[:2], 5), (texts[2:], 6)):
                with routed.record() as recorder:
                    found = record_texts(recorder, language_model, part, max_length=length)
                assert isinstance(found, EncodedTexts)
                assert found.cut == 2
                kept.append(recorder.statistics())
            with routed.record() as recorder:
                record_texts(recorder, language_model, texts)
            assert "cut" not in repr(recorder.statistics())
        assert "cut: 2 texts to 5 tokens" in repr(kept[0])
        (kept[0] + kept[1]).save(tmp_path / "both.safetensors")
        both = RoutingStatistics.load(tmp_path / "both.safetensors")
        assert (both.metadata["cut_texts"], both.metadata["cut_to_tokens"]) == (4, [5, 6])
        assert "cut: 4 texts to 5/6 tokens" in repr(both)

    def test_logits_at_some_positions_are_those_of_all(
        self, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
    ):
        (batch,) = language_model.batches(texts_of(Corpus.read("general", languages=["eng_Latn", "jpn_Jpan"], limit=3)))
        whole, places = language_model.run(batch), torch.tensor([0, 3, 7])
        torch.testing.assert_close(language_model.run(batch, places), whole[:, places])
        given: list[set[str]] = []

        def without(input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: object) -> object:
            given.append(set(options))
            return type(language_model.model).forward(language_model.model, input_ids, attention_mask, **options)

        monkeypatch.setattr(language_model.model, "forward", without)  # names no logits_to_keep
        assert torch.equal(language_model.run(batch, places), whole[:, places])
        assert given == [{"use_cache"}]

    def test_answers_are_judged_by_the_logits_after_their_prompt(self, language_model: LanguageModel):
        """Prompts and answers of several lengths in one batch, beside each text alone with all of its logits."""
        asked = [("2 + 3 =", " 5"), ("The last bus leaves at", " half past nine."), ("Wie viel ist 12 + 30?", " 42")]
        questions = [Question(str(i), "eng_Latn", prompt, answer) for i, (prompt, answer) in enumerate(asked)]
        found = language_model.answers(questions)
        for place, (prompt, answer) in enumerate(asked):
            ids = language_model.tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
            start = len(language_model.tokenizer(prompt)["input_ids"])
            assert ids[0, :start].tolist() == language_model.tokenizer(prompt)["input_ids"]
            with torch.inference_mode():
                logits = language_model.model(input_ids=ids).logits[0, start - 1 : -1]
            nats = -logits.log_softmax(-1).gather(1, ids[0, start:, None])
            assert found.nats[place] == pytest.approx(nats.sum().item(), rel=1e-4)
            assert found.correct[place] == bool((logits.argmax(-1) == ids[0, start:]).all())

    def test_an_unknown_name(self, tmp_path: Path):
        with pytest.raises(ModelNotFoundError, match="checkpoint"):
            LanguageModel.load(str(tmp_path / "nothing"))

    def test_a_checkpoint_without_its_tokenizer(self, language_model: LanguageModel, tmp_path: Path):
        language_model.model.save_pretrained(tmp_path)
        with pytest.raises(ModelNotFoundError, match="tokenizer"):
            LanguageModel.load(str(tmp_path))


def test_who_chooses_among_tied_scores_is_passed_on() -> None:
    with LanguageModel.load().attach("fused", ties="model") as routed:
        assert {engine.asks_model for engine in routed.attachment._engines} == {True}  # type: ignore[attr-defined]

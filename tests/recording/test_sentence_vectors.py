"""Sentence vectors against plain loops over unpadded sentences, for any batch size and either side of padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from harness.tiny_models import tiny_model
from harness.tiny_texts import Characters, tiny_language_model, tiny_texts

import moe_route as mr
from moe_route.base import files
from moe_route.data import Corpus
from moe_route.data.batches import Batch, EncodedTexts, Text, encode
from moe_route.recording import RecordingError, SentenceVectors, sentence_vectors
from moe_route.recording.vectors import POOLINGS, pool


class LeftCharacters(Characters):
    """Pads on the left."""

    def pad(self, rows, return_tensors):
        turned = {"input_ids": [row[::-1] for row in rows["input_ids"]]}
        return {name: values.flip(1) for name, values in super().pad(turned, return_tensors).items()}


def dense(kind: str):
    """A small model without experts: rotary and absolute positions, decoder and encoder."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.XLMRobertaConfig(
        **sizes, intermediate_size=48, pad_token_id=0, max_position_embeddings=64, type_vocab_size=1
    )
    return transformers.XLMRobertaModel(config).eval()


MODELS = {
    "llama": lambda: dense("llama"),
    "gpt2": lambda: dense("gpt2"),
    "xlm-roberta": lambda: dense("xlm-roberta"),
    "qwen3_moe": lambda: tiny_model("qwen3_moe", head=True),
    "gpt_oss": lambda: tiny_model("gpt_oss", head=True),
}
WEIGHTS = {
    "position": lambda s: np.arange(1, s + 1),
    "reversed": lambda s: np.arange(s, 0, -1),
    "mean": lambda s: np.ones(s),
    "last": lambda s: np.arange(s) == s - 1,
}


@torch.no_grad()
def by_loop(model, text: str, pooling: str) -> np.ndarray:
    """One sentence alone, without padding and without a mask."""
    ids = torch.tensor([[ord(letter) for letter in text]])
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    weights = WEIGHTS[pooling](ids.shape[1]).astype(np.float64)
    return np.stack([weights @ one[0].double().numpy() / weights.sum() for one in states])


@pytest.mark.parametrize("name", MODELS)
def test_any_batch_size_and_side_of_padding_gives_the_vectors_of_single_sentences(name: str) -> None:
    model, texts = MODELS[name](), tiny_texts(items=20)
    for pooling in POOLINGS:
        expected = {(t.item, t.group): by_loop(model, t.text, pooling) for t in texts}
        for tokenizer in (Characters(), LeftCharacters()):
            for batch_size in (1, 32):
                found = sentence_vectors(model, tokenizer, texts, pooling=pooling, batch_size=batch_size)
                assert found.layers[0] == "embedding"
                assert len(found) == len(texts)
                for key, vector in expected.items():
                    error = np.abs(found.vector(*key) - vector).max(1)
                    # gpt_oss amplifies rounding: its states grow from 1 to 50 over three layers
                    assert (error <= (5e-5 if name == "gpt_oss" else 1e-5) * np.abs(vector).max(1)).all()


def test_the_left_tokenizer_pads_on_the_left() -> None:
    padded = LeftCharacters().pad({"input_ids": [[5, 6], [7, 8, 9]]}, "pt")
    assert padded["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert padded["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_never_counts_padding(pooling) -> None:
    hidden = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 0]]).bool()
    expected = []
    for row, mask in zip(hidden, valid, strict=True):
        real = row[mask].double().numpy()
        weights = WEIGHTS[pooling](len(real)).astype(np.float64)
        expected.append(weights @ real / weights.sum())
    hidden[~valid] = float("nan")
    np.testing.assert_allclose(pool(hidden, valid, pooling), expected, rtol=1e-12)


def test_texts_with_the_same_tokens_have_the_same_bits() -> None:
    texts = tiny_texts(items=10)
    texts += [Text("c", text.item, text.text) for text in texts if text.group == "a"]
    texts += [Text("a", "again", texts[3].text)]
    found = sentence_vectors(dense("llama"), Characters(), texts, batch_size=3)
    for item in (text.item for text in texts if text.group == "c"):
        np.testing.assert_array_equal(found.vector(item, "a"), found.vector(item, "c"))
    np.testing.assert_array_equal(found.vector("again", "a"), found.vector(texts[3].item, "a"))


def test_layers_groups_and_items_keep_the_order_asked_for() -> None:
    model, texts = dense("llama"), tiny_texts(("b", "a"), items=5)
    whole = sentence_vectors(model, Characters(), texts)
    part = sentence_vectors(model, Characters(), texts, layers=[2, 0])
    assert whole.groups == ("b", "a")
    assert whole.items == tuple(f"item {i}" for i in range(5))
    assert part.layers == ("layer 2", "embedding")
    assert whole.numpy().shape == (5, 2, 3, 32)
    assert whole.numpy().dtype == np.float32
    np.testing.assert_allclose(part.numpy(), whole.numpy()[:, :, [2, 0]], rtol=1e-6)
    np.testing.assert_array_equal(whole.numpy(["a"])[:, 0], whole.numpy()[:, 1])


def test_batches_of_a_loader_with_padding_on_the_left() -> None:
    model, texts = dense("gpt2"), tiny_texts(items=6)
    encoded, tokenizer = encode(Characters(), texts), LeftCharacters()
    batches = []
    for i in range(0, len(texts), 4):
        rows = [list(row) for row in encoded.ids[i : i + 4]]
        batches.append(Batch(tuple(texts[i : i + 4]), (0, 1, 2, 3), tokenizer.pad({"input_ids": rows}, "pt")))
    found = sentence_vectors(model, None, iter(batches))
    for text in texts:
        expected = by_loop(model, text.text, "position")
        np.testing.assert_allclose(found.vector(text.item, text.group), expected, rtol=1e-5, atol=1e-5)


def test_shards_on_disk_and_a_file_hold_the_same(tmp_path) -> None:
    model, texts = dense("llama"), tiny_texts(items=12)
    whole = sentence_vectors(model, Characters(), texts, batch_size=4)
    spilled = sentence_vectors(model, Characters(), texts, batch_size=4, folder=tmp_path / "shards", memory_bytes=2000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(spilled.numpy(), whole.numpy())
    spilled.save(tmp_path / "vectors.safetensors")
    read = SentenceVectors.load(tmp_path / "vectors.safetensors")
    np.testing.assert_array_equal(read.numpy(), whole.numpy())
    assert (read.groups, read.items, read.layers) == (whole.groups, whole.items, whole.layers)
    assert read.pooling == "position"
    assert read.metadata["model"]["class"] == "LlamaForCausalLM"
    assert read.store.tokens("item 0", "a").tolist() == [len(texts[0].text)] * 3
    with pytest.raises(files.FileRefusedError, match="sentence_vectors"):
        mr.RoutingStatistics.load(tmp_path / "vectors.safetensors")


def test_a_corpus_is_cut_to_the_limit_and_says_so() -> None:
    corpus = Corpus(("a", "b"), ("x", "y"), {"a": ("abcdefgh", "abc"), "b": ("hgfedcba", "cba")})
    found = sentence_vectors(dense("llama"), Characters(), corpus, max_length=5)
    assert found.metadata["cut_texts"] == 2
    assert found.store.tokens("x", "a")[0] == 5


def test_an_attached_model_is_recorded_and_steered_meanwhile() -> None:
    language_model, texts = tiny_language_model("qwen3_moe"), tiny_texts(items=4)
    plain = sentence_vectors(language_model.model, language_model.tokenizer, texts).numpy()
    with mr.attach(language_model.model) as routed:
        with routed.record(["all"]) as recorder, recorder.labels(groups="all"):
            recorded = sentence_vectors(language_model.model, language_model.tokenizer, texts, batch_size=8).numpy()
        with routed.steer(mr.Plan.forbid({0: [0, 1, 2, 3]})):
            steered = sentence_vectors(language_model.model, language_model.tokenizer, texts).numpy()
    assert recorder.statistics().tokens().sum() > 0
    np.testing.assert_allclose(recorded, plain, rtol=1e-5, atol=1e-5)
    assert np.abs(steered - plain).max() > 1e-3


def broken() -> torch.nn.Module:
    model = dense("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
    return model


class Headless(torch.nn.Module):
    """Gives no hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask, output_hidden_states=False):
        return {}


def test_refuses_with_the_fix() -> None:
    texts, model, characters = tiny_texts(items=3), dense("llama"), Characters()
    two = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=128, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    ).eval()
    unmasked = Batch((texts[0],), (0,), {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    placed = Batch((texts[0],), (0,), {"input_ids": torch.ones(1, 3), "position_ids": torch.ones(1, 3)})
    masked = torch.zeros(1, 3, dtype=torch.long)
    empty = Batch((texts[0],), (0,), {"input_ids": masked, "attention_mask": masked})
    cases = [
        (ValueError, "model.eval()", lambda: sentence_vectors(dense("llama").train(), characters, texts)),
        (ValueError, "get_encoder", lambda: sentence_vectors(two, characters, texts)),
        (ValueError, "no pooling 'max'", lambda: sentence_vectors(model, characters, texts, pooling="max")),
        (ValueError, "batch_size", lambda: sentence_vectors(model, characters, texts, batch_size=0)),
        (ValueError, "0 .the embedding. to 2", lambda: sentence_vectors(model, characters, texts, layers=[3])),
        (ValueError, "different indices", lambda: sentence_vectors(model, characters, texts, layers=[1, 1])),
        (ValueError, "no token", lambda: sentence_vectors(model, characters, [Text("a", "x", "")])),
        (ValueError, "recorded already", lambda: sentence_vectors(model, characters, [texts[0], texts[0]])),
        (ValueError, "no text", lambda: sentence_vectors(model, characters, [])),
        (ValueError, "max_length must", lambda: sentence_vectors(model, characters, texts, max_length=0)),
        (ValueError, "attention_mask", lambda: sentence_vectors(model, None, [unmasked])),
        (ValueError, "position_ids", lambda: sentence_vectors(model, None, [placed])),
        (ValueError, "no token", lambda: sentence_vectors(model, None, [empty])),
        (ValueError, "leave max_length out", lambda: sentence_vectors(model, None, [empty], max_length=3)),
        (RecordingError, "not finite: load the model", lambda: sentence_vectors(broken(), characters, texts)),
        (RecordingError, "no hidden states", lambda: sentence_vectors(Headless().eval(), characters, texts)),
        (
            RecordingError,
            "common",
            lambda: sentence_vectors(model, characters, [texts[0], Text("z", "y", "ab")]).numpy(),
        ),
    ]
    encoded = EncodedTexts(tuple(texts[:1]), ((5, 6),), (), None)
    cases.append((ValueError, "encoded already", lambda: sentence_vectors(model, None, encoded, max_length=3)))
    for error, message, make in cases:
        with pytest.raises(error, match=message):
            make()


def test_an_encoder_of_two_parts_is_read() -> None:
    two = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=128, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    ).eval()
    found = sentence_vectors(two.get_encoder(), Characters(), tiny_texts(items=2))
    assert found.numpy().shape == (2, 2, 2, 16)

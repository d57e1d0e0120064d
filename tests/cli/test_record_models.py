"""`moe-route record` into a folder on checkpoints as users have them: chat templates, dtypes, maps, quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from harness.commands import refused

import moe_route as mr
from moe_route.data import demo_corpus, load_demo_model

TEXTS = list(demo_corpus()["eng_Latn"][:12])
TEMPLATE = "{{ bos_token }}{% for message in messages %}User: {{ message['content'] }}{% endfor %}{{ eos_token }}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def statistics(out: Path) -> mr.RoutingStatistics:
    return mr.RoutingStatistics.load(out / "statistics.safetensors")


def test_a_chat_template_brings_the_special_tokens(answer, moe_route, corpus: Path, tmp_path: Path):
    """They are not added a second time, and what is recorded is the text with its template."""
    model, tokenizer = load_demo_model()
    refused(moe_route("record", "--data", corpus, "--out", tmp_path / "none", "--chat-template"), "no chat template")
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    found = answer("record", tmp_path / "model", "--data", corpus, "--out", tmp_path / "run", "--chat-template")
    wrapped = [f"{tokenizer.bos_token or ''}User: {text}{tokenizer.eos_token or ''}" for text in TEXTS]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in wrapped]
    assert lengths != [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert found["tokens"] == sum(lengths) == statistics(tmp_path / "run").tokens().max()


def test_a_device_map_and_a_dtype(answer, moe_route, corpus: Path, tmp_path: Path):
    """Without a GPU, accelerate puts all layers on the CPU: the same weights, the same statistics."""
    pytest.importorskip("accelerate")
    command = ("record", "--data", corpus, "--out")
    for name, options in {
        "plain": (),
        "map": ("--device-map", "auto", "--dtype", "float32"),  # that of the demo model
        "half": ("--dtype", "bfloat16", "--device", "cpu"),
    }.items():
        assert answer(*command, tmp_path / name, *options)["complete"]
    plain, mapped, half = (statistics(tmp_path / name) for name in ("plain", "map", "half"))
    if not torch.cuda.is_available():
        for name in plain.metrics:
            assert mapped.token_sum(name).tolist() == plain.token_sum(name).tolist()
        assert mapped.store.content_hash() == plain.store.content_hash()
    assert half.tokens().tolist() == plain.tokens().tolist()
    assert half.token_sum("probability").tolist() != plain.token_sum("probability").tolist()
    both = moe_route(*command, tmp_path / "both", "--device-map", "auto", "--device", "cpu")
    refused(both, "either a device or a device map")


@pytest.mark.exhaustive
def test_a_quantized_checkpoint(answer, corpus: Path, tmp_path: Path):
    """It loads as transformers loads it, and its statistics are those of the weights that it has."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model, tokenizer = load_demo_model()
    model.save_pretrained(tmp_path / "float")
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=quantization, device_map="cpu"
    ).eval()
    for part in (packed, tokenizer):
        part.save_pretrained(tmp_path / "packed")
    out = tmp_path / "run"
    found = answer("record", tmp_path / "packed", "--data", corpus, "--out", out, "--batch-size", "1")
    with mr.attach(packed) as routed, routed.record(["texts"], sequences=True) as recorder:
        for number, text in enumerate(TEXTS, start=1):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with recorder.labels(groups="texts", items=[str(number)]), torch.inference_mode():
                packed(input_ids=ids)
    assert found["complete"]
    assert any(type(module).__name__ == "Linear8bitLt" for module in packed.modules())
    direct, recorded = recorder.statistics(), statistics(out)
    assert recorded.token_sum("counts").tolist() == direct.token_sum("counts").tolist()


def test_a_model_of_images_and_texts_reads_texts(answer, corpus: Path, tmp_path: Path):
    tokenizer = load_demo_model()[1]
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    transformers.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = answer("record", tmp_path / "model", "--data", corpus, "--out", tmp_path / "run")
    assert found["cut"] > 0  # at the end of the context, which the configuration of the texts says
    assert statistics(tmp_path / "run").token_sum("counts").shape[-2:] == (2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "run.safetensors", "--chat-template"), "--chat-template is for a folder"),
        (("--out", "run.safetensors", "--text-column", "body"), "--text-column is for a folder"),
        (("--out", "run", "--trace", "t.safetensors"), "--trace keeps every token"),
        (("--out", "v.safetensors", "--vectors", "mean", "--pairs"), "--pairs is not for --vectors"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    moe_route, monkeypatch, tmp_path: Path, options: tuple[str, ...], message: str
):
    monkeypatch.chdir(tmp_path)
    refused(moe_route("record", *options), message)
    assert not list(tmp_path.iterdir())


def test_vllm_is_no_engine_of_other_commands(moe_route):
    code, _, said = moe_route("describe", "--engine", "vllm")
    assert code == 2
    assert "`moe-route record --out FOLDER/` can use it" in said

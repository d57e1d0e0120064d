"""`moe-route upcycle`: a dense checkpoint becomes a sparse one that the other commands take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.commands import refused

from moe_route.data import demo_model_folder

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=["qwen3", "llama"])
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A dense checkpoint with the demo model's tokenizer, with and without a stock sparse class."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model_folder())
    config = transformers.CONFIG_MAPPING[request.param](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    folder = tmp_path / "dense"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_upcycle_describe_record(answer, moe_route, dense: Path, tmp_path: Path) -> None:
    sparse, plan = tmp_path / "sparse", tmp_path / "plan.json"
    options = ("--languages", "eng_Latn,swh_Latn,deu_Latn", "--out", sparse, "--plan", plan)
    made = answer("upcycle", dense, *options)
    assert (made["num_experts"], made["layers"]) == (2, [1, 2])
    assert made["families"] == {"eng_Latn": 0, "swh_Latn": 1, "deu_Latn": 0}
    assert answer("describe", sparse)["layers"][1]["experts"] == 2
    texts = ("--languages", "eng_Latn,swh_Latn,deu_Latn", "--limit", 2)
    answer("record", sparse, "--plan", plan, *texts, "--out", tmp_path / "s.safetensors")
    assert moe_route("upcycle", dense, *options)[1].startswith("kept")
    refused(moe_route("upcycle", dense, *options, "--top-k", 1), "--force")


def test_families_from_a_file(answer, moe_route, dense: Path, tmp_path: Path) -> None:
    families = tmp_path / "families.json"
    families.write_text(json.dumps({"math": 0, "text": 1, "code": 2}))
    made = answer("upcycle", dense, "--families", families, "--layers", "0", "--out", tmp_path / "sparse")
    assert (made["num_experts"], made["layers"]) == (3, [0])
    out = ("--out", tmp_path / "other")
    refused(moe_route("upcycle", dense, *out), "either --languages or --families")
    refused(moe_route("upcycle", dense, "--languages", "eng_Latn,xx", *out), "no language has the code 'xx'")
    refused(moe_route("upcycle", dense, "--families", families, "--top-k", 1, *out), "router gets no gradient")
    refused(moe_route("upcycle", "demo", "--families", families, *out), "no stack of layers")
    assert not (tmp_path / "other").exists()

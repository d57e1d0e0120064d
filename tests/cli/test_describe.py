"""`moe-route describe` answers from a configuration alone, and with --load from the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.commands import refused
from transformers import GptOssConfig, Qwen3MoeConfig

from moe_route.data import demo_model_folder
from moe_route.runs.language_model import ModelNotFoundError, model_without_weights


@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_the_configuration_says_what_the_weights_say(answer, engine):
    described, loaded = (answer("describe", *load, "--engine", engine) for load in ([], ["--load"]))
    for layer in described["layers"]:
        assert layer["notes"].pop().startswith("not checked")  # on random hidden states, which needs weights
    assert described == loaded


def test_a_checkpoint_of_sixty_gigabytes(answer, tmp_path: Path):
    """There are no weights and no tokenizer in the folder."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8}
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=768, vocab_size=151936)
    config.save_pretrained(tmp_path)
    model = model_without_weights(str(tmp_path))
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) > 60e9
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}
    described = answer("describe", tmp_path)
    assert len(described["layers"]) == 48
    assert {(layer["experts"], layer["top_k"]) for layer in described["layers"]} == {(128, 8)}
    assert described["name"] == str(tmp_path)


def test_a_router_with_an_adapter_of_its_own(answer, tmp_path: Path):
    GptOssConfig(num_hidden_layers=4, hidden_size=64, num_local_experts=32).save_pretrained(tmp_path)
    assert [layer["experts"] for layer in answer("describe", tmp_path)["layers"]] == [32] * 4


def test_what_is_no_configuration_is_refused(moe_route, tmp_path: Path):
    refused(moe_route("describe", tmp_path), "config")
    refused(moe_route("describe", "./nowhere"), "there is no folder")
    refused(moe_route("describe", "--device", "cpu"), "--load")
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        model_without_weights(str(tmp_path))


def test_the_demo_model_is_read_from_its_folder():
    assert model_without_weights().config.num_experts == 16
    assert (demo_model_folder() / "config.json").is_file()

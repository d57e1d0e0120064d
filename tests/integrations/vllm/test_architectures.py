"""Tiny random models of six architectures: names, counts and steering as in transformers, float32."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import ARCHITECTURES, BASE

import moe_route as mr

if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
else:
    vllm = pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

# vLLM's attention on a CPU wants heads of 32
SIZES = {
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
    "vocab_size": 512,
}
EXTRA = {
    "gpt_oss": {"sliding_window": 32, "num_attention_heads": 4},
    "deepseek_v3": {  # the only sizes of latent attention that vLLM has for a CPU
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "kv_lora_rank": 512,
        "head_dim": 64,
        "num_key_value_heads": 4,
    },
}
# vLLM 0.32's rotary kernel for CPUs misreads queries of several heads, [tokens, heads, 64], as latent attention gives
# them; its version in torch does not.
ENGINE = {"deepseek_v3": {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}}
ROWS = [np.random.default_rng(i).integers(5, 500, 10 + 4 * i).tolist() for i in range(8)]


def saved(name: str, folder: Path) -> Any:
    """The model, and its checkpoint in ``folder``."""
    import transformers

    kind = type(transformers.AutoConfig.for_model(name))
    own = {**ARCHITECTURES[name], **EXTRA.get(name, {})}
    known = kind().to_dict()
    config = kind(**{key: value for key, value in {**BASE, **SIZES, **own}.items() if key in known or key in own})
    config.eos_token_id = None
    if name == "phimoe":  # vLLM has these parameters always, and leaves them unset where the checkpoint lacks them
        config.attention_bias = config.lm_head_bias = True
    if name == "deepseek_v3":  # vLLM reads both from the file; transformers knows no other way for this model
        config.topk_method, config.scoring_func = "noaux_tc", "sigmoid"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for key, bias in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            bias.normal_(std=0.2)
    model.save_pretrained(folder)
    if name == "phimoe":  # transformers writes a class that vLLM does not know
        content = json.loads((folder / "config.json").read_text())
        content["architectures"] = ["PhiMoEForCausalLM"]
        (folder / "config.json").write_text(json.dumps(content))
    return model


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "gpt_oss", "qwen2_moe", "phimoe", "deepseek_v3"])
def test_an_architecture_counts_and_steers_as_in_transformers(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    llm = vllm.LLM(
        model=str(tmp_path),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        additional_config={"moe_route": {}},
        **ENGINE.get(name, {}),
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    with mr.attach(model) as routed, torch.no_grad():
        last = len(routed.routers) - 1
        steered = mr.Plan.activate({layer: [1, 2] for layer in range(last + 1)}, strength=0.7)
        for plan in (None, steered + mr.Plan.force_off({last: [3]})):
            with routed.steer(plan or mr.Plan()), routed.record() as rec:
                for ids in ROWS:
                    with rec.labels():
                        model(input_ids=torch.tensor([ids]))
            mr.vllm.steer(llm, plan)
            mr.vllm.record(llm)
            llm.generate([{"prompt_token_ids": ids} for ids in ROWS], params, use_tqdm=False)
            found, expected = mr.vllm.statistics(llm), rec.statistics()
            assert found.layers == expected.layers
            np.testing.assert_array_equal(found.token_sum("counts"), expected.token_sum("counts"))
            np.testing.assert_array_equal(found.scalar("flipped"), expected.scalar("flipped"))
            np.testing.assert_allclose(found.token_sum("weight"), expected.token_sum("weight"), rtol=1e-4)
            assert (found.scalar("flipped").sum() > 0) == (plan is not None)
    del llm
    gc.collect()

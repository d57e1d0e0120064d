"""Tiny random models of the supported architectures, built from each architecture's own configuration class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Names differ from one configuration class to the next; each reads those it knows.
BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_LATENT = {  # multi-head latent attention; three experts out of two groups of two, so that the groups matter
    "num_experts_per_tok": 3,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_SPARSE = _LATENT | {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
_GROUPS = {"num_experts_per_tok": 3, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}

# The seven that every behaviour is tested on.
MAIN = ("qwen3_moe", "olmoe", "gpt_oss", "phimoe", "mixtral", "qwen2_moe", "deepseek_v3")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_moe_without_norm": {"norm_topk_prob": False},
    "olmoe": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4},
    "phimoe": {},
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "deepseek_v3": _LATENT,
    "minimax": {},
    "flex_olmo": {},
    "mellum": {},
    "jamba": {"attn_layer_offset": 0, "attn_layer_period": 2, "expert_layer_offset": 0, "expert_layer_period": 1},
    "hunyuan_v1_moe": {},
    "qwen3_next": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_vl_moe_text": {},
    "deepseek_v2": _LATENT | {"topk_method": "greedy"},
    "deepseek_v2_with_groups": _LATENT | {"topk_method": "group_limited_greedy"},
    "granitemoe": {},
    "granitemoeshared": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "shared_intermediate_size": 32,
    },
    "cohere2_moe": {"expert_selection_fn": "softmax"},
    "cohere2_moe_with_sigmoid": {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
    "aria_text": {},
    "openai_privacy_filter": {},
    "axk1": _LATENT,
    "axk2": _LATENT,
    "axk2_without_groups": _LATENT | {"n_group": None, "topk_group": None},
    "bailing_hybrid": _LATENT | {"layer_group_size": 2},
    "beam": {"n_group": 4, "topk_group": 2, "mlp_layer_types": ["sparse"] * 3},
    "deepseek_v32": _SPARSE,
    "deepseek_v4": {"mlp_layer_types": ["moe"] * 3},
    "dots1": _GROUPS,
    "dots3_note_text": _LATENT,
    "exaone_moe": {},
    "glm4_moe": _GROUPS,
    "glm4_moe_lite": _LATENT,
    "glm4v_moe_text": _GROUPS
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        }
    },
    "glm_moe_dsa": _SPARSE,
    "kimi_linear": _LATENT | _HYBRID,
    "mimo_v2_flash": _GROUPS,
    "nemotron_h": {},
    "solar_open": _GROUPS,
    "hy_v3": {},
    "hy_v4": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "afmoe": {},
    "flint": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_dense_layers": 1},
    "ernie4_5_moe": {},
    "mistral4": _LATENT,
    "mistral_large4_text": _LATENT,
    "muse_spark_text": {},
    "inkling2_text": {},
    "longcat_flash": _LATENT
    | {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 4, "num_layers": 2},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2},
}


def tiny_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, head: bool = False, **changes: Any
) -> nn.Module:
    """A random model of `name` in evaluation mode, with its correction biases filled in so that they matter.

    With `head`, the causal language model; otherwise the model below its head.
    """
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    architecture = name.split("_with")[0]
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[architecture](**(BASE | ARCHITECTURES[name] | changes))
    model = (AutoModelForCausalLM if head else AutoModel).from_config(config, dtype=dtype).eval()
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in kept):  # as from_pretrained does
                parameter.data = parameter.data.float()
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if key.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.copy_(torch.rand(tensor.shape) * 0.5)
            elif key.endswith(("router.bias", "per_expert_scale")):
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
            elif key.endswith(("router.gate.weight", "gate.weight")) and not bool(tensor.any()):
                tensor.copy_(torch.randn(tensor.shape) * 0.3)  # an architecture that starts its gates at zero
    return model


def tokens(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length], none of them special."""
    return torch.randint(3, BASE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


# Routers of models whose text part is no model of its own: (architecture, what its configuration says besides BASE).
ROUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Step3p7TopKRouter": ("step3p7", {}),
    "UnlimitedOcrTextTopkRouter": ("unlimited_ocr", _GROUPS | {"topk_method": "greedy", "routed_scaling_factor": 1.5}),
    "DeepseekOcr2TextTopkRouter": ("deepseek_ocr2", _GROUPS | {"topk_method": "greedy", "routed_scaling_factor": 1.5}),
    "Glm5NextTextTopkRouter": ("glm5_next", _GROUPS | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    "DiffusionGemmaTextRouter": ("diffusion_gemma", {"top_k_experts": 2, "rms_norm_eps": 1e-6}),
    "Qwen3OmniMoeThinkerTextTopKRouter": ("qwen3_omni_moe", {"norm_topk_prob": True}),
    "Qwen3OmniMoeTalkerTextTopKRouter": ("qwen3_omni_moe", {"norm_topk_prob": False}),
    "Qwen4ExpTextTopKRouter": ("qwen4_exp", {"norm_topk_prob": True}),
    "Ernie4_5_VLMoeMoeTopKRouter": ("ernie4_5_vl_moe", {"moe_norm_min": 1e-12}),
    "Dots3NoteVisionTopKRouter": ("dots3_note", {"router_scaling_factor": 2.5}),
}


def tiny_block(router: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A block that holds one random router of `ROUTERS` as `gate`, and the correction bias it passes to it."""
    import importlib
    from types import SimpleNamespace

    architecture, more = ROUTERS[router]
    modeling = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    torch.manual_seed(0)
    block = nn.Module()
    block.gate = getattr(modeling, router)(SimpleNamespace(**(BASE | more)))
    with torch.no_grad():
        for parameter in block.gate.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    block.to(dtype)
    for _, buffer in block.gate.named_buffers():
        buffer.copy_(torch.rand(buffer.shape) * 0.5)
    block.register_buffer("e_score_correction_bias", torch.rand(BASE["num_experts"]) * 0.5)
    return block

"""Tiny random models of the supported architectures, built from each architecture's own configuration class."""

from __future__ import annotations

import importlib
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
# Layers beside attention have sizes of their own, and those of the real models make a call take up to a second.
_DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA = {
    "mamba_num_heads": 32,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
    "moe_shared_expert_intermediate_size": 32,
}
_ENCODER_DECODER = {"d_model": 64, "decoder_start_token_id": 0, "dropout": 0.0}

# The seven that every behavior is tested on.
MAIN = ("qwen3_moe", "olmoe", "gpt_oss", "phimoe", "mixtral", "qwen2_moe", "deepseek_v3")
# One of each routing family and form of router output.
MECHANISMS = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "phimoe",
    "ernie4_5_moe",
    "gemma4_text",
    "longcat_flash",
    "llama4_text",
    "jetmoe",
    "dbrx",
    "deepseek_v4_with_hash",
    "inkling_text",
    "zaya",
    "switch_transformers",
    "nllb-moe",
    "doge",
)
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
    "qwen3_next": _HYBRID | _DELTA,
    "qwen3_5_moe_text": _HYBRID | _DELTA,
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
    "dots3_note_text": _LATENT
    | {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
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
    "glm_moe_dsa": _SPARSE | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "kimi_linear": _LATENT | _HYBRID | {"linear_head_dim": 16, "linear_num_heads": 4},
    "mimo_v2_flash": _GROUPS,
    "nemotron_h": _MAMBA,
    "solar_open": _GROUPS,
    "hy_v3": {},
    "hy_v4": {"index_n_heads": 2, "index_head_dim": 16, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "afmoe": {},
    "flint": {},
    "kolibri1": {},
    "laguna": {"moe_router_logit_softcapping": 0.5},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_dense_layers": 1},
    "ernie4_5_moe": {},
    "mistral4": _LATENT,
    "mistral_large4_text": _LATENT,
    "muse_spark_text": {"moe_hidden_size": 64},
    "inkling2_text": {},
    "longcat_flash": _LATENT
    | {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 4, "num_layers": 2},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
    },
}
# Routers whose decision has a form of its own, models with an encoder, and parts of other models.
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v4_with_hash": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 64},
    },
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
    "llama4_text_with_top2": {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
    "jetmoe": {"kv_channels": 16},
    "inkling_text": {"n_shared_experts": 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "nemotron_h_with_latent": _MAMBA | {"moe_latent_size": 32},
    "switch_transformers": _ENCODER_DECODER
    | {
        "d_ff": 64,
        "d_kv": 16,
        "num_heads": 4,
        "num_hidden_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "expert_capacity": 2,
    },
    "nllb-moe": _ENCODER_DECODER
    | {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "moe_token_dropout": 0.0,
    },
    "nllb-moe_with_capacity": _ENCODER_DECODER
    | {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "moe_eval_capacity_token_fraction": 0.25,
    },
    "doge": {"is_moe": True, "num_experts": 16},
    # text models inside others: no name of their own, see CLASSES
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [32, 16],
        "moe_num_shared_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "step3p7": {"sliding_window": 4, "mlp_layer_types": ["dense", "sparse", "sparse"], "share_expert_dim": 32},
    "unlimited_ocr": _GROUPS | {"topk_method": "greedy", "routed_scaling_factor": 1.5},
    "deepseek_ocr2": _GROUPS
    | {
        "topk_method": "greedy",
        "routed_scaling_factor": 1.5,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "glm5_next": _LATENT
    | {
        "qk_rope_head_dim": 0,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_topk": 16,
        "index_kpool": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "diffusion_gemma": {"top_k_experts": 2},
    "qwen3_omni_moe": {"norm_topk_prob": True},
    "qwen3_omni_moe_with_talker": {"norm_topk_prob": False, "shared_expert_intermediate_size": 32},
    "qwen4_exp": _HYBRID
    | _DELTA
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
        "shared_expert_intermediate_size": 32,
    },
    "dots3_note_with_vision": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
        "router_scaling_factor": 2.5,
        "patch_size": 4,
    },
}
EVERY = ARCHITECTURES | OTHERS
# Architectures whose text (or vision) part is no model of its own: module, configuration class, model class.
CLASSES: dict[str, tuple[str, str, str]] = {
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe", "Ernie4_5_VLMoeTextConfig", "Ernie4_5_VLMoeTextModel"),
    "step3p7": ("step3p7", "Step3p7TextConfig", "Step3p7TextModel"),
    "unlimited_ocr": ("unlimited_ocr", "UnlimitedOcrTextConfig", "UnlimitedOcrTextModel"),
    "deepseek_ocr2": ("deepseek_ocr2", "DeepseekOcr2TextConfig", "DeepseekOcr2TextModel"),
    "glm5_next": ("glm5_next", "Glm5NextTextConfig", "Glm5NextTextModel"),
    "diffusion_gemma": ("diffusion_gemma", "DiffusionGemmaTextConfig", "DiffusionGemmaEncoderTextModel"),
    "qwen3_omni_moe": ("qwen3_omni_moe", "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel"),
    "qwen3_omni_moe_with_talker": ("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextConfig", "Qwen3OmniMoeTalkerModel"),
    "qwen4_exp": ("qwen4_exp", "Qwen4ExpTextConfig", "Qwen4ExpTextModel"),
    "dots3_note_with_vision": ("dots3_note", "Dots3NoteVisionConfig", "Dots3NoteVisionModel"),
}


def configuration(name: str, **changes: Any) -> Any:
    """The tiny configuration of `name`."""
    from transformers import CONFIG_MAPPING

    values = BASE | EVERY[name] | changes
    if name not in CLASSES:
        return CONFIG_MAPPING[name.split("_with")[0]](**values)
    folder, kind, _ = CLASSES[name]
    config = getattr(importlib.import_module(f"transformers.models.{folder}.configuration_{folder}"), kind)(**values)
    for key, value in EVERY[name].items():
        if not hasattr(config, key):
            setattr(config, key, value)  # the talker of Qwen3-Omni reads what its configuration lacks
    return config


def _build(name: str, config: Any, dtype: torch.dtype, head: bool) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if name in CLASSES:
        folder, _, kind = CLASSES[name]
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        return getattr(modeling, kind)._from_config(config, dtype=dtype)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return (kind if head else AutoModel).from_config(config, dtype=dtype)


def tiny_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, head: bool = False, **changes: Any
) -> nn.Module:
    """A random model of `name` in evaluation mode, with its correction biases filled in so that they matter.

    With `head`, the (causal or sequence to sequence) language model; otherwise the model below its head.
    """
    torch.manual_seed(seed)
    return made_ready(name, _build(name, configuration(name, **changes), dtype, head))


def made_ready(name: str, model: Any) -> Any:
    """`model` in evaluation mode, with what transformers leaves uninitialized or at zero filled in."""
    model.eval()
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in kept):  # as from_pretrained does
                parameter.data = parameter.data.float()
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if key.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.copy_(torch.rand(tensor.shape) * 0.5)
            elif name == "qwen3_omni_moe_with_talker" and ".experts." in key:
                tensor.copy_(torch.randn(tensor.shape) * 0.1)  # transformers leaves them uninitialized
            elif key.endswith("balancing_biases"):
                tensor.copy_(torch.rand(tensor.shape) * 0.1)
            elif key.endswith("tid2eid"):  # a frozen table: different experts for each token id
                tensor.copy_(torch.rand(len(tensor), BASE["num_experts"]).argsort(1)[:, : tensor.shape[1]])
            elif key.endswith(("router.bias", "per_expert_scale", "global_scale")):
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
            elif key.endswith(("router.gate.weight", "gate.weight")) and not bool(tensor.any()):
                tensor.copy_(torch.randn(tensor.shape) * 0.3)  # an architecture that starts its gates at zero
    return model


def inputs(name: str, model: nn.Module, batch: int = 2, length: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """What `model` is called with: token ids, and whatever else `name` needs."""
    ids = tokens(batch, length, seed)
    if name == "qwen3_omni_moe_with_talker":
        generator = torch.Generator().manual_seed(seed)
        dtype = next(model.parameters()).dtype
        return {"inputs_embeds": torch.randn((batch, length, 64), generator=generator).to(dtype)}
    if name == "dots3_note_with_vision":
        generator = torch.Generator().manual_seed(seed)
        patches = torch.randn((16, 3 * 4 * 4), generator=generator).to(next(model.parameters()).dtype)
        return {"pixel_values": patches, "grid_thw": torch.tensor([[1, 4, 4]])}
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": tokens(batch, length - 2, seed + 1)}
    return {"input_ids": ids}


def tokens(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length], none of them special."""
    return torch.randint(3, BASE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))

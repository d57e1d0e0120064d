"""Small models with adapters, as if trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_route.training import AdaptedModel, AdapterConfig, ShardPool, add_adapters

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 3,
        "n_inner": 64,
        "attn_pdrop": 0,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
    },
    "qwen3_moe": {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": {
        "first_k_dense_replace": 0,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}
GROUPS = ["eng", "swh", "eng"]
CONFIGS = {
    "none": AdapterConfig(rank=4),
    "token": AdapterConfig(rank=4, experts=3, router="token"),
    "token, two of three": AdapterConfig(rank=4, experts=3, router="token", top_k=2),
    "sequence": AdapterConfig(rank=4, experts=3, router="sequence"),
    "prefix": AdapterConfig(rank=4, experts=3, router="sequence", pooling="prefix"),
    "group": AdapterConfig(rank=4, router="group", groups=("eng", "swh")),
    "shards": AdapterConfig(rank=4, pool=ShardPool(rank=2)),
    "shards by token": AdapterConfig(rank=4, experts=3, router="token", pool=ShardPool(rank=2)),
}
ROUTED = [name for name, config in CONFIGS.items() if config.routed]


def model_of(kind: str = "llama") -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **CAUSAL[kind]})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapted_model(name: str, kind: str = "llama") -> AdaptedModel:
    """A model with adapters as if trained: B is not zero, and routers prefer some adapters."""
    adapted = add_adapters(model_of(kind), CONFIGS[name])
    as_trained(adapted)
    return adapted


@torch.no_grad()
def as_trained(adapted: AdaptedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in adapted.adapter_parameters().items():
        if parameter_name.endswith(".b"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        elif ".router." in parameter_name:
            parameter.mul_(20)


def batch() -> dict[str, Tensor]:
    """Three sequences of nine tokens, the second padded on the left."""
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(adapted: AdaptedModel, **changed: Tensor) -> Tensor:
    with torch.no_grad(), adapted.labels(GROUPS):
        return adapted.model(**{**batch(), **changed}).logits

"""Rows that only older versions of transformers need: blocks that choose themselves, and renamed router classes.

Router classes already in the table that merely return their outputs in another order need no row here; `probe` detects
the order. The facts were read from transformers 4.57.6, 5.0.0 and 5.6.2 and are tested against them.
"""

from __future__ import annotations

from moe_route.contract.spec import RouterSpec
from moe_route.routers.adapter import Adapter
from moe_route.routers.architectures.jetmoe import JetMoe
from moe_route.routers.architectures.routing_blocks import ByMethod, InForward
from moe_route.routers.family import (
    GROUPED_SOFTMAX,
    PLAIN_SOFTMAX,
    SCALED_GROUPS,
    Family,
    fill_of_left_out,
    without_groups_unless,
)

_CHOSEN = "the block chooses, not the router"
_BY_BLOCK: tuple[type[Adapter], ...] = (ByMethod, InForward)  # `fits` picks one for the version

LEGACY_FAMILIES: tuple[Family, ...] = (
    Family(
        "softmax, chosen by the block",
        (
            "Qwen2MoeSparseMoeBlock",
            "Qwen3MoeSparseMoeBlock",
            "Qwen3NextSparseMoeBlock",
            "Qwen3OmniMoeThinkerTextSparseMoeBlock",
            "Qwen3OmniMoeTalkerTextSparseMoeBlock",
            "OlmoeSparseMoeBlock",
            "FlexOlmoSparseMoeBlock",
        ),
        RouterSpec(score="softmax", renormalize="sum"),
        renormalize_if="norm_topk_prob",
        unfused=_CHOSEN,
        adapter=InForward,
    ),
    *(
        Family(
            "softmax, chosen by the block",
            ("MixtralSparseMoeBlock", "MiniMaxSparseMoeBlock", "HunYuanMoEV1Moe"),
            RouterSpec(score="softmax", renormalize="sum"),
            unfused=_CHOSEN,
            adapter=adapter,
        )
        for adapter in _BY_BLOCK
    ),
    *(
        Family(
            "softmax, chosen by the block",
            ("JambaSparseMoeBlock",),
            PLAIN_SOFTMAX,
            unfused=_CHOSEN,
            adapter=adapter,
        )
        for adapter in _BY_BLOCK
    ),
    Family(
        "softmax, group-limited, chosen by the block",
        ("DeepseekV2Moe",),
        GROUPED_SOFTMAX,
        read=SCALED_GROUPS,
        adjust=without_groups_unless("group_limited_greedy"),
        num_experts="gate.out_features",
        weights="float32",
        input_rank=3,
        unfused=_CHOSEN,
        adapter=ByMethod,
    ),
    Family(
        "softmax, group-limited",
        ("DeepseekV2MoEGate",),
        GROUPED_SOFTMAX,
        read=SCALED_GROUPS,
        adjust=without_groups_unless("group_limited_greedy"),
        weights="float32",
        input_rank=3,
        unfused="it returns no logits",
    ),
    Family(
        "softmax, group-limited, chosen by the block",
        ("Mistral4MoE",),
        RouterSpec(score="softmax", renormalize="sum", eps=1e-20, group_fill=0.0),
        read=SCALED_GROUPS,
        renormalize_if="norm_topk_prob",
        num_experts="n_routed_experts",
        low_precision=True,
        unfused=_CHOSEN,
        adapter=ByMethod,
    ),
    Family(
        "softmax over the chosen, chosen by the experts",
        ("AriaExperts",),
        RouterSpec(score="softmax", order="topk_then_score"),
        top_k="config.moe_topk",
        num_experts="config.moe_num_experts",
        low_precision=True,
        fixed_slots=True,
        unfused=_CHOSEN,
        adapter=ByMethod,
    ),
    Family(
        "softmax over the chosen, grouped by expert",
        ("GraniteMoeTopKGating", "GraniteMoeSharedTopKGating", "GraniteMoeHybridTopKGating"),
        RouterSpec(score="softmax", order="topk_then_score"),
        weights="input",
        unfused="it groups the tokens by expert",
        adapter=JetMoe,
    ),
    Family(
        "sigmoid with correction bias, group-limited, chosen by the block",
        (
            "DeepseekV3MoE",
            "Dots1MoE",
            "ExaoneMoeSparseMoEBlock",
            "Glm4MoeLiteMoE",
            "Glm4MoeMoE",
            "Glm4vMoeTextMoE",
            "GlmMoeDsaMoE",
            "NemotronHMoE",
            "SolarOpenMoE",
        ),
        RouterSpec(score="sigmoid", renormalize="sum", eps=1e-20),
        read=SCALED_GROUPS,
        renormalize_if="norm_topk_prob",
        adjust=fill_of_left_out,
        num_experts="n_routed_experts",
        correction_bias="gate.e_score_correction_bias",
        weights="float32",
        unfused=_CHOSEN,
        adapter=ByMethod,
    ),
    Family(
        "sigmoid with correction bias, chosen by the block",
        ("Lfm2MoeSparseMoeBlock",),
        RouterSpec(score="sigmoid", renormalize="sum", eps=1e-6),
        read={"scale": "routed_scaling_factor"},
        renormalize_if="norm_topk_prob",
        num_experts="gate.out_features",
        correction_bias="expert_bias",
        low_precision=True,
        unfused=_CHOSEN,
        adapter=ByMethod,
    ),
    Family(
        "softmax with correction bias, chosen by the block",
        ("Ernie4_5_MoeSparseMoeBlock",),
        RouterSpec(score="softmax", renormalize="clamp"),
        read={"eps": "norm_min"},
        correction_bias="moe_statics.e_score_correction_bias",
        unfused=_CHOSEN,
        adapter=InForward,
    ),
    Family(
        "sparsemixer, chosen by the block",
        ("PhimoeSparseMoeBlock",),
        RouterSpec(score="sparsemixer"),
        read={"jitter": "router_jitter_noise"},
        low_precision=True,
        unfused=_CHOSEN,
        adapter=InForward,
        notes=("samples its experts in training mode: unsteered tokens keep the sample, steered ones are greedy",),
    ),
)

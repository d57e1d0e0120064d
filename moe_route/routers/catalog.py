"""The table of router families: which router classes exist, and how each turns logits into weights and ids.

The table is data. A row (`Family`) names the router classes that it covers, the attributes of a live router that a
`RouterSpec` is read from, and the form in which the router returns its decision. Where the logits are one plain matrix
product, the row gives its dtypes. A router with another form has a file in `architectures`, with its row. Rows that
only older versions of transformers need are in `legacy`.

The facts were read from transformers 5.23 and are tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from moe_route.contract.spec import RouterSpec
from moe_route.routers.architectures import ARCHITECTURES
from moe_route.routers.family import (
    GROUPED_SOFTMAX,
    PLAIN_SOFTMAX,
    SCALED_GROUPS,
    Family,
    Gate,
    fill_of_left_out,
    own_spec,
    score_function,
    without_groups_unless,
)
from moe_route.routers.legacy import LEGACY_FAMILIES


def _mean_over_top_k(router: Any, spec: RouterSpec) -> RouterSpec:
    return replace(spec, scale=1.0 / float(router.top_k))


def _cohere(router: Any, spec: RouterSpec) -> RouterSpec:
    if router.expert_selection_fn == "softmax":
        return spec
    return replace(spec, score="sigmoid", renormalize="sum" if router.norm_topk_prob else "none")


_SOFTMAX = RouterSpec(score="softmax", renormalize="sum")
_SELECTED_SOFTMAX = RouterSpec(score="softmax", order="topk_then_score")
_SIGMOID = RouterSpec(score="sigmoid", renormalize="sum")
_SIGMOID_EPS = RouterSpec(score="sigmoid", renormalize="sum", eps=1e-20)
_IN_FLOAT32 = Gate(compute="float32")
_BIAS = "e_score_correction_bias"

FAMILIES: tuple[Family, ...] = (
    # A: softmax over all experts -> top-k -> [renormalize]
    Family(
        "softmax",
        (
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3OmniMoeThinkerTextTopKRouter",
            "Qwen3OmniMoeTalkerTextTopKRouter",
            "Qwen4ExpTextTopKRouter",
            "OlmoeTopKRouter",
            "FlexOlmoTopKRouter",
            "MellumTopKRouter",
        ),
        _SOFTMAX,
        renormalize_if="norm_topk_prob",
        gate=Gate(),
    ),
    Family("softmax", ("Qwen3_5MoeTopKRouter", "Qwen3VLMoeTextTopKRouter"), _SOFTMAX, gate=Gate()),
    Family("softmax", ("HunYuanMoEV1Gate",), _SOFTMAX, gate=Gate(weight="wg.weight", compute="weight")),
    Family("softmax", ("MixtralTopKRouter", "MiniMaxTopKRouter"), _SOFTMAX, weights="float32", gate=Gate()),
    Family("softmax", ("JambaTopKRouter",), PLAIN_SOFTMAX, weights="input", gate=Gate()),
    Family(
        "softmax",
        ("Gemma4TextRouter", "DiffusionGemmaTextRouter"),
        _SOFTMAX,
        top_k="config.top_k_experts",
        num_experts="config.num_experts",
        expert_scale="per_expert_scale",
        weights="float32",
        returns=("probabilities", "weights", "ids"),
        unfused="it normalizes and scales its hidden states first",
        known_issues=("the softmax stands in the place of the router logits; statistics and steering use its log",),
    ),
    Family(
        "softmax, group-limited",
        ("DeepseekV2TopkRouter", "DeepseekOcr2TextTopkRouter", "UnlimitedOcrTextTopkRouter"),
        GROUPED_SOFTMAX,
        read=SCALED_GROUPS,
        adjust=without_groups_unless("group_limited_greedy"),
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    # B: top-k over the logits -> softmax over the chosen
    Family("softmax over the chosen", ("AriaTextTopKRouter",), _SELECTED_SOFTMAX, low_precision=True, gate=Gate()),
    Family(
        "softmax over the chosen",
        ("OpenAIPrivacyFilterTopKRouter",),
        _SELECTED_SOFTMAX,
        adjust=_mean_over_top_k,
        weights="float32",
        gate=Gate(bias="bias", compute="float32"),
    ),
    Family(
        "softmax over the chosen",
        (
            "GraniteMoeTopKRouter",
            "GraniteMoeSWATopKRouter",
            "GraniteMoeHybridTopKRouter",
            "GraniteMoeSharedTopKRouter",
        ),
        _SELECTED_SOFTMAX,
        weights="input",
        gate=Gate(result="float32"),
    ),
    Family(
        "softmax or sigmoid over the chosen",
        ("Cohere2MoeTopKRouter",),
        _SELECTED_SOFTMAX,
        adjust=_cohere,
        weights="input",
        low_precision=True,
        gate=Gate(),
    ),
    # C: a score of each logit by itself + correction bias -> [groups] -> top-k -> [renormalize] -> scale
    Family(
        "sigmoid with correction bias, group-limited",
        (
            "AXK1TopkRouter",
            "BailingHybridTopkRouter",
            "BeamTopKRouter",
            "DeepseekV3TopkRouter",
            "DeepseekV32TopkRouter",
            "Dots1TopkRouter",
            "Dots3NoteTextTopkRouter",
            "ExaoneMoeTopkRouter",
            "Glm4MoeTopkRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4vMoeTextTopkRouter",
            "Glm5NextTextTopkRouter",
            "GlmMoeDsaTopkRouter",
            "HYV4TopkRouter",
            "KimiLinearTopkRouter",
            "MiMoV2FlashTopkRouter",
            "NemotronHTopkRouter",
            "SolarOpenTopkRouter",
        ),
        _SIGMOID_EPS,
        read=SCALED_GROUPS,
        renormalize_if="norm_topk_prob",
        adjust=fill_of_left_out,
        num_experts="weight",
        correction_bias=_BIAS,
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    Family(
        "sigmoid with correction bias, group-limited",
        ("AXK2TopkRouter",),
        RouterSpec(score="sigmoid", renormalize="sum", eps=1e-20, group_fill=0.0),
        read=SCALED_GROUPS,
        renormalize_if="norm_topk_prob",
        correction_bias=_BIAS,
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    Family(
        "sigmoid with correction bias",
        ("HYV3TopKRouter", "Dots3NoteVisionTopKRouter"),
        _SIGMOID_EPS,
        read={"scale": "router_scaling_factor"},
        bias_argument=1,
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    Family(
        "sigmoid with correction bias",
        ("MiniMaxM2TopKRouter",),
        _SIGMOID,
        bias_argument=1,
        weights="float32",
        gate=Gate(compute="weight"),
    ),
    Family(
        "sigmoid with correction bias",
        ("MiniMaxM3VLTopKRouter", "Step3p7TopKRouter"),
        _SIGMOID,
        correction_bias=_BIAS,
        weights="float32",
        gate=Gate(compute="weight"),
    ),
    Family(
        "sigmoid with correction bias",
        ("AfmoeTokenChoiceRouter",),
        _SIGMOID_EPS,
        read={"scale": "route_scale"},
        bias_argument=1,
        weights="float32",
        input_rank=3,
        gate=Gate(weight="gate.weight", result="float32"),
    ),
    Family(
        "sigmoid or sqrt-softplus with correction bias",
        ("DeepseekV4TopKRouter",),
        _SIGMOID_EPS,
        read={"scale": "routed_scaling_factor"},
        adjust=score_function,
        correction_bias=_BIAS,
        low_precision=True,
        gate=Gate(),
    ),
    Family(
        "sigmoid or sqrt-softplus with correction bias",
        ("Inkling2TopKRouter",),
        _SIGMOID_EPS,
        read={"scale": "routed_scaling_factor"},
        adjust=score_function,
        correction_bias=_BIAS,
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    Family(
        "sigmoid",
        ("FlintTopKRouter",),
        _SIGMOID,
        renormalize_if="norm_topk_prob",
        weights="float32",
        unfused="it switches autocast off",
    ),
    Family(
        "sigmoid over the chosen, bias on the logits",
        ("Kolibri1TopKRouter",),
        RouterSpec(score="sigmoid", order="topk_then_score", renormalize="sum"),
        renormalize_if="norm_topk_prob",
        correction_bias=_BIAS,
        weights="float32",
        unfused="its matrix product differs from device to device",
    ),
    Family(
        "sigmoid with correction bias",
        ("LagunaTopKRouter",),
        _SIGMOID,
        correction_bias=_BIAS,
        weights="input",
        gate=Gate(result="float32", softcap="router_logit_softcapping"),
    ),
    Family(
        "sigmoid with correction bias",
        ("Lfm2MoeTopKRouter",),
        RouterSpec(score="sigmoid", renormalize="sum", eps=1e-6),
        read={"scale": "routed_scaling_factor"},
        renormalize_if="norm_topk_prob",
        bias_argument=1,
        low_precision=True,
        gate=Gate(),
    ),
    Family(
        "sigmoid with correction bias",
        ("MuseSparkTopkRouter",),
        _SIGMOID,
        read={"eps": "norm_topk_prob_eps", "scale": "routed_scaling_factor"},
        correction_bias=_BIAS,
        weights="float32",
        unfused="it scales its logits",
    ),
    # D: softmax over all experts + correction bias and / or groups
    Family(
        "softmax, group-limited",
        ("Mistral4TopkRouter",),
        RouterSpec(score="softmax", renormalize="sum", eps=1e-20, group_fill=0.0),
        read=SCALED_GROUPS,
        renormalize_if="norm_topk_prob",
        low_precision=True,
        gate=Gate(),
    ),
    Family(
        "softmax, group-limited",
        ("MistralLarge4TextTopkRouter",),
        RouterSpec(score="softmax", renormalize="sum", eps=1e-20, group_fill=0.0),
        read=SCALED_GROUPS,
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    Family(
        "softmax with correction bias",
        ("LongcatFlashTopkRouter",),
        PLAIN_SOFTMAX,
        read={"scale": "routed_scaling_factor"},
        num_experts="n_routed_experts",
        correction_bias=_BIAS,
        weights="float32",
        gate=Gate(weight="classifier.weight", compute="float32"),
        notes=("ids past the number of real experts are identity experts",),
    ),
    # SparseMixer
    Family(
        "sparsemixer",
        ("PhimoeTopKRouter",),
        RouterSpec(score="sparsemixer"),
        read={"jitter": "router_jitter_noise"},
        top_k=2,
        num_experts="out_features",
        low_precision=True,
        unfused="it samples its experts in training mode",
        notes=("samples its experts in training mode: unsteered tokens keep the sample, steered ones are greedy",),
    ),
    *ARCHITECTURES,
    # moe_route.nn.TopKRouter, whose spec is an attribute
    Family("moe_route", ("TopKRouter",), adjust=own_spec, correction_bias="correction_bias", gate=Gate(bias="bias")),
)

# Modules that hold experts but cannot be attached to, each with the reason.
REFUSED: Mapping[str, str] = {
    "VitPoseBackboneMoeMLP": "nothing is routed: the caller's dataset_index names one expert for a whole image",
}


def family_of(router: nn.Module) -> Family | None:
    """The row of the table that covers `router`, or None."""
    return next((family for family in (*FAMILIES, *LEGACY_FAMILIES) if family.covers(router)), None)


def refused_name(module: nn.Module) -> str | None:
    """The class name under which `REFUSED` lists `module`, or None."""
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in REFUSED), None)

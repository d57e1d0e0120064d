"""Router families: which router classes exist, and how each one turns logits into weights and ids.

The table is data. A row names the router classes it covers and says where a `RouterSpec` is read from on a live
router, where the decision lies in the router's output, and, where the router computes its logits with one plain matrix
product, in which dtype. Reading the table imports nothing but torch: classes are matched by name along the MRO, among
classes defined in `transformers` or `moe_route.nn` only (a class of the same name in remote code may return its
decision in another form).

Facts were read from, and are tested against, transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_route.ops import RouterSpec

_PLAIN_SOFTMAX = RouterSpec(score="softmax")
# The modules whose classes the table speaks about.
HOMES = ("transformers.", "moe_route.nn")


@dataclass(frozen=True, slots=True)
class Gate:
    """How a router computes its logits with one matrix product, so that the fused engine may do it instead.

    `compute`: "native" = dtype of the hidden states, "weight" = hidden states cast to the weight's dtype, "float32" =
    both cast to float32. `result`: "native" = as computed, "float32" = logits cast to float32.
    """

    weight: str = "weight"
    bias: str | None = None
    compute: Literal["native", "weight", "float32"] = "native"
    result: Literal["native", "float32"] = "native"


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table. Strings that name a place are dotted attribute paths on the router."""

    name: str  # letter of the routing family and what it does, for people
    routers: tuple[str, ...]
    spec: RouterSpec = _PLAIN_SOFTMAX  # what is the same for every router of the row
    read: Mapping[str, str] = field(default_factory=dict)  # RouterSpec field <- attribute of the router
    renormalise_if: str | None = None  # attribute that switches spec.renormalise on; None = always as in spec
    adjust: Callable[[nn.Module, RouterSpec], RouterSpec] | None = None  # what no attribute alone says
    top_k: str = "top_k"
    num_experts: str = "num_experts"
    correction_bias: str | None = None  # attribute, or "argument:1" where the block passes it to the router
    expert_scale: str | None = None  # factor per expert on the final weight
    weights: Literal["logits", "input", "float32"] = "logits"  # dtype of the weights the router returns
    logits_at: int = 0
    weights_at: int = 1
    ids_at: int = 2
    probabilities: bool = False  # the router returns softmax(logits) where others return logits
    low_precision: bool = False  # scores are computed in the dtype of the logits, not in float32
    input_rank: int = 2
    gate: Gate | None = None
    unfused: str = ""  # why there is no `gate`: what the router does besides one matrix product
    steerable: bool = True
    notes: tuple[str, ...] = ()

    def covers(self, router: nn.Module) -> bool:
        """Whether `router` is, or derives from, a class of this row."""
        return any(c.__name__ in self.routers and c.__module__.startswith(HOMES) for c in type(router).__mro__)

    def spec_of(self, router: nn.Module) -> RouterSpec:
        """The `RouterSpec` of a live router."""
        values = {name: getattr(self.spec, name) for name in RouterSpec.__dataclass_fields__}
        for name, path in self.read.items():
            value = at(router, path)
            if value is not None:
                values[name] = value
        if self.renormalise_if is not None and not at(router, self.renormalise_if):
            values["renormalise"], values["eps"] = "none", 0.0
        if self.weights == "float32":
            values["weight_dtype"] = torch.float32
        spec = RouterSpec(**values)
        return spec if self.adjust is None else self.adjust(router, spec)

    def bias_of(self, router: nn.Module, arguments: tuple[object, ...] = ()) -> Tensor | None:
        """The correction bias in force, float32 [E], or None."""
        if self.correction_bias is None:
            return None
        if self.correction_bias.startswith("argument:"):
            place = int(self.correction_bias.removeprefix("argument:"))
            found = arguments[place] if len(arguments) > place else None
        else:
            found = at(router, self.correction_bias)
        return found.detach().reshape(-1).float() if isinstance(found, Tensor) else None

    def scale_of(self, router: nn.Module) -> Tensor | None:
        """The factor per expert on the final weights, float32 [E], or None."""
        return None if self.expert_scale is None else at(router, self.expert_scale).float()

    def logits_of(self, output: tuple[Tensor, ...]) -> Tensor:
        """Router logits [T, E] out of the router's output; log-probabilities where the router returns probabilities
        (a softmax of either is the same)."""
        logits = output[self.logits_at]
        return logits.log() if self.probabilities else logits


def at(root: Any, path: str) -> Any:
    """The attribute at a dotted path, or None where there is none."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def _without_groups_unless(method: str) -> Callable[[nn.Module, RouterSpec], RouterSpec]:
    def adjust(router: nn.Module, spec: RouterSpec) -> RouterSpec:
        if at(router, "topk_method") == method:
            return spec
        return _replace(spec, groups=1, top_groups=1)

    return adjust


def _mean_over_top_k(router: Any, spec: RouterSpec) -> RouterSpec:
    return _replace(spec, scale=1.0 / float(router.top_k))


def _score_function(router: Any, spec: RouterSpec) -> RouterSpec:
    name = type(router.score_fn).__name__
    score = {"SqrtSoftplusActivation": "sqrt_softplus", "Sigmoid": "sigmoid"}.get(name)
    if score is None:
        raise ValueError(f"{type(router).__name__} scores with {name}, which has no counterpart here")
    return _replace(spec, score=score)


def _cohere(router: Any, spec: RouterSpec) -> RouterSpec:
    if router.expert_selection_fn == "softmax":
        return spec
    return _replace(spec, score="sigmoid", renormalise="sum" if router.norm_topk_prob else "none")


def _own_spec(router: Any, spec: RouterSpec) -> RouterSpec:
    return router.spec


def _replace(spec: RouterSpec, **changes: object) -> RouterSpec:
    values = {name: getattr(spec, name) for name in RouterSpec.__dataclass_fields__}
    return RouterSpec(**(values | changes))


_SOFTMAX = RouterSpec(score="softmax", renormalise="sum")
_SELECTED_SOFTMAX = RouterSpec(score="softmax", order="topk_then_score")
_SIGMOID = RouterSpec(score="sigmoid", renormalise="sum")
_SIGMOID_EPS = RouterSpec(score="sigmoid", renormalise="sum", eps=1e-20)
_GROUPS = {"groups": "num_group", "top_groups": "topk_group"}
_SCALED_GROUPS = _GROUPS | {"scale": "routed_scaling_factor"}
_IN_FLOAT32 = Gate(compute="float32")
_BIAS = "e_score_correction_bias"

FAMILIES: tuple[Family, ...] = (
    # A: softmax over all experts -> top-k -> [renormalise]
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
        renormalise_if="norm_topk_prob",
        gate=Gate(),
    ),
    Family("softmax", ("Qwen3_5MoeTopKRouter", "Qwen3VLMoeTextTopKRouter"), _SOFTMAX, gate=Gate()),
    Family("softmax", ("HunYuanMoEV1Gate",), _SOFTMAX, gate=Gate(weight="wg.weight", compute="weight")),
    Family("softmax", ("MixtralTopKRouter", "MiniMaxTopKRouter"), _SOFTMAX, weights="float32", gate=Gate()),
    Family("softmax", ("JambaTopKRouter",), _PLAIN_SOFTMAX, weights="input", gate=Gate()),
    Family(
        "softmax",
        ("Gemma4TextRouter", "DiffusionGemmaTextRouter"),
        _SOFTMAX,
        top_k="config.top_k_experts",
        num_experts="config.num_experts",
        expert_scale="per_expert_scale",
        weights="float32",
        probabilities=True,
        unfused="it normalises and scales its hidden states first",
        notes=(
            "transformers returns the softmax in the place of the router logits; statistics and steering use its log",
        ),
    ),
    Family(
        "softmax, group-limited",
        ("DeepseekV2TopkRouter", "DeepseekOcr2TextTopkRouter", "UnlimitedOcrTextTopkRouter"),
        RouterSpec(score="softmax", group_score="max", group_fill=0.0),
        read=_SCALED_GROUPS,
        adjust=_without_groups_unless("group_limited_greedy"),
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    # B: top-k over the logits -> softmax over the chosen
    Family(
        "softmax over the chosen",
        ("GptOssTopKRouter",),
        _SELECTED_SOFTMAX,
        low_precision=True,
        gate=Gate(bias="bias"),
        notes=("MXFP4 and kernelised gpt-oss blocks bypass their router and are refused",),
    ),
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
    # C: a score of each logit by itself + correction bias -> [groups] -> top-k -> [renormalise] -> scale
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
        read=_SCALED_GROUPS,
        renormalise_if="norm_topk_prob",
        correction_bias=_BIAS,
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    Family(
        "sigmoid with correction bias, group-limited",
        ("AXK2TopkRouter",),
        RouterSpec(score="sigmoid", renormalise="sum", eps=1e-20, group_fill=0.0),
        read=_SCALED_GROUPS,
        renormalise_if="norm_topk_prob",
        correction_bias=_BIAS,
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    Family(
        "sigmoid with correction bias",
        ("HYV3TopKRouter", "Dots3NoteVisionTopKRouter"),
        _SIGMOID_EPS,
        read={"scale": "router_scaling_factor"},
        correction_bias="argument:1",
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    Family(
        "sigmoid with correction bias",
        ("MiniMaxM2TopKRouter",),
        _SIGMOID,
        correction_bias="argument:1",
        weights="float32",
        gate=Gate(compute="weight"),
        notes=("the auxiliary loss of transformers ignores the correction bias of this router",),
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
        correction_bias="argument:1",
        weights="float32",
        input_rank=3,
        gate=Gate(weight="gate.weight", result="float32"),
    ),
    Family(
        "sigmoid or sqrt-softplus with correction bias",
        ("DeepseekV4TopKRouter",),
        _SIGMOID_EPS,
        read={"scale": "routed_scaling_factor"},
        adjust=_score_function,
        correction_bias=_BIAS,
        low_precision=True,
        gate=Gate(),
    ),
    Family(
        "sigmoid or sqrt-softplus with correction bias",
        ("Inkling2TopKRouter",),
        _SIGMOID_EPS,
        read={"scale": "routed_scaling_factor"},
        adjust=_score_function,
        correction_bias=_BIAS,
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    Family(
        "sigmoid",
        ("FlintTopKRouter",),
        _SIGMOID,
        renormalise_if="norm_topk_prob",
        weights="float32",
        unfused="it switches autocast off",
    ),
    Family(
        "sigmoid over the chosen, bias on the logits",
        ("Kolibri1TopKRouter",),
        RouterSpec(score="sigmoid", order="topk_then_score", renormalise="sum"),
        renormalise_if="norm_topk_prob",
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
        unfused="it caps its logits",
    ),
    Family(
        "sigmoid with correction bias",
        ("Lfm2MoeTopKRouter",),
        RouterSpec(score="sigmoid", renormalise="sum", eps=1e-6),
        read={"scale": "routed_scaling_factor"},
        renormalise_if="norm_topk_prob",
        correction_bias="argument:1",
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
        "softmax with correction bias",
        ("Ernie4_5_MoeTopKRouter", "Ernie4_5_VLMoeMoeTopKRouter"),
        RouterSpec(score="softmax", renormalise="clamp"),
        read={"eps": "norm_min"},
        correction_bias="moe_statics.e_score_correction_bias",
        weights="input",
        unfused="it switches autocast off",
    ),
    Family(
        "softmax, group-limited",
        ("Mistral4TopkRouter",),
        RouterSpec(score="softmax", renormalise="sum", eps=1e-20, group_fill=0.0),
        read=_SCALED_GROUPS,
        renormalise_if="norm_topk_prob",
        low_precision=True,
        gate=Gate(),
    ),
    Family(
        "softmax, group-limited",
        ("MistralLarge4TextTopkRouter",),
        RouterSpec(score="softmax", renormalise="sum", eps=1e-20, group_fill=0.0),
        read=_SCALED_GROUPS,
        weights="float32",
        gate=_IN_FLOAT32,
    ),
    Family(
        "softmax with correction bias",
        ("LongcatFlashTopkRouter",),
        _PLAIN_SOFTMAX,
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
        low_precision=True,
        unfused="it samples its experts in training mode",
        notes=("samples its experts in training mode: unsteered tokens keep the sample, steered ones are greedy",),
    ),
    # this library's own router, whose spec is an attribute
    Family("moe_route", ("TopKRouter",), adjust=_own_spec, correction_bias="correction_bias", gate=Gate(bias="bias")),
)

# Routers whose output is no [T, k] decision; the sentence says why.
SPECIALS: Mapping[str, str] = {
    "Llama4Router": "it returns dense scores that weigh the experts' inputs",
    "SwitchTransformersTop1Router": "it drops tokens past a capacity and returns a one-hot mask",
    "NllbMoeTop2Router": "it drops tokens past a capacity and returns masks",
    "JetMoeTopKGating": "it returns tokens already grouped by expert",
    "DbrxRouter": "it returns logits only; its block chooses",
    "DbrxFFN": "its router returns logits only; the block chooses",
    "DogeCDMoE": "product keys choose inside the block; there is no router module",
    "DeepseekV4HashRouter": "a table of token ids chooses, not the logits",
    "InklingTopkRouter": "it normalises jointly with the shared experts, whose logits it does not return",
    "ZayaRouter": "it carries a state from layer to layer and has a skip expert",
    "VitPoseMoeMLP": "the data set's index chooses the expert",
}


def family_of(router: nn.Module) -> Family | None:
    """The row that covers `router`, or None."""
    return next((family for family in FAMILIES if family.covers(router)), None)


def special_name(module: nn.Module) -> str | None:
    """The name under which `SPECIALS` knows `module`, or None."""
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in SPECIALS), None)

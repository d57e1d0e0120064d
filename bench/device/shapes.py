"""Routing layers of public models, from their published configurations, and torch's way to route like each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_route.ops import RouterSpec


@dataclass(frozen=True)
class ModelShape:
    """The MoE layer of a model. `logits`: the dtype its router computes logits in."""

    name: str
    experts: int
    k: int
    hidden: int
    spec: RouterSpec
    logits: torch.dtype = torch.float32
    biased: bool = False  # a correction bias takes part in the choice

    @property
    def title(self) -> str:
        return f"{self.name}: E={self.experts} k={self.k} H={self.hidden}"


def _sigmoid(**more: float) -> RouterSpec:
    return RouterSpec(score="sigmoid", renormalize="sum", eps=1e-20, **more)  # type: ignore[arg-type]


_SOFTMAX, _SUM = RouterSpec(), RouterSpec(renormalize="sum")
_BF16 = torch.bfloat16

MODELS = (
    ModelShape("Mixtral-8x7B", 8, 2, 4096, _SUM, _BF16),
    ModelShape("Phi-3.5-MoE", 16, 2, 4096, RouterSpec(score="sparsemixer", jitter=0.01), _BF16),
    ModelShape("Qwen1.5-MoE-A2.7B", 60, 4, 2048, _SOFTMAX, _BF16),
    ModelShape("OLMoE-1B-7B", 64, 8, 2048, _SOFTMAX, _BF16),
    ModelShape("gpt-oss-120b", 128, 4, 2880, RouterSpec(order="topk_then_score"), _BF16),
    ModelShape("Qwen3-30B-A3B", 128, 8, 2048, _SUM, _BF16),
    ModelShape("GLM-4.5-Air", 128, 8, 4096, _sigmoid(), biased=True),
    ModelShape("DeepSeek-V3", 256, 8, 7168, _sigmoid(groups=8, top_groups=4, scale=2.5), biased=True),
    ModelShape("MiniMax-M2", 256, 8, 3072, RouterSpec(score="sigmoid", renormalize="sum"), biased=True),
    ModelShape(
        "DeepSeek-V4-Flash",
        256,
        6,
        4096,
        RouterSpec(score="sqrt_softplus", renormalize="sum", eps=1e-20, scale=1.5),
        biased=True,
    ),
    ModelShape("Kimi-K2", 384, 8, 7168, _sigmoid(scale=2.827), biased=True),
    ModelShape("Kimi-K3", 896, 16, 3584, _sigmoid(), biased=True),  # the width of its experts, which are latent
    ModelShape("Qwen3-Next-80B-A3B", 512, 10, 2048, _SUM, _BF16),
)


def route_in_torch(
    logits: torch.Tensor, k: int, spec: RouterSpec, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids as the code of such a model computes them; not for `sparsemixer` and renormalizing by a norm."""
    if spec.order == "topk_then_score":
        chosen, ids = torch.topk(logits, k, dim=-1)
        return torch.softmax(chosen, dim=-1, dtype=torch.float32), ids
    scores = _SCORES[spec.score](logits.float())
    choice = scores if bias is None else scores + bias
    if spec.groups > 1:
        choice = _best_groups(choice, spec)
    ids = torch.topk(choice, k, dim=-1).indices
    weights = scores.gather(1, ids)
    if spec.renormalize == "sum":
        weights = weights / (weights.sum(dim=-1, keepdim=True) + spec.eps)
    return (weights if spec.scale == 1.0 else weights * spec.scale), ids


_SCORES = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits: torch.sqrt(torch.nn.functional.softplus(logits)),
}


def _best_groups(choice: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """`choice` with the experts outside the best groups at -inf; a group is worth its two best [arXiv 2412.19437]."""
    grouped = choice.view(choice.shape[0], spec.groups, -1)
    worth = grouped.topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(worth).scatter_(1, worth.topk(spec.top_groups, dim=-1).indices, 1.0)
    return grouped.masked_fill(kept.unsqueeze(-1) == 0, float("-inf")).flatten(1)

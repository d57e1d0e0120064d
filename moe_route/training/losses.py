"""Losses on router logits. The load-balancing loss is `moe_route.nn.load_balancing_loss`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["own_expert_loss"]


def own_expert_loss(router_logits: Tensor, experts: Tensor) -> Tensor:
    """Mean of ``-log p`` over tokens, where p is the router's probability of the token's own expert.

    It teaches a router whose choice is fixed in training (k = 1), and that gets no gradient from the model's own loss,
    to find the expert by itself.

    Args:
        router_logits: [T, E].
        experts: integers [T], each token's own expert; -1 leaves a token out (padding, or no family).

    Returns a float32 scalar, 0 if every token is left out. Raises ``ValueError`` for other shapes, or for an expert
    that the router does not have.
    """
    if router_logits.dim() != 2 or experts.shape != router_logits.shape[:1]:
        raise ValueError(
            f"router_logits [T, E] and experts [T] are needed, not {list(router_logits.shape)} and "
            f"{list(experts.shape)}"
        )
    if experts.numel() and not -1 <= int(experts.min()) <= int(experts.max()) < router_logits.shape[1]:
        raise ValueError(f"experts must lie between -1 and {router_logits.shape[1] - 1}")
    total = F.cross_entropy(router_logits.float(), experts.long(), ignore_index=-1, reduction="sum")
    return total / torch.clamp((experts >= 0).sum(), min=1)

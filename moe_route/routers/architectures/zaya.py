"""Zaya: a router with a state that passes from layer to layer, and one class more than there are experts: "skip".

The model returns a skipped token as expert 0 with weight 0. Here skipping is the id E, so that it can be counted and
steered like an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_route.contract.spec import RouterSpec
from moe_route.routers.adapter import Adapter
from moe_route.routers.family import Family
from moe_route.routers.output import Decision, Output


class Zaya(Adapter):
    """Reads the output (logits [T, E + 1], weights, ids, state for the next layer)."""

    output_is_complete = False
    changes_choice = True

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """The decision, with id E where the model returned expert 0 with weight 0."""
        logits, weights, ids = output[:3]
        return Decision(logits, weights, torch.where((ids == 0) & (weights == 0), logits.shape[1] - 1, ids))

    def chosen(self, args: tuple[object, ...], output: Output, decision: Decision) -> Decision:
        """The router's choice, with the probability of skipping as the weight of a skipped token."""
        probabilities = decision.logits.softmax(-1).gather(1, decision.ids)
        skipped = decision.ids == decision.logits.shape[1] - 1
        return decision._replace(weights=torch.where(skipped, probabilities, decision.weights))

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """Write skipped tokens and empty slots as expert 0 with weight 0. The state is passed on unchanged."""
        idle = (ids < 0) | (ids == decision.logits.shape[1] - 1)
        weights = weights.masked_fill(idle, 0)
        chosen = ids.masked_fill(idle, 0).to(output[2].dtype)
        return (output[0], weights, chosen, *output[3:]), weights, ids


FAMILY = Family(
    "softmax with correction bias, may skip",
    ("ZayaRouter",),
    RouterSpec(score="softmax"),
    num_experts="num_router_classes",
    correction_bias="balancing_biases",
    low_precision=True,
    input_rank=3,
    unfused="it is a small network with a state",
    adapter=Zaya,
    notes=("the last id skips the experts: its weight is 0",),
)

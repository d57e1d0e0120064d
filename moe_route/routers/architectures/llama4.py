"""Llama 4: top-k over the logits, then a sigmoid. Dense scores [T, E] weigh the inputs of the experts.

Every expert runs on every token. Its input is zero for tokens that did not choose it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_route.contract.spec import RouterSpec
from moe_route.routers.adapter import Adapter
from moe_route.routers.family import Family
from moe_route.routers.output import Decision, Output


class Llama4(Adapter):
    """Reads the output (scores [T, E], zero where not chosen; logits [T, E])."""

    output_is_complete = False

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """Repeat the router's own top-k for the ids; nonzero scores would miss a sigmoid that underflowed to zero."""
        scores, logits = output
        ids = torch.topk(logits, int(self.module.top_k), dim=1).indices
        return Decision(logits, scores.gather(1, ids), ids)

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """Build dense scores that hold the weights at the chosen experts and zero elsewhere."""
        scores = torch.zeros_like(output[0]).scatter_add(1, ids.clamp(min=0).long(), weights)
        return (scores, *output[1:]), weights, ids


FAMILY = Family(
    "sigmoid over the chosen, on the experts' inputs",
    ("Llama4Router",),
    RouterSpec(score="sigmoid", order="topk_then_score"),
    unfused="it returns dense scores",
    adapter=Llama4,
    notes=(
        "the weights scale what goes into the experts, not what comes out: twice the weight is not twice the output",
    ),
)

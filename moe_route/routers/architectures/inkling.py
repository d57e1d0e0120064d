"""Inkling: the chosen experts and the shared experts are normalized together.

Let r be the sigmoids of the chosen experts, s those of the shared experts, R and S their sums, and c a constant. The
weights are c * r / (R + S) and the gammas (weights of the shared experts) c * s / (R + S). The router does not return
the logits of the shared experts, but S = R * sum(gammas) / sum(weights).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_route.contract.spec import RouterSpec
from moe_route.routers.adapter import Adapter
from moe_route.routers.family import Family
from moe_route.routers.output import Decision, Output


class Inkling(Adapter):
    """Reads the output (logits of the routed experts, weights, ids, gammas of the shared experts [T, n])."""

    changes_choice = True

    def chosen(self, args: tuple[object, ...], output: Output, decision: Decision) -> Decision:
        """The router's choice, with the sigmoids of the chosen experts before normalization as weights."""
        return decision._replace(weights=decision.logits.gather(1, decision.ids).sigmoid())

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """Normalize the new sigmoids jointly with those of the shared experts.

        Tokens whose choice and sigmoids are unchanged keep the router's own weights.
        """
        logits, own, own_ids, gammas = output
        sigmoids = self.chosen(args, output, decision).weights
        routed, shared = own.float().sum(1, keepdim=True), gammas.float().sum(1, keepdim=True)
        before = sigmoids.sum(1, keepdim=True)
        others = before * shared / routed
        after = weights.float().sum(1, keepdim=True) + others
        changed = weights * (routed + shared) / after
        same = (ids == own_ids).all(1, keepdim=True) & (weights == sigmoids).all(1, keepdim=True)
        changed = torch.where(same, own, changed.to(own.dtype))
        gammas = torch.where(same, gammas, (gammas.float() * (before + others) / after).to(gammas.dtype))
        return (logits, changed, self.filled(ids).to(own_ids.dtype), gammas), changed, ids


FAMILY = Family(
    "sigmoid with correction bias, normalized with the shared experts",
    ("InklingTopkRouter",),
    RouterSpec(score="sigmoid"),
    correction_bias="e_score_correction_bias",
    weights="input",
    unfused="it normalizes jointly with the shared experts",
    adapter=Inkling,
    notes=("a steered choice changes the weight of the shared experts too: they are normalized together",),
)

"""Switch Transformers: the best expert of each token, as long as it has room.

Of each sequence an expert takes `expert_capacity` tokens, in order. A dropped token bypasses the experts; its slot is
empty.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_route.contract.spec import RouterSpec
from moe_route.routers.adapter import Adapter, Decision, Output, empty_ids
from moe_route.routers.family import Family


class Switch(Adapter):
    """Reads the output (one-hot choice after dropping [B, S, E], probability [B, S, 1], logits [B, S, E])."""

    output_is_complete = False
    changes_choice = True

    @property
    def role(self) -> str:
        """The stack that the router is in: "encoder" or "decoder", which see different tokens."""
        return "decoder" if "decoder." in self.place.name else "encoder"

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """The choice of each token; a row of zeros is a dropped token."""
        taken, probability, logits = (tensor.flatten(0, 1) for tensor in output)
        dropped = ~taken.any(1, keepdim=True)
        ids = empty_ids(taken.argmax(1, keepdim=True), dropped)
        return Decision(logits, probability.masked_fill(dropped, 0), ids)

    def chosen(self, args: tuple[object, ...], output: Output, decision: Decision) -> Decision:
        """The choice before dropping: the largest probability, in the precision of the router."""
        probabilities = decision.logits.softmax(-1, dtype=self.module.dtype).to(output[1].dtype)
        best = probabilities.argmax(-1, keepdim=True)
        ids = torch.where(decision.ids < 0, best, decision.ids)
        return Decision(decision.logits, output[1].flatten(0, 1), ids)

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """Assign tokens to experts up to their capacity, in the order of each sequence."""
        taken = output[0]
        asked = F.one_hot(ids.long().clamp(min=0), taken.shape[-1]) * (ids >= 0)[..., None]
        asked = asked.view(taken.shape).to(taken.dtype)
        granted = asked * (asked.cumsum(-2) <= self.module.expert_capacity)
        dropped = ~granted.flatten(0, 1).any(1, keepdim=True)
        changed = (granted, weights.view(output[1].shape), *output[2:])
        return changed, weights.masked_fill(dropped, 0), empty_ids(ids, dropped)


FAMILY = Family(
    "softmax, with a capacity",
    ("SwitchTransformersTop1Router",),
    RouterSpec(score="softmax"),
    top_k=1,
    low_precision=True,
    input_rank=3,
    unfused="it drops tokens past a capacity",
    adapter=Switch,
    notes=(
        "of each sequence an expert takes expert_capacity tokens, in order and padding included; a dropped token is an "
        "empty slot, and steering one token can drop or admit another",
    ),
)

"""DeepSeek-V4's first layers: a frozen table maps each token id to its experts. The logits only weigh them."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_route.contract.spec import RouterSpec
from moe_route.routers.adapter import Adapter
from moe_route.routers.family import Family, score_function
from moe_route.routers.output import Output


class Hash(Adapter):
    """Reads the usual output (logits, weights, ids) of a router that also needs token ids to run."""

    def probe(self, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
        """Run the router on random token ids together with the hidden states."""
        hidden = hidden.reshape(1, -1, hidden.shape[-1])
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(len(self.module.tid2eid), hidden.shape[:2], generator=generator).to(hidden.device)
        return (hidden, tokens), self.module.forward(hidden.clone(), tokens)


FAMILY = Family(
    "by token id, weighed by sigmoid or sqrt-softplus",
    ("DeepseekV4HashRouter",),
    RouterSpec(score="sigmoid", renormalize="sum", eps=1e-20),
    read={"scale": "routed_scaling_factor"},
    adjust=score_function,
    chosen_by="token ids",
    low_precision=True,
    unfused="a table of token ids chooses",
    adapter=Hash,
    unsteerable="a frozen table of token ids names its experts, so there is no choice to steer",
    known_issues=("output_router_logits leaves its layers out",),
)

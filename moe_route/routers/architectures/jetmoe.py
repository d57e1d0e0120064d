"""JetMoE, and Granite models of older transformers: routers that return tokens grouped by expert.

JetMoE has two kinds of router. One chooses feed-forward experts. The other chooses attention experts, each of which
is a query and an output projection.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_route.contract.spec import RouterSpec
from moe_route.modules.intercept import modeling_of
from moe_route.routers.adapter import Adapter, Decision, Output
from moe_route.routers.family import Family


class JetMoe(Adapter):
    """Reads the output (order of the T * k slots by expert, their tokens, their weights, slots per expert, logits)."""

    output_is_complete = False

    @property
    def role(self) -> str:
        """The kind of router: "attention" or "feed-forward" in JetMoE."""
        kinds = {"JetMoeMoA": "attention", "JetMoeMoE": "feed-forward"}
        return kinds.get(type(self.block).__name__, super().role)

    def notes(self) -> Iterable[str]:
        """A sentence that says what an attention expert is."""
        if self.role == "attention":
            yield "its experts are attention heads; an emptied slot keeps its query and has weight 0"

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """Undo the grouping: slot j of token t has index t * k + j before it."""
        order, _, gates, sizes, logits = output
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        experts = torch.arange(len(sizes), device=order.device)
        grouped = experts.repeat_interleave(torch.tensor(sizes, device=order.device), output_size=len(order))
        shape = (logits.shape[0], int(self.module.top_k))
        return Decision(logits, gates[place].view(shape), grouped[place].view(shape))

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """Group the slots by their new experts."""
        flat = self.filled(ids).long().flatten()
        order = flat.sort(0).indices
        tokens = order.div(ids.shape[1], rounding_mode="trunc")
        experts = torch.arange(decision.logits.shape[1], device=flat.device)
        sizes = (flat[:, None] == experts).sum(0).tolist()  # torch.bincount would break the graph of a compiled model
        return (order, tokens, weights.flatten()[order], sizes, output[4]), weights, ids

    def known_issues(self) -> Iterable[str]:
        """The routers of the attention experts are hooked twice: as routers, and in the output of the attention."""
        model = getattr(modeling_of(self.block), "JetMoePreTrainedModel", None)
        recorders = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
        if isinstance(recorders, list) and len(recorders) > 1:
            yield "output_router_logits and the balancing loss count the routers of the attention twice"


FAMILY = Family(
    "softmax over the chosen, grouped by expert",
    ("JetMoeTopKGating",),
    RouterSpec(score="softmax", order="topk_then_score"),
    weights="input",
    unfused="it groups the tokens by expert",
    adapter=JetMoe,
)

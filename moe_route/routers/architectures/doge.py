"""Doge: product keys. Expert (x, y) has the logit x + y, and the block chooses inside its forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from moe_route.contract.limits import MAX_CHOSEN, MAX_EXPERTS
from moe_route.contract.spec import RouterSpec
from moe_route.modules.intercept import Change, ForwardHook
from moe_route.routers.adapter import Adapter, Decision, Output, OutputHook
from moe_route.routers.family import Family


class Doge(Adapter):
    """Treats the block as the router.

    Only the output of its gate [B, S, 2 * keys] can be observed. The block's choice depends on nothing else and is
    recomputed from it.
    """

    output_is_complete = False

    def obstacle(self) -> str | None:
        """Refuse models with more experts or slots than the statistics tables can hold."""
        experts, slots = self.module.num_experts, self.module.top_k
        if experts > MAX_EXPERTS or slots > MAX_CHOSEN:
            return (
                f"it has {experts} experts and chooses {slots}; up to {MAX_EXPERTS} and {MAX_CHOSEN} can be recorded. "
                "Attach to another model"
            )
        return None

    def known_issues(self) -> Iterable[str]:
        """The bug that a comment in the model's own code names."""
        yield "the halves of the gate's output are split across tokens: a token's experts depend on other tokens"

    def changes(self, hook: OutputHook) -> Sequence[Change]:
        """A hook on the gate inside the block."""
        self.hook = hook
        return (ForwardHook(self.module.router_gate, self._see),)

    def _see(self, gate: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        if self.module.router_gate is not gate:
            raise RuntimeError(
                f"the gate of {self.place.name!r} was wrapped after attach (LoRA), and what it adds is not seen: "
                "detach, and attach again"
            )
        self.hook(self.module, args, (output,))

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """Repeat the block's own steps: the largest sums of the best keys of each half, in the block's order."""
        block, keys = self.module, int(self.module.num_keys)
        halves = output[0].reshape(2, -1, keys)
        values, places = halves.topk(keys, dim=-1)
        sums = (values[0][:, :, None] + values[1][:, None, :]).flatten(1)
        experts = (places[0][:, :, None] * keys + places[1][:, None, :]).flatten(1)
        best, position = sums.topk(int(block.top_k), dim=-1)
        weights = best.softmax(-1)
        if block.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        logits = sums.new_full((len(sums), int(block.num_experts)), float("-inf"))
        return Decision(logits.scatter(1, experts, sums), weights, experts.gather(1, position))

    def probe(self, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
        """Run the gate alone."""
        return (), (self.module.router_gate.forward(hidden.clone()),)


FAMILY = Family(
    "softmax over the chosen product keys",
    ("DogeCDMoE",),
    RouterSpec(score="softmax", order="topk_then_score"),
    low_precision=True,
    input_rank=3,
    unfused="product keys choose inside the block",
    adapter=Doge,
    unsteerable="its block chooses inside its forward, where nothing can be put in between",
)

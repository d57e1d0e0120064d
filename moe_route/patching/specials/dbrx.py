"""DBRX: the router returns logits only; the block chooses, in `route_tokens_to_experts`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moe_route.ops import RouterSpec
from moe_route.patching.adapter import Adapter, Hook, Output, Removable
from moe_route.patching.family import Family
from moe_route.patching.replaced import ReplacedMethod

METHOD = "route_tokens_to_experts"


class Dbrx(Adapter):
    """The block stands for the router: it holds the gate matrix, and its method makes the decision."""

    def listen(self, hook: Hook) -> Sequence[Removable]:
        """Put a method of this object before the block's own."""
        self.hook = hook
        return (ReplacedMethod(self.module, METHOD, self.route_tokens_to_experts),)

    def route_tokens_to_experts(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> weights [T, k], ids [T, k]: the block's own, as the hook leaves them."""
        output = self._decide(router_logits)
        changed = self.hook(self.module, (), output)
        _, weights, ids = output if changed is None else changed
        return weights, ids

    def _decide(self, router_logits: Tensor) -> Output:
        return (router_logits, *getattr(type(self.module), METHOD)(self.module, router_logits))

    def probe(self, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
        """Gate matrix, then the block's choice."""
        router: nn.Module = self.module.get_submodule("router")
        return (), self._decide(router.forward(hidden.clone()))


def _norm(block: nn.Module, spec: RouterSpec) -> RouterSpec:
    p = block.moe_normalize_expert_weights
    if p is None:
        return spec
    return RouterSpec(score="softmax", renormalise="norm", norm_p=float(p))  # type: ignore[arg-type]


FAMILY = Family(
    "softmax, chosen by the block",
    ("DbrxFFN",),
    RouterSpec(score="softmax"),
    adjust=_norm,
    num_experts="experts.num_experts",
    low_precision=True,
    unfused="the block chooses, not the router",
    adapter=Dbrx,
)

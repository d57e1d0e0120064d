"""NLLB-MoE: the two best experts of each token, as long as they have room.

In evaluation an expert takes `fraction * T` tokens of the batch. Tokens that the attention mask excludes get no expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route.contract.spec import RouterSpec
from moe_route.routers.adapter import Adapter, Decision, Output, empty_ids
from moe_route.routers.family import Family


class Nllb(Adapter):
    """Reads the output (one-hot first choice [T, E], weights of both choices [T, E], logits [T, E]), after dropping."""

    output_is_complete = False
    changes_choice = True

    @property
    def role(self) -> str:
        """The stack that the router is in: "encoder" or "decoder", which see different tokens."""
        return "decoder" if "decoder." in self.place.name else "encoder"

    def obstacle(self) -> str | None:
        """Refuse policies that draw the second expert at random, because the draw cannot be read from the output."""
        policy = self.module.second_expert_policy
        if policy == "all":
            return None
        return (
            f"its second_expert_policy {policy!r} draws the second expert at random and does not return what it drew. "
            'Set second_expert_policy="all" in the configuration'
        )

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """The first and second choice; a choice without weight was dropped and is an empty slot."""
        first, combined, logits = output
        both = self._best_two(logits, combined.dtype)
        second = combined.gather(1, both[:, 1:]) != 0
        kept = torch.cat((first.any(1, keepdim=True), second), 1)
        return Decision(logits, combined.gather(1, both) * kept, empty_ids(both, ~kept))

    def chosen(self, args: tuple[object, ...], output: Output, decision: Decision) -> Decision:
        """The two best experts, before any is dropped."""
        logits, dtype = decision.logits, output[1].dtype
        ids = self._best_two(logits, dtype)
        probabilities = self._probabilities(logits, dtype).gather(1, ids)
        least = torch.finfo(dtype).eps
        return Decision(logits, probabilities / probabilities.sum(1, keepdim=True).clamp(min=least), ids)

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """Assign tokens to experts up to their capacity, first choices before second ones."""
        first, combined, logits = output
        filled = ids >= 0
        asked = F.one_hot(ids.long().clamp(min=0), logits.shape[1]) * filled[..., None]  # [T, 2, E]
        kept = self._granted(asked, self._probabilities(logits, combined.dtype), args)
        weights = weights * kept
        if not self.module.normalize_router_prob_before_dropping:
            lone = (filled & ~kept).any(1, keepdim=True)
            total = weights.sum(1, keepdim=True)
            weights = torch.where(lone & (total > 0), weights / total, weights)
        granted = asked * kept[..., None]
        dense = (granted * weights[..., None]).sum(1)
        return (granted[:, 0].to(first.dtype), dense, logits), weights, empty_ids(ids, ~kept)

    def _probabilities(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        return logits.softmax(-1, dtype=self.module.dtype).to(dtype)

    def _best_two(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, 2]: the expert with the largest probability in the model's precision, and the largest other logit."""
        first = self._probabilities(logits, dtype).argmax(-1, keepdim=True)
        return torch.cat((first, logits.scatter(1, first, float("-inf")).argmax(-1, keepdim=True)), 1)

    def _granted(self, asked: Tensor, probabilities: Tensor, args: tuple[object, ...]) -> Tensor:
        """bool [T, 2]: which of the requested choices [T, 2, E] fit into the experts' capacity."""
        padding = args[1] if len(args) > 1 else None
        if isinstance(padding, Tensor) and not self.module.router_ignore_padding_tokens:
            if padding.dim() == 4:
                padding = padding[:, :, -1, :].reshape(-1)[-len(asked) :]
            asked = asked * ~padding.bool()[:, None, None]
        order = torch.arange(len(asked), device=asked.device)
        if self.module.batch_prioritized_routing:
            order = (-probabilities.max(1).values).argsort(dim=0)
        place = torch.empty_like(asked)
        place[order] = asked[order].cumsum(0)
        place[:, 1] += asked[:, 0].sum(0)
        return (asked.bool() & (place <= self._capacity(len(asked)))).any(-1)

    def _capacity(self, num_tokens: int) -> int:
        """How many tokens of this batch an expert takes."""
        router = self.module
        if not router.training and router.moe_eval_capacity_token_fraction > 0:
            return math.ceil(router.moe_eval_capacity_token_fraction * num_tokens)
        return int(router.expert_capacity)

    def known_issues(self) -> Iterable[str]:
        """Find known bugs by running the class's own loop over experts that only record that they were called."""
        kind = type(self.block.experts)
        called = {2} if kind is nn.ModuleDict else experts_called(kind)  # before transformers 5 the block runs them
        if called != {2}:
            names = " and ".join(f"expert_{i}" for i in sorted(called))
            yield (
                f"the experts read the mask of the first choice as ids: whatever the router chooses, only {names} are "
                "run. What is recorded is the router's choice; steering reaches the output through the weights alone"
            )


class _Noted(nn.Module):
    """An expert that records its number when it is called."""

    def __init__(self, number: int, called: set[int]) -> None:
        super().__init__()
        self.number, self.called = number, called

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states unchanged."""
        self.called.add(self.number)
        return hidden


def experts_called(kind: type[nn.Module]) -> set[int]:
    """Which of three experts the forward of `kind` runs for one token that chose expert 2 with weight 1."""
    called: set[int] = set()
    experts = nn.ModuleDict({f"expert_{i}": _Noted(i, called) for i in range(3)})
    experts.num_experts, experts.moe_token_dropout = 3, 0.0  # type: ignore[assignment]
    mask = torch.tensor([[0, 0, 1]])
    kind.forward(experts, torch.ones(1, 1), mask, mask.float())
    return called


FAMILY = Family(
    "softmax, two with a capacity",
    ("NllbMoeTop2Router",),
    RouterSpec(score="softmax", renormalize="clamp", eps=torch.finfo(torch.float32).eps),
    top_k=2,
    low_precision=True,
    unfused="it drops tokens past a capacity",
    adapter=Nllb,
    notes=(
        "an expert takes a limited number of the batch's tokens and none that the attention masks; a dropped choice is "
        "an empty slot, and steering one token can drop or admit another",
    ),
)

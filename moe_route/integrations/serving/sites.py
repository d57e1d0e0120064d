"""The routers of a model that an engine serves, as one of its workers holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.contract.token_tables import TokenTables
from moe_route.integrations.serving.options import EngineNotSupportedError
from moe_route.ops.token_rules import route_tokens
from moe_route.steering.cell import LayerShape

_BLOCKS = {".block_sparse_moe": ".mlp"}
_GATES = {"gpt_oss": "router", "phimoe": "router"}
"""By ``model_type``: name of the router in transformers 5, where it is not ``gate``."""
_CHECKED_ROWS = 64
_WEIGHT_TOLERANCE = 1e-4


@dataclass(eq=False)
class TokenNumbers:
    """What rules that look at single tokens need of the tokens of a step.

    Attributes:
        counter: int64 [T], made of a token's position and id; None if no plan draws.
        entries: int64 [T, M], its row in each of M tables of values per token, -1 for none; None if no plan has one.
        present: whether such rules may reach some token of the step.
    """

    counter: Tensor | None = None
    entries: Tensor | None = None
    present: bool = False

    def at(self, places: Tensor) -> TokenNumbers:
        """Those of the tokens at these places of the step, int64 [N]."""
        counter, entries = (None if one is None else one[places] for one in (self.counter, self.entries))
        return TokenNumbers(counter, entries, self.present)


@dataclass(eq=False)
class Site:
    """One router of the model that this worker runs."""

    name: str  # of the router in transformers
    module: Any  # of the engine, which chooses
    num_experts: int
    top_k: int
    spec: RouterSpec
    correction_bias: Tensor | None
    device: torch.device
    output_scale: float = 1.0  # the engine applies it to the output, transformers to the weights
    kernel: str = "unknown"  # what runs its experts
    role: str = "text"
    reached: int = 0  # calls of the operator; a replayed graph adds none
    steering: SteeringTables | None = None
    statistics: StatisticsTables | None = None
    traced: tuple[Tensor, Tensor] | None = None  # ids and weights of the latest step, [T, k], if they are traced
    steers: bool = False  # whether a plan that runs has a rule for this layer
    by_token: TokenTables | None = None  # all plans that run, if some rule here looks at single tokens
    numbers: TokenNumbers = field(default_factory=TokenNumbers)  # what such rules need of the step that runs
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, 4, dtype=torch.int32))
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 4, dtype=torch.int32))  # those of a step, of `tokens`

    def route(
        self,
        logits: Tensor,
        ids: Tensor,
        weights: Tensor,
        tokens: Tensor,
        numbers: TokenNumbers,
    ) -> tuple[Tensor, Tensor]:
        """Steer and count the router's own choice, ids int32 and weights float32 [T, k]; returns weights and ids.

        ``tokens``: int32 [T, 4], the token table of this layer. ``numbers``: of these tokens.
        """
        given: dict[str, Any] = {
            "correction_bias": self.correction_bias,
            "tokens": tokens,
            "choice": ids,
            "choice_weights": weights,
            "statistics": self.statistics,
        }
        if self.by_token is None or not numbers.present:
            return ops.route(logits, self.top_k, self.spec, steering=self.steering, **given)
        new_weights, new_ids, _ = route_tokens(
            self.by_token,
            logits,
            self.top_k,
            self.spec,
            counter=numbers.counter,
            entries=numbers.entries,
            **given,
        )
        return new_weights, new_ids


def transformers_name(block: str, model_type: str) -> str:
    """Name of a router in transformers 5, from an engine's name of its block: statistics of both then merge."""
    for ending, there in _BLOCKS.items():
        block = block.removesuffix(ending) + there if block.endswith(ending) else block
    return f"{block}.{_GATES.get(model_type, 'gate')}"


@torch.inference_mode()
def check(site: Site, choose: Callable[[Tensor], tuple[Tensor, Tensor]], kind: str) -> None:
    """Raise ``EngineNotSupportedError`` unless the spec gives what a router gives, on 64 random rows.

    ``choose``: weights and ids of the engine for logits [64, E]. ``kind``: what the message calls the router.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(_CHECKED_ROWS, site.num_experts, generator=generator) * 2).to(site.device)
    weights, ids = choose(logits)
    weights, ids = weights[:, : site.top_k].float(), ids[:, : site.top_k].long()
    mine, chosen = ops.route(logits, site.top_k, site.spec, correction_bias=site.correction_bias)
    order, other = ids.argsort(-1), chosen.long().argsort(-1)
    same = bool((ids.gather(-1, order) == chosen.long().gather(-1, other)).all())
    gap = float((weights.gather(-1, order) - mine.gather(-1, other)).abs().max())
    if not same or not gap <= _WEIGHT_TOLERANCE:
        what = f"weights differ by {gap:.2g}" if same else "it chooses other experts"
        raise EngineNotSupportedError(
            f"moe_route: {site.name}: {kind} does not route as {site.spec} says ({what}): this model is not known "
            "here; use mr.attach in transformers"
        )


def traced_buffers(site: Site, most_tokens: int) -> tuple[Tensor, Tensor]:
    """Room for the ids and weights of the largest step."""
    return (
        torch.full((most_tokens, site.top_k), -1, dtype=torch.int16, device=site.device),
        torch.zeros(most_tokens, site.top_k, device=site.device),
    )


# ---- which of the model's layers a worker holds


@dataclass(frozen=True)
class Stage:
    """The place of a worker's MoE layers among those of the model.

    Attributes:
        layers: experts and top-k of all MoE layers of the model.
        first: index of this worker's first one.
        count: number of its own; 0 in a stage that has dense layers only.
    """

    layers: tuple[LayerShape, ...]
    first: int
    count: int

    @classmethod
    def among(cls, stages: Sequence[Sequence[LayerShape]], index: int) -> Stage:
        """The stage of this index, from the shapes of the layers of each."""
        first = sum(len(stage) for stage in stages[:index])
        return cls(tuple(layer for stage in stages for layer in stage), first, len(stages[index]))

    @property
    def own(self) -> slice:
        """This worker's layers among all."""
        return slice(self.first, self.first + self.count)

    def within(self, layers: Sequence[int]) -> list[int]:
        """Those of these layers of the model that this worker holds, as indices among its own.

        Raises ``EngineNotSupportedError`` for a layer that the model does not have.
        """
        outside = [layer for layer in layers if not 0 <= layer < len(self.layers)]
        if outside:
            raise EngineNotSupportedError(
                f"moe_route: there is no layer {outside[0]} to trace: the model has MoE layers 0 to "
                f"{len(self.layers) - 1}"
            )
        return [layer - self.first for layer in layers if self.first <= layer < self.first + self.count]

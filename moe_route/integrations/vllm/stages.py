"""Which layers of the model a worker holds: all of them, or those of its stage of pipeline parallelism.

Plans and traces name layers of the whole model, so every stage knows the shapes of all MoE layers, and its own place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_route.integrations.vllm.versions import EngineNotSupportedError, find
from moe_route.steering.compiled import LayerShape

if TYPE_CHECKING:
    from moe_route.integrations.vllm.sites import Site

__all__ = ["Stage", "find_stage"]

_NO_LAYERS = (
    "moe_route: no MoE layer of vLLM's own was found; a model that runs on vLLM's Transformers backend routes inside "
    "transformers: use mr.attach(model) there"
)


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


def find_stage(read: Callable[[], list[Site]], stages: int) -> tuple[list[Site], Stage]:
    """The sites that ``read`` finds in this worker, and their place; all stages call this while they load the model.

    An error of one stage is raised in all of them, so that none waits for another.

    Raises ``EngineNotSupportedError`` that ``read`` raised, here or in another stage, and where no stage has a layer.
    """
    sites: list[Site] = []
    found: tuple[LayerShape, ...] | str
    try:
        sites = read()
        found = tuple(LayerShape(site.num_experts, site.top_k) for site in sites)
    except EngineNotSupportedError as error:
        found = str(error)
    index, of_all = (0, [found]) if stages == 1 else _exchanged(found)
    wrong = next((one for one in of_all if isinstance(one, str)), None)
    if wrong is not None:
        raise EngineNotSupportedError(wrong)
    stage = Stage.among([one for one in of_all if not isinstance(one, str)], index)
    if not stage.layers:
        raise EngineNotSupportedError(_NO_LAYERS)
    return sites, stage


def _exchanged(mine: Any) -> tuple[int, list[Any]]:
    """The index of this stage, and what all stages said; they are the ranks of vLLM's pipeline group."""
    group = find("vllm.distributed.parallel_state:get_pp_group")()
    answers: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(answers, mine, group=group.cpu_group)
    return group.rank_in_group, answers

"""Groups of ranks that run one copy of a model together, by tensor or expert parallelism of transformers.

A launcher (torchrun, accelerate launch) starts R ranks. With N ranks per model they form R / N groups of consecutive
ranks. The ranks of a group are a world of their own for torch.distributed, so groups never wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch

from moe_route.base.devices import accelerator

# a rank may wait while another one reads a large checkpoint, or writes one
_PATIENCE = timedelta(hours=2)

Result = TypeVar("Result")


class ModelParallelError(ValueError):
    """Raised if the ranks cannot share a model; the message names the fix."""


@dataclass(frozen=True)
class ModelParallelGroup:
    """The group of this rank.

    Attributes:
        number, groups: number of the group, and how many there are.
        member, size: number of this rank in its group, and how many ranks the group has.
        how: "tensor" divides matrices among its ranks, "expert" gives each some of the experts, whole, and divides
            other matrices; None for a group of one.
    """

    number: int = 0
    groups: int = 1
    member: int = 0
    size: int = 1
    how: Literal["tensor", "expert"] | None = None

    @property
    def writes(self) -> bool:
        """Whether this rank writes the results of its group."""
        return self.member == 0

    def load_options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that divide the model among the ranks of the group."""
        if self.how is None:
            return {}
        try:
            from transformers.distributed import DistributedConfig

            sizes: dict[str, Any] = {"tp_size": self.size}
            if self.how == "expert":
                sizes["ep_size"] = self.size
            return {"distributed_config": DistributedConfig(**sizes)}
        except (ImportError, TypeError) as error:
            raise ImportError(
                "a model that is divided among ranks needs transformers 5.23 or newer: pip install -U transformers"
            ) from error

    def any(self, value: bool) -> bool:
        """Whether the value is true on any rank of the group. All of its ranks must call this."""
        if self.size == 1:
            return value
        flag = torch.tensor([value], dtype=torch.int32)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def of_writer(self, make: Callable[[], Result]) -> Result:
        """What ``make`` returns on the rank that writes, or the exception that it raises, on all ranks of the group."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.writes:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        torch.distributed.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        if made[1] is not None:
            raise made[1]
        result: Result = made[0]
        return result


ALONE = ModelParallelGroup()
"""The only rank of the only group."""


@contextmanager
def model_parallel_group(size: int, how: Literal["tensor", "expert"]) -> Iterator[ModelParallelGroup]:
    """Join the group of this rank, as the environment variables of a launcher say; it is left when the block ends.

    Raises ``ModelParallelError`` without a launcher, if ``size`` does not divide the number of ranks, and if
    torch.distributed is in use already.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ModelParallelGroup(rank, ranks)
        return
    distributed = torch.distributed
    if ranks % size:
        raise ModelParallelError(
            f"{size} ranks run a model together, and there are {ranks}: start a multiple of {size}, such as "
            f"torchrun --nproc-per-node {size} -m moe_route ..."
        )
    if distributed.is_initialized():
        raise ModelParallelError("torch.distributed is in use already: leave its initialization to moe-route")
    group = ModelParallelGroup(rank // size, ranks // size, rank % size, size, how)
    store, _, _ = next(distributed.rendezvous("env://", timeout=_PATIENCE))
    kind = accelerator()
    backend = "gloo" if kind is None else distributed.get_default_backend_for_device(kind)
    distributed.init_process_group(
        backend if backend == "gloo" else f"cpu:gloo,{kind}:{backend}",
        store=distributed.PrefixStore(f"moe-route-{group.number}", store),
        rank=group.member,
        world_size=size,
        timeout=_PATIENCE,
    )
    try:
        yield group
    finally:
        distributed.destroy_process_group()


def share_of_weights(model: torch.nn.Module) -> float:
    """Part of the bytes of all weights that this rank holds, from 0 to 1; 1 if nothing is divided."""
    from torch.distributed.tensor import DTensor  # slow to import

    weights = list(model.parameters())
    here = sum((weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in weights)
    return here / max(sum(weight.nbytes for weight in weights), 1)

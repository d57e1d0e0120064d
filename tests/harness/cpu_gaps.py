"""What vLLM 0.30 to 0.32 lacks on a CPU, for parallel engines: a plug-in of the tests, no part of moe_route.

Without it a stock engine, with or without moe_route, ends in an error: experts of other ranks are read past the weights
(expert parallelism), and the communicator of CPUs has no gathering of tensors of several lengths (data parallelism).
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def register() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    CPUUnquantizedExperts.apply = with_own_experts(CPUUnquantizedExperts.apply)


def install(folder: Path) -> list[str]:
    """Make the plug-in known in ``folder``; returns the folders that processes need on their path."""
    info = folder / "cpu_gaps-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-gaps\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ncpu_gaps = cpu_gaps:register\n")
    return [str(folder), str(Path(__file__).parent)]


def with_own_experts(apply: Any) -> Any:
    """An experts' ``apply`` that leaves out the choices of experts that another rank has."""
    signature = inspect.signature(apply)

    @functools.wraps(apply)
    def applied(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given["expert_map"] is not None:
            own = given["expert_map"][given["topk_ids"].long()]
            given["topk_weights"] = given["topk_weights"] * (own >= 0)
            given["topk_ids"] = own.clamp(min=0).to(given["topk_ids"].dtype)
        return apply(**given)

    return applied


def all_gatherv(self: Any, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None) -> Any:
    """The rows of all ranks, one rank after the other; ``sizes``: how many each has."""
    assert dim == 0
    if isinstance(input_, list):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    sizes = [len(input_)] * self.world_size if sizes is None else sizes
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self: Any, input_: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
    """The sum over ranks, of which this rank keeps its rows."""
    assert dim == 0
    sizes = [len(input_) // self.world_size] * self.world_size if sizes is None else sizes
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    first = sum(sizes[: self.rank_in_group])
    return total[first : first + sizes[self.rank_in_group]].clone()

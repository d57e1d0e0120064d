"""Add up the statistics of a run on several ranks.

Each rank counts the tokens that it routed. Ranks of data parallelism (also FSDP) route different tokens, so the sum
over ranks describes the run. Ranks of tensor and expert parallelism all route the same tokens, so any one of them
describes the run.
"""

from __future__ import annotations

import copy

import torch
from torch.distributed import ProcessGroup

from moe_route.recording.metadata import add_fingerprints
from moe_route.recording.statistics import MergeError, RoutingStatistics
from moe_route.recording.store import SequenceShard, SequenceStore, is_unnamed

_Part = tuple[RoutingStatistics, list[SequenceShard] | None]


def all_reduce(statistics: RoutingStatistics | None, group: ProcessGroup | None = None) -> RoutingStatistics:
    """Add up the statistics of the ranks of ``group``; every rank gets the same sum, and all of them must call this.

    The sums are of integers, so they are exact. Recorded sequences are exchanged too.

    Args:
        statistics: those of this rank, or None if it recorded nothing.
        group: the ranks that were given different tokens, such as ``model.device_mesh["fsdp"].get_group()``; None for
            all ranks.

    Raises:
        RuntimeError: there is no initialized process group.
        ValueError: this rank is not in ``group``.
        MergeError: two ranks recorded the same tokens (leave one of the ranks that share a batch out of the group), or
            no rank recorded anything.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialized: a single process holds the whole run, use it as it is"
        )
    ranks = distributed.get_world_size(group)
    if ranks < 1:
        raise ValueError("this rank is not in the group: call all_reduce with a group that it belongs to")
    received: list[_Part | None] = [None] * ranks
    distributed.all_gather_object(received, None if statistics is None else _packed(statistics), group=group)
    parts = {rank: _unpacked(part) for rank, part in enumerate(received) if part is not None}
    if not parts:
        raise MergeError("no rank of the group recorded anything: call the attached model inside the recording")
    _refuse_replicas(parts)
    first, *others = parts.values()
    for other in others:
        first = first.merge(other)
    return first


def _packed(statistics: RoutingStatistics) -> _Part:
    alone = copy.copy(statistics)
    alone.store = None
    return alone, None if statistics.store is None else list(statistics.store.shards())


def _unpacked(part: _Part) -> RoutingStatistics:
    statistics, shards = part
    if shards is not None:
        statistics.store = store = SequenceStore(statistics.layers, statistics.num_experts)
        for shard in shards:  # sequences without item are numbered as the store numbers them
            keys = [(store.next_unnamed() if is_unnamed(item) else item, group) for item, group in shard.keys]
            store.append(keys, dict(shard.arrays))
    return statistics


def _refuse_replicas(parts: dict[int, RoutingStatistics]) -> None:
    seen: dict[str, int] = {}
    nothing = add_fingerprints(None, None)
    for rank, statistics in parts.items():
        fingerprint = statistics.metadata.get("fingerprint") or nothing
        if fingerprint != nothing and fingerprint in seen:
            raise MergeError(
                f"ranks {seen[fingerprint]} and {rank} of the group recorded the same tokens: ranks of tensor and "
                "expert parallelism share their batch, and are not added up. Give the data-parallel group, such as "
                'all_reduce(statistics, model.device_mesh["fsdp"].get_group())'
            )
        seen[fingerprint] = rank

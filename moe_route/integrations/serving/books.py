"""Files of statistics that one engine after the other adds to."""

from __future__ import annotations

import re
from pathlib import Path

from moe_route.integrations.serving.answers import held
from moe_route.recording.statistics import RoutingStatistics
from moe_route.recording.store import SequenceStore, is_unnamed

_RANK = re.compile(r"\.rank\d+$")


def ranked(path: Path, rank: int) -> Path:
    """The file of one rank of data parallelism: books.rank0.safetensors."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def newest_of(path: Path) -> tuple[RoutingStatistics | None, int]:
    """The statistics that servers saved under ``path``, and their generation; None and 0 if there are none.

    Files of ranks add up. Those of older generations are in them already. Requests that ran when a file was written
    are no longer running.

    Raises ``files.FileRefusedError`` for a damaged file.
    """
    beside = [one for one in path.parent.iterdir() if one.name.endswith(path.suffix) and one.is_file()]
    named = [one for one in beside if _RANK.sub("", one.name.removesuffix(path.suffix)) == path.stem]
    parts = [RoutingStatistics.load(one, partial=True) for one in sorted(named)]
    generations = [int(part.metadata.pop("generation", "0")) for part in parts]
    newest = max(generations, default=0)
    total: RoutingStatistics | None = None
    for part, generation in zip(parts, generations, strict=True):
        if generation < newest:
            continue
        part = held(part)
        running = part.metadata.get("running_sequences", 0)
        part.metadata["abandoned_sequences"] = part.metadata.get("abandoned_sequences", 0) + running
        part.metadata["running_sequences"] = 0
        total = part if total is None else added(total, part)
    return total, newest


def added(base: RoutingStatistics, new: RoutingStatistics, *, sequences: bool = True) -> RoutingStatistics:
    """Both; a repeated item is kept without its id, as inside one run."""
    if not sequences:
        base = base.select(base.groups)
        base.store = new.store = None
    if base.store is not None and new.store is not None:
        kept = SequenceStore(new.layers, new.num_experts)
        repeated = 0
        for shard in new.store.shards():
            known = [key in base.store and not is_unnamed(key[0]) for key in shard.keys]
            repeated += sum(known)
            unnamed = [again or is_unnamed(item) for again, (item, _) in zip(known, shard.keys, strict=True)]
            keys = [
                (kept.next_unnamed() if without else item, group)
                for without, (item, group) in zip(unnamed, shard.keys, strict=True)
            ]
            kept.append(keys, shard.arrays)
        new.store = kept
        new.metadata["repeated_items"] = new.metadata.get("repeated_items", 0) + repeated
    return base + new

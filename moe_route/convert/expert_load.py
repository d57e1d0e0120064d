"""Loads of experts: dumps of SGLang's expert distribution recorder, vLLM's balancer state, EPLB weights.

SGLang (``sglang/srt/eplb/expert_distribution.py``) saves with torch.save. Mode "stat": {"logical_count": int [steps,
layers, experts]}. Modes "per_pass" and "per_token": {"records": [{"global_physical_count": int [layers, physical]}],
"last_physical_to_logical_map": int [layers, physical]}, one file per rank. ``--init-expert-location`` takes
{"logical_count"}, too. vLLM's EplbState has ``expert_load_window`` [window, layers, physical] and
``physical_to_logical_map`` [layers, physical]. EPLB (github.com/deepseek-ai/EPLB) takes one array [layers, experts].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_route.convert.source import Source, as_array
from moe_route.convert.tables import counted, number_table
from moe_route.recording import RoutingStatistics

__all__ = ["is_eplb", "is_sglang", "is_vllm", "read_eplb", "read_sglang", "read_vllm"]


def is_sglang(source: Source) -> bool:
    return _holds(source, "logical_count") or _holds(source, "records", "last_physical_to_logical_map")


def is_vllm(source: Source) -> bool:
    return _holds(source, "expert_load_window", "physical_to_logical_map")


def is_eplb(source: Source) -> bool:
    return _one_array(source) is not None and np.ndim(_one_array(source)) in (2, 3)


def _holds(source: Source, *names: str) -> bool:
    return isinstance(source.content, Mapping) and all(name in source.content for name in names)


def _one_array(source: Source) -> Any:
    """The only array of the file, or None."""
    content = source.content
    if isinstance(content, Mapping) and len(content) == 1 and source.form != "json" and not is_sglang(source):
        content = next(iter(content.values()))
    if source.form == "json" and not (isinstance(content, list) and content and isinstance(content[0], list)):
        return None
    try:
        return as_array(content)
    except (ValueError, TypeError):
        return None


def read_sglang(source: Source, *, top_k: int | None = None, group: str | None = None) -> RoutingStatistics:
    """Statistics of a dump; add up the files of all ranks (modes "per_pass" and "per_token").

    The dump tells neither prompts from answers nor requests apart: all counts are of one group and phase "prefill".
    """
    if "logical_count" in source.content:
        counts = number_table(source, source.content["logical_count"], "layer, expert")
        return counted(source, counts, top_k=top_k, format="sglang", group=group)
    records = source.content["records"]
    if not records:
        raise source.refused("it has no records", "start the recording before the requests")
    owners = as_array(source.content["last_physical_to_logical_map"])
    load = np.zeros(owners.shape, np.int64)
    for one in records:
        found = number_table(source, one["global_physical_count"], "layer, physical expert")
        if found.shape != load.shape:
            raise source.refused(f"a record is {list(found.shape)}, the map {list(load.shape)}", "dump one server")
        load += found
    return counted(source, _logical(source, load, owners), top_k=top_k, format="sglang", group=group)


def read_vllm(source: Source, *, top_k: int | None = None, group: str | None = None) -> RoutingStatistics:
    """Statistics of the window of steps that vLLM's balancer keeps."""
    load = number_table(source, source.content["expert_load_window"], "layer, physical expert")
    owners = as_array(source.content["physical_to_logical_map"])
    return counted(source, _logical(source, load, owners), top_k=top_k, format="vllm-load", group=group)


def read_eplb(source: Source, *, top_k: int | None = None, group: str | None = None) -> RoutingStatistics:
    """Statistics of loads [layer, expert], or [step, layer, expert]; they must be counts."""
    counts = number_table(source, _one_array(source), "layer, expert")
    return counted(source, counts, top_k=top_k, format="eplb", group=group)


def _logical(source: Source, load: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Sum the loads of the copies of each expert: ``load[l, p]`` goes to expert ``owners[l, p]``."""
    if owners.shape != load.shape or owners.dtype.kind not in "iu":
        raise source.refused(
            f"its map of physical experts is {owners.dtype} {list(owners.shape)}, its loads are {list(load.shape)}",
            "save both from one process, after the last rebalancing",
        )
    if owners.min() < 0:
        raise source.refused("its map has physical experts that belong to no expert", "save it after the start")
    counts = np.zeros((len(load), int(owners.max()) + 1), load.dtype)
    np.add.at(counts, (np.arange(len(load))[:, None], owners), load)
    return counts

"""Checks and sums that several readers share."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moe_route.convert.source import Source, as_array
from moe_route.recording import RoutingStatistics

__all__ = ["counted", "number_table", "whole_numbers"]

_LARGEST = 2.0**53  # floats are whole numbers up to here
_ROWS = 64  # slices of the first axis that are added up at once
logger = logging.getLogger(__name__)


def whole_numbers(source: Source, keys: Iterable[str]) -> list[int]:
    """Keys such as "0", "1", "10" as integers in increasing order; refuses other keys, and a file without any."""
    try:
        found = sorted(int(key) for key in keys)
    except (TypeError, ValueError) as error:
        raise source.refused(f"its keys are not numbers of layers or experts ({error})", "check --from") from error
    if not found or found[0] < 0:
        raise source.refused("it holds no layers, or a negative one", "record again")
    return found


def number_table(source: Source, value: Any, axes: str) -> np.ndarray:
    """An array of finite numbers from 0 with the named last axes ("layer, expert"); earlier axes are summed over."""
    try:
        array = as_array(value)
    except ValueError as error:
        raise source.refused(f"[{axes}] is not a table ({error})", "save an array of numbers") from error
    wanted = axes.count(",") + 1
    if array.ndim < wanted or not array.size:
        raise source.refused(f"[{axes}] has shape {list(array.shape)}", f"it needs {wanted} axes with entries")
    flat = array.reshape(-1, *array.shape[array.ndim - wanted :])
    total = np.zeros(flat.shape[1:], np.int64 if array.dtype.kind in "biu" else np.float64)
    for start in range(0, len(flat), _ROWS):
        part = flat[start : start + _ROWS]
        if not (part >= 0).all() or (part > _LARGEST).any():
            raise source.refused(f"[{axes}] holds negative numbers, or some that are not finite", "record again")
        total += part.sum(axis=0)
    return total


def counted(
    source: Source,
    counts: np.ndarray,
    *,
    top_k: int | None,
    format: str,
    group: str | None = None,
    layers: Sequence[str] | None = None,
) -> RoutingStatistics:
    """Statistics of counts ``[L, E]``: a layer has sum / ``top_k`` tokens. Layers without counts are left out.

    Refuses counts that are not whole, or that ``top_k`` does not divide.
    """
    if top_k is None:
        raise ValueError(f"{source.path} holds selections, not tokens: pass top_k (--top-k), experts per token")
    if (counts != np.rint(counts)).any():
        raise source.refused("its loads are not whole numbers of tokens", "convert counts, before they are averaged")
    names = list(layers or map(str, range(len(counts))))
    used: np.ndarray = np.any(counts, axis=1)
    if not used.any():
        raise source.refused("no expert was chosen", "start the recording before the requests")
    if not used.all():
        empty = [name for name, here in zip(names, used, strict=True) if not here]
        logger.warning("%s: layers %s have no counts and are left out (dense layers?)", source.path, ", ".join(empty))
    sums = counts[used].astype(np.int64).sum(axis=1)
    if (sums % top_k).any():
        raise source.refused(
            f"layer {names[int(np.flatnonzero(used)[(sums % top_k > 0).argmax()])]} has "
            f"{int(sums[(sums % top_k > 0).argmax()])} selections, not a multiple of top_k {top_k}",
            "check --top-k",
        )
    return RoutingStatistics.from_token_sums(
        [group or source.name],
        counts=counts[used][None],
        tokens=(sums // top_k)[None],
        top_k=top_k,
        layers=[name for name, here in zip(names, used, strict=True) if here],
        num_experts=counts.shape[1],
        tolerance=0.0,
        metadata={"format": format},
    )

"""Routed tokens of other programs as a ``Trace``, and a trace as sums."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

import numpy as np

from moe_route.calls.call import PHASES
from moe_route.recording import RoutingStatistics, Trace
from moe_route.recording.store import Item

_MODEL_LAYER = re.compile(r"(?:^|\D)(\d+)(?:\D|$)")
_ROWS = 1 << 16  # tokens that are summed at once
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RoutedSequence:
    """The experts of the T tokens of one sequence."""

    ids: np.ndarray  # int [T, L, k]; -1 is an empty slot
    item: Item | None = None
    group: str = "all"
    weights: np.ndarray | None = None  # float [T, L, k]; None if they are not known
    token_ids: np.ndarray | None = None  # int [T]
    prompt: int | None = None  # number of leading tokens that are the prompt; None: all
    first: int = 0  # position of the first token


def model_layers(names: Sequence[str]) -> list[int]:
    """The number of each router's layer among all layers of the model, dense ones too: the first in its name."""
    in_names = [_MODEL_LAYER.findall(name) for name in names]
    numbers = [int(of[0]) for of in in_names if of]
    if len(numbers) != len(in_names) or len(set(numbers)) != len(numbers):
        raise ValueError(
            f"engines count every layer of the model, and {names[0]!r} and others do not say which they are"
        )
    return numbers


def routed_layers(sequences: Sequence[np.ndarray], layers: Sequence[int] | None = None) -> list[int]:
    """Which of the L layers of ids ``[T, L, k]`` are MoE layers: those given, or all that choose.

    Recorders keep a row for dense layers, too, filled with -1 or 0; those are left out, with a warning.
    """
    _, count, slots = sequences[0].shape
    if layers is not None:
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong:
            raise ValueError(f"there is no layer {wrong[0]}: the ids are of {count} layers, 0 to {count - 1}")
        return list(layers)
    dense = [
        layer
        for layer in range(count)
        if all((ids[:, layer] == -1).all() for ids in sequences)
        or (slots > 1 and not any(ids[:, layer].any() for ids in sequences))
    ]
    if dense:
        logger.warning(
            "layers %s of the ids choose no experts and count as dense: MoE layers are numbered without them", dense
        )
    return [layer for layer in range(count) if layer not in dense]


def trace_of(sequences: Sequence[RoutedSequence], layers: Sequence[str], numbers: Sequence[int] | None = None) -> Trace:
    """A trace of sequences that have the same L layers, named ``layers``; ``numbers`` are indices among the MoE layers.

    Weights that are not known are NaN, token ids -1.
    """
    if not sequences or not sum(len(one.ids) for one in sequences):
        raise ValueError("there are no tokens: record some first")
    widest = max(one.ids.shape[2] for one in sequences)
    largest = max(int(one.ids.max(initial=-1)) for one in sequences)
    smallest = min(int(one.ids.min(initial=0)) for one in sequences)
    if smallest < -1 or largest > np.iinfo(np.int16).max:
        wrong = smallest if smallest < -1 else largest
        raise ValueError(f"{wrong} is not an expert: ids count from 0, and -1 is an empty slot")
    groups = list(dict.fromkeys(one.group for one in sequences))
    lengths = [len(one.ids) for one in sequences]
    ids = np.full((sum(lengths), len(layers), widest), -1, np.int8 if largest < 128 else np.int16)
    weights = np.full(ids.shape, np.nan, np.float32)
    columns: dict[str, list[np.ndarray]] = {"position": [], "token": [], "phase": []}
    start = 0
    for one, length in zip(sequences, lengths, strict=True):
        rows, slots = slice(start, start + length), one.ids.shape[2]
        if one.ids.shape[1] != len(layers):
            raise ValueError(
                f"ids of {one.ids.shape[1]} layers beside ids of {len(layers)}: convert one model at a time"
            )
        ids[rows, :, :slots] = one.ids
        if one.weights is not None:
            weights[rows] = 0
            weights[rows, :, :slots] = one.weights
        columns["position"].append(one.first + np.arange(length))
        columns["token"].append(np.full(length, -1) if one.token_ids is None else one.token_ids[:length])
        columns["phase"].append(np.arange(length) >= (length if one.prompt is None else one.prompt))
        start += length
    numbered = np.arange(len(sequences))
    return Trace(
        layers=tuple(layers),
        layer_numbers=tuple(range(len(layers)) if numbers is None else numbers),
        groups=tuple(groups),
        items=tuple(one.item for one in sequences),
        sequence=np.repeat(numbered, lengths).astype(np.int32),
        group=np.repeat([groups.index(one.group) for one in sequences], lengths).astype(np.int32),
        position=np.concatenate(columns["position"]).astype(np.int32),
        token=np.concatenate(columns["token"]).astype(np.int32),
        phase=np.concatenate(columns["phase"]).astype(np.uint8),
        ids=ids,
        weights=weights,
    )


def joined(traces: Sequence[Trace]) -> Trace:
    """The sequences of several traces of the same layers, one trace after another."""
    if len(traces) == 1:
        return traces[0]
    first = traces[0]
    if any((trace.layers, trace.layer_numbers) != (first.layers, first.layer_numbers) for trace in traces):
        raise ValueError("the files hold different layers: convert files of one model at a time")
    groups = list(dict.fromkeys(group for trace in traces for group in trace.groups))
    slots = max(trace.ids.shape[2] for trace in traces)

    def widened(array: np.ndarray, empty: int) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, 0), (0, slots - array.shape[2])), constant_values=empty)

    before = np.cumsum([0, *(len(trace.items) for trace in traces)])
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(t, name) for t in traces]) for name in ("position", "token", "phase")
    }
    return Trace(
        layers=first.layers,
        layer_numbers=first.layer_numbers,
        groups=tuple(groups),
        items=tuple(item for trace in traces for item in trace.items),
        sequence=np.concatenate([t.sequence + n for t, n in zip(traces, before, strict=False)]).astype(np.int32),
        group=np.concatenate([np.array([groups.index(g) for g in t.groups])[t.group] for t in traces]).astype(np.int32),
        **columns,
        ids=np.concatenate([widened(t.ids, -1) for t in traces]),
        weights=np.concatenate([widened(t.weights, 0) for t in traces]),
        truncated=any(trace.truncated for trace in traces),
        backends=tuple(sorted({backend for trace in traces for backend in trace.backends})),
    )


def statistics_of(
    trace: Trace, *, num_experts: int | None = None, metadata: Mapping[str, Any] | None = None
) -> RoutingStatistics:
    """The token sums of a trace: counts, and weights where they are known.

    ``weight`` sums the weights as they were recorded, and ``weight_share`` those of each token divided by their sum.
    ``num_experts`` is the number of experts of every layer. Raises ``ValueError`` if it is missing, for an expert
    beyond it, and for tokens with fewer choices than others of the layer.
    """
    if num_experts is None:
        raise ValueError("how many experts the layers have is not in the file: pass num_experts (--num-experts)")
    if trace.ids.max(initial=-1) >= num_experts:
        raise ValueError(f"a token chose expert {int(trace.ids.max())} of {num_experts}: check num_experts")
    tops = (trace.ids >= 0).sum(axis=2).max(axis=0, initial=0)
    made = [_sums(trace, index, num_experts, tops, metadata) for index in np.unique(trace.phase)]
    return functools.reduce(add, made)


def _sums(
    trace: Trace, phase: int, num_experts: int, tops: np.ndarray, metadata: Mapping[str, Any] | None
) -> RoutingStatistics:
    """The sums over the tokens of one phase."""
    shape = (len(trace.groups), len(trace.layers), num_experts)
    known = not np.isnan(trace.weights).any()
    counts, tokens = np.zeros(shape), np.zeros(shape[:2], np.int64)
    weight, share = np.zeros(shape), np.zeros(shape)
    rows = np.flatnonzero(trace.phase == phase)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        ids, weights, group = (
            trace.ids[part].astype(np.int64),
            trace.weights[part].astype(np.float64),
            trace.group[part],
        )
        for layer in range(shape[1]):
            chosen, weighed = ids[:, layer] >= 0, np.where(ids[:, layer] >= 0, weights[:, layer], 0.0)
            filled = chosen.sum(axis=1)
            uneven = (filled > 0) & (filled < tops[layer])
            if uneven.any():
                raise ValueError(
                    f"token {int(part[uneven][0])} has {int(filled[uneven][0])} of {int(tops[layer])} experts in layer "
                    f"{trace.layers[layer]}: sums are of tokens with the same number of choices; drop such tokens"
                )
            tokens[:, layer] += np.bincount(group[filled > 0], minlength=shape[0])
            cells = (group[:, None] * num_experts + ids[:, layer])[chosen]
            total = weighed.sum(axis=1, keepdims=True)
            parts = np.divide(weighed, total, out=np.zeros_like(weighed), where=total > 0)
            for table, values in ((counts, None), (weight, weighed), (share, parts)):
                given = None if values is None else values[chosen]
                table[:, layer] += np.bincount(cells, given, shape[0] * num_experts).reshape(shape[0], num_experts)
    sums: dict[str, Any] = {"weight": weight, "weight_share": share} if known else {}
    return RoutingStatistics.from_token_sums(
        trace.groups,
        counts=counts,
        tokens=tokens,
        top_k=tops.tolist(),
        layers=trace.layers,
        num_experts=num_experts,
        phase=PHASES[phase],
        metadata=metadata,
        **sums,
    )

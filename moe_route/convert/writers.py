"""The formats that can be written, as one table."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from moe_route.base.files import replacing, write_text
from moe_route.convert.formats import KINDS
from moe_route.convert.routed_experts import UNNAMED, megatron_of, sglang_responses_of, vllm_responses_of
from moe_route.convert.selections import easysteer_of
from moe_route.convert.traces import model_layers
from moe_route.recording import RoutingStatistics, Trace
from moe_route.steering import ExpertSelection, Plan
from moe_route.steering.tables import ReplayTable

__all__ = ["TARGETS", "Target", "write"]


@dataclass(frozen=True)
class Target:
    """A format that can be written."""

    holds: str  # what the file holds, and who reads it
    kinds: tuple[str, ...]  # kinds that can be written so
    suffixes: tuple[str, ...]
    write: Callable[..., None]  # (value, path, **options)


def write(value: Any, path: str | os.PathLike[str], to: str | None = None, **options: Any) -> None:
    """Write statistics, a trace, a selection or a plan as ``to``, one of ``TARGETS``; the suffix chooses the container.

    By default ``to`` is the kind of ``value``, moe-route's own file. ``options``: ``groups`` of statistics to add up
    (by default all) for "eplb" and "sglang"; ``first_layer``, the model's number of the first MoE layer, for
    "easysteer" (default 0).

    Raises ``ValueError`` for a format that does not hold such a value, a wrong suffix, an unknown option.
    """
    path = Path(path)
    kind = next((name for name, made in KINDS.items() if isinstance(value, made)), None)
    if kind is None:
        raise ValueError(f"a {type(value).__name__} is not written: give {', '.join(KINDS)}")
    name = to or kind
    if name not in TARGETS:
        raise ValueError(f"no format {name!r} to write: one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    if kind not in target.kinds:
        raise ValueError(f"{name} holds {' or '.join(target.kinds)}, not a {kind}: convert it first")
    if path.suffix not in target.suffixes:
        raise ValueError(f"{path}: {name} is written as {', '.join(target.suffixes)}: choose such a name")
    try:
        target.write(value, path, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"{name} takes no {', '.join(f'{option}=' for option in options)}: leave it out") from error


def _save(value: Any, path: Path) -> None:
    value.save(path)


def _bytes(path: Path, content: bytes) -> None:
    with replacing(path) as stream:
        stream.write(content)


def _json(path: Path, content: Any) -> None:
    write_text(path, f"{json.dumps(content, indent=1, allow_nan=False)}\n")


def _arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one array (``.npy``, ``.pt``) or several by name (``.npz``, ``.safetensors``)."""
    stream = io.BytesIO()
    if path.suffix == ".safetensors":
        _bytes(path, save_safetensors({name: torch.from_numpy(array) for name, array in arrays.items()}))
        return
    if path.suffix == ".npz":
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(next(iter(arrays.values()))), stream)
    else:
        np.save(stream, next(iter(arrays.values())))
    _bytes(path, stream.getvalue())


def _counts(statistics: RoutingStatistics, groups: Sequence[str] | str | None) -> np.ndarray:
    """Selections of each expert, int64 ``[L, E]``, summed over the groups."""
    chosen = statistics if groups is None else statistics.select(groups=groups)  # type: ignore[arg-type]
    return np.ascontiguousarray(chosen.token_sum("counts").sum(axis=0))


def _eplb(statistics: RoutingStatistics, path: Path, *, groups: Sequence[str] | str | None = None) -> None:
    counts = _counts(statistics, groups)
    if len(set(statistics.num_experts)) > 1:
        raise ValueError("EPLB takes layers with the same number of experts: select(layers=...) those first")
    if path.suffix == ".json":
        _json(path, counts.tolist())
    else:
        _arrays(path, {"weight": counts})


def _sglang(statistics: RoutingStatistics, path: Path, *, groups: Sequence[str] | str | None = None) -> None:
    numbers = model_layers(statistics.layers)
    rows = np.zeros((max(numbers) + 1, max(statistics.num_experts)), np.int64)
    rows[numbers] = _counts(statistics, groups)
    if path.suffix == ".json":
        _json(path, {"logical_count": rows.tolist()})
        return
    stream = io.BytesIO()
    torch.save({"logical_count": torch.from_numpy(rows)}, stream)
    _bytes(path, stream.getvalue())


def _replay(trace: Trace, path: Path) -> None:
    table = ReplayTable.of_trace(trace)
    ends = np.cumsum(table.lengths)[:-1]
    parts = [np.ascontiguousarray(part, np.int32) for part in np.split(table.ids, ends)]
    assert table.layers is not None
    whole = table.layers == tuple(range(len(table.layers)))
    if path.suffix == ".npy":
        if len(parts) > 1 or not whole:
            raise ValueError("a .npy file holds one sequence of all layers: write .npz or .safetensors")
        _arrays(path, {"ids": parts[0]})
        return
    named = {
        f"{UNNAMED}{number}" if table.keys is None else str(table.keys[number][0]): part
        for number, part in enumerate(parts)
    }
    if len(named) < len(parts) or "layers" in named:
        raise ValueError(
            "an array is named after its item, and here items are in several groups, or one is called 'layers': record "
            "a trace of each group by itself (moe-route record --languages eng_Latn --trace FILE)"
        )
    _arrays(path, named if whole else {**named, "layers": np.array(table.layers, np.int32)})


def _lines(path: Path, documents: Sequence[Any]) -> None:
    write_text(path, "".join(f"{json.dumps(one, allow_nan=False)}\n" for one in documents))


def _vllm_response(trace: Trace, path: Path, *, num_layers: int | None = None) -> None:
    _lines(path, vllm_responses_of(trace, num_layers))


def _sglang_response(trace: Trace, path: Path, *, num_layers: int | None = None) -> None:
    _lines(path, sglang_responses_of(trace, num_layers))


def _megatron(trace: Trace, path: Path) -> None:
    stream = io.BytesIO()
    torch.save(megatron_of(trace), stream)
    _bytes(path, stream.getvalue())


def _easysteer(plan: Plan, path: Path, *, first_layer: int = 0) -> None:
    _json(path, easysteer_of(plan, first_layer))


def _csv(value: RoutingStatistics | Trace | ExpertSelection, path: Path) -> None:
    from moe_route.base.table import data_frame

    if isinstance(value, ExpertSelection):
        layers, experts = zip(*value.pairs, strict=True) if value else ((), ())
        scores = [value.scores.get(layer, {}).get(expert) for layer, expert in value.pairs]
        frame = data_frame({"layer": layers, "expert": experts, "score": scores})
    else:
        frame = value.to_pandas()
    write_text(path, frame.to_csv(index=False))


def _plain_json(value: RoutingStatistics | ExpertSelection | Plan, path: Path) -> None:
    if isinstance(value, Plan):
        value.save(path)
    elif isinstance(value, ExpertSelection):
        _json(path, value.to_dict())
    else:
        axes = {name: list(getattr(value, name)) for name in ("groups", "layers", "num_experts", "top_k")}
        sums = {name: value.token_sum(name).tolist() for name in value.metrics}
        _json(path, {**axes, "tokens": value.tokens().tolist(), **sums})


TARGETS: Mapping[str, Target] = {
    "statistics": Target("statistics of moe-route", ("statistics",), (".safetensors",), _save),
    "trace": Target("a trace of moe-route", ("trace",), (".safetensors",), _save),
    "selection": Target("a selection of moe-route", ("selection",), (".safetensors",), _save),
    "plan": Target("a plan of moe-route", ("plan",), (".safetensors", ".json"), _save),
    "eplb": Target(
        "loads [MoE layers, experts] for EPLB", ("statistics",), (".npy", ".safetensors", ".pt", ".json"), _eplb
    ),
    "sglang": Target(
        "logical_count [layers, experts] for SGLang's --init-expert-location",
        ("statistics",),
        (".pt", ".json"),
        _sglang,
    ),
    "replay": Target(
        "experts of each token, int32 [tokens, layers, k]", ("trace",), (".npy", ".npz", ".safetensors"), _replay
    ),
    "vllm-response": Target("answers of vLLM with routed_experts", ("trace",), (".jsonl",), _vllm_response),
    "sglang-response": Target("answers of SGLang with routed_experts", ("trace",), (".jsonl",), _sglang_response),
    "megatron": Target(
        "routing replay of slime and Miles on Megatron, rank<N>_routing_replay.pt", ("trace",), (".pt",), _megatron
    ),
    "easysteer": Target("EasySteer's configuration of router steering", ("plan",), (".json",), _easysteer),
    "csv": Target("a table with a row per expert or choice", ("statistics", "trace", "selection"), (".csv",), _csv),
    "json": Target("the numbers as JSON", ("statistics", "selection", "plan"), (".json",), _plain_json),
}
"""Every format that can be written, by name."""

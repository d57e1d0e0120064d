"""Write results: files of moe-route itself, plain tables, and the containers that other programs' formats use."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from moe_route.base.files import replacing, write_text
from moe_route.convert.formats import KINDS, TARGETS, writes
from moe_route.recording import RoutingStatistics, Trace
from moe_route.steering import ExpertSelection, Plan


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


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole."""
    with replacing(path) as stream:
        stream.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write one JSON document."""
    write_text(path, f"{json.dumps(content, indent=1, allow_nan=False)}\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one array (``.npy``, ``.pt``) or several by name (``.npz``, ``.safetensors``)."""
    stream = io.BytesIO()
    if path.suffix == ".safetensors":
        write_bytes(path, save_safetensors({name: torch.from_numpy(array) for name, array in arrays.items()}))
        return
    if path.suffix == ".npz":
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    elif path.suffix == ".pt":
        stream.write(pickled(torch.from_numpy(next(iter(arrays.values())))))
    else:
        np.save(stream, next(iter(arrays.values())))
    write_bytes(path, stream.getvalue())


def write_lines(path: Path, documents: Sequence[Any]) -> None:
    """Write a JSON document per line."""
    write_text(path, "".join(f"{json.dumps(one, allow_nan=False)}\n" for one in documents))


def pickled(content: Any) -> bytes:
    """The content of a ``.pt`` file."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


for _kind in KINDS:
    _suffixes = [".safetensors", ".json"] if _kind == "plan" else [".safetensors"]
    writes(_kind, f"{_kind} of moe-route", takes=[_kind], suffixes=_suffixes)(lambda value, path: value.save(path))


@writes(
    "csv",
    "a table with a row per expert or choice",
    takes=["statistics", "trace", "selection"],
    suffixes=[".csv"],
)
def _csv(value: RoutingStatistics | Trace | ExpertSelection, path: Path) -> None:
    from moe_route.base.table import csv_text, data_frame

    if isinstance(value, ExpertSelection):
        layers, experts = zip(*value.pairs, strict=True) if value else ((), ())
        scores = [value.scores.get(layer, {}).get(expert) for layer, expert in value.pairs]
        frame = data_frame({"layer": layers, "expert": experts, "score": scores})
    else:
        frame = value.to_pandas()
    write_text(path, csv_text(frame))


@writes("json", "the numbers as JSON", takes=["statistics", "selection", "plan"], suffixes=[".json"])
def _plain_json(value: RoutingStatistics | ExpertSelection | Plan, path: Path) -> None:
    if isinstance(value, Plan):
        value.save(path)
    elif isinstance(value, ExpertSelection):
        write_json(path, value.to_dict())
    else:
        axes = {name: list(getattr(value, name)) for name in ("groups", "layers", "num_experts", "top_k")}
        sums = {name: value.token_sum(name).tolist() for name in value.metrics}
        write_json(path, {**axes, "tokens": value.tokens().tolist(), **sums})

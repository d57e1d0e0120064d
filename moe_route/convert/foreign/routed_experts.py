"""The experts of each token, as engines return them for routing replay (arXiv 2510.11370): int [tokens, layers, k].

vLLM: ``CompletionOutput.routed_experts``, or over HTTP ``choices[i].routed_experts``, base64 of a ``.npy`` file.
SGLang: ``meta_info.routed_experts``, base64 of plain integers of type ``routed_experts_dtype`` (by default int32).
Megatron with slime or Miles: ``rank<N>_routing_replay.pt``, a list over layers of lists over calls of int [tokens, k],
or {"replays": that list}. The last token of a text is never fed, so T is one less than its length.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_route.base.budget import BudgetError
from moe_route.convert.formats import reads, writes
from moe_route.convert.source import Source, npy
from moe_route.convert.traces import RoutedSequence, model_layers, routed_layers, trace_of
from moe_route.convert.writers import pickled, write_arrays, write_bytes, write_lines
from moe_route.recording import Trace
from moe_route.recording.store import Item
from moe_route.steering.tables import ReplayTable

_UNNAMED = "sequence_"  # prefix of the names of sequences without an item, in files of several arrays
_SGLANG_DTYPES = ("uint8", "uint16", "int16", "int32", "int64")


def _documents(source: Source) -> list[Mapping[str, Any]]:
    listed = source.content if isinstance(source.content, list) else [source.content]
    right = source.form in ("json", "lines") and all(isinstance(one, Mapping) for one in listed)
    return listed if right else []


def _is_megatron(source: Source) -> bool:
    replays = _replays(source)
    return isinstance(replays, list) and bool(replays) and all(isinstance(calls, list) for calls in replays)


def _is_replay(source: Source) -> bool:
    if source.form == "array":
        return bool(source.content.ndim in (3, 4) and source.content.dtype.kind in "iu")
    if source.form != "arrays":
        return False
    return all(name == "layers" or source.content[name].ndim == 3 for name in source.content)


def _traced(source: Source, sequences: Sequence[RoutedSequence], layers: Sequence[int] | None) -> Trace:
    """A trace of the MoE layers of the sequences; ``layers`` are those to take."""
    if not sequences:
        raise source.refused("it has no routed experts", "ask for them: return_routed_experts")
    widths = {one.ids.shape[1] for one in sequences}
    if len(widths) > 1:
        raise source.refused(f"its texts have {sorted(widths)} layers", "convert one model at a time")
    kept = routed_layers([one.ids for one in sequences], layers)
    parts = [
        RoutedSequence(_signed(one.ids)[:, kept], one.item, one.group, prompt=one.prompt, token_ids=one.token_ids)
        for one in sequences
    ]
    trace = trace_of(parts, [str(layer) for layer in kept])
    ordered = np.sort(trace.ids, axis=2)
    twice = ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any(axis=2)
    if twice.any():
        token, layer = np.argwhere(twice)[0]
        raise source.refused(
            f"token {token} has an expert twice in layer {trace.layers[layer]}",
            "that layer is dense, or the axes are not [tokens, layers, k]: check layers (--layers)",
        )
    return trace


def _signed(ids: np.ndarray) -> np.ndarray:
    """Ids of a type that has -1."""
    return ids.astype(np.int64 if ids.dtype.itemsize > 2 else np.int32) if ids.dtype.kind == "u" else ids


@reads("replay", "experts of each token [tokens, layers, k], .npy, .npz, .safetensors", gives="trace", when=_is_replay)
def read_replay(source: Source, *, layers: Sequence[int] | None = None, group: str | None = None) -> Trace:
    """A trace of ids ``[T, L, k]`` (or ``[B, T, L, k]``), or of a file with one such array per sequence.

    The name of an array is the item of its sequence, unless it begins with ``sequence_``. An array named ``layers``
    holds the indices of the L layers among the MoE layers.
    """
    numbers = None
    if source.form == "array":
        batch = source.content if source.content.ndim == 4 else source.content[None]
        named: list[tuple[Item | None, np.ndarray]] = [(None, ids) for ids in batch]
    else:
        numbers = [int(n) for n in source.content["layers"]] if "layers" in source.content else None
        named = [(_item(name), source.content[name]) for name in source.content if name != "layers"]
    for _, ids in named:
        if ids.dtype.kind not in "iu":
            raise source.refused(f"its ids are {ids.dtype}, not integers", "give ids [tokens, layers, k]")
    sequences = [RoutedSequence(ids, item, group or "all") for item, ids in named]
    if numbers is None:
        return _traced(source, sequences, layers)
    trace = _traced(source, sequences, range(len(numbers)) if layers is None else [numbers.index(n) for n in layers])
    kept = numbers if layers is None else list(layers)
    return Trace(**{**vars(trace), "layers": tuple(map(str, kept)), "layer_numbers": tuple(kept)})


def _item(name: str) -> Item | None:
    if name.startswith(_UNNAMED):
        return None
    return int(name) if name.isdecimal() and str(int(name)) == name else name


@reads(
    "vllm-response",
    "answers of vLLM with routed_experts, .json or a line each",
    gives="trace",
    when=lambda source: any("routed_experts" in of for one in _documents(source) for of in one.get("choices") or ()),
)
def read_vllm_response(source: Source, *, layers: Sequence[int] | None = None, group: str | None = None) -> Trace:
    """A trace of the texts of an answer of vLLM's server, or of several, one per line.

    The item is the id of the answer, with the number of the choice if there are several.
    """
    sequences = []
    for one in _documents(source):
        choices = one.get("choices") or ()
        prompt = _prompt(one.get("usage"))
        for number, choice in enumerate(choices):
            if choice.get("routed_experts") is None:
                raise source.refused(f"choice {number} has no routed_experts", "ask for them: return_routed_experts")
            ids = _npy(source, choice["routed_experts"])
            name = None if one.get("id") is None else f"{one['id']}-{number}" if len(choices) > 1 else str(one["id"])
            sequences.append(RoutedSequence(ids, name, group or "all", prompt=prompt))
    return _traced(source, sequences, layers)


def _prompt(about: Mapping[str, Any] | None) -> int | None:
    """The number of prompt tokens that an answer states."""
    stated = (about or {}).get("prompt_tokens")
    return None if stated is None else index(stated)


def _npy(source: Source, encoded: Any) -> np.ndarray:
    try:
        ids = npy(base64.b64decode(encoded, validate=True), source.budget)
    except BudgetError:
        raise
    except (TypeError, ValueError) as error:
        raise source.refused(
            f"routed_experts is not base64 of a .npy file ({error})", "save the whole answer"
        ) from error
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise source.refused(f"routed_experts is {ids.dtype} {list(ids.shape)}", "it should be ids [tokens, layers, k]")
    return ids


@reads(
    "sglang-response",
    "answers of SGLang with routed_experts, .json or a line each",
    gives="trace",
    when=lambda source: any("routed_experts" in (one.get("meta_info") or ()) for one in _documents(source)),
)
def read_sglang_response(
    source: Source,
    *,
    num_layers: int | None = None,
    top_k: int | None = None,
    layers: Sequence[int] | None = None,
    group: str | None = None,
) -> Trace:
    """A trace of the texts of an answer of SGLang's server; ``num_layers`` and ``top_k`` give its shape.

    ``num_layers`` counts every layer of the model, dense ones too, as the answer does.
    """
    if num_layers is None or top_k is None:
        raise ValueError("SGLang's answer has no shape: pass num_layers (--num-layers) and top_k (--top-k)")
    sequences = []
    for one in _documents(source):
        about = one.get("meta_info") or {}
        if about.get("routed_experts") is None:
            raise source.refused("an answer has no routed_experts", "ask for them: return_routed_experts")
        dtype = about.get("routed_experts_dtype") or "int32"
        if dtype not in _SGLANG_DTYPES:
            raise source.refused(f"routed_experts_dtype {dtype!r} is not known", "upgrade moe-route")
        try:
            flat = np.frombuffer(base64.b64decode(about["routed_experts"], validate=True), dtype)
            ids = flat.reshape(-1, num_layers, top_k).astype(np.int32)
        except (TypeError, ValueError) as error:
            raise source.refused(
                f"routed_experts is not base64 of ids [tokens, {num_layers}, {top_k}] ({error})",
                "check num_layers and top_k, those of the model",
            ) from error
        tokens = (about.get("prompt_tokens") or 0) + (about.get("completion_tokens") or 0) - 1
        if tokens > 0 and len(ids) != tokens:
            raise source.refused(
                f"it has the experts of {len(ids)} tokens, and {tokens} were fed", "check num_layers and top_k"
            )
        name = about.get("id")
        prompt = _prompt(about)
        sequences.append(RoutedSequence(ids, None if name is None else str(name), group or "all", prompt=prompt))
    return _traced(source, sequences, layers)


def _replays(source: Source) -> Any:
    if source.form != "objects":
        return None
    return source.content.get("replays") if isinstance(source.content, dict) else source.content


@reads(
    "megatron",
    "routing replay of slime and Miles on Megatron, rank<N>_routing_replay.pt",
    gives="trace",
    when=_is_megatron,
)
def read_megatron(source: Source, *, layers: Sequence[int] | None = None, group: str | None = None) -> Trace:
    """A trace with a sequence per call of the model: sequences that were packed into one call are not told apart.

    One pipeline stage and one rank are in a file; merge data-parallel ranks, not stages.
    """
    replays = _replays(source)
    calls = {len(of_layer) for of_layer in replays}
    if len(calls) != 1 or not calls.pop():
        raise source.refused("its layers were called a different number of times, or never", "record one run")
    sequences = []
    for call in zip(*replays, strict=True):
        try:
            ids = np.stack([source.array(of_layer) for of_layer in call], axis=1)
        except BudgetError:
            raise
        except ValueError as error:
            raise source.refused(f"the layers of a call differ in shape ({error})", "record one run") from error
        if ids.ndim != 3 or ids.dtype.kind not in "iu":
            raise source.refused(f"a call holds {ids.dtype} {list(ids.shape)}", "it should be ids [tokens, k]")
        sequences.append(RoutedSequence(ids, None, group or "all"))
    return _traced(source, sequences, layers)


def _fed(trace: Trace) -> list[RoutedSequence]:
    """The sequences of a trace, with the experts of every token that was fed, in the order of positions."""
    table = ReplayTable.of_trace(trace)
    prompts = np.bincount(trace.sequence[trace.phase == 0], minlength=len(trace.items)).tolist()
    parts = np.split(table.ids, np.cumsum(table.lengths)[:-1])
    for number, ids in enumerate(parts):
        missing = np.flatnonzero((ids[:, :, 0] < 0).any(axis=1))
        if len(missing):
            raise ValueError(
                f"token {missing[0]} of sequence {trace.items[number]!r} has no experts in the trace, and a file for "
                "replay has those of every token: record all of its tokens"
            )
    return [
        RoutedSequence(ids, item, prompt=prompt) for ids, item, prompt in zip(parts, trace.items, prompts, strict=True)
    ]


def _answers(trace: Trace, num_layers: int | None) -> Iterator[tuple[RoutedSequence, np.ndarray]]:
    """Each sequence, and its ids ``[tokens, layers of the model, k]``: dense layers hold 0, as engines fill them."""
    numbers = model_layers(trace.layers)
    rows = max(numbers) + 1 if num_layers is None else num_layers
    if rows <= max(numbers):
        raise ValueError(
            f"the trace has layer {max(numbers)} of the model, so num_layers is {max(numbers) + 1} or more"
        )
    for one in _fed(trace):
        ids = np.zeros((len(one.ids), rows, one.ids.shape[2]), np.int32)
        ids[:, numbers] = one.ids
        yield one, ids


@writes("vllm-response", "answers of vLLM with routed_experts", takes=["trace"], suffixes=[".jsonl"])
def write_vllm_response(trace: Trace, path: Path, *, num_layers: int | None = None) -> None:
    """Write a document per sequence, as vLLM's server answers; ``num_layers`` counts the layers of the model.

    Sequences without an item have no id. By default the last layer of the trace is the model's last.
    """
    documents = []
    for one, ids in _answers(trace, num_layers):
        stream = io.BytesIO()
        np.save(stream, ids.astype(np.int16))
        choice = {"index": 0, "routed_experts": base64.b64encode(stream.getvalue()).decode()}
        usage = {"prompt_tokens": one.prompt, "completion_tokens": len(ids) + 1 - (one.prompt or 0)}
        documents.append({"id": None if one.item is None else str(one.item), "choices": [choice], "usage": usage})
    write_lines(path, documents)


@writes("sglang-response", "answers of SGLang with routed_experts", takes=["trace"], suffixes=[".jsonl"])
def write_sglang_response(trace: Trace, path: Path, *, num_layers: int | None = None) -> None:
    """Write a document per sequence, as SGLang's server answers; arguments as those of ``write_vllm_response``."""
    documents = []
    for one, ids in _answers(trace, num_layers):
        about: dict[str, Any] = {
            "id": None if one.item is None else str(one.item),
            "prompt_tokens": one.prompt,
            "completion_tokens": len(ids) + 1 - (one.prompt or 0),
            "routed_experts": base64.b64encode(ids.tobytes()).decode(),
            "routed_experts_dtype": "int32",
        }
        documents.append({"meta_info": about})
    write_lines(path, documents)


@writes(
    "megatron",
    "routing replay of slime and Miles on Megatron, rank<N>_routing_replay.pt",
    takes=["trace"],
    suffixes=[".pt"],
)
def write_megatron(trace: Trace, path: Path) -> None:
    """Write, for each layer of the trace, a tensor int32 ``[tokens, k]`` for each sequence, as if each was a call."""
    ids = [one.ids.astype(np.int32) for one in _fed(trace)]
    layers = [[torch.from_numpy(of[:, layer].copy()) for of in ids] for layer in range(len(trace.layers))]
    write_bytes(path, pickled(layers))


@writes(
    "replay",
    "experts of each token, int32 [tokens, layers, k]",
    takes=["trace"],
    suffixes=[".npy", ".npz", ".safetensors"],
)
def write_replay(trace: Trace, path: Path) -> None:
    table = ReplayTable.of_trace(trace)
    ends = np.cumsum(table.lengths)[:-1]
    parts = [np.ascontiguousarray(part, np.int32) for part in np.split(table.ids, ends)]
    assert table.layers is not None
    whole = table.layers == tuple(range(len(table.layers)))
    if path.suffix == ".npy":
        if len(parts) > 1 or not whole:
            raise ValueError("a .npy file holds one sequence of all layers: write .npz or .safetensors")
        write_arrays(path, {"ids": parts[0]})
        return
    named = {
        f"{_UNNAMED}{number}" if table.keys is None else str(table.keys[number][0]): part
        for number, part in enumerate(parts)
    }
    if len(named) < len(parts) or "layers" in named:
        raise ValueError(
            "an array is named after its item, and here items are in several groups, or one is called 'layers': record "
            "a trace of each group by itself (moe-route record --languages eng_Latn --trace FILE)"
        )
    write_arrays(path, named if whole else {**named, "layers": np.array(table.layers, np.int32)})

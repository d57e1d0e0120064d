"""Routing of single sequences (q_i, a_i and L_i), keyed by (item, group), in memory up to a limit, then on disk.

The item id pairs a sentence with its translations. Paired divergence and the bootstrap read from here. While a
recording runs, sequences beyond the limit go to files of kind "sequences" in a folder. The file that the user keeps is
one: `RoutingStatistics.save` writes the sequences into it as blocks (`moe_route.base.files`) and reads them from there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import socket
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moe_route.base import files

Item = str | int
Key = tuple[Item, str]
_FILE_KIND = "sequences"
_SHARD_BYTES = 8 << 20  # sequences are kept, written and read in portions of this size
_OPEN_SHARDS = 16  # number of shards from disk that are held in memory for reading
_NARROW = np.dtype(np.uint16)  # of counts in files, where all of them fit
_OVER_EXPERTS = ("counts", "full", "topk")  # arrays [n, L, E]; those of others are [n, L, ...]
# array -> the arguments of `record` that keep it
_RECORDED_BY = {
    "counts": "record(metrics=...) with 'counts'",
    "full": "record(metrics=...) with 'probability'",
    "topk": "record(metrics=...) with 'weight_share'",
    "token_entropy": "record(sequences=True, entropy=True)",
    "consistency": "record(sequences=True, consistency=True)",
    "hidden": "record(sequences=True, hidden=True)",
}
_UNNAMED = "#"  # sequences without an item id are "#0", "#1", ... and are never paired


@dataclass(frozen=True)
class SequenceShard:
    """A portion of the sequences of one store.

    Attributes:
        keys: n (item, group) pairs.
        tokens: int64 ``[n, L]`` (L_i).
        counts: int32 ``[n, L, E]`` (a_i), if its metric was recorded.
        full, topk: float32 ``[n, L, E]`` (q_i; NaN in layers without tokens), each if its metric was recorded.
        token_entropy: float64 ``[n, L]``, mean of H(p_t) over tokens in nats, if the entropy was recorded.
        hidden: float32 ``[n, L, H]``, if asked for; in stores of ``sentence_vectors`` the pooled hidden states.
        consistency: float64 ``[n, L]``, if asked for.
    """

    keys: tuple[Key, ...]
    arrays: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def rows(self) -> int:
        """Number of sequences, n."""
        return len(self.keys)

    def read(self) -> Mapping[str, np.ndarray]:
        """The arrays by name, as `files.Block` requires."""
        return self.arrays

    def array(self, name: str) -> np.ndarray:
        """One of the arrays. Raises ``ValueError`` that says how to record it."""
        if name not in self.arrays:
            raise ValueError(f"{name!r} was not recorded: {_RECORDED_BY[name]}")
        return self.arrays[name]


class _Growing:
    """The latest sequences, in arrays with spare room.

    The arrays of each label block are copied in. Keeping those small arrays would fragment the heap.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], capacity: int):
        self.keys: list[Key] = []
        self._arrays = {name: np.empty((capacity, *array.shape[1:]), array.dtype) for name, array in arrays.items()}
        self._capacity = capacity

    def take(self, keys: Sequence[Key], arrays: Mapping[str, np.ndarray]) -> bool:
        """Append sequences; False if there is not enough room."""
        first, last = len(self.keys), len(self.keys) + len(keys)
        if last > self._capacity:
            return False
        if arrays.keys() != self._arrays.keys():
            raise ValueError(f"sequences with {sorted(arrays)} after some with {sorted(self._arrays)}: record alike")
        for name, array in arrays.items():
            self._arrays[name][first:last] = array
        self.keys.extend(keys)
        return True

    def shard(self) -> SequenceShard:
        """The present sequences, as a view; later ones are outside it."""
        return SequenceShard(tuple(self.keys), {name: array[: len(self.keys)] for name, array in self._arrays.items()})


class _Folder:
    """The folder that one recording writes its shards to, locked as long as an object refers to it.

    A temporary folder is then removed, but only by the process that made it, since a forked process has this object
    too.
    """

    def __init__(self, path: Path | None):
        self.temporary = path is None
        self.path, descriptor = _temporary_folder() if path is None else _claimed(path)
        self._release = weakref.finalize(self, _leave, descriptor, self.path if self.temporary else None, os.getpid())


def _leave(descriptor: int, temporary: Path | None, owner: int) -> None:
    if temporary is not None and os.getpid() == owner:
        shutil.rmtree(temporary, ignore_errors=True)
    os.close(descriptor)


@dataclass(frozen=True)
class _Shard:
    """A shard of a store, in memory or in a file."""

    keys: tuple[Key, ...]  # differ from the file's in merged stores, where sequences without item are renumbered
    block: SequenceShard | files.StoredBlock
    layers: tuple[int, ...] | None = None  # indices of the block's layers, if some were selected
    widest: int | None = None  # experts of the widest of these layers
    folder: _Folder | None = None  # kept alive by this reference

    @property
    def in_memory(self) -> int:
        """Bytes held in memory."""
        return self.block.nbytes if isinstance(self.block, SequenceShard) else 0

    @property
    def rows(self) -> int:
        return len(self.keys)

    @property
    def is_narrow(self) -> bool:
        """Whether its counts, if it has any, are known to fit into `_NARROW`."""
        if isinstance(self.block, files.StoredBlock):
            return self.block.dtypes.get("counts", torch.uint16) == torch.uint16
        counts = self.block.arrays.get("counts")
        return counts is None or not counts.size or int(counts.max()) <= np.iinfo(_NARROW).max

    def read(self) -> Mapping[str, np.ndarray]:
        arrays = dict(self.block.read())
        if "counts" in arrays:
            arrays["counts"] = arrays["counts"].astype(np.int32, copy=False)
        if self.layers is None:
            return arrays
        axes = (slice(None), list(self.layers), slice(self.widest))
        return {
            name: array[axes[: array.ndim] if name in _OVER_EXPERTS else axes[:2]] for name, array in arrays.items()
        }


@dataclass(frozen=True)
class _Narrowed:
    """A shard as files hold it: with counts in half the bytes."""

    shard: _Shard

    @property
    def rows(self) -> int:
        return self.shard.rows

    def read(self) -> Mapping[str, np.ndarray]:
        arrays = self.shard.read()
        return {name: array.astype(_NARROW) if name == "counts" else array for name, array in arrays.items()}


def _portions(shards: Sequence[_Shard]) -> list[files.Block]:
    """The shards as one file holds them: all of its portions have one dtype."""
    return [_Narrowed(shard) for shard in shards] if all(shard.is_narrow for shard in shards) else list(shards)


class SequenceStore:
    """Routing distributions and counts of single sequences, keyed by (item, group), over all phases together.

    A key can be recorded once. A second time is an error when the label block begins, before the model runs. Sequences
    without an item id are named "#0", "#1", ... and are never paired. Values are exact sums, rounded once to float32.
    """

    def __init__(
        self,
        layers: Sequence[str],
        num_experts: Sequence[int],
        *,
        folder: str | os.PathLike[str] | None = None,
        memory_bytes: int = 256 << 20,
    ):
        """Create an empty store.

        ``folder``: sequences are written there once they exceed ``memory_bytes``, and all of them when the recording
        ends. It is created if missing, in a folder that exists. Without it, a temporary folder is used and removed with
        the last object that reads it.

        Raises ``FileExistsError`` for a folder that already holds sequences, or that another recording writes to.
        """
        self.layers = tuple(layers)
        self.num_experts = tuple(num_experts)
        self.memory_bytes = memory_bytes
        if folder is not None and not os.fspath(folder):
            raise ValueError('sequences="" names no folder: give its name, or True for a temporary one')
        self._folder = None if folder is None else _Folder(Path(folder))
        self._shards: list[_Shard] = []
        self._growing: _Growing | None = None  # becomes the next shard
        self._index: dict[Key, tuple[int, int]] = {}
        self._in_memory = 0
        self._unnamed = self._written = 0
        self._opened: OrderedDict[int, SequenceShard] = OrderedDict()

    # ---- reading

    def keys(self) -> list[Key]:
        """(item, group) of every sequence, in the order recorded."""
        return list(self._index)

    def groups(self) -> tuple[str, ...]:
        """Groups that have at least one sequence, in the order recorded."""
        return tuple(dict.fromkeys(group for _, group in self._index))

    def items(self, group: str) -> list[Item]:
        """Items recorded for one group, in the order of recording."""
        return [item for item, of in self._index if of == group]

    def paired_items(self, *groups: str) -> list[Item]:
        """Items with an id that every one of these groups has, in the order of the first group."""
        items_of: dict[str, dict[Item, None]] = {group: {} for group in groups}
        for item, group in self._index:
            if group in items_of:
                items_of[group][item] = None
        first, *rest = (items_of[group] for group in groups)
        return [item for item in first if not is_unnamed(item) and all(item in items for items in rest)]

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._index))

    def distributions(self, item: Item, group: str, kind: Literal["full", "topk", "count"] = "full") -> np.ndarray:
        """q_i of one sequence, float64 ``[L, E]``; rows sum to 1 (to float32 rounding) and are NaN without tokens.

        Raises ``KeyError`` for a key that was not recorded, and ``ValueError`` for a kind whose metric was not
        recorded.
        """
        shard, row = self._locate(item, group)
        return _distribution(shard, kind)[row].astype(np.float64)

    def counts(self, item: Item, group: str) -> np.ndarray:
        """Number of tokens of the sequence that chose each expert (a_i), int64 ``[L, E]``."""
        shard, row = self._locate(item, group)
        return shard.array("counts")[row].astype(np.int64)

    def tokens(self, item: Item, group: str) -> np.ndarray:
        """Number of tokens of the sequence that each layer counted (L_i), int64 ``[L]``."""
        shard, row = self._locate(item, group)
        return shard.arrays["tokens"][row].copy()

    def frequency(self, item: Item, group: str) -> np.ndarray:
        """a_i / L_i, float64 ``[L, E]``; NaN in layers without tokens."""
        tokens = self.tokens(item, group)[:, None].astype(np.float64)
        return self.counts(item, group) / np.where(tokens > 0, tokens, np.nan)

    def token_entropy(self, item: Item, group: str) -> np.ndarray:
        """Mean of H(p_t) over the tokens of the sequence, float64 ``[L]`` in nats; NaN in layers without tokens.

        Raises ``ValueError`` without ``record(sequences=True, entropy=True)``.
        """
        shard, row = self._locate(item, group)
        return shard.array("token_entropy")[row].copy()

    def consistency(self, item: Item, group: str) -> np.ndarray:
        """Mean Jaccard index of the experts of two tokens of the sequence, float64 ``[L]``; NaN for fewer than two.

        Raises ``ValueError`` without ``record(sequences=True, consistency=...)``.
        """
        shard, row = self._locate(item, group)
        return shard.array("consistency")[row].copy()

    def hidden(self, item: Item, group: str) -> np.ndarray:
        """Mean router input (or sentence vector) of the sequence, float32 ``[L, H]``; NaN in layers without tokens.

        Raises ``ValueError`` without ``record(sequences=True, hidden=True)``.
        """
        shard, row = self._locate(item, group)
        return shard.array("hidden")[row].copy()

    def shards(self, keys: Container[Key] | None = None) -> Iterator[SequenceShard]:
        """Yield all sequences, one shard at a time, so that memory stays bounded whatever the size of the store.

        With ``keys``, shards that hold none of these sequences are not read. A corpus that comes group by group is then
        read once, even if its groups are looked at one after the other.
        """
        for shard in self._blocks():
            if keys is None or any(key in keys for key in shard.keys):
                yield SequenceShard(shard.keys, shard.read())

    def _blocks(self) -> list[_Shard]:
        """All shards, in the order of recording."""
        latest = [] if self._growing is None else [_held(self._growing.shard())]
        return [*self._shards, *latest]

    def _locate(self, item: Item, group: str) -> tuple[SequenceShard, int]:
        if (item, group) not in self._index:
            known = ", ".join(self.groups()) or "nothing"
            raise KeyError(
                f"no sequence of item {item!r} in group {group!r}: the store holds {len(self)} sequences of {known}"
            )
        number, row = self._index[item, group]
        return self._open(number), row

    def _open(self, number: int) -> SequenceShard:
        if number == len(self._shards):
            assert self._growing is not None
            return self._growing.shard()
        shard = self._shards[number]
        if isinstance(shard.block, SequenceShard) and shard.layers is None:
            return shard.block
        if number not in self._opened:
            self._opened[number] = SequenceShard(shard.keys, shard.read())
            if len(self._opened) > _OPEN_SHARDS:
                self._opened.popitem(last=False)
        self._opened.move_to_end(number)
        return self._opened[number]

    # ---- writing

    def next_unnamed(self) -> str:
        """The item id for the next sequence without one."""
        self._unnamed += 1
        return f"{_UNNAMED}{self._unnamed - 1}"

    def append(self, keys: Sequence[Key], arrays: Mapping[str, np.ndarray]) -> None:
        """Add sequences. ``arrays`` are those of ``SequenceShard`` and are copied.

        Raises ``ValueError`` for a key that exists already, and then adds nothing.
        """
        given: set[Key] = set()
        for key in keys:
            if key in self._index or key in given:
                raise ValueError(
                    f"item {key[0]!r} of group {key[1]!r} was recorded already: every sequence needs an item id of "
                    "its own"
                )
            given.add(key)
        if not keys:
            return
        if self._growing is None or not self._growing.take(keys, arrays):
            self._end_growing()
            one = max(sum(array[:1].nbytes for array in arrays.values()), 1)
            self._growing = _Growing(arrays, max(len(keys), min(_SHARD_BYTES, self.memory_bytes) // one))
            self._growing.take(keys, arrays)
        number, first = len(self._shards), len(self._growing.keys) - len(keys)
        self._index.update({key: (number, first + row) for row, key in enumerate(keys)})
        self._in_memory += sum(array.nbytes for array in arrays.values())
        if self._in_memory > self.memory_bytes:
            self.flush()

    def _end_growing(self) -> None:
        self._shards, self._growing = self._blocks(), None

    def flush(self) -> None:
        """Write the sequences in memory to the folder, as one file."""
        self._end_growing()
        held = [number for number, shard in enumerate(self._shards) if shard.in_memory]
        if not held:
            return
        if self._folder is None:
            self._folder = _Folder(None)
        path = self._folder.path / f"sequences-{self._written:05d}-{secrets.token_hex(4)}.safetensors"
        content = [self._shards[number] for number in held]
        files.write(path, {}, self._header(content), _FILE_KIND, blocks=_portions(content))
        self._written += 1
        for number, block in zip(held, files.read_blocks(path, _FILE_KIND)[2], strict=True):
            self._shards[number] = _Shard(self._shards[number].keys, block, folder=self._folder)
        self._in_memory = 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the present sequences to a file of their own; `load` reads a folder of such files.

        Its name must be ``sequences-*.safetensors``. Raises ``OSError`` if it cannot be written.
        """
        content = self._blocks()
        files.write(path, {}, self._header(content), _FILE_KIND, blocks=_portions(content))

    def _header(self, shards: Sequence[_Shard]) -> dict[str, Any]:
        return {"layers": list(self.layers), "num_experts": list(self.num_experts), **_names(shards)}

    def close(self) -> None:
        """End a recording; a folder that the user named then holds all sequences."""
        if self._folder is not None and not self._folder.temporary:
            self.flush()

    # ---- selecting and merging

    def snapshot(self) -> SequenceStore:
        """A store with the present sequences. Both share shards; later additions to one do not appear in the other."""
        return self._of(self._blocks())

    def select(self, layers: Sequence[int]) -> SequenceStore:
        """Select layers by index, in the given order; sequences are shared, not copied."""
        columns = tuple(int(layer) for layer in layers)
        part = SequenceStore([self.layers[i] for i in columns], [self.num_experts[i] for i in columns])
        widest = max(part.num_experts, default=0)
        for shard in self._blocks():
            chosen = columns if shard.layers is None else tuple(shard.layers[i] for i in columns)
            part._add(replace(shard, layers=chosen, widest=widest))
        part.memory_bytes, part._unnamed = self.memory_bytes, self._unnamed
        return part

    def merge(self, other: SequenceStore) -> SequenceStore:
        """Merge two stores, sharing their shards. Sequences of ``other`` without item are renumbered.

        Raises ``ValueError`` for a key that both have.
        """
        if (self.layers, self.num_experts) != (other.layers, other.num_experts):
            raise ValueError("the two stores are of different models: merge runs of the same model only")
        merged = self.snapshot()
        for shard in other._blocks():
            keys = tuple((merged.next_unnamed() if is_unnamed(item) else item, group) for item, group in shard.keys)
            repeated = [key for key in keys if key in merged._index]
            if repeated:
                raise ValueError(
                    f"both stores hold item {repeated[0][0]!r} of group {repeated[0][1]!r}: merge disjoint recordings"
                )
            merged._add(replace(shard, keys=keys))
        return merged

    @classmethod
    def join_layers(cls, parts: Sequence[SequenceStore]) -> SequenceStore:
        """Join stores of the same sequences in different layers, in the order of the parts; reads a shard at a time.

        Raises ``ValueError`` if the parts do not hold the same sequences in the same order.
        """
        if any(part.keys() != parts[0].keys() for part in parts):
            raise ValueError("the parts hold different sequences: join stores of the same run")
        experts = [number for part in parts for number in part.num_experts]
        joined = cls([name for part in parts for name in part.layers], experts)
        for shards in _aligned(parts):
            arrays = {}
            for name in shards[0].arrays:
                tables = [shard.array(name) for shard in shards]
                if name in _OVER_EXPERTS:
                    tables = [np.pad(table, ((0, 0), (0, 0), (0, max(experts) - table.shape[2]))) for table in tables]
                arrays[name] = np.concatenate(tables, axis=1)
            joined.append(shards[0].keys, arrays)
        return joined._counted()

    def _of(self, shards: Sequence[_Shard]) -> SequenceStore:
        """A store made of these shards."""
        store = SequenceStore(self.layers, self.num_experts, memory_bytes=self.memory_bytes)
        for shard in shards:
            store._add(shard)
        store._unnamed = self._unnamed
        return store

    def _add(self, shard: _Shard) -> None:
        number = len(self._shards)
        self._shards.append(shard)
        self._index.update({key: (number, row) for row, key in enumerate(shard.keys)})
        self._in_memory += shard.in_memory

    # ---- files

    def content_hash(self) -> str:
        """SHA-256 over keys and contents, independent of the division into shards. Reads all sequences."""
        digests = []
        for shard in self.shards():
            for row, key in enumerate(shard.keys):
                parts = {name: np.ascontiguousarray(array[row]) for name, array in shard.arrays.items()}
                digests.append(files.content_hash(parts, list(key)))
        return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()

    def file_bytes(self, sequences: int) -> int:
        """Bytes that this number of sequences take in a file, names left out, if they are like those kept here."""
        blocks = self.content()[1]
        nbytes = sum(array.nbytes for block in blocks for array in block.read().values())
        return sequences * nbytes // len(self) if len(self) else 0

    def content(self) -> tuple[dict[str, Any], list[files.Block]]:
        """The content that `RoutingStatistics.save` writes: names of the sequences, for the header, and the blocks."""
        shards = self._blocks()
        return _names(shards), _portions(shards)

    @classmethod
    def of_file(
        cls,
        layers: Sequence[str],
        num_experts: Sequence[int],
        names: Mapping[str, Any],
        blocks: Sequence[files.StoredBlock],
    ) -> SequenceStore:
        """The store that ``content`` described, over the blocks of a file; sequences are read when they are used."""
        store = cls(layers, num_experts)
        for shard in _named(names, blocks):
            store._add(shard)
        return store._counted()

    def lies_in(self, path: str | os.PathLike[str]) -> bool:
        """Whether some of the sequences are read from this file."""
        paths = {os.path.realpath(s.block.path) for s in self._shards if isinstance(s.block, files.StoredBlock)}
        return os.path.realpath(path) in paths

    def read_from(self, saved: SequenceStore) -> None:
        """Read the sequences from the file of ``saved``, which holds the same ones; their own was replaced."""
        self._shards, self._growing, self._index, self._in_memory = [], None, {}, 0
        self._opened.clear()
        for shard in saved._shards:
            self._add(shard)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SequenceStore:
        """Open a folder that ``record(sequences=folder)`` wrote, also if the recording was killed.

        Sequences are read when they are used. Raises ``files.FileRefusedError`` for a folder without sequences, or with
        files that are damaged or come from two recordings.
        """
        path = Path(folder)
        found = sorted(path.glob("sequences-*.safetensors"))
        if not found:
            raise files.FileRefusedError(
                f"{path} holds no sequences: give the folder of record(sequences=folder), or read a file with "
                "RoutingStatistics.load"
            )
        store: SequenceStore | None = None
        for file in found:
            _, header, blocks = files.read_blocks(file, _FILE_KIND)
            with files.expected_content(file):
                of_model = tuple(header["layers"]), tuple(header["num_experts"])
                shards = _named(header, blocks)
            store = store or cls(*of_model)
            if of_model != (store.layers, store.num_experts):
                raise files.FileRefusedError(
                    f"{file} is of another model than {found[0].name}: keep one recording in a folder"
                )
            if any(key in store for shard in shards for key in shard.keys):
                raise files.FileRefusedError(f"{path} holds a sequence twice: keep one recording in a folder")
            for shard in shards:
                store._add(shard)
        assert store is not None
        return store._counted()

    def _counted(self) -> SequenceStore:
        """This store, set to number its next sequence without item after those that it holds."""
        self._unnamed = sum(is_unnamed(item) for item, _ in self._index)
        return self

    def __repr__(self) -> str:
        stored = sum(isinstance(shard.block, files.StoredBlock) for shard in self._shards)
        place = f", {stored} shards on disk" if stored else ""
        return f"SequenceStore({len(self)} sequences of {len(self.groups())} groups, {len(self.layers)} layers{place})"


def is_unnamed(item: Item) -> bool:
    """Whether this is the name of a sequence without item id."""
    return isinstance(item, str) and item.startswith(_UNNAMED) and item[1:].isdigit()


def _distribution(shard: SequenceShard, kind: str) -> np.ndarray:
    if kind == "count":
        counts = shard.array("counts").astype(np.float64)
        totals = counts.sum(-1, keepdims=True)
        return counts / np.where(totals > 0, totals, np.nan)
    if kind not in ("full", "topk"):
        raise ValueError(f"no distribution kind {kind!r}: full, topk or count")
    return shard.array(kind)


def _aligned(parts: Sequence[SequenceStore]) -> Iterator[list[SequenceShard]]:
    """The shards of stores of the same sequences, cut where one of them ends."""
    rest = [part.shards() for part in parts]
    held = [next(shards, None) for shards in rest]
    while shards := [shard for shard in held if shard is not None]:
        rows = min(shard.rows for shard in shards)
        yield [_rows_of(shard, slice(0, rows)) for shard in shards]
        held = [
            next(more, None) if shard.rows == rows else _rows_of(shard, slice(rows, None))
            for shard, more in zip(shards, rest, strict=True)
        ]


def _rows_of(shard: SequenceShard, rows: slice) -> SequenceShard:
    return SequenceShard(shard.keys[rows], {name: array[rows] for name, array in shard.arrays.items()})


def _held(shard: SequenceShard) -> _Shard:
    return _Shard(shard.keys, shard)


def _names(shards: Sequence[_Shard]) -> dict[str, list[Any]]:
    """Items and groups of the sequences of these shards."""
    keys = [key for shard in shards for key in shard.keys]
    return {"items": [item for item, _ in keys], "groups": [group for _, group in keys]}


def _named(names: Mapping[str, Any], blocks: Sequence[files.StoredBlock]) -> list[_Shard]:
    """The blocks of a file, with the items and groups of their sequences."""
    keys = list(zip(names["items"], names["groups"], strict=True))
    shards, first = [], 0
    for block in blocks:
        shards.append(_Shard(tuple(keys[first : first + block.rows]), block))
        first += block.rows
    if first != len(keys):
        raise ValueError(f"{len(keys)} names for {first} sequences")
    return shards


# ---- folders of recordings


def _claimed(path: Path) -> tuple[Path, int]:
    """The folder, made if missing and locked, and the lock's descriptor."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"there is no folder {path.parent} to make {path.name} in: make it first, or correct the path"
        )
    path = Path(os.path.abspath(path))
    path.mkdir(exist_ok=True)
    descriptor = files.open_folder(path)
    try:
        if files.lock(descriptor) is False:
            raise FileExistsError(f"another recording writes its sequences to {path}: name a folder of its own")
        if any(path.glob("sequences-*.safetensors")):
            raise FileExistsError(f"{path} holds the sequences of another recording: name an empty folder")
    except BaseException:
        os.close(descriptor)
        raise
    return path, descriptor


def _temporary_folder() -> tuple[Path, int]:
    """A new temporary folder, locked, and the lock's descriptor. Those of killed processes are removed."""
    # hosts that share a folder may not see each other's locks
    prefix = f"moe-route-{hashlib.blake2b(socket.gethostname().encode(), digest_size=6).hexdigest()}-"
    for leftover in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # gone by now, or of another user
            descriptor = files.open_folder(leftover)
            if files.lock(descriptor):
                shutil.rmtree(leftover, ignore_errors=True)
            os.close(descriptor)
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        descriptor = files.open_folder(path)
        files.lock(descriptor)
        if path.is_dir():
            return path, descriptor
        os.close(descriptor)  # taken for a leftover between its making and its locking

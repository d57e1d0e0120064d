"""Sequence by sequence: q_i, a_i and L_i keyed by (item, group), in memory up to a bound, then in shards on disk.

The item id pairs a sentence with its translations; paired divergence and the bootstrap read from here. Shards are
`moe_route.files` of kind "sequences".
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from moe_route import files

__all__ = ["Item", "SequenceShard", "SequenceStore", "is_unnamed"]

Item = str | int
Key = tuple[Item, str]
_FILE_KIND = "sequences"
_OPEN_SHARDS = 4  # shards from disk held in memory for reading
_UNNAMED = "#"  # items without an id are "#0", "#1", ...: they pair with nothing


@dataclass(frozen=True)
class SequenceShard:
    """Some sequences of one store: ``keys`` of length n; ``tokens`` int64 ``[n, L]`` (L_i); ``counts`` int32 ``[n, L,
    E]`` (a_i); ``full`` and ``topk`` float32 ``[n, L, E]`` (q_i; NaN where a layer saw nothing), each present where
    its metric was recorded.
    """

    keys: tuple[Key, ...]
    arrays: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


@dataclass
class _Folder:
    """Where shards lie; a temporary one is removed when nothing refers to it any more."""

    path: Path
    temporary: bool
    removal: weakref.finalize | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.temporary:
            self.removal = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class _ShardFile:
    """A shard on disk. ``renamed`` replaces the keys in the file (unnamed items of merged stores are numbered anew)."""

    folder: _Folder
    name: str
    keys: tuple[Key, ...]
    hash: str

    def read(self) -> SequenceShard:
        arrays, _ = files.read(self.folder.path / self.name, _FILE_KIND)
        return SequenceShard(self.keys, arrays)


class SequenceStore:
    """Routing distributions and counts of single sequences, keyed by (item, group), for all phases together.

    A key is recorded once: a second time is an error when the label block begins, before the model runs. Sequences
    without an item id are named "#0", "#1", ... and pair with nothing. Values are exact sums rounded once to float32.
    """

    def __init__(
        self,
        layers: Sequence[str],
        num_experts: Sequence[int],
        *,
        folder: str | os.PathLike[str] | None = None,
        memory_bytes: int = 256 << 20,
    ):
        """An empty store. ``folder``: where shards go (made if missing; refused with ``FileExistsError`` if it holds
        shards already); without one a temporary folder is made once ``memory_bytes`` are passed, and removed with the
        last object that reads it.
        """
        self.layers = tuple(layers)
        self.num_experts = tuple(num_experts)
        self.memory_bytes = memory_bytes
        self._folder = None if folder is None else _claimed(Path(folder))
        self._shards: list[SequenceShard | _ShardFile] = []
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
        """Items recorded for one group, in the order recorded."""
        return [item for item, of in self._index if of == group]

    def paired_items(self, *groups: str) -> list[Item]:
        """Items with an id of their own that every one of these groups has, in the order of the first."""
        rest = [set(self.items(group)) for group in groups[1:]]
        return [i for i in self.items(groups[0]) if not is_unnamed(i) and all(i in items for items in rest)]

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._index))

    def distributions(self, item: Item, group: str, kind: Literal["full", "topk", "count"] = "full") -> np.ndarray:
        """q_i of one sequence, float64 ``[L, E]``: rows sum to 1 (to float32 rounding), NaN where the layer saw no
        token of it.

        Raises ``KeyError`` for a key that was not recorded, ``ValueError`` for a kind whose metric was not.
        """
        shard, row = self._locate(item, group)
        return _distribution(shard, kind)[row].astype(np.float64)

    def counts(self, item: Item, group: str) -> np.ndarray:
        """a_i: tokens of the sequence that chose each expert, int64 ``[L, E]``."""
        shard, row = self._locate(item, group)
        return _array(shard, "counts")[row].astype(np.int64)

    def tokens(self, item: Item, group: str) -> np.ndarray:
        """L_i: tokens of the sequence that each layer counted, int64 ``[L]``."""
        shard, row = self._locate(item, group)
        return shard.arrays["tokens"][row]

    def frequency(self, item: Item, group: str) -> np.ndarray:
        """a_i / L_i, float64 ``[L, E]``; NaN where the layer saw no token."""
        tokens = self.tokens(item, group)[:, None].astype(np.float64)
        return self.counts(item, group) / np.where(tokens > 0, tokens, np.nan)

    def shards(self) -> Iterator[SequenceShard]:
        """All sequences, a shard at a time: memory stays bounded whatever the size of the store."""
        for shard in list(self._shards):
            yield shard if isinstance(shard, SequenceShard) else shard.read()

    def _locate(self, item: Item, group: str) -> tuple[SequenceShard, int]:
        if (item, group) not in self._index:
            known = ", ".join(self.groups()) or "nothing"
            raise KeyError(
                f"no sequence of item {item!r} in group {group!r}: the store holds {len(self)} sequences of {known}"
            )
        number, row = self._index[item, group]
        return self._open(number), row

    def _open(self, number: int) -> SequenceShard:
        shard = self._shards[number]
        if isinstance(shard, SequenceShard):
            return shard
        if number not in self._opened:
            self._opened[number] = shard.read()
            if len(self._opened) > _OPEN_SHARDS:
                self._opened.popitem(last=False)
        self._opened.move_to_end(number)
        return self._opened[number]

    # ---- writing

    def next_unnamed(self) -> str:
        """The next item id for a sequence that was given none."""
        self._unnamed += 1
        return f"{_UNNAMED}{self._unnamed - 1}"

    def append(self, keys: Sequence[Key], arrays: Mapping[str, np.ndarray]) -> None:
        """Add sequences; ``arrays`` as in ``SequenceShard``. Raises ``ValueError`` for a key that is there already,
        and adds nothing then."""
        repeated = [key for position, key in enumerate(keys) if key in self._index or key in keys[:position]]
        if repeated:
            raise ValueError(
                f"item {repeated[0][0]!r} of group {repeated[0][1]!r} was recorded already: every sequence needs an "
                "item id of its own"
            )
        if not keys:
            return
        shard = SequenceShard(tuple(keys), dict(arrays))
        self._add(shard)
        self._in_memory += shard.nbytes
        if self._in_memory > self.memory_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory to the folder, as one shard per ``memory_bytes``."""
        batch: list[SequenceShard] = []
        kept: list[SequenceShard | _ShardFile] = []
        for shard in self._shards:
            if isinstance(shard, _ShardFile):
                kept.append(shard)
                continue
            if batch and sum(s.nbytes for s in batch) + shard.nbytes > self.memory_bytes:
                kept.append(self._write(_joined(batch)))
                batch = []
            batch.append(shard)
        if batch:
            kept.append(self._write(_joined(batch)))
        self._replace(kept)

    def close(self) -> None:
        """End of a recording: a folder that the user named then holds everything."""
        if self._folder is not None and not self._folder.temporary:
            self.flush()

    def snapshot(self) -> SequenceStore:
        """A store with what is here now; both share shards, later additions to one are not seen by the other."""
        copy = SequenceStore(self.layers, self.num_experts, memory_bytes=self.memory_bytes)
        copy._replace(list(self._shards))
        copy._unnamed = self._unnamed
        return copy

    def merge(self, other: SequenceStore) -> SequenceStore:
        """Both stores as one, sharing their shards. Unnamed items of ``other`` are numbered anew. Raises
        ``ValueError`` for a key that both have."""
        if (self.layers, self.num_experts) != (other.layers, other.num_experts):
            raise ValueError("the two stores are of different models: merge runs of the same model only")
        merged = self.snapshot()
        for shard in other._shards:
            keys = tuple((merged.next_unnamed() if is_unnamed(item) else item, group) for item, group in shard.keys)
            repeated = [key for key in keys if key in merged._index]
            if repeated:
                raise ValueError(
                    f"both stores hold item {repeated[0][0]!r} of group {repeated[0][1]!r}: merge disjoint recordings"
                )
            renamed = (
                SequenceShard(keys, shard.arrays)
                if isinstance(shard, SequenceShard)
                else _ShardFile(shard.folder, shard.name, keys, shard.hash)
            )
            merged._add(renamed)
        merged._in_memory = sum(s.nbytes for s in merged._shards if isinstance(s, SequenceShard))
        return merged

    def _add(self, shard: SequenceShard | _ShardFile) -> None:
        number = len(self._shards)
        self._shards.append(shard)
        self._index.update({key: (number, row) for row, key in enumerate(shard.keys)})

    def _replace(self, shards: list[SequenceShard | _ShardFile]) -> None:
        self._shards, self._index = [], {}
        self._opened.clear()
        for shard in shards:
            self._add(shard)
        self._in_memory = sum(s.nbytes for s in shards if isinstance(s, SequenceShard))

    def _write(self, shard: SequenceShard) -> _ShardFile:
        if self._folder is None:
            self._folder = _Folder(Path(tempfile.mkdtemp(prefix="moe-route-sequences-")), temporary=True)
        name = f"sequences-{self._written:05d}-{secrets.token_hex(4)}.safetensors"  # read back in the order written
        self._written += 1
        digest = files.write(self._folder.path / name, shard.arrays, self._header(shard.keys), _FILE_KIND)
        return _ShardFile(self._folder, name, shard.keys, digest)

    def _header(self, keys: Sequence[Key]) -> dict[str, object]:
        return {
            "layers": list(self.layers),
            "num_experts": list(self.num_experts),
            "items": [item for item, _ in keys],
            "groups": [group for _, group in keys],
        }

    # ---- folders

    def content_hash(self) -> str:
        """SHA-256 over keys and contents, whatever the shards they lie in. Reads everything."""
        digests = []
        for shard in self.shards():
            for row, key in enumerate(shard.keys):
                parts = {name: np.ascontiguousarray(array[row]) for name, array in shard.arrays.items()}
                digests.append(files.content_hash(parts, list(key)))
        return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()

    def files_hash(self) -> str:
        """SHA-256 over the hashes that the shard files carry, each of which is verified when its shard is read."""
        hashes = sorted(shard.hash for shard in self._shards if isinstance(shard, _ShardFile))
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Copy everything into ``folder``, which appears whole or not at all; returns the copy's ``files_hash()``.

        An existing folder is replaced if it is a store; anything else there is refused with ``FileExistsError``.
        """
        target = Path(folder)
        if self._folder is not None and target.resolve() == self._folder.path.resolve():
            self.flush()
            return self.files_hash()
        _check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        building = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        try:
            self._save_into(building)
            _replace_folder(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        copy = SequenceStore.load(target)
        if any(isinstance(s, _ShardFile) and s.folder.path.resolve() == target.resolve() for s in self._shards):
            self._replace(list(copy._shards))  # it was read from the folder that is gone
        return copy.files_hash()

    def _save_into(self, folder: Path) -> None:
        copy = SequenceStore(self.layers, self.num_experts, folder=folder, memory_bytes=self.memory_bytes)
        for shard in self.shards():
            copy._add(shard)
            copy._in_memory += shard.nbytes
            if copy._in_memory > copy.memory_bytes:
                copy.flush()
        copy.flush()
        if not len(copy):
            files.write(folder / "sequences-00000-empty.safetensors", {}, copy._header([]), _FILE_KIND)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SequenceStore:
        """A store over the shards of a folder; sequences are read when asked for.

        Raises ``files.FileRefusedError`` for a folder without shards or a shard that is damaged or of another model (each
        shard is verified when it is first read).
        """
        path = Path(folder)
        found = sorted(path.glob("sequences-*.safetensors"))
        if not found:
            raise files.FileRefusedError(f"{path} holds no sequence shards: give the folder of a recording")
        headers = [files.read_header(shard, _FILE_KIND) for shard in found]
        first = headers[0]["header"]
        store = cls(first["layers"], first["num_experts"])
        home = _Folder(path, temporary=False)
        for shard, envelope in zip(found, headers, strict=True):
            header = envelope["header"]
            if (header["layers"], header["num_experts"]) != (first["layers"], first["num_experts"]):
                raise files.FileRefusedError(
                    f"{shard} is of another model than {found[0].name}: keep one recording in a folder"
                )
            keys = tuple(zip(header["items"], header["groups"], strict=True))
            store._add(_ShardFile(home, shard.name, keys, envelope["sha256"]))
        if len(store) != sum(len(shard.keys) for shard in store._shards):
            raise files.FileRefusedError(f"{path} holds a sequence twice: keep one recording in a folder")
        store._unnamed = sum(is_unnamed(item) for item, _ in store._index)
        return store

    def __repr__(self) -> str:
        shards = sum(isinstance(shard, _ShardFile) for shard in self._shards)
        place = f", {shards} shards in {self._folder.path}" if shards and self._folder else ""
        return f"SequenceStore({len(self)} sequences of {len(self.groups())} groups, {len(self.layers)} layers{place})"


def is_unnamed(item: Item) -> bool:
    """Whether this is the name of a sequence that was given none."""
    return isinstance(item, str) and item.startswith(_UNNAMED) and item[1:].isdigit()


def _distribution(shard: SequenceShard, kind: str) -> np.ndarray:
    if kind == "count":
        counts = _array(shard, "counts").astype(np.float64)
        totals = counts.sum(-1, keepdims=True)
        return counts / np.where(totals > 0, totals, np.nan)
    if kind not in ("full", "topk"):
        raise ValueError(f"no distribution kind {kind!r}: full, topk or count")
    return _array(shard, kind)


def _array(shard: SequenceShard, name: str) -> np.ndarray:
    if name not in shard.arrays:
        metric = {"full": "probability", "topk": "weight_share", "counts": "counts"}[name]
        raise ValueError(f"{name!r} was not recorded: record(metrics=...) with {metric!r}")
    return shard.arrays[name]


def _joined(shards: Sequence[SequenceShard]) -> SequenceShard:
    keys = tuple(key for shard in shards for key in shard.keys)
    return SequenceShard(keys, {name: np.concatenate([s.arrays[name] for s in shards]) for name in shards[0].arrays})


def _claimed(path: Path) -> _Folder:
    path.mkdir(parents=True, exist_ok=True)
    if any(path.glob("sequences-*.safetensors")):
        raise FileExistsError(f"{path} holds the sequences of another recording: name an empty folder")
    return _Folder(path, temporary=False)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir() or any(not entry.match("sequences-*.safetensors") for entry in target.iterdir()):
        raise FileExistsError(f"{target} is there and is not a sequence store: name another path")


def _replace_folder(building: Path, target: Path) -> None:
    retired = target.with_name(f".{target.name}.{secrets.token_hex(8)}.old")
    replaces = target.exists()
    if replaces:
        os.replace(target, retired)
    try:
        os.replace(building, target)
    except OSError:
        if replaces:
            os.replace(retired, target)
        raise
    shutil.rmtree(retired, ignore_errors=True)

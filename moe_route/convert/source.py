"""Open a file of any supported kind: sniff what it is, read its content, run nothing of it.

Arrays of ``.npy`` and ``.pt`` files are mapped into memory, not read; those of ``.npz`` and ``.safetensors`` are read
one by one when they are asked for. What is made of a file is drawn from its `Budget`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from moe_route.base import files
from moe_route.base.budget import Budget, BudgetError, FileRefusedError, extent
from moe_route.convert.pickles import OLD_TORCH, read_archive, read_pickle, unpacked
from moe_route.recording import RoutingStatistics

_LONGEST_JSON = 1 << 30  # bytes; Python needs about ten times as much memory to parse it


@dataclass(frozen=True, eq=False)
class Source:
    """A file and its content.

    ``form`` is "json" (one document), "lines" (a list of documents, one per line), "array", "arrays" (name -> array),
    "objects" (what a ``.pt`` or ``.pkl`` file holds), "text" and "folder" (no content), or "moe-route" (the content is
    the kind of file).
    """

    path: Path
    form: str
    content: Any
    budget: Budget

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    def json_with(self, *names: str) -> bool:
        """Whether this is one JSON document, a mapping that has these keys."""
        return self.form == "json" and isinstance(self.content, dict) and all(name in self.content for name in names)

    def documents(self) -> list[dict[str, Any]]:
        """The mappings of a JSON document, or of a file with one per line."""
        listed = self.content if isinstance(self.content, list) else [self.content]
        return [one for one in listed if isinstance(one, dict)] if self.form in ("json", "lines") else []

    def refused(self, problem: str, fix: str) -> FileRefusedError:
        """The error for content that cannot be used: what is wrong, and what to do."""
        return FileRefusedError(f"{self.path}: {problem}: {fix}")

    def array(self, value: Any) -> np.ndarray:
        """Numbers of an array, a tensor (bfloat16 as float32) or nested lists; ``ValueError`` for anything else."""
        self.room(_numbers_in(value, self.budget, {}, 0))
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError("its rows differ in length") from error
        if array.dtype.kind not in "biuf":
            raise ValueError(f"it holds {array.dtype}, not numbers")
        return array

    def room(self, *shape: int) -> tuple[int, ...]:
        """The shape of a table that is made next, drawn from the budget: numbers in a file say how large it is."""
        self.budget.spend(extent(shape))
        return shape


def _numbers_in(value: Any, budget: Budget, known: dict[int, int], depth: int) -> int:
    """How many numbers an array, or nested lists, would hold; ``known`` are lists that were counted, by their ids.

    ``ValueError`` for text, all of which would take the width of the longest.
    """
    if isinstance(value, np.ndarray):
        return extent(value.shape)
    if isinstance(value, (str, bytes)):
        raise ValueError("it holds text, not numbers")
    if not isinstance(value, (list, tuple)):
        return 1
    budget.enter(depth)
    if id(value) not in known:
        known[id(value)] = sum(_numbers_in(item, budget, known, depth + 1) for item in value)
    return known[id(value)]


class _Arrays(Mapping[str, np.ndarray]):
    """The arrays of a file by name, each read when it is asked for."""

    def __init__(self, path: Path, names: Iterable[str], budget: Budget) -> None:
        self._path, self._budget = path, budget
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    @abstractmethod
    def _read(self, name: str) -> np.ndarray:
        """Read one array."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Safetensors(_Arrays):
    def _read(self, name: str) -> np.ndarray:
        try:
            with safe_open(self._path, framework="pt") as stream:
                tensor = stream.get_tensor(name)
                self._budget.spend(extent(tensor.shape))
                return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        except (SafetensorError, TypeError, RuntimeError) as error:
            raise FileRefusedError(f"{self._path}: {name!r} is no array of numbers ({error}): save numbers") from error


class _Npz(_Arrays):
    def _read(self, name: str) -> np.ndarray:
        with _whole(self._path), zipfile.ZipFile(self._path) as archive:
            member = archive.getinfo(f"{name}.npy")
            return npy(unpacked(archive, member, self._budget), self._budget)


def open_source(path: str | Path) -> Source:
    """Open a file or a folder. Raises ``FileRefusedError`` for a missing, empty, truncated or unknown one."""
    path = Path(path)
    try:
        budget = Budget(path)
        if path.is_dir():
            return Source(path, "folder", None, budget)
        with open(path, "rb") as stream:
            head = stream.read(64)
    except FileNotFoundError as error:
        raise FileRefusedError(f"{path} does not exist: check the name") from error
    except OSError as error:
        raise FileRefusedError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if not head:
        raise FileRefusedError(f"{path} is empty: its writing was cut off or it is the wrong file; make it again")
    if head[8:9] == b"{":
        return _safetensors(path, budget)
    if head.startswith(b"\x93NUMPY"):
        return Source(path, "array", _mapped(path, budget), budget)
    if head.startswith(b"PK\x03\x04"):
        return _zip(path, budget)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        content = read_pickle(path, budget)
        if isinstance(content, int) and content == OLD_TORCH:
            raise FileRefusedError(f"{path} was made by torch.save before torch 1.6: load it and save it again")
        return Source(path, "objects", content, budget)
    if head.lstrip()[:1] in (b"{", b"["):
        return _json(path, budget)
    try:
        head[:-4].decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileRefusedError(
            f"{path} is of no known kind: give .json, .npy, .npz, .safetensors, .pt, .pkl or text"
        ) from error
    return Source(path, "text", None, budget)


def _safetensors(path: Path, budget: Budget) -> Source:
    try:
        with safe_open(path, framework="pt") as stream:
            names, ours = list(stream.keys()), "moe_route" in (stream.metadata() or {})
    except SafetensorError as error:
        raise FileRefusedError(f"{path} is truncated or damaged ({error}): copy it again or make it again") from error
    if ours:
        return Source(path, "moe-route", files.read_header(path)["kind"], budget)
    return Source(path, "arrays", _Safetensors(path, names, budget), budget)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn errors of any kind, which a damaged file raises in other libraries, into `FileRefusedError`."""
    try:
        yield
    except (FileRefusedError, MemoryError):
        raise
    except Exception as error:
        fix = "save numbers, not objects" if "bject" in str(error) else "copy it again or make it again"
        raise FileRefusedError(f"{path} is truncated, or is not an array of numbers ({error}): {fix}") from error


def _mapped(path: Path, budget: Budget) -> np.ndarray:
    """The array of a ``.npy`` file, mapped."""
    with _whole(path):
        with open(path, "rb") as stream:
            shape, order, dtype = _npy_head(stream)
            start = stream.tell()
        budget.spend(extent(shape))
        return np.empty(shape, dtype) if 0 in shape else np.memmap(path, dtype, "r", start, shape, order)


def npy(content: bytes, budget: Budget) -> np.ndarray:
    """The array in the bytes of a ``.npy`` file, not writable; ``FileRefusedError`` for bytes that are none."""
    stream = io.BytesIO(content)
    with _whole(Path(budget.source)):
        shape, order, dtype = _npy_head(stream)
        budget.spend(extent(shape))
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.frombuffer(content, dtype, math.prod(shape), stream.tell()).reshape(shape, order=order)


def _npy_head(stream: IO[bytes]) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype[Any]]:
    """Shape, order and dtype that a ``.npy`` file states."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of .npy is not read")
    shape, fortran, dtype = read[version](stream)
    if dtype.hasobject or not dtype.itemsize or any(n < 0 for n in shape):
        raise ValueError(f"an array of {'Python objects' if dtype.hasobject else dtype} {list(shape)}")
    return shape, "F" if fortran else "C", dtype


def _zip(path: Path, budget: Budget) -> Source:
    with _whole(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            return Source(path, "arrays", _Npz(path, [name.removesuffix(".npy") for name in names], budget), budget)
        return Source(path, "objects", read_archive(path, archive, budget), budget)


def _json(path: Path, budget: Budget) -> Source:
    size = path.stat().st_size
    if size > _LONGEST_JSON:
        raise FileRefusedError(
            f"{path} has {size} bytes of JSON, and at most {_LONGEST_JSON} are read: split it, or save arrays (.npz)"
        )
    text = path.read_text("utf-8", errors="replace")
    try:
        return Source(path, "json", budget.json(text), budget)
    except BudgetError:
        raise
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return Source(path, "lines", [budget.json(line) for line in lines], budget)
        except BudgetError:
            raise
        except ValueError:
            raise FileRefusedError(f"{path} is not whole JSON ({error}): copy it again or make it again") from error


# ---- checks and sums that several readers share

_LARGEST = 2.0**53  # floats are whole numbers up to here
_ROWS = 64  # slices of the first axis that are added up at once
logger = logging.getLogger(__name__)


def whole_numbers(source: Source, keys: Iterable[str]) -> list[int]:
    """Keys such as "0", "1", "10" as integers in increasing order; refuses other keys, and a file without any."""
    try:
        numbers = sorted(int(key) for key in keys)
    except (TypeError, ValueError) as error:
        raise source.refused(f"its keys are not numbers of layers or experts ({error})", "check --from") from error
    if not numbers or numbers[0] < 0:
        raise source.refused("it holds no layers, or a negative one", "record again")
    return numbers


def number_table(source: Source, value: Any, axes: str) -> np.ndarray:
    """An array of finite numbers from 0 with the named last axes ("layer, expert"); earlier axes are summed over."""
    try:
        array = source.array(value)
    except BudgetError:
        raise
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

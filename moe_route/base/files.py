"""Files the user keeps: safetensors with a JSON header, written whole and verified when read.

A file holds named tensors and one JSON header. The safetensors metadata contains the header under the key
``moe_route``, with the kind of file ("statistics", "plan", ...), the schema version, the library version, and a SHA-256
over all of it. So any safetensors reader can open the file, and this module detects truncated, altered, foreign or
newer files. Nothing is ever unpickled or executed.

Tensors that may not fit into memory have names that begin with ``rows.``. They are written and read as *blocks* of
rows. The header has a SHA-256 for each block, which is verified when the block is read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol, overload

import numpy as np
import torch

from moe_route import __version__
from moe_route.base.budget import Budget, extent
from moe_route.base.schema import FileRefusedError, check_format, load_json, reading, stamp

try:
    import fcntl
except ModuleNotFoundError:  # on Windows, where a file that is open can be neither renamed nor deleted
    fcntl = None  # type: ignore[assignment]
    import msvcrt

__all__ = [
    "FULL_DISK",
    "SCHEMA",
    "Block",
    "FileRefusedError",
    "StoredBlock",
    "canonical_json",
    "check_new_folder",
    "check_room",
    "check_writable",
    "content_hash",
    "dtype_code",
    "expected_content",
    "is_json",
    "lock",
    "make_folder",
    "new_folder",
    "open_folder",
    "read",
    "read_blocks",
    "read_header",
    "read_json",
    "readable_json",
    "replacing",
    "write",
    "write_json",
    "write_text",
]

SCHEMA = 2  # raised when a reader of the previous schema could misread a file
_KEY = "moe_route"
_ROWS = "rows."  # prefix of tensors that are written in blocks
_LENGTH_BYTES = 8  # layout of safetensors: header length (uint64, little endian), header (JSON), data
_LONGEST_HEADER = 100_000_000  # bytes; safetensors readers refuse more
_UNFINISHED = ".new"  # suffix of folders that are being written
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # in messages of libraries in Rust, whose errors are of other classes
_NO_HASH = "0" * 64  # placeholder for a hash
_LOCKED_BYTE = 2**31 - 2  # stands for the file on Windows, whose locks reach no further and keep others from reading
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_FULL_DISK = {
    errno.ENOSPC: "free some space, or choose a path on another disk",
    errno.EDQUOT: "free some space, or choose a path outside of this quota",
    errno.EFBIG: "choose a path on a disk that takes files of this size",
    errno.EIO: "check the disk, or choose a path on another one",
}
_UNCHANGED = "(an older file there is unchanged)"
FULL_DISK = frozenset(_FULL_DISK)
"""Numbers of the system errors after which the same file may be written once somebody has made room."""
_NOT_ALLOWED = {
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "choose a folder in which files can be made",  # the folder is there: /proc, or removed since
    errno.ENAMETOOLONG: "choose a shorter name",
}


class Block(Protocol):
    """A portion of the rows of some tensors, written and read at once."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    def read(self) -> Mapping[str, np.ndarray]:
        """Name -> array ``[rows, ...]``; all blocks of a file have the same names, dtypes and row shapes."""
        ...


@dataclass(frozen=True)
class StoredBlock:
    """A block of a file. Each call of `read` reads it and verifies its hash."""

    path: Path
    rows: int
    sha256: str
    entries: Mapping[str, _Entry]  # name -> position of its rows in the file

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype of its array."""
        return {name: entry.dtype for name, entry in self.entries.items()}

    def read(self) -> dict[str, np.ndarray]:
        """Name -> array ``[rows, ...]``. Raises ``FileRefusedError`` if the file is missing or has been replaced."""
        with reading(self.path), open(self.path, "rb") as stream:
            tensors = {name: _read_tensor(self.path, stream, entry) for name, entry in self.entries.items()}
        if _digest(tensors, None) != self.sha256:
            raise FileRefusedError(
                f"{self.path} was altered or replaced since it was opened: open it again, or restore it from a copy"
            )
        return {name: _as_array(os.fspath(self.path), name, tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Entry:
    """The position of a tensor in a file, in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, first: int, rows: int) -> _Entry:
        """The position of some of its rows."""
        row = _Entry(self.dtype, self.shape[1:], 0).nbytes
        return _Entry(self.dtype, (rows, *self.shape[1:]), self.start + first * row)


def canonical_json(value: object) -> str:
    """JSON with sorted keys, without spaces, NaN and infinity; equal content gives equal text.

    Raises ``TypeError`` for values that JSON cannot hold and ``ValueError`` for NaN or infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(tensors: Mapping[str, torch.Tensor | np.ndarray], header: object) -> str:
    """SHA-256 (hex) over the header and every tensor's name, dtype, shape and bytes, in the order of the names."""
    return _digest({name: _as_tensor(name, value) for name, value in tensors.items()}, header)


def _digest(tensors: Mapping[str, torch.Tensor], header: object) -> str:
    digest = hashlib.sha256(canonical_json(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(canonical_json([name, _dtype_name(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_raw_bytes(tensor))
    return digest.hexdigest()


def dtype_code(dtype: torch.dtype) -> str:
    """The name that safetensors gives a dtype ("BF16"); that of torch where it has none."""
    return _DTYPE_CODES.get(dtype, str(dtype))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():  # the strides of an empty tensor cannot be viewed as bytes
        return memoryview(b"")
    # as_strided: a single element is contiguous with any stride, but can be viewed as bytes with stride 1 only
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _as_tensor(name: str, value: torch.Tensor | np.ndarray) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous()
    array = np.asarray(value)
    try:
        # astype: torch supports the native byte order only; copy: torch warns about read-only arrays
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=not array.flags.writeable))
    except TypeError as error:
        raise TypeError(
            f"tensor {name!r} has dtype {array.dtype}, which a file cannot hold: convert it to a number dtype first"
        ) from error


# ---- replacing a file


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces ``path`` only when the block ends without an exception.

    It is written under a temporary name in the same folder, synced to disk and renamed. If the block raises, ``path``
    stays as it was and the temporary file is deleted. Temporary files of killed processes are deleted too.

    Raises ``OSError`` with the file and the remedy if the folder is missing or not writable, the path is a folder, its
    name is too long, or the disk is full.
    """
    target = _target(path)
    _remove_leftovers(target)
    with _explained(target, _NOT_ALLOWED | _FULL_DISK):
        stream, temporary = _new_temporary(target)
    try:
        with _explained(target, _FULL_DISK), stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if not fcntl:
                stream.close()
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text to ``path`` as UTF-8, whole or not at all, with the errors of ``replacing``."""
    with replacing(path) as stream:
        stream.write(text.encode())


def append(path: str | os.PathLike[str], content: bytes) -> None:
    """Append bytes to a file, and wait until they are on the disk. A full disk raises the error of ``replacing``."""
    with _explained(Path(path), _FULL_DISK), open(path, "ab") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that ``path`` can be written, before long work whose result goes there. Changes nothing.

    Raises the errors of ``replacing``, except that of a full disk.
    """
    target = _target(path)
    with _explained(target, _NOT_ALLOWED | _FULL_DISK):
        stream, temporary = _new_temporary(target)
    stream.close()
    temporary.unlink()


def check_room(path: str | os.PathLike[str], nbytes: int) -> None:
    """Check that the disk of ``path`` has this many bytes left, before long work whose result goes there.

    Raises ``OSError`` that names the folder and both sizes if it has not.
    """
    folder = _target(path).parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"{os.fspath(path)} will need at least {nbytes / 1e6:.1f} MB, and {folder} has {free / 1e6:.1f} MB left: "
            f"{_FULL_DISK[errno.ENOSPC]}",
        )


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder for results, inside a folder that is there; nothing is done if it exists.

    Raises ``OSError`` that says what to do if the folder around it is missing, or a file has this name.
    """
    folder = Path(path)
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"{folder} cannot be made: there is no folder {folder.parent}; make it first, or correct it"
        )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file: give the name of a folder")
    with _explained(folder, _NOT_ALLOWED | _FULL_DISK):
        folder.mkdir(exist_ok=True)
    return folder


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds something, or a file, by ``FileExistsError``."""
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not an empty folder: name a new one")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A folder that takes the name ``path`` only when the block ends without an exception; else it is deleted.

    With ``replace``, a folder that is there stays until the new one takes its name, and is deleted then. What killed
    processes left beside it is deleted, or takes its name back.

    Raises ``FileExistsError`` if ``path`` holds something already, or another process made it meanwhile, and
    ``OSError`` that says what to do if it cannot be written.
    """
    target = Path(path)
    old = target.with_name(f".{target.name}.old")
    _settle(target, old)
    if not replace:
        check_new_folder(path)
    if target.is_dir() and target.name.startswith(".") and target.suffix == _UNFINISHED:
        yield target  # the folder of a block around this one, which makes it whole or deletes it
        return
    with _explained(target, _NOT_ALLOWED | _FULL_DISK):
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished, descriptor = _new_unfinished(target)
    try:
        with _explained(target, _FULL_DISK):
            yield unfinished
        if replace and target.exists():
            target.rename(old)  # a process that is killed here leaves it to the next one
        try:
            unfinished.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(f"{target} was made by another process meanwhile: name a new one") from error
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _settle(target: Path, old: Path) -> None:
    """Undo or end what a killed process began: only folders that no process has locked are touched."""
    if old.is_dir():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{_UNFINISHED}") if fcntl else ():
        with contextlib.suppress(FileNotFoundError, PermissionError):
            descriptor = open_folder(left)
            try:
                if lock(descriptor):
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def _new_unfinished(target: Path) -> tuple[Path, int | None]:
    """A folder beside ``target``, and the descriptor that has it locked; Windows renames no folder that is open."""
    while True:
        unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_UNFINISHED}")
        unfinished.mkdir()
        if not fcntl:
            return unfinished, None
        descriptor = open_folder(unfinished)
        lock(descriptor)
        if unfinished.exists():
            return unfinished, descriptor
        os.close(descriptor)  # another process deleted it before it was locked


def _target(path: str | os.PathLike[str]) -> Path:
    """The file that ``path`` resolves to, in a folder that exists."""
    target = Path(os.path.realpath(path))
    with _explained(target, _NOT_ALLOWED), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(target)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{target} is a folder: give the name of a file in it")
    if target.exists() and not target.is_file():  # a rename would put a file in the place of /dev/null
        raise OSError(errno.EINVAL, f"{target} is a device or a pipe: give the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"{target} cannot be written: there is no folder {target.parent}; make it first, or correct the path",
        )
    return target


@contextlib.contextmanager
def _explained(target: Path, advice: Mapping[int, str]) -> Iterator[None]:
    """Add the file and the advice to the message of a system error for which there is advice."""
    try:
        yield
    except Exception as error:
        said = None if isinstance(error, OSError) else _SYSTEM_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
        if number is None or number not in advice or str(error).endswith(_UNCHANGED):
            raise
        raise OSError(
            number, f"{target} was not written ({os.strerror(number).lower()}): {advice[number]} {_UNCHANGED}"
        ) from error


def _temporary_prefix(target: Path) -> str:
    """Prefix of the names of all temporary files for ``target``; short for any name.

    It depends on the host: hosts that share a folder may not see each other's locks, so each deletes only its own
    temporary files.
    """
    owner = f"{socket.gethostname()}\0{target.name}".encode(errors="surrogateescape")
    return f".moe-route-{hashlib.blake2b(owner, digest_size=8).hexdigest()}-"


def _new_temporary(target: Path) -> tuple[IO[bytes], Path]:
    """Create a temporary file for ``target``, open and locked.

    The lock ends with the process, so an unlocked file is a leftover.
    """
    while True:
        temporary = target.with_name(f"{_temporary_prefix(target)}{secrets.token_hex(8)}.tmp")
        stream = open(temporary, "xb")  # noqa: SIM115  (handed to the caller)
        lock(stream.fileno())
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(temporary), os.fstat(stream.fileno())):
                return stream, temporary
        stream.close()  # another process deleted it before it was locked


def _remove_leftovers(target: Path) -> None:
    """Delete temporary files for ``target`` whose process has ended."""
    for leftover in target.parent.glob(f"{_temporary_prefix(target)}*.tmp"):
        # the file may be gone by now, or belong to another user
        with contextlib.suppress(FileNotFoundError, PermissionError), open(leftover, "rb") as stream:
            if lock(stream.fileno()):
                if not fcntl:
                    stream.close()
                leftover.unlink()


def open_folder(folder: str | os.PathLike[str]) -> int:
    """A descriptor of a folder, to lock; on Windows, which opens no folders, of a hidden file in it."""
    return os.open(folder, os.O_RDONLY) if fcntl else os.open(Path(folder, ".lock"), os.O_CREAT | os.O_RDWR)


def lock(descriptor: int) -> bool | None:
    """Lock a file or folder that was opened just now, until it is closed or the process ends.

    Returns False if another process has locked it, and None if the file system has no locks.
    """
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(descriptor, 0, os.SEEK_SET)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _sync_folder(folder: Path) -> None:
    """Sync the folder, so that the rename survives a power failure."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # the folder is writable but cannot be opened
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- writing


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | np.ndarray],
    header: Mapping[str, Any],
    kind: str,
    *,
    blocks: Sequence[Block] = (),
) -> str:
    """Write ``tensors`` and ``header`` to ``path`` as a file of this ``kind``; returns the content hash.

    Tensors may be torch (any device, any dtype of safetensors) or numpy. The header is JSON: strings, numbers,
    booleans, None, lists and string-keyed mappings, without NaN. The rows of all ``blocks`` form tensors named
    ``rows.NAME``; one block at a time is in memory.

    Raises ``TypeError`` / ``ValueError`` for a header, tensor or block that a file cannot hold, and ``OSError`` if
    ``path`` cannot be written. ``path`` then stays as it was.
    """
    held = {name: _as_tensor(name, value) for name, value in tensors.items()}
    reserved = [name for name in held if name.startswith(_ROWS)]
    if reserved:
        raise ValueError(f"tensor names beginning with {_ROWS!r} are those of blocks: rename {reserved[0]!r}")
    envelope: dict[str, Any] = {"schema": SCHEMA, "kind": kind, "library_version": __version__, **stamp(kind)}
    envelope["header"] = _checked_header(header)
    if blocks:
        envelope["blocks"] = {"rows": [block.rows for block in blocks], "sha256": [_NO_HASH] * len(blocks)}
    entries = _laid_out({**{name: (held[name].dtype, held[name].shape) for name in held}, **_shapes_of_rows(blocks)})
    start = len(_head(entries, {**envelope, "sha256": _NO_HASH}))  # hashes are filled in at the end
    with replacing(path) as stream:
        for name, tensor in held.items():
            _write_tensor(stream, start + entries[name].start, tensor)
        first = 0
        for number, block in enumerate(blocks):
            envelope["blocks"]["sha256"][number] = _write_block(stream, start, entries, block, first)
            first += block.rows
        digest = _digest(held, envelope)
        stream.seek(0)
        stream.write(_head(entries, {**envelope, "sha256": digest}))
    return digest


def _shapes_of_rows(blocks: Sequence[Block]) -> dict[str, tuple[torch.dtype, Sequence[int]]]:
    """Dtypes and shapes of the tensors that the rows of all blocks form."""
    if not blocks:
        return {}
    rows = sum(block.rows for block in blocks)
    first = {name: _as_tensor(name, array) for name, array in blocks[0].read().items()}
    return {_ROWS + name: (tensor.dtype, (rows, *tensor.shape[1:])) for name, tensor in first.items()}


def _laid_out(shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> dict[str, _Entry]:
    """Assign positions to tensors, relative to the first one: wide dtypes first, so that all are aligned."""
    entries, start = {}, 0
    for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):
        dtype, shape = shapes[name]
        if dtype not in _DTYPE_CODES:
            raise TypeError(
                f"tensor {name!r} has dtype {_dtype_name(dtype)}, which a file cannot hold: convert it first"
            )
        entries[name] = _Entry(dtype, tuple(shape), start)
        start += entries[name].nbytes
    return entries


def _head(entries: Mapping[str, _Entry], envelope: Mapping[str, Any]) -> bytes:
    """The start of a file: the length of the safetensors header, and the header."""
    layout: dict[str, Any] = {"__metadata__": {_KEY: canonical_json(envelope)}}
    for name, entry in entries.items():
        offsets = [entry.start, entry.start + entry.nbytes]
        layout[name] = {"dtype": _DTYPE_CODES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    if len(text) > _LONGEST_HEADER:
        raise ValueError(
            f"the header has {len(text)} bytes, and safetensors readers take {_LONGEST_HEADER}: keep parts in files of "
            "their own"
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _write_tensor(stream: IO[bytes], start: int, tensor: torch.Tensor) -> None:
    stream.seek(start)
    stream.write(_raw_bytes(tensor))


def _write_block(stream: IO[bytes], start: int, entries: Mapping[str, _Entry], block: Block, first: int) -> str:
    """Write a block whose first row has index ``first`` in the file; returns its hash."""
    tensors = {name: _as_tensor(name, array) for name, array in block.read().items()}
    places = {
        name.removeprefix(_ROWS): entry.part(first, block.rows)
        for name, entry in entries.items()
        if name.startswith(_ROWS)
    }
    own = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if own != {name: (place.dtype, place.shape) for name, place in places.items()}:
        raise ValueError(f"the blocks of a file hold the same tensors: {sorted(own)} differ from {sorted(places)}")
    for name, tensor in tensors.items():
        _write_tensor(stream, start + places[name].start, tensor)
    return _digest(tensors, None)


def _checked_header(header: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(canonical_json(dict(header)))
    except (TypeError, ValueError) as error:
        raise type(error)(f"the header cannot be written as JSON: {error}") from error
    if plain != _tuples_as_lists(header):
        raise TypeError("the header would not come back as it is: mappings need string keys")
    return plain


def _tuples_as_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples_as_lists(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tuples_as_lists(item) for item in value]
    return value


# ---- reading


@overload
def read(
    path: str | os.PathLike[str], kind: str, *, framework: Literal["numpy"] = "numpy"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]: ...
@overload
def read(
    path: str | os.PathLike[str], kind: str, *, framework: Literal["torch"]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]: ...
def read(
    path: str | os.PathLike[str], kind: str, *, framework: Literal["numpy", "torch"] = "numpy"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read tensors and header of a file that ``write`` made with the same ``kind``, without the tensors of blocks.

    ``framework`` is the type of the returned tensors; bfloat16 and float8 need "torch". Raises ``FileRefusedError`` for
    a missing, empty, truncated, altered, foreign (a pickle, another program's file, another kind) or newer file. A
    foreign file is detected by its header, before its data is read.
    """
    if framework not in ("numpy", "torch"):
        raise ValueError(f'framework must be "numpy" or "torch", not {framework!r}')
    tensors, header, _ = _read(Path(path), kind)
    if framework == "torch":
        return tensors, header
    return {name: _as_array(os.fspath(path), name, tensor) for name, tensor in tensors.items()}, header


def read_blocks(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[StoredBlock]]:
    """Read a file like ``read``, and return its blocks too; the rows of a block are read by its ``read``."""
    tensors, header, blocks = _read(Path(path), kind)
    return {name: _as_array(os.fspath(path), name, tensor) for name, tensor in tensors.items()}, header, blocks


def _read(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[StoredBlock]]:
    with reading(path) as budget, open(path, "rb") as stream:
        layout, start = _layout(path, stream, budget)
        envelope = _envelope(path, layout, kind, budget)
        entries = _entries(path, layout, start, budget)
        tensors = {
            name: _read_tensor(path, stream, entry) for name, entry in entries.items() if not name.startswith(_ROWS)
        }
    expected = envelope.pop("sha256", None)
    if _digest(tensors, envelope) != expected:
        raise FileRefusedError(
            f"{path} was altered after it was written (its contents do not match its SHA-256): "
            "restore it from a copy or make it again"
        )
    with expected_content(path):
        return tensors, envelope["header"], _blocks(path, entries, envelope.get("blocks"))


def _blocks(path: Path, entries: Mapping[str, _Entry], said: Mapping[str, Any] | None) -> list[StoredBlock]:
    rows = {name.removeprefix(_ROWS): entry for name, entry in entries.items() if name.startswith(_ROWS)}
    blocks, first = [], 0
    for count, sha256 in zip(said["rows"], said["sha256"], strict=True) if said else ():
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"a block has {count!r} rows")
        of_block = {name: entry.part(first, count) for name, entry in rows.items()}
        blocks.append(StoredBlock(Path(os.path.abspath(path)), count, sha256, of_block))
        first += count
    if any(entry.shape[0] != first for entry in rows.values()):
        raise ValueError("blocks and rows differ in number")
    return blocks


@contextlib.contextmanager
def expected_content(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors from unpacking a file's content into ``FileRefusedError``.

    They mean that another version, or another program, wrote an intact file with other fields.
    """
    try:
        yield
    except FileRefusedError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FileRefusedError(
            f"{os.fspath(path)} is whole, but does not hold what this version of moe-route reads ({error}): another "
            "version wrote it; make it again"
        ) from error


def _read_tensor(path: Path, stream: IO[bytes], entry: _Entry) -> torch.Tensor:
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    data = bytearray(entry.nbytes)
    stream.seek(entry.start)
    if stream.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise FileRefusedError(f"{path} is truncated: copy it again or make it again")
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


def _as_array(path: str, name: str, tensor: torch.Tensor) -> np.ndarray:
    try:
        return tensor.numpy()
    except TypeError as error:
        raise TypeError(
            f"tensor {name!r} of {path} is {_dtype_name(tensor.dtype)}, which numpy does not have: "
            'read with framework="torch"'
        ) from error


def is_json(path: str | os.PathLike[str]) -> bool:
    """Whether a name asks for JSON, to read and edit, in place of safetensors."""
    return Path(path).suffix == ".json"


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], kind: str) -> None:
    """Write JSON of a ``kind`` to ``path``, to read and edit, whole or not at all. It has no hash."""
    write_text(path, f"{readable_json({_KEY: kind, 'schema': SCHEMA, **stamp(kind), **content})}\n")


def readable_json(content: Any, indent: str = "") -> str:
    """JSON in which a list or object without others inside takes one line, and any other a line for each entry.

    Raises ``ValueError`` for NaN and infinity.
    """
    if isinstance(content, Mapping):
        entries, brackets = [(f"{json.dumps(str(key))}: ", entry) for key, entry in content.items()], "{}"
    elif isinstance(content, Sequence) and not isinstance(content, str):
        entries, brackets = [("", entry) for entry in content], "[]"
    else:
        return json.dumps(content, allow_nan=False)
    if not any(_holds_others(entry) for _, entry in entries):
        return brackets[0] + ", ".join(f"{key}{readable_json(entry)}" for key, entry in entries) + brackets[1]
    deeper = indent + "  "
    lines = ",\n".join(f"{deeper}{key}{readable_json(entry, deeper)}" for key, entry in entries)
    return f"{brackets[0]}\n{lines}\n{indent}{brackets[1]}"


def _holds_others(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str))


def read_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read a file that ``write_json`` wrote with the same ``kind``; it may have been edited.

    Raises ``FileRefusedError`` for a missing file, one that is not JSON, another kind, or a newer schema.
    """
    content = load_json(path)
    if not isinstance(content, dict) or content.get(_KEY) != kind:
        raise FileRefusedError(f'{path} is not a {kind}: it lacks "{_KEY}": "{kind}"; write it with {kind}.save')
    if "schema" not in content:
        raise FileRefusedError(f'{path} does not say how it is written: add "schema": {SCHEMA}')
    if content.get("schema") not in range(1, SCHEMA + 1):
        raise FileRefusedError(
            f"{path} has schema {content.get('schema')!r}, this version reads up to {SCHEMA}: upgrade moe-route"
        )
    check_format(kind, content, os.fspath(path))
    return content


def read_header(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """Metadata of a file, without its tensors and without verifying the hash.

    Keys: schema, kind, library_version, sha256, header. With ``kind=None`` any kind is accepted, for listings and for
    messages that name the kind of a file.
    """
    source = Path(path)
    with reading(source) as budget, open(source, "rb") as stream:
        return _envelope(source, _layout(source, stream, budget)[0], kind, budget)


def _envelope(path: Path, layout: Mapping[str, Any], kind: str | None, budget: Budget) -> dict[str, Any]:
    """The checked metadata of a file; refuses everything that is not a file of ``kind``."""
    try:
        envelope: dict[str, Any] = budget.json(layout.get("__metadata__", {})[_KEY])
        canonical_json(envelope)  # without NaN, which no hash is made of
        schema, found, header = envelope["schema"], envelope["kind"], envelope["header"]
    except FileRefusedError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileRefusedError(
            f"{path} is a safetensors file, but not one that moe-route wrote: give a moe-route file"
        ) from error
    if not isinstance(schema, int) or not isinstance(header, dict):
        raise FileRefusedError(
            f"{path} is damaged (its metadata has the wrong shape): restore it from a copy or make it again"
        )
    if schema > SCHEMA:
        raise FileRefusedError(
            f"{path} has schema {schema}, written by moe-route {envelope.get('library_version')}; "
            f"this version reads up to {SCHEMA}: upgrade moe-route"
        )
    if kind is not None and found != kind:
        raise FileRefusedError(f"{path} holds {found!r}, not {kind!r}: give a file of the right kind")
    check_format(found, envelope, os.fspath(path), writer=envelope.get("library_version"))
    return envelope


def _layout(path: Path, stream: IO[bytes], budget: Budget) -> tuple[dict[str, Any], int]:
    """The safetensors header, and the position of the data; checks the file's length against the header."""
    size = os.fstat(stream.fileno()).st_size
    if not size:
        raise FileRefusedError(f"{path} is empty: its writing was cut off or it is the wrong file; make it again")
    head = stream.read(_LENGTH_BYTES + 1)
    truncated = f"{path} is truncated ({size} bytes): copy it again or make it again"
    _refuse_pickles(path, head)
    if head[_LENGTH_BYTES:] not in (b"{", b""):
        raise FileRefusedError(f"{path} is not a moe-route file (not safetensors at all): give a moe-route file")
    start = _LENGTH_BYTES + int.from_bytes(head[:_LENGTH_BYTES], "little")
    if size <= _LENGTH_BYTES or start > size:
        raise FileRefusedError(truncated)
    if start - _LENGTH_BYTES > _LONGEST_HEADER:
        raise FileRefusedError(f"{path} is not a moe-route file (its header is too long): give a moe-route file")
    try:
        layout: dict[str, Any] = budget.json(head[_LENGTH_BYTES:] + stream.read(start - len(head)))
        end = max((entry["data_offsets"][1] for key, entry in layout.items() if key != "__metadata__"), default=0)
        missing = start + end - size
    except FileRefusedError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise FileRefusedError(
            f"{path} is damaged (its header is not valid): restore it from a copy or make it again"
        ) from error
    if missing > 0:
        raise FileRefusedError(truncated)
    if missing < 0:
        raise FileRefusedError(
            f"{path} was altered ({-missing} bytes after its end): restore it from a copy or make it again"
        )
    return layout, start


def _entries(path: Path, layout: Mapping[str, Any], start: int, budget: Budget) -> dict[str, _Entry]:
    """The positions of the tensors of a file, which share no byte."""
    entries: dict[str, _Entry] = {}
    places = []
    try:
        for name, said in layout.items():
            if name == "__metadata__":
                continue
            first, last = said["data_offsets"]
            shape = tuple(said["shape"])
            entries[name] = entry = _Entry(_DTYPES[said["dtype"]], shape, start + first)
            budget.enter(len(shape))
            if not all(isinstance(n, int) and n >= 0 for n in (first, last, *shape)) or entry.nbytes != last - first:
                raise ValueError(name)
            budget.spend(extent(shape))
            places.append((first, last))
        if any(first < last for (_, last), (first, _) in itertools.pairwise(sorted(places))):
            raise ValueError("tensors share their bytes")
    except FileRefusedError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise FileRefusedError(
            f"{path} is damaged (its header is not valid): restore it from a copy or make it again"
        ) from error
    return entries


def _refuse_pickles(path: Path, head: bytes) -> None:
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:9] != b"{":
        raise FileRefusedError(
            f"{path} is a pickle, which could run code: moe-route never loads one; give a moe-route file"
        )
    if head[:4] == b"PK\x03\x04":
        raise FileRefusedError(
            f"{path} is a zip archive (torch.save or npz): moe-route never loads one; give a moe-route file"
        )

"""Files the user keeps: safetensors with a JSON header, written whole and verified when read.

A file holds named tensors and one JSON header. The header travels in the safetensors metadata under the key
``moe_route`` together with the file's kind ("statistics", "plan", ...), the schema version, the library version and a
SHA-256 over all of it, so any safetensors reader can open the file and this one can tell a truncated, altered, foreign
or newer file from a good one. Nothing is ever unpickled or executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, overload

import numpy as np
import safetensors
import safetensors.torch
import torch

from moe_route import __version__

__all__ = ["SCHEMA", "FileRefusedError", "canonical_json", "content_hash", "read", "read_header", "replacing", "write"]

SCHEMA = 1  # raised when a reader of the previous schema could misread a file
_KEY = "moe_route"
_LENGTH_BYTES = 8  # a safetensors file: header length (uint64, little endian), header (JSON), data


class FileRefusedError(ValueError):
    """A file that cannot be trusted or understood; the message says what is wrong and what to do."""


def canonical_json(value: object) -> str:
    """JSON with sorted keys, no spaces and no NaN or infinity: equal content gives equal text.

    Raises ``TypeError`` for what JSON cannot hold and ``ValueError`` for NaN or infinity.
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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():  # an empty tensor's strides cannot be viewed as bytes
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _as_tensor(name: str, value: torch.Tensor | np.ndarray) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous()
    array = np.asarray(value)
    try:
        # astype: torch knows only the machine's own byte order; copy: torch warns about arrays it may not write to
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=not array.flags.writeable))
    except TypeError as error:
        raise TypeError(
            f"tensor {name!r} has dtype {array.dtype}, which a file cannot hold: convert it to a number dtype first"
        ) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write to that takes the place of ``path`` only when the block ends well.

    It is written under a temporary name in the same folder (made if missing), synced to disk and renamed. When the
    block raises, ``path`` is what it was before and the temporary file is gone.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: give the name of a file in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last through a power cut, where the system can sync a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | np.ndarray],
    header: Mapping[str, Any],
    kind: str,
) -> str:
    """Write ``tensors`` and ``header`` to ``path`` as a file of this ``kind``; returns the content hash.

    Tensors may be torch (any device, any dtype safetensors knows) or numpy arrays. The header is JSON: strings,
    numbers, booleans, None, lists and string-keyed mappings, no NaN. Raises ``TypeError`` / ``ValueError`` for a header
    or tensor that a file cannot hold, before anything is written.
    """
    held = {name: _as_tensor(name, value) for name, value in tensors.items()}
    envelope = {"schema": SCHEMA, "kind": kind, "library_version": __version__, "header": _checked_header(header)}
    digest = _digest(held, envelope)
    # clones: safetensors refuses tensors that share memory, such as a view next to its base
    data = safetensors.torch.save(
        {name: tensor.clone() for name, tensor in held.items()},
        metadata={_KEY: canonical_json({**envelope, "sha256": digest})},
    )
    with replacing(path) as stream:
        stream.write(data)
    return digest


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
    """Tensors and header of a file that ``write`` made with the same ``kind``.

    ``framework`` is what the tensors come back as; bfloat16 and float8 need "torch". Raises ``FileRefusedError`` for a
    missing, empty, truncated, altered, foreign (a pickle, another program's file, another kind) or newer file.
    """
    if framework not in ("numpy", "torch"):
        raise ValueError(f'framework must be "numpy" or "torch", not {framework!r}')
    name = os.fspath(path)
    with _reading(Path(path)):
        data = Path(path).read_bytes()
    envelope = _envelope(name, data, len(data), kind)
    expected = envelope.pop("sha256", None)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise FileRefusedError(f"{name} is damaged ({error}): restore it from a copy or make it again") from error
    if _digest(tensors, envelope) != expected:
        raise FileRefusedError(
            f"{name} was altered after it was written (its contents do not match its SHA-256): "
            "restore it from a copy or make it again"
        )
    if framework == "torch":
        return tensors, envelope["header"]
    return {key: _as_array(name, key, tensor) for key, tensor in tensors.items()}, envelope["header"]


def _as_array(path: str, name: str, tensor: torch.Tensor) -> np.ndarray:
    try:
        return tensor.numpy()
    except TypeError as error:
        raise TypeError(
            f"tensor {name!r} of {path} is {_dtype_name(tensor.dtype)}, which numpy does not have: "
            'read with framework="torch"'
        ) from error


def read_header(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """What a file says about itself, without its tensors and without verifying the hash: schema, kind, library_version,
    sha256, header.

    With ``kind=None`` any kind is taken: for listings and for the message that tells a user what a file is.
    """
    source = Path(path)
    with _reading(source), open(source, "rb") as stream:
        head = stream.read(_LENGTH_BYTES)
        size = os.fstat(stream.fileno()).st_size
        head += stream.read(min(int.from_bytes(head, "little"), size))
    return _envelope(os.fspath(path), head, size, kind)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the system says when a file cannot be read into ``FileRefusedError``."""
    if path.is_dir():
        raise FileRefusedError(f"{path} is a folder: give the name of a file in it")
    try:
        yield
    except FileNotFoundError as error:
        raise FileRefusedError(f"{path} does not exist: check the name") from error
    except OSError as error:
        raise FileRefusedError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def _envelope(name: str, head: bytes, size: int, kind: str | None) -> dict[str, Any]:
    """The checked metadata in a file's first bytes; refuses everything that is not a whole file of ``kind``."""
    layout = _layout(name, head, size)
    try:
        envelope: dict[str, Any] = json.loads(layout.get("__metadata__", {})[_KEY])
        schema, found, header = envelope["schema"], envelope["kind"], envelope["header"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileRefusedError(
            f"{name} is a safetensors file, but not one that moe-route wrote: give a moe-route file"
        ) from error
    if not isinstance(schema, int) or not isinstance(header, dict):
        raise FileRefusedError(
            f"{name} is damaged (its metadata has the wrong shape): restore it from a copy or make it again"
        )
    if schema > SCHEMA:
        raise FileRefusedError(
            f"{name} has schema {schema}, written by moe-route {envelope.get('library_version')}; "
            f"this version reads up to {SCHEMA}: upgrade moe-route"
        )
    if kind is not None and found != kind:
        raise FileRefusedError(f"{name} holds {found!r}, not {kind!r}: give a file of the right kind")
    return envelope


def _layout(name: str, head: bytes, size: int) -> dict[str, Any]:
    """The safetensors header, after the file's length was checked against it."""
    if not size:
        raise FileRefusedError(f"{name} is empty: its writing was cut off or it is the wrong file; make it again")
    truncated = f"{name} is truncated ({size} bytes): copy it again or make it again"
    _refuse_pickles(name, head)
    if head[_LENGTH_BYTES : _LENGTH_BYTES + 1] not in (b"{", b""):
        raise FileRefusedError(f"{name} is not a moe-route file (not safetensors at all): give a moe-route file")
    start = _LENGTH_BYTES + int.from_bytes(head[:_LENGTH_BYTES], "little")
    if size <= _LENGTH_BYTES or start > size:
        raise FileRefusedError(truncated)
    try:
        layout: dict[str, Any] = json.loads(head[_LENGTH_BYTES:start])
        end = max((entry["data_offsets"][1] for key, entry in layout.items() if key != "__metadata__"), default=0)
        missing = start + end - size
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise FileRefusedError(
            f"{name} is damaged (its header is not valid): restore it from a copy or make it again"
        ) from error
    if missing > 0:
        raise FileRefusedError(truncated)
    if missing < 0:
        raise FileRefusedError(
            f"{name} was altered ({-missing} bytes after its end): restore it from a copy or make it again"
        )
    return layout


def _refuse_pickles(name: str, head: bytes) -> None:
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:9] != b"{":
        raise FileRefusedError(
            f"{name} is a pickle, which could run code: moe-route never loads one; give a moe-route file"
        )
    if head[:4] == b"PK\x03\x04":
        raise FileRefusedError(
            f"{name} is a zip archive (torch.save or npz): moe-route never loads one; give a moe-route file"
        )

"""Read the arrays and tables of a pickle without running any of it.

A pickle is a program: it names functions and calls them. Here every name becomes a record of what was to be built, with
its arguments, and nothing is called or imported. Afterwards the records of ``BUILDERS`` become arrays, tables and plain
containers. Any other name is refused before the rest of the file is read. So a table of pandas is read without pandas,
and a file of torch without torch's reader. What is built is drawn from the `Budget` of the file.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from moe_route.base.budget import Budget, FileRefusedError, extent

OLD_TORCH = 0x1950A86A20F9469CFC6C  # the first pickle in a file of torch before 1.6 is this number
_ZIP_HEAD, _ZIP_LENGTHS = 30, 26  # bytes of the head of a member, and where in it two lengths stand
_DTYPE_KINDS = "biufcSUO"
_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_Builder = Callable[[tuple[Any, ...], Any, dict[Any, Any], Budget], Any]


class _Record:
    """What a pickle wants built: the arguments, the state and the items that were given for it."""

    name = ""

    def __new__(cls, *args: Any, **keywords: Any) -> _Record:
        record = super().__new__(cls)
        record.args, record.keywords, record.state, record.items = args, keywords, None, []
        return record

    def __init__(self, *args: Any, **keywords: Any) -> None:
        pass  # __new__ keeps them, which is all that the opcode NEWOBJ calls

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    state: Any
    items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def update(self, items: Any) -> None:
        self.items += [(item, None) for item in items]


def _named(name: str) -> type[_Record]:
    return type("_Named", (_Record,), {"name": name})


_STORAGE = "storage"  # no full name, so that no pickle can give it


class _Reader(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Reads one pickle from memory, which bounds its reads, into containers, records and plain values.

    It is the reader in Python, whose memo is a mapping. Dictionaries and sets become records as well: to hash a key of
    nested shared tuples may take forever, so the budget is asked before.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    stack: list[Any]

    def __init__(self, stream: io.BytesIO, budget: Budget) -> None:
        super().__init__(stream)
        self._budget = budget

    def find_class(self, module: str, name: str) -> type[_Record]:
        full = f"{module}.{name}"
        if full not in BUILDERS:
            raise FileRefusedError(
                f"{self._budget.source} is a pickle that uses {full}, which is not an array, a table or a plain "
                "container: it was refused and nothing of it ran; save the numbers alone (.npz, .safetensors or .json)"
            )
        return _named(full)

    def persistent_load(self, reference: Any) -> _Record:
        return _named(_STORAGE)(reference)

    def _empty_dict(self) -> None:
        self.append(_named("builtins.dict")())

    def _dict(self) -> None:
        items = self.pop_mark()
        self._empty_dict()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][key] = value

    def _empty_set(self) -> None:
        self.append(_named("builtins.set")())

    def _additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(items)

    def _frozenset(self) -> None:
        self.append(_named("builtins.frozenset")(self.pop_mark()))

    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]  # which makes no buffer before it reads
    dispatch[pickle.EMPTY_DICT[0]] = _empty_dict
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.EMPTY_SET[0]] = _empty_set
    dispatch[pickle.ADDITEMS[0]] = _additems
    dispatch[pickle.FROZENSET[0]] = _frozenset


_Storage = Callable[[Any], Any]


def _content(stream: io.BytesIO, budget: Budget, storage: _Storage | None = None) -> Any:
    """What the next pickle holds, built; raises `FileRefusedError` for anything that is not whole or not plain.

    ``storage`` gives what stands for a storage that the pickle refers to: a tensor of one axis.
    """
    try:
        built, _ = _Building(budget, storage).plain(_Reader(stream, budget).load(), 0)
        return built
    except (FileRefusedError, MemoryError):
        raise
    except EOFError as error:
        raise FileRefusedError(f"{budget.source} is truncated: copy it again or make it again") from error
    except Exception as error:  # a damaged pickle raises errors of any kind
        raise FileRefusedError(
            f"{budget.source} is not a pickle of arrays or tables ({type(error).__name__}: {error}): save the numbers "
            "alone (.npz, .safetensors or .json)"
        ) from error


def read_pickle(path: Path, budget: Budget | None = None) -> Any:
    """The content of a pickle: numpy arrays, a dict of columns for each table, and plain containers.

    Raises ``FileRefusedError`` for a pickle that names anything else, is truncated, or would cost more than its budget.
    """
    return _content(io.BytesIO(path.read_bytes()), budget or Budget(path))


def read_archive(path: Path, archive: zipfile.ZipFile, budget: Budget) -> Any:
    """The content of a file of ``torch.save``: as `read_pickle`, with tensors as arrays that are mapped into memory."""
    members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
    if "data.pkl" not in members:
        raise FileRefusedError(f"{path} is a zip archive, neither of arrays nor made by torch.save: give one of these")

    if "byteorder" in members and unpacked(archive, members["byteorder"], budget) == b"big":
        raise FileRefusedError(f"{path} is of a big-endian machine: save its tensors as .npz or .safetensors there")

    def storage(reference: Any) -> torch.Tensor:
        dtype, key, count = _referred(reference)
        member, size = members[f"data/{key}"], count * dtype.itemsize
        if not 0 <= size <= member.file_size:
            raise ValueError(f"storage {key} has {member.file_size} bytes, and not {count} elements")
        if not count or member.compress_type != zipfile.ZIP_STORED:
            return (
                torch.frombuffer(bytearray(unpacked(archive, member, budget)), dtype=dtype, count=count)
                if count
                else torch.empty(0)
            )
        with archive.open(member), open(path, "rb") as stream:  # the first checks that the member is there
            stream.seek(member.header_offset + _ZIP_LENGTHS)
            start = member.header_offset + _ZIP_HEAD + sum(struct.unpack("<HH", stream.read(4)))  # of name and extra
        mapped = np.memmap(path, np.uint8, "c", start, (size,))
        return torch.from_numpy(np.array(mapped) if start % dtype.itemsize else mapped).view(dtype)

    return _content(io.BytesIO(unpacked(archive, members["data.pkl"], budget)), budget, storage)


def unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, budget: Budget) -> bytes:
    """The bytes of a member of an archive, as many as it states, drawn from the budget."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is packed in a way that neither numpy nor torch writes")
    budget.unpack(member.compress_size, member.file_size)
    with archive.open(member) as stream:
        return stream.read(member.file_size)  # without a size, what is more than stated would be unpacked, too


def _referred(reference: Any) -> tuple[torch.dtype, str, int]:
    """Dtype, key and number of elements of the storage that a pickle of torch refers to."""
    kind, dtype, key, _, count, *_ = reference
    if kind != "storage" or type(count) is not int or not isinstance(key, str):
        raise ValueError("it refers to something that is no storage")
    return _STORAGES[dtype], key, count


class _Building:
    """Builds the records of a pickle, shared parts once, and refuses what would be too large if no part was shared."""

    def __init__(self, budget: Budget, storage: _Storage | None) -> None:
        self.budget, self.storage = budget, storage
        self._done: dict[int, tuple[Any, Any, int]] = {}  # id -> (original, which keeps the id taken; result; extent)

    def plain(self, value: Any, depth: int) -> tuple[Any, int]:
        """What a value is, built, and how many elements it would have with its shared parts copied."""
        self.budget.enter(depth)
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, bytearray)):
            return value, 1
        if id(value) in self._done:
            return self._done[id(value)][1:]
        built: Any
        if isinstance(value, (list, tuple)):
            built, extents = self._all(value, depth)
            built = built if isinstance(value, list) else tuple(built)
        elif isinstance(value, _Record):
            (args, state, items), extents = self._all([value.args, value.state, value.items], depth)
            if value.name == _STORAGE:
                if self.storage is None:
                    raise ValueError("it refers to something outside of it")
                built = self.storage(args[0])
            else:
                built = BUILDERS[value.name](args, state, dict(items), self.budget)
            extents += extent(built.shape) if isinstance(built, np.ndarray) else 0
        elif isinstance(value, type) and issubclass(value, _Record):
            built, extents = value.name, 1  # a class that is named, not built, such as the int of defaultdict(int)
        else:
            raise TypeError(f"{type(value).__name__} is neither an array nor a container")
        self._done[id(value)] = (value, built, extents)
        return built, extents

    def _all(self, values: Sequence[Any], depth: int) -> tuple[list[Any], int]:
        built, extents = [], 1
        for value in values:
            one, here = self.plain(value, depth + 1)
            built.append(one)
            extents += here
        self.budget.afford(extents)
        return built, extents


# ---- numpy


def _dtype(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> np.dtype[Any]:
    order: Any = state[1] if state else "="
    dtype = np.dtype(_text(args[0]))
    if dtype.kind not in _DTYPE_KINDS:
        raise TypeError(f"arrays of {dtype} are not read")
    return dtype.newbyteorder(order) if order in "<>" else dtype


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} stands where text belongs")
    return value


def _array(dtype: np.dtype[Any], shape: Any, data: Any, order: str, budget: Budget) -> np.ndarray:
    budget.spend(extent(shape if isinstance(shape, tuple) else (shape,)))
    if dtype.kind != "O":
        return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")
    objects = np.empty(len(data), object)
    objects[:] = data
    return objects.reshape(shape, order="F" if order == "F" else "C")


def _array_of_state(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> np.ndarray:
    _, shape, dtype, fortran, data = state
    return _array(dtype, shape, data, "F" if fortran else "C", budget)


def _array_of_buffer(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> np.ndarray:
    data, dtype, shape, order = args
    return _array(dtype, shape, data, order, budget)


def _scalar(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> Any:
    dtype, data = args
    return np.frombuffer(data, dtype)[0].item() if dtype.kind != "O" else data


# ---- pandas and pyarrow


def _block_values(columns: Any) -> np.ndarray:
    values = np.asarray(columns)
    return values if values.ndim == 2 else values[None]


def _index(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> Any:
    parts = args[1]
    if "data" in parts:
        return np.asarray(parts["data"])
    if {"start", "stop", "step"} <= parts.keys():
        numbers = range(parts["start"], parts["stop"], parts["step"])
        budget.spend(len(numbers))
        return np.array(numbers)
    raise TypeError("an index of several levels is not read: reset_index() before saving")


def _frame(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> dict[str, np.ndarray]:
    """A DataFrame as column -> array."""
    blocks, axes = state["_mgr"]
    if len(axes[0]) != sum(len(_block_values(values)) for values, *_ in blocks):
        raise ValueError("a table names other columns than it has")
    names, columns = [str(name) for name in np.asarray(axes[0]).tolist()], {}
    for values, placement, *_ in blocks:
        places = range(len(names))[placement] if isinstance(placement, slice) else placement
        for place, column in zip(places, _block_values(values), strict=True):
            columns[names[int(place)]] = column
    return {name: columns[name] for name in names}


def _arrow_array(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> np.ndarray:
    """An array of texts, the only one that pandas keeps in pyarrow by itself; texts that are missing become None."""
    kind, length, _, offset, (valid, starts, text), *_ = args[0]
    widths = {"string": np.int32, "large_string": np.int64}
    if kind not in widths:
        raise TypeError(f"columns of pyarrow type {kind} are not read")
    ends = np.frombuffer(starts, widths[kind])[offset : offset + length + 1]
    if len(ends) != length + 1 or (np.diff(ends) < 0).any():
        raise ValueError("its texts overlap, or reach past their data")
    budget.spend(length)
    bits = None if valid is None else np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")[offset:]
    array = np.empty(length, object)
    for row in range(length):
        here = bits is None or bits[row]
        array[row] = bytes(text[ends[row] : ends[row + 1]]).decode() if here else None
    return array


def _extension_array(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> np.ndarray:
    return np.asarray(state["_pa_array"] if "_pa_array" in state else state["_ndarray"])


# ---- torch


def _storage(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> Any:
    """A storage in the format of torch before 1.6: five pickles, the fourth of it, then its size and its bytes."""
    stream = io.BytesIO(args[0])
    number, _, _, (dtype, _, count), _ = (_content(stream, budget, _referred) for _ in range(5))
    data = stream.read()[8 : 8 + count * dtype.itemsize]
    if number != OLD_TORCH or count < 0 or len(data) != count * dtype.itemsize:
        raise ValueError("a storage is not whole")
    return torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _tensor(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> np.ndarray:
    flat, offset, size, stride = args[:4]
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= flat.numel()):
        raise ValueError("a tensor reaches past its data")
    budget.spend(extent(size))
    tensor = flat.as_strided(size, stride, offset)
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _is(value: Any) -> _Builder:
    return lambda args, state, items, budget: value


def _bytes(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> bytes:
    data = args[0] if args else b""
    if not isinstance(data, (str, bytes, bytearray)):
        raise TypeError("bytes are given, not a number of them")
    return data.encode("latin-1") if isinstance(data, str) else bytes(data)


def _first(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> Any:
    return args[0]


def _arguments(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> Any:
    return args


def _mapping(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> dict[Any, Any]:
    given = args[0] if args and isinstance(args[0], (Mapping, list)) else {}
    return {**dict(given), **items}


def _set(args: tuple[Any, ...], state: Any, items: dict[Any, Any], budget: Budget) -> set[Any]:
    return {*(args[0] if args else ()), *items}


def _builders(modules: tuple[str, ...], name: str, builder: Any) -> dict[str, Any]:
    return {f"{module}.{name}": builder for module in modules}


_BUILTINS = ("builtins", "__builtin__")
_PANDAS = ("pandas", "pandas.core.frame", "pandas.core.indexes.base")
BUILDERS: Mapping[str, _Builder] = {
    **_builders(_BUILTINS, "slice", lambda args, state, items, budget: slice(*args)),
    **_builders(_BUILTINS, "bytearray", _bytes),
    **_builders(_BUILTINS, "set", _set),
    **_builders(_BUILTINS, "frozenset", lambda *given: frozenset(_set(*given))),
    **_builders(_BUILTINS, "dict", _mapping),
    **{f"{module}.{name}": _is(None) for module in _BUILTINS for name in ("int", "long", "float", "list")},
    "_codecs.encode": lambda args, state, items, budget: _text(args[0]).encode("latin-1"),
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": _mapping,
    "numpy.dtype": _dtype,
    "numpy.ndarray": _is(None),
    **_builders(("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct", _array_of_state),
    **_builders(("numpy.core.multiarray", "numpy._core.multiarray"), "scalar", _scalar),
    **_builders(("numpy.core.numeric", "numpy._core.numeric"), "_frombuffer", _array_of_buffer),
    **_builders(_PANDAS, "DataFrame", _frame),
    **_builders(_PANDAS, "Index", _is(None)),
    **_builders(("pandas", "pandas.core.indexes.range"), "RangeIndex", _is(None)),
    **_builders(("pandas", "pandas.core.arrays.string_"), "StringDtype", _is(None)),
    **_builders(("pandas.arrays", "pandas.core.arrays.string_arrow"), "ArrowStringArray", _extension_array),
    "pandas.core.indexes.base._new_Index": _index,
    "pandas.core.internals.managers.BlockManager": _arguments,
    "pandas._libs.internals._unpickle_block": _arguments,
    "pyarrow.lib.type_for_alias": _first,
    "pyarrow.lib.py_buffer": _first,
    "pyarrow.lib._restore_array": _arrow_array,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_parameter": _first,
    "torch.Size": lambda args, state, items, budget: tuple(*args),
    **{name: _is(None) for name in _STORAGES},
}
"""Full name -> how a record of it becomes a value. Names that are not here are refused."""

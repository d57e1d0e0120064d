"""Read the arrays and tables of a pickle without running any of it.

A pickle is a program: it names functions and calls them. Here every name becomes a record of what was to be built, with
its arguments, and nothing is called or imported. Afterwards the records of ``BUILDERS`` become arrays, tables and plain
containers. Any other name is refused before the rest of the file is read. So a table of pandas is read without pandas.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_route.base.files import FileRefusedError

_DTYPE_KINDS = "biufcSUO"
_DEEPEST = 200  # nesting; deeper containers are refused


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


class _Reader(pickle.Unpickler):
    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> type[_Record]:
        full = f"{module}.{name}"
        if full not in BUILDERS:
            raise FileRefusedError(
                f"{self._path} is a pickle that uses {full}, which is not an array, a table or a plain container: it "
                "was refused and nothing of it ran; save the numbers alone (.npz, .safetensors or .json)"
            )
        return type("_Named", (_Record,), {"name": full})


def read_pickle(path: Path) -> Any:
    """The content of a pickle: numpy arrays, a dict of columns for each table, and plain containers.

    Raises ``FileRefusedError`` for a pickle that names anything else, or is truncated.
    """
    try:
        with open(path, "rb") as stream:
            return _plain(_Reader(stream, path).load(), {}, 0)
    except FileRefusedError:
        raise
    except EOFError as error:
        raise FileRefusedError(f"{path} is truncated: copy it again or make it again") from error
    except Exception as error:  # a damaged pickle raises errors of any kind
        raise FileRefusedError(
            f"{path} is not a pickle of arrays or tables ({type(error).__name__}: {error}): save the numbers alone "
            "(.npz, .safetensors or .json)"
        ) from error


def _plain(value: Any, done: dict[int, tuple[Any, Any]], depth: int) -> Any:
    """Build the records in ``value``. ``done`` maps ids to (original, result), so that shared parts are built once."""
    if depth > _DEEPEST:
        raise ValueError("its containers are nested too deeply, or hold themselves")
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, bytearray)):
        return value
    if id(value) in done:
        return done[id(value)][1]
    built: Any
    if isinstance(value, dict):
        built = {_plain(k, done, depth + 1): _plain(v, done, depth + 1) for k, v in value.items()}
    elif isinstance(value, (list, tuple, set, frozenset)):
        built = type(value)(_plain(item, done, depth + 1) for item in value)
    elif isinstance(value, _Record):
        args, state = _plain(value.args, done, depth + 1), _plain(value.state, done, depth + 1)
        items = dict(_plain(value.items, done, depth + 1))
        built = BUILDERS[value.name](args, state, items)
    elif isinstance(value, type) and issubclass(value, _Record):
        built = value.name  # a class that is named, not built, such as the int of defaultdict(int)
    else:
        raise TypeError(f"{type(value).__name__} is neither an array nor a container")
    done[id(value)] = (value, built)
    return built


# ---- numpy


def _dtype(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> np.dtype[Any]:
    order: Any = state[1] if state else "="
    dtype = np.dtype(str(args[0]))
    if dtype.kind not in _DTYPE_KINDS:
        raise TypeError(f"arrays of {dtype} are not read")
    return dtype.newbyteorder(order) if order in "<>" else dtype


def _array(dtype: np.dtype[Any], shape: Any, data: Any, order: str) -> np.ndarray:
    if dtype.kind != "O":
        return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")
    objects = np.empty(len(data), object)
    objects[:] = data
    return objects.reshape(shape, order="F" if order == "F" else "C")


def _array_of_state(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> np.ndarray:
    _, shape, dtype, fortran, data = state
    return _array(dtype, shape, data, "F" if fortran else "C")


def _array_of_buffer(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> np.ndarray:
    data, dtype, shape, order = args
    return _array(dtype, shape, data, order)


def _scalar(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> Any:
    dtype, data = args
    return np.frombuffer(data, dtype)[0].item() if dtype.kind != "O" else data


# ---- pandas and pyarrow


def _block_values(columns: Any) -> np.ndarray:
    values = np.asarray(columns)
    return values if values.ndim == 2 else values[None]


def _index(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> Any:
    parts = args[1]
    if "data" in parts:
        return np.asarray(parts["data"])
    if {"start", "stop", "step"} <= parts.keys():
        return range(parts["start"], parts["stop"], parts["step"])
    raise TypeError("an index of several levels is not read: reset_index() before saving")


def _frame(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> dict[str, np.ndarray]:
    """A DataFrame as column -> array."""
    blocks, axes = state["_mgr"]
    if len(axes[0]) != sum(len(_block_values(values)) for values, *_ in blocks):
        raise ValueError("a table names other columns than it has")
    names, columns = [str(name) for name in axes[0]], {}
    for values, placement, *_ in blocks:
        places = range(len(names))[placement] if isinstance(placement, slice) else placement
        for place, column in zip(places, _block_values(values), strict=True):
            columns[names[int(place)]] = column
    return {name: columns[name] for name in names}


def _arrow_array(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> np.ndarray:
    """An array of texts, the only one that pandas keeps in pyarrow by itself; texts that are missing become None."""
    kind, length, _, offset, (valid, starts, text), *_ = args[0]
    widths = {"string": np.int32, "large_string": np.int64}
    if kind not in widths:
        raise TypeError(f"columns of pyarrow type {kind} are not read")
    ends = np.frombuffer(starts, widths[kind])[offset : offset + length + 1]
    bits = None if valid is None else np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")[offset:]
    array = np.empty(length, object)
    for row in range(length):
        here = bits is None or bits[row]
        array[row] = bytes(text[ends[row] : ends[row + 1]]).decode() if here else None
    return array


def _extension_array(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> np.ndarray:
    return np.asarray(state["_pa_array"] if "_pa_array" in state else state["_ndarray"])


# ---- torch


def _storage(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> Any:
    return torch.load(io.BytesIO(args[0]), weights_only=True, map_location="cpu")


def _tensor(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> np.ndarray:
    storage, offset, size, stride = args[:4]
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= flat.numel()):
        raise ValueError("a tensor reaches past its data")
    tensor = flat.as_strided(size, stride, offset)
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _is(value: Any) -> Callable[[tuple[Any, ...], Any, dict[Any, Any]], Any]:
    return lambda args, state, items: value


def _bytes(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> bytes:
    data = args[0] if args else b""
    if isinstance(data, int):
        raise TypeError("bytes are given, not a number of them")
    return data.encode("latin-1") if isinstance(data, str) else bytes(data)


def _first(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> Any:
    return args[0]


def _arguments(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> Any:
    return args


def _mapping(args: tuple[Any, ...], state: Any, items: dict[Any, Any]) -> dict[Any, Any]:
    given = args[0] if args and isinstance(args[0], (Mapping, list)) else {}
    return {**dict(given), **items}


def _named(modules: tuple[str, ...], name: str, builder: Any) -> dict[str, Any]:
    return {f"{module}.{name}": builder for module in modules}


_BUILTINS = ("builtins", "__builtin__")
_PANDAS = ("pandas", "pandas.core.frame", "pandas.core.indexes.base")
BUILDERS: Mapping[str, Callable[[tuple[Any, ...], Any, dict[Any, Any]], Any]] = {
    **_named(_BUILTINS, "slice", lambda args, state, items: slice(*args)),
    **_named(_BUILTINS, "bytearray", _bytes),
    **_named(_BUILTINS, "set", lambda args, state, items: set(*args)),
    **_named(_BUILTINS, "frozenset", lambda args, state, items: frozenset(*args)),
    **{f"{module}.{name}": _is(None) for module in _BUILTINS for name in ("int", "long", "float", "list", "dict")},
    "_codecs.encode": lambda args, state, items: str(args[0]).encode("latin-1"),
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": _mapping,
    "numpy.dtype": _dtype,
    "numpy.ndarray": _is(None),
    **_named(("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct", _array_of_state),
    **_named(("numpy.core.multiarray", "numpy._core.multiarray"), "scalar", _scalar),
    **_named(("numpy.core.numeric", "numpy._core.numeric"), "_frombuffer", _array_of_buffer),
    **_named(_PANDAS, "DataFrame", _frame),
    **_named(_PANDAS, "Index", _is(None)),
    **_named(("pandas", "pandas.core.indexes.range"), "RangeIndex", _is(None)),
    **_named(("pandas", "pandas.core.arrays.string_"), "StringDtype", _is(None)),
    **_named(("pandas.arrays", "pandas.core.arrays.string_arrow"), "ArrowStringArray", _extension_array),
    "pandas.core.indexes.base._new_Index": _index,
    "pandas.core.internals.managers.BlockManager": _arguments,
    "pandas._libs.internals._unpickle_block": _arguments,
    "pyarrow.lib.type_for_alias": _first,
    "pyarrow.lib.py_buffer": _first,
    "pyarrow.lib._restore_array": _arrow_array,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
}
"""Full name -> how a record of it becomes a value. Names that are not here are refused."""

"""Devices that are not there: tensors that say they lie on cuda:0, cuda:1, ..., computed on the CPU.

What is real: the code under test sees `tensor.device`, has to name a device when it makes a tensor, has to bring
tensors of two devices together itself, and has no way to a value but the operations that make the host wait for a
device. Every operation passes through here, so each of those waits is seen, and which code asked for it. What is not:
kernels of a device, streams, and how long anything takes. A graph (`StandInGraph`) is the list of operations, run again
on the same memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
# What a device answers only when everything before it is done.
WAITING = {
    aten._local_scalar_dense,
    aten.item,
    aten.is_nonzero,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.equal,
    aten.allclose,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.bincount,
}
COPYING = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}


class HostWaitedError(AssertionError):
    """Code that must not wait for a device did."""


class OnDevice(Tensor):
    """A tensor of a device that is not there; `inner` holds its values on the CPU."""

    inner: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> OnDevice:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        with torch.inference_mode(inner.is_inference()):
            made = Tensor._make_wrapper_subclass(cls, inner.shape, **layout)
        made.inner, made.place = inner, place
        return made

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self) -> str:  # prints without an operation
        return f"OnDevice({self.place}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, lambda what: None)


class _BeforeDispatch(TorchFunctionMode):
    """Functions that do their work before an operation can be seen: `torch.tensor(list, device=...)` makes a tensor of
    the host and copies it; attention and `to` ask C++ for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], OnDevice):
            inner, named = tree_map_only(OnDevice, _inner, args), tree_map_only(OnDevice, _inner, kwargs)
            return OnDevice(func(*inner, **named), args[0].place)
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return aten._to_copy.default(args[0], device=torch.device("cpu")).tolist()
        if func is Tensor.pin_memory:
            return _pin(args[0].clone())
        if func is Tensor.cpu:
            func, args = Tensor.to, (args[0], "cpu")
        if func is Tensor.to and not isinstance(args[1] if len(args) > 1 else None, Tensor):
            return _to(func, args[0], args[1:], kwargs)
        return func(*args, **kwargs)


def _to(func: Any, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`Tensor.to`, which asks C++ where the tensor lies."""
    named = {name: value for name, value in kwargs.items() if name != "copy"}
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **named)
    device, dtype = tensor.device if device is None else device, tensor.dtype if dtype is None else dtype
    if "cuda" not in (device.type, tensor.device.type):
        return func(tensor, *args, **kwargs)
    if (device, dtype) == (tensor.device, tensor.dtype) and not kwargs.get("copy"):
        return tensor
    return aten._to_copy.default(tensor, device=device, dtype=dtype, non_blocking=non_blocking)


class StandInDevices(TorchDispatchMode):
    """While on, `device="cuda:N"` works, and code of moe_route that waits for a device raises `HostWaitedError`.

    `allowed` counts the waits of code inside `waiting_allowed`, `others` those of other code. While `late`, copies to
    pinned memory of the host that nobody waits for do not arrive; `deliver` lets them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strict = True
        self.allowed: list[str] = []
        self.others: list[str] = []
        self.late = False
        self._before = _BeforeDispatch()

    def __enter__(self) -> StandInDevices:
        self._before.__enter__()
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._before.__exit__(*failure)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.late and func.overloadpacket is aten.copy_ and _unhurried(*args):
            _on_their_way.append((args[0], args[1].inner.clone()))
            return args[0]
        return run(func, args, kwargs or {}, self._wait)

    def _wait(self, what: str) -> None:
        where = asked_by("moe_route")
        if where is None:
            self.others.append(what)
        elif self.strict:
            raise HostWaitedError(f"{what} makes the host wait, asked for at {where}")
        else:
            self.allowed.append(f"{what} at {where}")

    def deliver(self) -> None:
        """Everything that is on its way to the host arrives."""
        for host, values in _on_their_way:
            host.copy_(values)
        _on_their_way.clear()

    @contextmanager
    def waiting_allowed(self) -> Iterator[None]:
        """Reading results, at the end of a block."""
        before, self.strict = self.strict, False
        try:
            yield
        finally:
            self.strict = before


_pinned: set[int] = set()
_on_their_way: list[tuple[Tensor, Tensor]] = []
_capture: list[StandInGraph] = []


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], wait: Callable[[str], None]) -> Any:
    """One operation: on the CPU, for the device that its arguments name or lie on."""
    packet = func.overloadpacket
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    if packet is aten.is_pinned:
        return tensors[0].data_ptr() in _pinned
    if packet is aten._pin_memory:
        return _pin(tensors[0].clone())
    pinned = bool(kwargs.get("pin_memory"))
    target = kwargs.get("device")
    place = there[0].place if there else None
    if target is not None:
        target = torch.device(target)
        place = target if target.type == "cuda" else None
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if pinned:
        kwargs = {**kwargs, "pin_memory": False}
    if there:
        _check_places(func, packet, tensors, there)
    if packet in COPYING:
        _see_copy(packet, args, kwargs, place, wait)
    elif there and (packet in WAITING or _reads_a_mask(packet, args)):
        wait(str(func))
    inner, named = tree_map_only(OnDevice, _inner, args), tree_map_only(OnDevice, _inner, kwargs)
    for graph in _capture:
        graph.see_writes(func, inner, named)
    out = func(*inner, **named)
    for graph in _capture:
        graph.operations.append((func, inner, named, out))
    if place is None or (packet is aten.copy_ and not isinstance(args[0], OnDevice)):
        if pinned:
            _pin(out)
        return args[0] if packet is aten.copy_ else out
    itself = {id(tensor.inner): tensor for tensor in there}  # an operation in place returns what it was given

    def wrapped(tensor: Tensor) -> OnDevice:
        return itself[id(tensor)] if id(tensor) in itself else OnDevice(tensor, place)

    return tree_map_only(Tensor, wrapped, out)


class StandInGraph:
    """What a CUDA graph does with the code that is captured: its operations are noted and not run (whatever they wrote
    outside is put back), and `replay` runs them again on the memory they had, without the code."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def capture(self) -> Iterator[None]:
        with (
            mock.patch("torch.cuda.is_initialized", return_value=True),
            mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
        ):
            _capture.append(self)
            try:
                yield
            finally:
                _capture.remove(self)
                for tensor, before in self._before.values():
                    tensor.copy_(before)

    def see_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what an operation is about to write over."""
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(given):
                if isinstance(tensor, Tensor):
                    key = tensor.untyped_storage().data_ptr()
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self._before.setdefault(key, (whole, whole.clone()))

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _inner(tensor: OnDevice) -> Tensor:
    return tensor.inner


def _unhurried(target: Tensor, source: Tensor, non_blocking: bool = False) -> bool:
    """Whether a copy from a device to pinned memory of the host is waited for by nobody."""
    away = isinstance(source, OnDevice) and not isinstance(target, OnDevice)
    return away and non_blocking and target.data_ptr() in _pinned


def _pin(tensor: Tensor) -> Tensor:
    _pinned.add(tensor.data_ptr())
    return tensor


def _check_places(func: Any, packet: Any, tensors: list[Tensor], there: list[OnDevice]) -> None:
    places = {str(tensor.place) for tensor in there}
    if packet not in INDEXING:
        places |= {"cpu" for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim() > 0}
    if len(places) > 1 and packet not in COPYING:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {', '.join(sorted(places))}")


def _see_copy(
    packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], place: torch.device | None, wait: Callable[[str], None]
) -> None:
    """A copy between host and device waits unless it is asked not to and the host's side is pinned."""
    source, host = args[0], args[0]
    non_blocking = bool(kwargs.get("non_blocking", False))
    if packet is aten.copy_:
        host, source = args[0], args[1]
        non_blocking = bool(args[2]) if len(args) > 2 else non_blocking
        if isinstance(host, OnDevice) == isinstance(source, OnDevice):
            return
        host = source if isinstance(host, OnDevice) else host
        pinned = host.data_ptr() in _pinned
    elif isinstance(source, OnDevice):
        if place is not None:
            return
        pinned = False  # a new tensor of the host is not pinned
    elif place is None:
        return
    else:
        pinned = source.data_ptr() in _pinned
    if not (non_blocking and pinned):
        wait(f"{packet} between host and device")


def _reads_a_mask(packet: Any, args: tuple[Any, ...]) -> bool:
    if packet not in INDEXING:
        return False
    indices = [index for index in args[1] if index is not None]
    return any(index.dtype in (torch.bool, torch.uint8) or not isinstance(index, OnDevice) for index in indices)


def asked_by(package: str) -> str | None:
    """The line of `package` that asked for the operation, unless it asked transformers, which then did by itself."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] == package:
            return f"{name}:{frame.f_lineno}"
        if name.partition(".")[0] == "transformers":
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on a device that is not there (or back), whoever asks."""
    inner = tensor.inner if isinstance(tensor, OnDevice) else tensor
    return inner if torch.device(device).type == "cpu" else OnDevice(inner.clone(), torch.device(device))


def move(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Every parameter and buffer of `module` on `device`, in place."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                inner._parameters[name] = nn.Parameter(to_device(parameter.detach(), device), parameter.requires_grad)
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = to_device(buffer, device)
    return module

"""A device of another kind: tensors on ``plain:0``, which torch knows by the key PrivateUse1, computed on the CPU.

Operators go through torch's real dispatcher: one that is registered for CPU and CUDA alone fails here as it would on a
device of any other maker. The device has no float64, and operations that make the host wait are counted by name. What
is not real: the device's kernels and streams, and the strides that tensors tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("plain")
PLAIN = torch.device("plain:0")
_WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::masked_select", "aten::equal"}
# What torch composes of other operators for any device, often by resizing an empty output, is sent through whole.
_SHARING = {
    "aten::alias",
    "aten::detach",
    "aten::lift",
    "aten::lift_fresh",
}  # torch's own copies of a tensor, not of its values
_COMPOSED = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")

waits: Counter[str] = Counter()
"""Operations that waited for the device -> how often, since `counted` was entered."""


_VALUES: dict[int, Tensor] = {}  # of each storage on the device, which autograd's copies of a tensor share


def _on_device(values: Tensor) -> Tensor:
    """A tensor on `PLAIN` with these values."""
    if values.dtype is torch.float64:
        raise RuntimeError("the plain device has no float64")
    made: Tensor = torch._C._acc.create_empty_tensor(values.shape, values.dtype)  # type: ignore[attr-defined]
    _VALUES[made.untyped_storage()._cdata] = values  # may be a view: what is written there is written to its base
    return made


def put(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` on `PLAIN`."""
    return _on_device(tensor.detach().clone())


def raw(tensor: Tensor) -> Tensor:
    """The values of a tensor, on the CPU; views of torch's own making share a storage in another shape."""
    if tensor.device.type != "plain":
        return tensor
    values = _VALUES[tensor.untyped_storage()._cdata]
    return values if values.shape == tensor.shape else values.reshape(tensor.shape)


def put_module(module: nn.Module) -> nn.Module:
    """Move the parameters and buffers of a module to `PLAIN`, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(put(parameter), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = put(buffer)
    return module


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the operations that wait for the device."""
    waits.clear()
    yield waits


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the values of its tensors."""
    name = op._schema.name
    if name in _WAITING:
        waits[name] += 1
    target = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    known = {id(raw(tensor)): tensor for tensor in tensors if tensor.device.type == "plain"}
    here, there = tree_map_only(Tensor, raw, (args, kwargs))
    here, there = tree_map_only(torch.device, lambda device: torch.device("cpu"), (here, there))
    if name == "aten::_copy_from":
        here[1].copy_(here[0])
        return args[1]
    if name == "aten::view" and not here[0].is_contiguous():
        op = torch.ops.aten.reshape.default  # the device's tensors say that they are contiguous
    out = op(*here, **there)
    if name == "aten::_local_scalar_dense" or (
        name == "aten::_to_copy" and target is not None and target.type == "cpu"
    ):
        return out
    return tree_map_only(Tensor, lambda tensor: known[id(tensor)] if id(tensor) in known else _on_device(tensor), out)


_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(_run, "PrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")


def _send_whole(name: str) -> None:
    base, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, base), overload or "default")
    _ATEN.impl(name, lambda *args, **kwargs: _run(op, *args, **kwargs), "PrivateUse1")


for _key in _COMPOSED:
    for _name in torch._C._dispatch_get_registrations_for_dispatch_key(_key):
        here = torch._C._dispatch_has_kernel_for_dispatch_key(_name, "PrivateUse1")
        if _name.startswith("aten::") and _name not in _SHARING and not here:
            _send_whole(_name.removeprefix("aten::"))


def _finished(device: Any = None, /) -> None:
    """Nothing to wait for: the device computes at once. torch has no such function for a backend in Python."""
    if torch.device(device).type != "plain":
        _synchronize(device)


_synchronize = torch.accelerator.synchronize
torch.accelerator.synchronize = _finished  # type: ignore[assignment]

"""Read attributes of a module by dotted path, wherever accelerate keeps the tensors.

accelerate may keep a tensor on the CPU or on disk and move it to its device only while the module's forward runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def at(root: Any, path: str) -> Any:
    """The attribute at a dotted path, or None if there is none."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def number(root: Any, value: str | int) -> Any:
    """`value` if it is a number, else the attribute at that dotted path; of a matrix there, the number of rows."""
    found = at(root, value) if isinstance(value, str) else value
    return len(found) if isinstance(found, Tensor) else found


def modeling_of(module: nn.Module) -> ModuleType | None:
    """The modeling file of transformers that defines the class of `module`, or None."""
    return next(
        (sys.modules.get(c.__module__) for c in type(module).__mro__ if c.__module__.startswith("transformers.")), None
    )


# Instance attributes with which other libraries replace those of the class.
PUT_BY_OTHERS = ("forward", "_hf_hook", "_old_forward")


def resident(root: Any, path: str) -> Any:
    """The value at a dotted path, or None if there is none.

    For an offloaded tensor this is the value that accelerate loads before the forward pass. Raises `RuntimeError` for a
    tensor on the meta device that accelerate does not offload.
    """
    *above, name = path.split(".")
    owner = root
    for step in above:
        owner = getattr(owner, step, None)
    value = getattr(owner, name, None)
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    for hook in _accelerate_hooks(owner):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name].to(hook.execution_device)
    raise RuntimeError(f"{path} of {type(root).__name__} is on the meta device: load the weights before attaching")


def managed_by_accelerate(module: nn.Module) -> bool:
    """Whether accelerate has put a hook on the module."""
    return hasattr(module, "_hf_hook")


def device_of(module: nn.Module) -> torch.device:
    """The device on which the module runs: that of its first parameter, or the one that accelerate moves it to."""
    parameter = next(module.parameters(), None)
    if parameter is not None and not parameter.is_meta:
        return parameter.device
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if device is None else device)


def forward_attribute(module: nn.Module) -> str:
    """Name of the attribute that holds the module's forward; accelerate moves the original to another attribute."""
    return "_old_forward" if managed_by_accelerate(module) else "forward"


def _accelerate_hooks(module: Any) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,))

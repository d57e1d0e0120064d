"""Tensors that accelerate keeps on the CPU or on disk, and brings to their module only while its forward runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def resident(root: Any, path: str) -> Any:
    """The value at a dotted path on a live module, None where there is none; of a tensor that is offloaded now, what
    its module would be given.

    Raises `RuntimeError` for a tensor on the meta device that nobody offloaded.
    """
    *above, name = path.split(".")
    owner = root
    for step in above:
        owner = getattr(owner, step, None)
    value = getattr(owner, name, None)
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    for hook in _hooks(owner):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name].to(hook.execution_device)
    raise RuntimeError(f"{path} of {type(root).__name__} is on the meta device: load the weights before attaching")


def _hooks(module: Any) -> Iterator[Any]:
    """accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,))

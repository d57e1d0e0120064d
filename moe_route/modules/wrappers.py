"""Find the modules that other libraries wrap around a router (PEFT's adapters, torch.compile, FSDP).

A wrapper is recognized by the attribute name under which it holds the wrapped module. The router's owner is the module
above all wrappers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_HOLDS_ONE = frozenset(("base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_HOLDS_ORIGINAL = "original_module"  # used by PEFT's modules_to_save, beside the trained copies
_HOLDS_COPIES = "modules_to_save"


def outermost(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Name of the outermost wrapper around the module `name`, or `name` itself if there is none."""
    above, _, last = name.rpartition(".")
    if last in _HOLDS_ONE or (last == _HOLDS_ORIGINAL and _has_copies(modules[above])):
        return outermost(above, modules)
    above, _, holder = above.rpartition(".")
    if holder == _HOLDS_COPIES and _has_copies(modules[above]):
        return outermost(above, modules)
    return name


def in_use(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the wrappers around the module `name` run it now."""
    above, _, last = name.rpartition(".")
    if not above:
        return True
    if last == _HOLDS_ORIGINAL and _has_copies(modules[above]):
        return not _active(modules[above]) and in_use(above, modules)
    higher, _, holder = above.rpartition(".")
    if holder == _HOLDS_COPIES and _has_copies(modules[higher]):
        return last in _active(modules[higher]) and in_use(higher, modules)
    return in_use(above, modules) if last in _HOLDS_ONE else True


def _has_copies(module: nn.Module) -> bool:
    return isinstance(module._modules.get(_HOLDS_COPIES), nn.ModuleDict)


def _active(wrapper: Any) -> list[str]:
    """Names of the copies that the wrapper runs in place of the original."""
    if getattr(wrapper, "disable_adapters", False):
        return []
    return [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]

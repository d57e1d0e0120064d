"""gpt-oss: an ordinary router, under blocks that may go round it.

In MXFP4 the block computes the logits itself and routes inside a triton kernel. transformers has a way through the
router for expert parallelism, which a flag on the experts switches on: an attached block takes that way. A kernelized
block (`use_kernels=True`) has a forward of its own; an attached one runs that of its class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

from torch import nn

from moe_route.modules.intercept import Removable
from moe_route.routers.adapter import Adapter, Hook

_FLAG = "_is_hooked"
_KERNELIZABLE = "kernel_layer_name"  # what the `kernels` package leaves on classes whose forward it may replace


class GptOss(Adapter):
    """(logits, weights, ids) as usual."""

    @property
    def _packed(self) -> bool:
        return type(self.block).__name__ == "Mxfp4GptOssMLP" and not getattr(self.block.experts, _FLAG, False)

    def obstacle(self) -> str | None:
        """A block that never calls its router, and has no other way."""
        kind = type(self.block).__name__
        if replaced_forward(self.block) and not hasattr(self.block, _KERNELIZABLE):
            return f"the forward of {kind} was replaced, and nothing says that it calls its router. Undo that first"
        if self._packed and _FLAG not in type(self.block).forward.__code__.co_consts:
            return (
                f"{kind} routes inside its MXFP4 kernel and never calls its router. Load the model with "
                "quantization_config=Mxfp4Config(dequantize=True)"
            )
        return None

    def notes(self) -> Iterable[str]:
        """Say that a block takes another way while it is attached."""
        if self._packed:
            yield (
                "the MXFP4 block routes inside a kernel that cannot be seen into: while attached it takes its way "
                "through the router (that of expert parallelism), equal up to the kernel's rounding"
            )
        if replaced_forward(self.block):
            yield (
                "the kernel of use_kernels=True goes round the router: while attached the block runs the forward of "
                "its class, equal up to the kernel's rounding"
            )

    def listen(self, hook: Hook) -> Sequence[Removable]:
        """Lead the block through its router."""
        handles: list[Removable] = [*super().listen(hook)]
        if self._packed:
            handles.append(_Set(self.block.experts, _FLAG, True))
        if replaced_forward(self.block):
            own = MethodType(type(self.block).forward, self.block)
            handles.append(_Set(self.block, _forward_of(self.block), own))
        return handles


class _Set:
    """Another value of an attribute of one module, from here to `remove`."""

    def __init__(self, owner: nn.Module, name: str, value: object) -> None:
        self.owner, self.name = owner, name
        self.before = vars(owner).get(name)
        setattr(owner, name, value)

    def remove(self) -> None:
        """Put back what was there."""
        if self.before is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


def _forward_of(block: nn.Module) -> str:
    """The attribute that holds a block's forward: accelerate keeps the one it found."""
    return "_old_forward" if hasattr(block, "_hf_hook") else "forward"


def replaced_forward(block: nn.Module) -> bool:
    """Whether the block has a forward of its own that is not its class's."""
    own: Any = vars(block).get(_forward_of(block))
    return own is not None and getattr(own, "__func__", None) is not type(block).forward

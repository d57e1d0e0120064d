"""gpt-oss: an ordinary router, under blocks that may go round it.

In MXFP4 the block computes the logits itself and routes inside a triton kernel. transformers has a way through the
router for expert parallelism, which a flag on the experts switches on: an attached block takes that way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from moe_route.patching.adapter import Adapter, Hook, Removable

_FLAG = "_is_hooked"


class GptOss(Adapter):
    """(logits, weights, ids) as usual."""

    @property
    def _packed(self) -> bool:
        return type(self.block).__name__ == "Mxfp4GptOssMLP" and not getattr(self.block.experts, _FLAG, False)

    def obstacle(self) -> str | None:
        """A block that never calls its router, and has no other way."""
        kind = type(self.block).__name__
        if replaced_forward(self.block):
            return (
                f"the forward of {kind} was replaced (kernelised) and never calls its router. Load the model with "
                "use_kernels=False"
            )
        if self._packed and _FLAG not in type(self.block).forward.__code__.co_consts:
            return (
                f"{kind} routes inside its MXFP4 kernel and never calls its router. Load the model with "
                "quantization_config=Mxfp4Config(dequantize=True)"
            )
        return None

    def notes(self) -> Iterable[str]:
        """Say that an MXFP4 block takes another way while it is attached."""
        if self._packed:
            yield (
                "the MXFP4 block routes inside a kernel that cannot be seen into: while attached it takes its way "
                "through the router (that of expert parallelism), equal up to the kernel's rounding"
            )

    def listen(self, hook: Hook) -> Sequence[Removable]:
        """Lead an MXFP4 block through its router."""
        handles = tuple(super().listen(hook))
        return (*handles, _ThroughTheRouter(self.block.experts)) if self._packed else handles


class _ThroughTheRouter:
    """The flag on MXFP4 experts, from here to `remove`."""

    def __init__(self, experts: nn.Module) -> None:
        self.experts = experts
        self.before = vars(experts).get(_FLAG)
        setattr(experts, _FLAG, True)

    def remove(self) -> None:
        """Let the block use its kernel again."""
        if self.before is None:
            delattr(self.experts, _FLAG)
        else:
            setattr(self.experts, _FLAG, self.before)


def replaced_forward(block: nn.Module) -> bool:
    """Whether the block has a forward of its own that is not its class's (under accelerate: had one before)."""
    own = vars(block).get("_old_forward" if hasattr(block, "_hf_hook") else "forward")
    return own is not None and getattr(own, "__func__", None) is not type(block).forward

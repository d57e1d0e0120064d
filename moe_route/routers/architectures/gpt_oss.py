"""gpt-oss: an ordinary router, under blocks that may bypass it.

In MXFP4 the block computes the logits itself and routes inside a Triton kernel. For expert parallelism, transformers
has a second path, which calls the router; a flag on the experts selects it. An attached block takes that path. A
kernelized block (`use_kernels=True`) runs a replaced forward; while attached it runs the forward of its class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType

from torch import nn

from moe_route.contract.spec import RouterSpec
from moe_route.modules.intercept import Change, ReplacedAttribute, forward_attribute, is_overridden
from moe_route.routers.adapter import Adapter, OutputHook
from moe_route.routers.family import Family, Gate

_FLAG = "_is_hooked"
_KERNELIZABLE = "kernel_layer_name"  # what the `kernels` package leaves on classes whose forward it may replace


class GptOss(Adapter):
    """Reads the usual output (logits, weights, ids), and makes the block call its router."""

    @property
    def _packed(self) -> bool:
        return type(self.block).__name__ == "Mxfp4GptOssMLP" and not getattr(self.block.experts, _FLAG, False)

    def obstacle(self) -> str | None:
        """Refuse a block that never calls its router and has no path that does."""
        kind = type(self.block).__name__
        if _is_kernelized(self.block) and not hasattr(self.block, _KERNELIZABLE):
            return f"the forward of {kind} was replaced, and nothing says that it calls its router. Undo that first"
        if self._packed and _FLAG not in type(self.block).forward.__code__.co_consts:
            return (
                f"{kind} routes inside its MXFP4 kernel and never calls its router. Load the model with "
                "quantization_config=Mxfp4Config(dequantize=True)"
            )
        return None

    def notes(self) -> Iterable[str]:
        """A sentence for each way in which an attached block computes differently."""
        if self._packed:
            yield (
                "the MXFP4 block routes inside a kernel that cannot be seen into: while attached it takes its way "
                "through the router (that of expert parallelism), equal up to the kernel's rounding"
            )
        if _is_kernelized(self.block):
            yield (
                "the kernel of use_kernels=True bypasses the router: while attached the block runs the forward of "
                "its class, equal up to the kernel's rounding"
            )

    def changes(self, hook: OutputHook) -> Sequence[Change]:
        """The usual changes, and those that make the block call its router."""
        changes = [*super().changes(hook)]
        if self._packed:
            changes.append(ReplacedAttribute(self.block.experts, _FLAG, True))
        if _is_kernelized(self.block):
            own = MethodType(type(self.block).forward, self.block)
            changes.append(ReplacedAttribute(self.block, forward_attribute(self.block), own))
        return changes


def _is_kernelized(block: nn.Module) -> bool:
    """Whether the block runs a forward other than that of its class."""
    return is_overridden(block, "forward", forward_attribute(block))


FAMILY = Family(
    "softmax over the chosen",
    ("GptOssTopKRouter",),
    RouterSpec(score="softmax", order="topk_then_score"),
    low_precision=True,
    gate=Gate(bias="bias"),
    adapter=GptOss,
)

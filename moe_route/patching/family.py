"""What a row of the table of router families says, and how it is read on a live router.

Reading a row imports nothing but torch: classes are matched by name along the MRO, among classes defined in
`transformers` or `moe_route.nn` only (a class of the same name in remote code may return its decision in another form).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_route.ops import RouterSpec
from moe_route.patching.adapter import Adapter
from moe_route.patching.offloaded import resident

PLAIN_SOFTMAX = RouterSpec(score="softmax")
# The modules whose classes the table speaks about.
HOMES = ("transformers.", "moe_route.nn")


@dataclass(frozen=True, slots=True)
class Gate:
    """How a router computes its logits with one matrix product, so that the fused engine may do it instead.

    `compute`: "native" = dtype of the hidden states, "weight" = hidden states cast to the weight's dtype, "float32" =
    both cast to float32. `result`: "native" = as computed, "float32" = logits cast to float32.
    """

    weight: str = "weight"
    bias: str | None = None
    compute: Literal["native", "weight", "float32"] = "native"
    result: Literal["native", "float32"] = "native"


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table. Strings that name a place are dotted attribute paths on the router."""

    name: str  # letter of the routing family and what it does, for people
    routers: tuple[str, ...]
    spec: RouterSpec = PLAIN_SOFTMAX  # what is the same for every router of the row
    read: Mapping[str, str] = field(default_factory=dict)  # RouterSpec field <- attribute of the router
    renormalise_if: str | None = None  # attribute that switches spec.renormalise on; None = always as in spec
    adjust: Callable[[nn.Module, RouterSpec], RouterSpec] | None = None  # what no attribute alone says
    top_k: str | int = "top_k"  # a number where no attribute says it
    num_experts: str | int = "num_experts"
    correction_bias: str | None = None  # attribute, or "argument:1" where the block passes it to the router
    expert_scale: str | None = None  # factor per expert on the final weight
    weights: Literal["logits", "input", "float32"] = "logits"  # dtype of the weights the router returns
    logits_at: int = 0
    weights_at: int = 1
    ids_at: int = 2
    probabilities: bool = False  # the router returns softmax(logits) where others return logits
    low_precision: bool = False  # scores are computed in the dtype of the logits, not in float32
    chosen_by: Literal["logits", "token ids"] = "logits"
    input_rank: int = 2
    gate: Gate | None = None
    unfused: str = ""  # why there is no `gate`: what the router does besides one matrix product
    adapter: type[Adapter] = Adapter
    unsteerable: str = ""  # why its choice cannot be changed; "" = it can
    notes: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()  # what transformers does wrong with these routers

    def covers(self, router: nn.Module) -> bool:
        """Whether `router` is, or derives from, a class of this row."""
        return any(c.__name__ in self.routers and c.__module__.startswith(HOMES) for c in type(router).__mro__)

    def spec_of(self, router: nn.Module) -> RouterSpec:
        """The `RouterSpec` of a live router."""
        values = {name: getattr(self.spec, name) for name in RouterSpec.__dataclass_fields__}
        for name, path in self.read.items():
            value = at(router, path)
            if value is not None:
                values[name] = value
        if self.renormalise_if is not None and not at(router, self.renormalise_if):
            values["renormalise"], values["eps"] = "none", 0.0
        if self.weights == "float32":
            values["weight_dtype"] = torch.float32
        spec = RouterSpec(**values)
        return spec if self.adjust is None else self.adjust(router, spec)

    def bias_of(self, router: nn.Module, arguments: tuple[object, ...] = ()) -> Tensor | None:
        """The correction bias in force, float32 [E], or None."""
        if self.correction_bias is None:
            return None
        if self.correction_bias.startswith("argument:"):
            place = int(self.correction_bias.removeprefix("argument:"))
            found = arguments[place] if len(arguments) > place else None
        else:
            found = resident(router, self.correction_bias)
        return found.detach().reshape(-1).float() if isinstance(found, Tensor) else None

    def scale_of(self, router: nn.Module) -> Tensor | None:
        """The factor per expert on the final weights, float32 [E], or None."""
        return None if self.expert_scale is None else resident(router, self.expert_scale).float()

    def logits_of(self, output: tuple[Tensor, ...]) -> Tensor:
        """Router logits [T, E] out of the router's output; log-probabilities where the router returns probabilities
        (a softmax of either is the same)."""
        logits = output[self.logits_at]
        return logits.log() if self.probabilities else logits


def at(root: Any, path: str) -> Any:
    """The attribute at a dotted path, or None where there is none."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def number(root: Any, value: str | int) -> Any:
    """A number, or the attribute at a dotted path."""
    return at(root, value) if isinstance(value, str) else value


def modeling_of(module: nn.Module) -> ModuleType | None:
    """The file of transformers that the class of `module` comes from, or None."""
    return next(
        (sys.modules.get(c.__module__) for c in type(module).__mro__ if c.__module__.startswith(HOMES[0])), None
    )


def score_function(router: Any, spec: RouterSpec) -> RouterSpec:
    """`spec` with the score that the router holds as a module (`Family.adjust`)."""
    name = type(router.score_fn).__name__
    score = {"SqrtSoftplusActivation": "sqrt_softplus", "Sigmoid": "sigmoid"}.get(name)
    if score is None:
        raise ValueError(f"{type(router).__name__} scores with {name}, which has no counterpart here")
    return replace(spec, score=score)  # type: ignore[arg-type]

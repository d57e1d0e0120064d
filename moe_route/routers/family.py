"""What a row of the table of router families says, and how it is read on a live router.

Reading a row imports nothing but torch: classes are matched by name along the MRO, among classes defined in
`transformers` or `moe_route.nn` only (a class of the same name in remote code may return its decision in another form).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_route.contract.spec import RouterSpec
from moe_route.modules.attributes import resident
from moe_route.routers.adapter import Adapter

PLAIN_SOFTMAX = RouterSpec(score="softmax")
GROUPED_SOFTMAX = RouterSpec(score="softmax", group_score="max", group_fill=0.0)
# Where routers that choose among groups first keep what they go by (`Family.read`).
SCALED_GROUPS: dict[str, str | tuple[str, ...]] = {
    "groups": ("num_group", "n_group"),
    "top_groups": "topk_group",
    "scale": "routed_scaling_factor",
}
# What a router returns: "logits" [T, E], or "probabilities" [T, E], their softmax, in their place; "weights" [T, k], or
# "scores" [T, E], weights that are zero where an expert was not chosen; "ids" [T, k].
Part = Literal["logits", "probabilities", "weights", "scores", "ids"]
_CHOOSING = ("forward", "get_topk_indices", "route_tokens_to_experts")  # methods in which a choice is made
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
    # RouterSpec field <- attribute of the router, or the names it had in several versions
    read: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    renormalize_if: str | None = None  # attribute that switches spec.renormalize on; None = always as in spec
    adjust: Callable[[nn.Module, RouterSpec], RouterSpec] | None = None  # what no attribute alone says
    top_k: str | int = "top_k"  # a number where no attribute says it
    num_experts: str | int = "num_experts"  # of a matrix: its rows
    correction_bias: str | None = None  # attribute, or "argument:1" where the block passes it to the router
    expert_scale: str | None = None  # factor per expert on the final weight
    weights: Literal["logits", "input", "float32"] = "logits"  # dtype of the weights the router returns
    returns: tuple[Part, ...] = ("logits", "weights", "ids")  # without logits, they are caught where they are scored
    fixed_slots: bool = False  # what takes the choice has room for top_k experts a token and no more
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
        """Whether `router` is, or derives from, a class of this row, and has the form that its adapter reads."""
        known = any(c.__name__ in self.routers and c.__module__.startswith(HOMES) for c in type(router).__mro__)
        return known and self.adapter.fits(router)

    def spec_of(self, router: nn.Module) -> RouterSpec:
        """The `RouterSpec` of a live router."""
        values = {name: getattr(self.spec, name) for name in RouterSpec.__dataclass_fields__}
        for name, paths in self.read.items():
            found = (at(router, path) for path in ((paths,) if isinstance(paths, str) else paths))
            value = next((value for value in found if value is not None), None)
            if value is not None:
                values[name] = value
        if self.renormalize_if is not None and not at(router, self.renormalize_if):
            values["renormalize"], values["eps"] = "none", 0.0
        if self.weights == "float32":
            values["weight_dtype"] = torch.float32
        spec = RouterSpec(**values)
        return spec if self.adjust is None else self.adjust(router, spec)

    def num_experts_of(self, router: nn.Module) -> Any:
        """How many experts `router` chooses among, None where it does not say so."""
        return number(router, self.num_experts)

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


def at(root: Any, path: str) -> Any:
    """The attribute at a dotted path, or None where there is none."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def number(root: Any, value: str | int) -> Any:
    """A number, or the attribute at a dotted path; of a matrix there, its rows."""
    found = at(root, value) if isinstance(value, str) else value
    return len(found) if isinstance(found, Tensor) else found


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


def without_groups_unless(method: str) -> Callable[[nn.Module, RouterSpec], RouterSpec]:
    """Groups count only where the router's `topk_method` is `method` (`Family.adjust`)."""

    def adjust(router: nn.Module, spec: RouterSpec) -> RouterSpec:
        return spec if at(router, "topk_method") == method else replace(spec, groups=1, top_groups=1)

    return adjust


def fill_of_left_out(router: nn.Module, spec: RouterSpec) -> RouterSpec:
    """`spec` with the score that experts of groups left out are given: 0 in older versions of a class, minus infinity
    in later ones (`Family.adjust`). Its code says which."""
    methods = (inspect.unwrap(getattr(type(router), name)) for name in _CHOOSING if hasattr(type(router), name))
    code = next((m.__code__ for m in methods if "masked_fill" in m.__code__.co_names), None)
    infinite = code is not None and ("-inf" in code.co_consts or {"inf", "finfo"} & {*code.co_names})
    return spec if code is None or infinite else replace(spec, group_fill=0.0)

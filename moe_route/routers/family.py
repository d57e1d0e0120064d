"""One row of the table of router families, and how it is read from a live router.

Reading a row imports nothing but torch: classes are matched by name along the MRO, among classes defined in
`transformers` or `moe_route.nn` only (a class of the same name in remote code may return its decision in another form).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route.contract.spec import RouterSpec
from moe_route.modules.attributes import at, number, resident
from moe_route.routers.adapter import Adapter
from moe_route.routers.output import OutputForm, OutputPart

PLAIN_SOFTMAX = RouterSpec(score="softmax")
GROUPED_SOFTMAX = RouterSpec(score="softmax", group_score="max", group_fill=0.0)
# Where routers that choose among groups first keep what they go by (`Family.read`).
SCALED_GROUPS: dict[str, str | tuple[str, ...]] = {
    "groups": ("num_group", "n_group"),
    "top_groups": "topk_group",
    "scale": "routed_scaling_factor",
}
_CHOOSING = ("forward", "get_topk_indices", "route_tokens_to_experts")  # methods in which a choice is made
TESTED = "transformers 5.23"  # what the table was read from and is tested against
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

    name: str  # what it does, for people; rows of one name share a line of docs/models.md
    routers: tuple[str, ...]
    spec: RouterSpec = PLAIN_SOFTMAX  # what is the same for every router of the row
    # RouterSpec field <- attribute of the router, or the names it had in several versions
    read: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    renormalize_if: str | None = None  # attribute that switches spec.renormalize on; None = always as in spec
    adjust: Callable[[nn.Module, RouterSpec], RouterSpec] | None = None  # what no attribute alone says
    top_k: str | int = "top_k"  # a number where no attribute says it
    num_experts: str | int = "num_experts"  # of a matrix: its rows
    correction_bias: str | None = None  # attribute
    bias_argument: int | None = None  # where the block passes the correction bias to the router: which argument
    expert_scale: str | None = None  # factor per expert on the final weight
    weights: Literal["logits", "input", "float32"] = "logits"  # dtype of the weights the router returns
    returns: tuple[OutputPart, ...] = (
        "logits",
        "weights",
        "ids",
    )  # without logits, they are caught where they are scored
    fixed_slots: bool = False  # what takes the choice has room for top_k experts a token and no more
    low_precision: bool = False  # scores are computed in the dtype of the logits, not in float32
    chosen_by: Literal["logits", "token ids"] = "logits"
    input_rank: int = 2
    gate: Gate | None = None
    unfused: str = ""  # why there is no `gate`: what the router does besides one matrix product
    adapter: type[Adapter] = Adapter
    unsteerable: str = ""  # why its choice cannot be changed; "" = it can
    notes: tuple[str, ...] = ()
    known_issues: tuple[str, ...] = ()  # what transformers does wrong with these routers

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

    def form_of(self, router: nn.Module) -> OutputForm:
        """How `router` returns its decision."""
        num_experts, top_k = self.num_experts_of(router), number(router, self.top_k)
        return OutputForm(self.returns, num_experts, top_k, self.weights == "float32", self.fixed_slots)

    @property
    def has_bias(self) -> bool:
        """Whether a correction bias takes part in the choice."""
        return self.correction_bias is not None or self.bias_argument is not None

    def bias_of(self, router: nn.Module, arguments: tuple[object, ...] = ()) -> Tensor | None:
        """The correction bias in force, float32 [E], or None."""
        found: object = None
        if self.bias_argument is not None:
            found = arguments[self.bias_argument] if len(arguments) > self.bias_argument else None
        elif self.correction_bias is not None:
            found = resident(router, self.correction_bias)
        return found.detach().reshape(-1).float() if isinstance(found, Tensor) else None

    def scale_of(self, router: nn.Module) -> Tensor | None:
        """The factor per expert on the final weights, float32 [E], or None."""
        return None if self.expert_scale is None else resident(router, self.expert_scale).float()


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


def gate_logits(module: nn.Module, gate: Gate | None, hidden: Tensor) -> Tensor:
    """Router logits [T, E] of hidden states [..., H], in the dtypes the model itself uses."""
    if gate is None:
        raise ValueError(f"{type(module).__name__} is more than a gate matrix")
    weight, bias = at(module, gate.weight), None if gate.bias is None else at(module, gate.bias)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if gate.compute == "float32":
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    elif gate.compute == "weight":
        hidden = hidden.to(weight.dtype)
    logits = F.linear(hidden, weight, bias)
    return logits.float() if gate.result == "float32" else logits


def weight_dtype(rule: str, hidden: Tensor, logits: Tensor) -> torch.dtype:
    """The dtype of the weights that a router returns, by `Family.weights`."""
    return {"logits": logits.dtype, "input": hidden.dtype, "float32": torch.float32}[rule]

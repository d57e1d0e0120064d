"""One row of the table of router families, and how its facts are read from a live router.

This module imports no transformers. Classes are matched by name along the method resolution order, and only classes
defined in `transformers` or `moe_route` count: a class of the same name in remote code may return its decision in
another form.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route.contract.spec import RouterSpec
from moe_route.modules.intercept import at, modeling_of, number, resident
from moe_route.routers.adapter import Adapter, OutputForm, OutputPart

PLAIN_SOFTMAX = RouterSpec(score="softmax")
GROUPED_SOFTMAX = RouterSpec(score="softmax", group_score="max", group_fill=0.0)
# Attributes that hold the group settings of most group-limited routers (`Family.read`).
SCALED_GROUPS: dict[str, str | tuple[str, ...]] = {
    "groups": ("num_group", "n_group"),
    "top_groups": "topk_group",
    "scale": "routed_scaling_factor",
}
_CHOOSING = ("forward", "get_topk_indices", "route_tokens_to_experts")  # methods in which a choice is made
TESTED = "transformers 5.23"  # the version that the table was read from and is tested against
# Modules whose classes the table may cover.
HOMES = ("transformers.", "moe_route.nn", "moe_route.training.")


@dataclass(frozen=True, slots=True)
class Gate:
    """How a router computes its logits with one matrix product, which the fused engine can then compute itself.

    `compute` is the dtype of the product: "native" = dtype of the hidden states, "weight" = hidden states cast to the
    weight's dtype, "float32" = both cast to float32. `result` is the dtype of the logits: "native" = as computed,
    "float32" = cast to float32. `softcap` is the attribute with the cap c of routers that return c tanh(z / c), if any.
    """

    weight: str = "weight"
    bias: str | None = None
    compute: Literal["native", "weight", "float32"] = "native"
    result: Literal["native", "float32"] = "native"
    softcap: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table. A string that names an attribute is a dotted path, read from the router."""

    name: str  # what the family does, for people; rows of one name share a line of docs/support.md
    routers: tuple[str, ...]
    spec: RouterSpec = PLAIN_SOFTMAX  # the facts that all routers of the row share
    # RouterSpec field <- attribute of the router, or a tuple of the names that it had in several versions
    read: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    renormalize_if: str | None = None  # attribute that switches spec.renormalize on; None: always as in `spec`
    adjust: Callable[[nn.Module, RouterSpec], RouterSpec] | None = None  # reads what needs more than one attribute
    top_k: str | int = "top_k"  # attribute, or a number where there is none
    num_experts: str | int = "num_experts"  # attribute; the number of rows where it is a matrix
    correction_bias: str | None = None  # attribute that holds the bias
    bias_argument: int | None = None  # index of the argument in which the block passes the correction bias
    expert_scale: str | None = None  # attribute that holds a factor per expert on the final weights
    weights: Literal["logits", "input", "float32"] = "logits"  # dtype of the weights the router returns
    returns: tuple[OutputPart, ...] = (
        "logits",
        "weights",
        "ids",
    )  # without logits among them, the logits are captured while the router scores them
    fixed_slots: bool = False  # whether the experts have room for exactly top_k choices per token
    low_precision: bool = False  # whether scores are computed in the dtype of the logits, not in float32
    chosen_by: Literal["logits", "token ids"] = "logits"
    input_rank: int = 2
    gate: Gate | None = None
    unfused: str = ""  # why there is no `gate`: what the router does in addition to one matrix product
    adapter: type[Adapter] = Adapter
    unsteerable: str = ""  # why its choice cannot be changed; "" if it can
    notes: tuple[str, ...] = ()
    known_issues: tuple[str, ...] = ()  # known bugs of transformers with these routers

    def covers(self, router: nn.Module) -> bool:
        """Whether `router` belongs to a class of this row (or a subclass) and returns a form that the adapter reads."""
        known = any(c.__name__ in self.routers and c.__module__.startswith(HOMES) for c in type(router).__mro__)
        return known and self.adapter.fits(router)

    def spec_of(self, router: nn.Module) -> RouterSpec:
        """Read the `RouterSpec` of a live router."""
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
        """Number of experts that `router` chooses among, or None where the router does not hold it."""
        return number(router, self.num_experts)

    def form_of(self, router: nn.Module) -> OutputForm:
        """The form in which `router` returns its decision."""
        num_experts, top_k = self.num_experts_of(router), number(router, self.top_k)
        return OutputForm(self.returns, num_experts, top_k, self.weights == "float32", self.fixed_slots)

    @property
    def has_bias(self) -> bool:
        """Whether the routers of this row choose with a correction bias."""
        return self.correction_bias is not None or self.bias_argument is not None

    def bias_of(self, router: nn.Module, arguments: tuple[object, ...] = ()) -> Tensor | None:
        """The correction bias that the router uses now, float32 [E], or None."""
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
    """`spec` with the score function that the router holds as a module. Serves as `Family.adjust`."""
    name = type(router.score_fn).__name__
    score = {"SqrtSoftplusActivation": "sqrt_softplus", "Sigmoid": "sigmoid"}.get(name)
    if score is None:
        raise ValueError(f"{type(router).__name__} scores with {name}, which has no counterpart here")
    return replace(spec, score=score)  # type: ignore[arg-type]


def own_spec(router: Any, spec: RouterSpec) -> RouterSpec:
    """The spec that a router of `moe_route.nn` keeps. Serves as `Family.adjust`."""
    return router.spec


def without_groups_unless(method: str) -> Callable[[nn.Module, RouterSpec], RouterSpec]:
    """Make a `Family.adjust` that drops the groups unless the router's `topk_method` is `method`."""

    def adjust(router: nn.Module, spec: RouterSpec) -> RouterSpec:
        return spec if at(router, "topk_method") == method else replace(spec, groups=1, top_groups=1)

    return adjust


def fill_of_left_out(router: nn.Module, spec: RouterSpec) -> RouterSpec:
    """`spec` with the score that experts of excluded groups get. Serves as `Family.adjust`.

    Older versions of a class use 0, later ones minus infinity; the constants in its code tell which.
    """
    methods = (inspect.unwrap(getattr(type(router), name)) for name in _CHOOSING if hasattr(type(router), name))
    code = next((m.__code__ for m in methods if "masked_fill" in m.__code__.co_names), None)
    infinite = code is not None and ("-inf" in code.co_consts or {"inf", "finfo"} & {*code.co_names})
    return spec if code is None or infinite else replace(spec, group_fill=0.0)


def gate_logits(module: nn.Module, gate: Gate | None, hidden: Tensor) -> Tensor:
    """Compute router logits [T, E] from hidden states [..., H], in the dtypes that the model uses."""
    if gate is None:
        raise ValueError(f"{type(module).__name__} is more than a gate matrix")
    weight, bias = at(module, gate.weight), None if gate.bias is None else at(module, gate.bias)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if gate.compute == "float32":
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    elif gate.compute == "weight":
        hidden = hidden.to(weight.dtype)
    logits = F.linear(hidden, weight, bias)
    logits = logits.float() if gate.result == "float32" else logits
    cap = at(module, gate.softcap) if gate.softcap else 0.0
    return torch.tanh(logits / cap) * cap if cap > 0.0 else logits


def weight_dtype(rule: str, hidden: Tensor, logits: Tensor) -> torch.dtype:
    """The dtype of the weights that a router returns, by the rule in `Family.weights`."""
    return {"logits": logits.dtype, "input": hidden.dtype, "float32": torch.float32}[rule]


def known_issues(family: Family, adapter: Adapter, spec: RouterSpec) -> tuple[str, ...]:
    """Known bugs of the installed transformers that concern a router: a sentence each, opening with the version.

    Empty for a router that is not from transformers. `describe` shows them.
    """
    modeling = modeling_of(adapter.module)
    if modeling is None:
        return ()
    texts = [*family.known_issues, *adapter.known_issues()]
    loss = getattr(modeling, "load_balancing_loss_func", None)
    if loss is not None and "gate_logits" in loss.__code__.co_varnames:  # Switch's loss takes the choice
        texts.append(_balancing_loss(family, spec))
    version = sys.modules["transformers"].__version__
    return tuple(f"transformers {version}: {text}" for text in texts)


def _balancing_loss(family: Family, spec: RouterSpec) -> str:
    """Describe the loss: it takes the softmax of the logits and its k largest, whatever the router did."""
    unseen = ["steering"]
    if family.has_bias:
        unseen.append("the correction bias")
    if spec.groups > 1:
        unseen.append("the groups")
    if spec.score not in ("softmax", "sparsemixer"):
        unseen.append(f"the {spec.score.replace('_', '-')} score")
    return f"the balancing loss (aux_loss) chooses anew from the router logits and does not see {' or '.join(unseen)}"

"""Explain arguments of the wrong type in terms of the Python functions.

torch reports such an argument with the operator's whole schema. So when a call has failed, its arguments are checked
here. A call that succeeds pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

from torch import Tensor

from moe_route.contract.experts import Activation, PackedExperts
from moe_route.contract.spec import SCORES, RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables

FAILURES = (AttributeError, RuntimeError, TypeError)
"""Exceptions that torch and Python raise for arguments of the wrong type."""


class _Kind(NamedTuple):
    fits: Callable[[Any], bool]
    name: str
    fix: str


def _whole(value: Any) -> bool:
    try:
        index(value)
    except TypeError:
        return False
    return True


_TENSOR = _Kind(lambda value: isinstance(value, Tensor), "a torch.Tensor", "torch.as_tensor({name}) makes one")
_TENSORS = _Kind(
    lambda value: isinstance(value, Sequence) and all(isinstance(one, Tensor) for one in value),
    "a list of torch.Tensor",
    "one per layer",
)
_INTEGER = _Kind(_whole, "an integer", "int({name})")
_SPEC = _Kind(lambda value: isinstance(value, RouterSpec), "a RouterSpec", "RouterSpec(score={score!r}) is one")
_STEERING = _Kind(
    lambda value: isinstance(value, SteeringTables), "SteeringTables", "SteeringTables(rows, num_experts, bias=...)"
)
_STATISTICS = _Kind(
    lambda value: isinstance(value, StatisticsTables),
    "StatisticsTables",
    "StatisticsTables.zeros(num_experts, groups=1)",
)
_STATISTICS_LIST = _Kind(
    lambda value: isinstance(value, Sequence) and all(isinstance(one, StatisticsTables) for one in value),
    "a list of StatisticsTables",
    "one per layer",
)
_DISPATCH = _Kind(
    lambda value: all(isinstance(getattr(value, name, None), Tensor) for name in ("order", "inverse")),
    "a Dispatch",
    "ops.dispatch(ids, num_experts) makes one",
)
_ACTIVATION = _Kind(lambda value: isinstance(value, Activation), "an Activation", 'ops.Activation("silu") is one')
_PACKED = _Kind(
    lambda value: isinstance(value, PackedExperts), "PackedExperts", "ops.pack_experts(up, down) makes them"
)
_KINDS: Mapping[str, _Kind] = {
    "activation": _ACTIVATION,
    "k": _INTEGER,
    "num_experts": _INTEGER,
    "block": _INTEGER,
    "spec": _SPEC,
    "dispatch": _DISPATCH,
    "packed": _PACKED,
    "steering": _STEERING,
    "statistics": _STATISTICS,
}
_LISTS: Mapping[str, _Kind] = {"statistics": _STATISTICS_LIST, "spec": _SPEC, "tokens": _TENSOR}


def refuse_types(optional: Sequence[str] = (), *, layers: bool = False, **arguments: Any) -> None:
    """Raise TypeError for the first argument of the wrong type, and name the expected one.

    Args:
        optional: names of arguments that may be None.
        layers: whether the arguments other than spec and tokens are lists with one entry per layer.
        arguments: the arguments of the failed call.
    """
    for name, value in arguments.items():
        kind = _LISTS.get(name, _TENSORS) if layers else _KINDS.get(name, _TENSOR)
        if kind.fits(value) or (value is None and name in optional):
            continue
        score = value if isinstance(value, str) and value in SCORES else "softmax"
        fix = kind.fix.format(name=name, score=score)
        raise TypeError(f"{name} must be {kind.name}, not {_name_of(type(value))}: {fix}") from None


def _name_of(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"

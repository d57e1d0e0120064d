"""``RoutingFunction``: a user's own function of router logits, and how a plan names it.

A plan that is saved holds the function's name and a hash of its source, never its code. Loading imports nothing: the
program that steers must have imported the function's module itself.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from textwrap import dedent
from typing import Any

from torch import Tensor

from moe_route.contract.token_tables import Where
from moe_route.steering.model import PlanError

Function = Callable[[Tensor, Where], Tensor]


class RoutingFunction:
    """A function of router logits, by name and hash of its source where it has a name that can be imported.

    Two are equal if name and hash are equal; functions without such a name if they are the same object.

    Attributes:
        name: "package.module:function"; "" if it cannot be imported (a lambda, an inner function, one of a notebook).
        source: SHA-256 (hex) of its source; "" without a name.
        shown: what it is called in messages.
    """

    __slots__ = ("_function", "name", "shown", "source")

    def __init__(self, function: Function | None, name: str, source: str, shown: str) -> None:
        self._function, self.name, self.source, self.shown = function, name, source, shown

    @classmethod
    def of(cls, function: Function) -> RoutingFunction:
        """Take a user's function. Raises ``PlanError`` for anything that cannot be called."""
        if not callable(function):
            raise PlanError(
                f"apply takes a function of logits and where, not {type(function).__name__}: "
                "Plan.apply(lambda logits, where: logits - 1)"
            )
        module, path = (getattr(function, name, None) or "" for name in ("__module__", "__qualname__"))
        shown = getattr(function, "__qualname__", None) or type(function).__name__
        if module in ("", "__main__") or not path or _found(module, path) is not function:
            return cls(function, "", "", shown)
        source = _hash(function)
        return cls(function, f"{module}:{path}" if source else "", source, shown)

    @classmethod
    def named(cls, name: Any, source: Any) -> RoutingFunction:
        """The function that a file names; it is looked for when it is first used."""
        if not isinstance(name, str) or name.count(":") != 1 or not isinstance(source, str):
            raise PlanError(f'an apply rule has a "function" as "package.module:name" and a "source", not {name!r}')
        return cls(None, name, source, name)

    @property
    def function(self) -> Function:
        """The function itself. Raises ``PlanError`` if its module was not imported, or its source is another now."""
        if self._function is not None:
            return self._function
        module, _, path = self.name.partition(":")
        function = _found(module, path)
        if not callable(function):
            raise PlanError(
                f"the plan applies {self.name}, and this program has no such function: import {module} before the plan "
                "steers (moe-route imports no code that a file names)"
            )
        if _hash(function) != self.source:
            raise PlanError(
                f"the source of {self.name} is not the one that the plan was saved with: use that version, or make the "
                "plan again with Plan.apply"
            )
        self._function = function
        return function

    def to_dict(self) -> dict[str, str]:
        """What a plan's content holds. One without a name is told apart in this process only, and cannot be saved."""
        if self.name:
            return {"function": self.name, "source": self.source}
        return {"function": f"{self.shown} at {id(self._function):x}"}

    def require_name(self) -> None:
        """Raise ``PlanError`` for a function that cannot be saved."""
        if not self.name:
            raise PlanError(
                f"a plan with the function {self.shown} cannot be saved: a file holds names and no code. Define it at "
                "the top of a module that can be imported, and apply it from there"
            )

    @property
    def _identity(self) -> Any:
        return (self.name, self.source) if self.name else id(self._function)

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, RoutingFunction) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        return self.shown


def _found(module: str, path: str) -> Any:
    """The object at a dotted path in a module that is imported already; None if there is none."""
    named: Any = sys.modules.get(module)
    for name in path.split("."):
        named = getattr(named, name, None)
    return named


def _hash(function: Function) -> str:
    """SHA-256 (hex) of the source, without its common indentation; "" if the source is not known."""
    try:
        return hashlib.sha256(dedent(inspect.getsource(function)).encode()).hexdigest()
    except (OSError, TypeError):
        return ""


def function_of(content: Mapping[str, Any]) -> RoutingFunction | None:
    """The function of a rule's content in a file, or None if the rule has none."""
    return RoutingFunction.named(content["function"], content.get("source")) if "function" in content else None

"""Replace an attribute or a method of one object, and put it back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

_ABSENT = object()


class Removable(Protocol):
    """Something put on a model that can be taken away again."""

    def remove(self) -> None:
        """Take it away. Does nothing when called twice."""


class ReplacedAttribute:
    """Another value of one object's attribute, from here to `remove`."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self._before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)

    def remove(self) -> None:
        """Put back what was there before. A value that somebody else set meanwhile stays."""
        if vars(self.owner).get(self.name, _ABSENT) is not self.value:
            return
        if self._before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._before)


class ReplacedMethod(ReplacedAttribute):
    """`function` in place of a method of one object, from here to `remove`. Deep copies of the object have the method
    of their class.

    Raises `RuntimeError` where the object has a method of its own already.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        if is_overridden(owner, name):
            raise RuntimeError(f"{name} of {type(owner).__name__} was replaced already; undo that first")
        self.function = function
        super().__init__(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The method of the copied owner's class."""
        return MethodType(getattr(type(self.owner), self.name), copy.deepcopy(self.owner, memo))


def is_overridden(owner: Any, method: str, attribute: str | None = None) -> bool:
    """Whether an object holds something else than its class's `method`, under that name or in another `attribute`."""
    own = vars(owner).get(attribute or method)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(owner), method)

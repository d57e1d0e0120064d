"""A method of one object, replaced until it is put back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any


class ReplacedMethod:
    """`function` in place of the method `name` of `owner`, from here to `remove`. Deep copies of the owner have the
    method of their class."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        if taken(owner, name):
            raise RuntimeError(f"{name} of {type(owner).__name__} was replaced already; undo that first")
        self.owner, self.name, self.function = owner, name, function
        self._before = vars(owner).get(name)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def remove(self) -> None:
        """Put the owner's method back."""
        if self._before is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The method of the copied owner's class."""
        return MethodType(getattr(type(self.owner), self.name), copy.deepcopy(self.owner, memo))


def taken(owner: Any, name: str) -> bool:
    """Whether an object has another method of this name than its class."""
    own = vars(owner).get(name)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(owner), name)

"""Context managers that warn if they were never entered."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class Block(AbstractContextManager[T]):
    """A `with` block around `manager` that warns if it is deleted without having been entered.

    Python warns in the same way of a coroutine that was never awaited. `call` is the user's code that made the block,
    such as "routed.steer(plan)".
    """

    def __init__(self, call: str, manager: AbstractContextManager[T]) -> None:
        self._call, self._manager, self._entered = call, manager, False

    def __enter__(self) -> T:
        self._entered = True
        return self._manager.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._manager.__exit__(kind, error, trace)

    def __del__(self) -> None:
        if not self._entered:
            warn_never_entered(self._call)


def warn_never_entered(call: str) -> None:
    """Warn, from a `__del__`, that the result of `call` was never entered."""
    said = f"{call} was never entered and does nothing: write `with {call}:` and call the model inside"
    warnings.warn(said, RuntimeWarning, stacklevel=3)

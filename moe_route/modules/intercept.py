"""Changes to other people's modules that can be taken back: hooks, attributes, methods, classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol, SupportsIndex

from torch import nn

_ABSENT = object()  # the object has no attribute of that name of its own
_UNKNOWN = object()  # `install` has not looked yet


class Change(Protocol):
    """A change to a model, made by `install` and taken back by `remove`."""

    def install(self) -> None:
        """Make the change."""

    def remove(self) -> None:
        """Take the change back. May be called at any time: twice, or after an interrupt in `install` or `remove`.

        What another tool has put in the place of the change stays.
        """


class ForwardHook:
    """`hook` as a forward hook of `module`."""

    def __init__(self, module: nn.Module, hook: Callable[..., Any], *, always_call: bool = False) -> None:
        self.module, self.hook, self.always_call = module, hook, always_call

    def install(self) -> None:
        """Register the hook."""
        self.module.register_forward_hook(self.hook, always_call=self.always_call)

    def remove(self) -> None:
        """Remove the hook."""
        module = self.module
        _take_out(self.hook, module._forward_hooks, module._forward_hooks_always_called)


class ForwardPreHook:
    """`hook` as a forward pre-hook of `module`."""

    def __init__(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        self.module, self.hook, self.with_kwargs = module, hook, with_kwargs

    def install(self) -> None:
        """Register the hook."""
        self.module.register_forward_pre_hook(self.hook, with_kwargs=self.with_kwargs)

    def remove(self) -> None:
        """Remove the hook."""
        _take_out(self.hook, self.module._forward_pre_hooks, self.module._forward_pre_hooks_with_kwargs)


def _take_out(hook: Callable[..., Any], hooks: dict[int, Callable[..., Any]], flags: dict[int, bool]) -> None:
    """Remove `hook` by identity: the handle that torch returns is lost where an interrupt comes before it."""
    for number in [number for number, other in hooks.items() if other is hook]:
        flags.pop(number, None)  # first: the hook tells its number
        hooks.pop(number, None)


class ReplacedAttribute:
    """Another value of one object's attribute, from `install` to `remove`."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self._before = _UNKNOWN

    def install(self) -> None:
        """Set the value."""
        self._before = vars(self.owner).get(self.name, _ABSENT)
        setattr(self.owner, self.name, self.value)

    def remove(self) -> None:
        """Put back what was there before. A value that somebody else set meanwhile stays."""
        if self._before is _UNKNOWN or vars(self.owner).get(self.name, _ABSENT) is not self.value:
            return
        if self._before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._before)


class ReplacedMethod(ReplacedAttribute):
    """`function` in place of a method of one object, from `install` to `remove`. Deep copies of the object have the
    method of their class."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        super().__init__(owner, name, self)

    def install(self) -> None:
        """Set the function. Raises `RuntimeError` where the object has a method of its own already."""
        if is_overridden(self.owner, self.name):
            raise RuntimeError(f"{self.name} of {type(self.owner).__name__} was replaced already; undo that first")
        super().install()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The method of the copied owner's class."""
        return MethodType(getattr(type(self.owner), self.name), copy.deepcopy(self.owner, memo))


class ReplacedForward:
    """`forward(module, *args)` in place of the forward of one module's class, through a subclass for that module alone,
    from `install` to `remove`. Copies of the module are of the original class.

    A tool that derives a class from the subclass meanwhile (FSDP) keeps it; its forward is the original one from
    `remove` on.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.original, self.installed = module, type(module), False
        original = self.original

        def either(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (forward if self.installed else original.forward)(module, *args, **kwargs)

        def reduce(module: nn.Module, protocol: SupportsIndex) -> object:
            reduced: Any = original.__reduce_ex__(module, protocol)
            function, (kind, *arguments), *rest = reduced
            return function, (original if kind is self.own else kind, *arguments), *rest

        names: dict[str, Any] = {"forward": either, "__reduce_ex__": reduce}
        names |= {"__module__": original.__module__, "__doc__": original.__doc__}
        self.own = type(original.__name__, (original,), names)

    def install(self) -> None:
        """Give the module the subclass."""
        self.installed = True
        self.module.__class__ = self.own

    def remove(self) -> None:
        """Give the module its own class back."""
        self.installed = False
        if type(self.module) is self.own:
            self.module.__class__ = self.original


def is_overridden(owner: Any, method: str, attribute: str | None = None) -> bool:
    """Whether an object holds something else than its class's `method`, under that name or in another `attribute`."""
    own = vars(owner).get(attribute or method)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(owner), method)

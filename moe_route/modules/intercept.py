"""Reversible changes to a module: hooks, attributes, methods, classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol, SupportsIndex

from torch import nn

_ABSENT = object()  # marks an object without an own attribute of that name
_UNKNOWN = object()  # the state before `install`


class Change(Protocol):
    """A change to a model. `install` makes it and `remove` reverts it."""

    def install(self) -> None:
        """Make the change."""

    def remove(self) -> None:
        """Revert the change. Safe at any time: a second time, or after an interrupt in `install` or `remove`.

        A value that another tool has put in the place of this change stays.
        """


class ForwardHook:
    """Registers `hook` as a forward hook of `module`."""

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
    """Registers `hook` as a forward pre-hook of `module`."""

    def __init__(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        self.module, self.hook, self.with_kwargs = module, hook, with_kwargs

    def install(self) -> None:
        """Register the hook."""
        self.module.register_forward_pre_hook(self.hook, with_kwargs=self.with_kwargs)

    def remove(self) -> None:
        """Remove the hook."""
        _take_out(self.hook, self.module._forward_pre_hooks, self.module._forward_pre_hooks_with_kwargs)


def _take_out(hook: Callable[..., Any], hooks: dict[int, Callable[..., Any]], flags: dict[int, bool]) -> None:
    """Remove `hook` by identity, because an interrupt during registration loses the handle that torch returns."""
    for number in [number for number, other in hooks.items() if other is hook]:
        flags.pop(number, None)  # before the hook, which supplies the number
        hooks.pop(number, None)


class ReplacedAttribute:
    """Gives one attribute of one object another value, from `install` to `remove`."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self._before = _UNKNOWN

    def install(self) -> None:
        """Set the value."""
        self._before = vars(self.owner).get(self.name, _ABSENT)
        setattr(self.owner, self.name, self.value)

    def remove(self) -> None:
        """Restore the former value, unless another tool has set the attribute meanwhile."""
        if self._before is _UNKNOWN or vars(self.owner).get(self.name, _ABSENT) is not self.value:
            return
        if self._before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._before)


class ReplacedMethod(ReplacedAttribute):
    """Replaces a method of one object by `function`, from `install` to `remove`.

    Deep copies of the object have the method of their class.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        super().__init__(owner, name, self)

    def install(self) -> None:
        """Set the function. Raises `RuntimeError` if the object's method is already replaced."""
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
    """Replaces the forward of one module by `forward(module, *args)`, from `install` to `remove`.

    The module is given a subclass of its class; other modules of that class are untouched. Copies of the module have
    the original class. A tool that derives a class from the subclass meanwhile (FSDP) keeps it; after `remove`, its
    forward is the original one.
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
        """Give the module its original class back."""
        self.installed = False
        if type(self.module) is self.own:
            self.module.__class__ = self.original


def is_overridden(owner: Any, method: str, attribute: str | None = None) -> bool:
    """Whether an object holds another function than its class's `method`, under that name or in `attribute`."""
    own = vars(owner).get(attribute or method)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(owner), method)

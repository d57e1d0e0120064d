"""Reversible changes to a module: hooks, attributes, methods, classes."""

from __future__ import annotations

import copy
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import wraps
from types import MethodType, ModuleType
from typing import Any, ParamSpec, Protocol, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)
_graphs_known = 0  # how many Dynamo had made when they were last dropped

# ---- attributes by dotted path, wherever accelerate keeps the tensors
#
# accelerate may keep a tensor on the CPU or on disk and move it to its device only while the module's forward runs.


def at(root: Any, path: str) -> Any:
    """The attribute at a dotted path, or None if there is none."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def number(root: Any, value: str | int) -> Any:
    """`value` if it is a number, else the attribute at that dotted path; of a matrix there, the number of rows."""
    given = at(root, value) if isinstance(value, str) else value
    return len(given) if isinstance(given, Tensor) else given


def modeling_of(module: nn.Module) -> ModuleType | None:
    """The modeling file of transformers that defines the class of `module`, or None."""
    return next(
        (sys.modules.get(c.__module__) for c in type(module).__mro__ if c.__module__.startswith("transformers.")), None
    )


# Instance attributes with which other libraries replace those of the class.
PUT_BY_OTHERS = ("forward", "_hf_hook", "_old_forward")


def resident(root: Any, path: str) -> Any:
    """The value at a dotted path, or None if there is none.

    For an offloaded tensor this is the value that accelerate loads before the forward pass. Raises `RuntimeError` for a
    tensor on the meta device that accelerate does not offload.
    """
    *above, name = path.split(".")
    owner = root
    for step in above:
        owner = getattr(owner, step, None)
    value = getattr(owner, name, None)
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    for hook in _accelerate_hooks(owner):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name].to(hook.execution_device)
    raise RuntimeError(f"{path} of {type(root).__name__} is on the meta device: load the weights before attaching")


def managed_by_accelerate(module: nn.Module) -> bool:
    """Whether accelerate has put a hook on the module."""
    return hasattr(module, "_hf_hook")


def device_of(module: nn.Module) -> torch.device:
    """The device on which the module runs: that of its first parameter, or the one that accelerate moves it to."""
    parameter = next(module.parameters(), None)
    if parameter is not None and not parameter.is_meta:
        return parameter.device
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if device is None else device)


def runs_by(module: nn.Module) -> tuple[object, ...]:
    """What runs when a module is called: its forward, and hooks of accelerate that are not accelerate's own.

    Equal as long as nobody replaces them: the wrapper that accelerate itself puts on for offloading does not count.
    """
    forward: Any = vars(module).get("forward")
    strange: tuple[object, ...] = ()
    if managed_by_accelerate(module) and _is_of_accelerate(getattr(forward, "func", None)):
        forward = vars(module).get("_old_forward")
        strange = tuple(hook for hook in _accelerate_hooks(module) if not _is_of_accelerate(type(hook)))
    return getattr(forward, "__func__", forward) or type(module).forward, strange


def _is_of_accelerate(thing: object) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("accelerate.")


def forward_attribute(module: nn.Module) -> str:
    """Name of the attribute that holds the module's forward; accelerate moves the original to another attribute."""
    return "_old_forward" if managed_by_accelerate(module) else "forward"


def _accelerate_hooks(module: Any) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,))


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

    def come_last(self) -> bool:
        """Run behind the hooks that others have registered since. Returns whether there were any.

        Raises `RuntimeError` if the hook was taken out.
        """
        later = later_hooks(self.module, self.hook)
        if later:
            hooks = self.module._forward_hooks
            _to_end(hooks, next(number for number, hook in hooks.items() if _is(hook, self.hook)))
        return bool(later)

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


def later_hooks(module: nn.Module, hook: Callable[..., Any] | None) -> list[int]:
    """Numbers of the forward hooks of `module` that run after `hook`, or of all with None.

    Raises `RuntimeError` if `hook` is not among them.
    """
    numbers = [number for number, other in module._forward_hooks.items() if _is(other, hook)]
    if hook is not None and not numbers:
        raise RuntimeError(
            f"the hook of moe-route was taken out of {type(module).__name__} after attach: detach(), and attach again"
        )
    listed = list(module._forward_hooks)
    return listed if hook is None else listed[listed.index(numbers[0]) + 1 :]


def _is(hook: Callable[..., Any], ours: Callable[..., Any] | None) -> bool:
    """Whether a registered hook is ours, or what somebody who times hooks has wrapped around it."""
    return hook is ours or (ours is not None and getattr(hook, "__wrapped__", None) is ours)


def _to_end(hooks: dict[int, Callable[..., Any]], number: int) -> None:
    cast("OrderedDict[int, Callable[..., Any]]", hooks).move_to_end(number)  # torch says dict, and makes an OrderedDict


class KeptOutput:
    """Raises `RuntimeError` with `refusal` where hooks of others change the output of `module` behind `hook`.

    `hook` is the one that sees the output first; None where the module's own forward is. Hooks that return nothing, or
    the same values, are let through.
    """

    def __init__(self, module: nn.Module, hook: Callable[..., Any] | None, refusal: str) -> None:
        self.module, self.hook, self.refusal = module, hook, refusal
        self._around = ForwardHook(module, untraced(self._keep)), ForwardHook(module, untraced(self._compare))
        self._kept: tuple[Any, int] | None = None

    def install(self) -> None:
        """Register a hook before those of others, and one behind them."""
        others = later_hooks(self.module, self.hook)
        for hook in self._around:
            hook.install()
        for number in (*others, next(reversed(self.module._forward_hooks))):
            _to_end(self.module._forward_hooks, number)

    def remove(self) -> None:
        """Remove both hooks."""
        for hook in self._around:
            hook.remove()
        self._kept = None

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._kept = output, _changes_in_place(output)

    def _compare(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept, self._kept = self._kept, None
        if kept is None or (output is kept[0] and _changes_in_place(output) == kept[1]):
            return
        if output is kept[0] or not _equal(output, kept[0]):
            raise RuntimeError(self.refusal)


def _changes_in_place(output: Any) -> int:
    """How often tensors of an output were changed in place; 0 in inference mode, where torch does not count it."""
    try:
        return sum(part._version for part in _parts(output) if isinstance(part, Tensor))
    except RuntimeError:
        return 0


def _equal(a: Any, b: Any) -> bool:
    return len(_parts(a)) == len(_parts(b)) and all(
        x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and bool((x == y).all()))
        for x, y in zip(_parts(a), _parts(b), strict=True)
    )


def _parts(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


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


def drop_graphs(model: nn.Module) -> None:
    """Drop every compiled graph of the process, if any was made since this was last called.

    Dynamo does not guard on hooks: a graph that it made of this model, or of another one of the same class, would be
    taken for the model and bypass its hooks. All are compiled again at the next call.
    """
    global _graphs_known
    graphs = _graphs_made()
    if graphs != _graphs_known:
        logger.info("graphs were made before hooks of %s changed: they are dropped", type(model).__name__)
        torch.compiler.reset()
    _graphs_known = graphs


def _graphs_made() -> int:
    """How many graphs Dynamo has made in this process."""
    dynamo = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else int(dynamo.utils.counters["stats"]["unique_graphs"])


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Let `torch.compile` call a function without tracing it, as `torch.compiler.disable` does.

    That decorator imports torch._dynamo, which takes a second. Here it is applied at the first call after something
    else imported it, since nothing is traced before.
    """
    disabled: Callable[P, R] | None = None

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # where traced code calls it, the graph ends
    try:  # a frame of `call` itself runs as it is
        frames = torch._C._dynamo.eval_frame
        strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        frames.set_code_exec_strategy(call.__code__, strategy)
    except (AttributeError, TypeError):  # another torch keeps this elsewhere, or calls it otherwise
        return torch.compiler.disable(function)
    return wraps(function)(call)

"""Capture intermediate tensors of a forward pass that appear in neither its inputs nor its outputs.

A `TorchFunctionMode` sees every call of a torch function while the module's forward runs. Nothing in the module is
replaced, so this works together with offloading, checkpointing, quantized gates and LoRA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from moe_route.modules.intercept import Change, ForwardHook, ForwardPreHook

_SCORES = frozenset(("softmax", "sigmoid", "topk", "max"))  # functions that are called on a router's logits
_CHOICE = "one_hot"  # function that is called on a block's chosen ids


class NothingScoredError(RuntimeError):
    """Raised when the watched forward ended without scoring any logits."""


class Scored(TorchFunctionMode):
    """Captures the first tensor that is scored and has `experts` columns: the router logits.

    `caller` is the frame that runs the watched forward, if known. An interrupt can leave this mode on torch's stack; it
    then captures nothing, because that frame is gone.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.seen: Tensor | None = None
        self.caller: FrameType | None = None

    def runs(self) -> bool:
        """Whether the watched forward is still running."""
        if self.caller is None or torch.compiler.is_compiling():
            return True
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        return frame is not None

    def logits(self) -> Tensor:
        """The router logits [T, E]. Raises `NothingScoredError`."""
        if self.seen is None:
            raise NothingScoredError(
                f"no logits over {self.experts} experts were scored: the router's forward was changed after attach. "
                "Detach, and attach again"
            )
        return self.seen

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, and keep the first argument of the first scoring function."""
        kwargs = kwargs or {}
        if self.seen is None and func.__name__ in _SCORES:
            scored = args[0] if args else kwargs.get("input")
            if isinstance(scored, Tensor) and scored.shape[-1:] == (self.experts,) and self.runs():
                self.seen = scored.flatten(0, -2)
        return func(*args, **kwargs)


class Decided(Scored):
    """Captures a choice that a block makes in the middle of its forward, and can replace it.

    The ids are captured when they are passed to `one_hot`. The weights are the last tensor of the same shape made
    before. `decide` is called once with logits [T, E], weights [T, k] and ids [T, k]. It returns the ids to use, and
    may change the weights in place.
    """

    def __init__(self, experts: int, top_k: int, decide: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(experts)
        self.top_k, self.decide = top_k, decide
        self.weights: Tensor | None = None
        self.decided = False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function; give `one_hot` the ids that `decide` returned."""
        kwargs = kwargs or {}
        if self.decided:
            return func(*args, **kwargs)
        if func.__name__ == _CHOICE and args and self.weights is not None and self.runs():
            self.decided = True
            return func(self.decide(self.logits(), self.weights, args[0]), *args[1:], **kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if self.seen is not None:
            shape = (self.seen.shape[0], self.top_k)
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, Tensor) and part.is_floating_point() and part.shape == shape:
                    self.weights = part
        return result


class WatchedForward:
    """Runs the forward of `module` under a mode made by `make`, from `install` to `remove`.

    If `make` returns None, the forward runs unwatched. Afterwards `see` is called with the module, its arguments, its
    output and the mode. A result other than None replaces the output.
    """

    def __init__(
        self,
        module: nn.Module,
        make: Callable[[], Scored | None],
        see: Callable[[nn.Module, tuple[Any, ...], Any, Any], Any],
    ) -> None:
        self._module, self._make, self._see = module, make, see
        self._entered: list[Scored | None] = []
        self._hooks: tuple[Change, ...] = ()

    def install(self) -> None:
        """Begin watching."""
        self._hooks = (
            ForwardPreHook(self._module, self._enter),
            ForwardHook(self._module, self._leave, always_call=True),
        )
        for hook in self._hooks:
            hook.install()

    @property
    def last(self) -> ForwardHook:
        """The hook that sees the output."""
        hook = self._hooks[-1]
        assert isinstance(hook, ForwardHook)
        return hook

    def remove(self) -> None:
        """Stop watching."""
        self._drop_interrupted()
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()  # the hooks hold this object

    def _drop_interrupted(self) -> None:
        """Pop modes whose forward was interrupted, because torch runs no hook after a KeyboardInterrupt."""
        if not self._entered:
            return
        left, above = [mode for mode in self._entered if mode is not None], []
        while any(mode is one for mode in _get_current_function_mode_stack() for one in left):
            mode = _pop_mode()
            if not any(mode is one for one in left):
                above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)
        self._entered = []

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._drop_interrupted()
        mode = self._make()
        self._entered.append(mode)
        if mode is not None:
            if not torch.compiler.is_compiling():
                mode.caller = sys._getframe(1)
            mode.__enter__()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._entered:
            return None  # an earlier hook raised, so `_enter` did not run
        mode = self._entered[-1]
        if mode is not None:
            mode.__exit__(None, None, None)
        self._entered.pop()  # last, so that an interrupted mode is dropped later
        if mode is None:
            return None
        return None if output is None else self._see(module, args, output, mode)  # None: the forward raised

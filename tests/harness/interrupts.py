"""Interrupt a piece of code at one of its lines, as Ctrl-C does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch


def count_lines(act: Callable[[], object], root: Callable[..., Any]) -> int:
    """How many lines of Python `act` runs within calls of `root`, those of what it calls included."""
    tracer = _Tracer(root.__code__, -1)
    tracer.run(act)
    return tracer.lines


def interrupt_at(line: int, act: Callable[[], object], root: Callable[..., Any]) -> bool:
    """Run `act` and raise `KeyboardInterrupt` before that line of it (as `count_lines` counts). Whether it came out.

    The gradient mode is put back: a `torch.no_grad()` that is interrupted while it is left never does so itself.
    """
    gradients = torch.is_grad_enabled()
    try:
        _Tracer(root.__code__, line).run(act)
    except KeyboardInterrupt:
        return True
    finally:
        torch.set_grad_enabled(gradients)
    return False


class _Tracer:
    def __init__(self, root: CodeType, line: int) -> None:
        self.root, self.line, self.lines, self.depth = root, line, 0, 0

    def run(self, act: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self.enter)
        try:
            act()
        finally:
            sys.settrace(before)

    def enter(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if frame.f_code is self.root:
            self.depth += 1
            return self.in_root
        return self.step if self.depth else None

    def in_root(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "return":
            self.depth -= 1
        self.step(frame, event, argument)
        return self.in_root

    def step(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "line":
            self.lines += 1
            if self.lines - 1 == self.line:
                raise KeyboardInterrupt
        return self.step

"""Ctrl-C during long work: the first ends it after the step at hand, so that what was done can be kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["INTERRUPTED", "deferred_interrupt"]

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended: 128 + SIGINT, as shells have it."""

_STANDARD_ERROR = 2


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed in the block; a second Ctrl-C raises KeyboardInterrupt.

    Work that asks it between its steps never stops within one. Outside the main thread, and where Ctrl-C is ignored or
    handled by another program around this one, nothing changes and the function always answers False.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield lambda: False
        return
    asked = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # not print: the handler may run while the stream is being written to
        os.write(_STANDARD_ERROR, b"\nmoe-route: ending after this batch; Ctrl-C again drops what was done\n")

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)

"""Ctrl-C during long work: the first one ends it after the current step, so that its results so far are kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["INTERRUPTED", "deferred_interrupt"]

INTERRUPTED = 130
"""Exit code of a command ended by Ctrl-C: 128 + SIGINT, as in shells."""

_STANDARD_ERROR = 2


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed in the block; a second Ctrl-C raises KeyboardInterrupt.

    Work that calls it between steps is never interrupted within a step. Outside the main thread, or if Ctrl-C is
    ignored or handled by a surrounding program, nothing changes and the function always returns False.
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
        # print must not be used here, because the handler may run while the stream is being written to
        os.write(_STANDARD_ERROR, b"\nmoe-route: ending after this batch; Ctrl-C again drops what was done\n")

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)

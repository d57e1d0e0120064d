"""Ctrl-C, or a request to terminate, during long work: it ends after the current step, so that its results are kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit code of a command ended by Ctrl-C: 128 + SIGINT, as in shells."""

_STANDARD_ERROR = 2


@contextmanager
def deferred_interrupt(
    *, terminate: bool = False, second: str = "Ctrl-C again drops what was done"
) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed in the block; a second Ctrl-C raises KeyboardInterrupt.

    Work that calls it between steps is never interrupted within a step. With `terminate`, SIGTERM does the same as
    Ctrl-C. `second` says on standard error what a second Ctrl-C does. Outside the main thread, or for signals that are
    ignored or handled by a surrounding program, nothing changes and the function always returns False.
    """
    usual = {signal.SIGINT: signal.default_int_handler} | ({signal.SIGTERM: signal.SIG_DFL} if terminate else {})
    before = {number: signal.getsignal(number) for number in usual}
    taken = [number for number in usual if before[number] is usual[number]]
    if threading.current_thread() is not threading.main_thread() or not taken:
        yield lambda: False
        return
    asked = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # print must not be used here, because the handler may run while the stream is being written to
        os.write(_STANDARD_ERROR, f"\nmoe-route: ending after this batch; {second}\n".encode())

    try:
        for number in taken:
            signal.signal(number, on_interrupt)
        yield lambda: asked
    finally:
        for number in taken:
            signal.signal(number, before[number])

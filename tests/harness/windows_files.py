"""Files as on Windows: no `fcntl`, locks by `msvcrt`, and no folder opened, no open file renamed or deleted."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch  # noqa: F401  (the standard library takes whoever has msvcrt for Windows: what imports it comes first)

_LOCK = 2


def imitate() -> None:
    """Imitate Windows in this process, before it imports `moe_route.base.files`."""
    sys.modules["fcntl"] = None  # type: ignore[assignment]
    sys.modules["msvcrt"] = SimpleNamespace(LK_NBLCK=_LOCK, locking=_locking)  # type: ignore[assignment]
    os.open = _no_folders(os.open)  # type: ignore[assignment]
    for name in ("replace", "unlink"):
        setattr(os, name, _closed_only(getattr(os, name)))


def _locking(descriptor: int, mode: int, size: int) -> None:
    assert (mode, size) == (_LOCK, 1)
    assert os.lseek(descriptor, 0, os.SEEK_CUR) > 1 << 30  # beyond what others read: locks of Windows bind all
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError("Permission denied") from error


def _no_folders(function: Any) -> Any:
    def open_file(path: Any, *arguments: Any, **named: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(f"Permission denied: {path}")
        return int(function(path, *arguments, **named))

    return open_file


def _closed_only(function: Any) -> Any:
    def changed(path: Any, *arguments: Any, **named: Any) -> None:
        for descriptor in Path("/proc/self/fd").iterdir():
            if descriptor.exists() and os.path.exists(path) and descriptor.samefile(path):
                raise PermissionError(f"another process uses the file: {path}")
        function(path, *arguments, **named)

    return changed

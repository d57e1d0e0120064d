"""What reading a file may cost, and the one error of a file that is refused.

A file of some bytes can ask for far more than its bytes: nested lists that share their parts, an array whose stride is
0, zeros that were packed, an expert numbered 10^12. Every reader draws what it makes from one `Budget` per file, before
it makes it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_ELEMENTS, _PER_BYTE = 1 << 20, 64  # numbers and objects made of a file: so many, and so many per byte
_UNPACKED, _RATIO = 1 << 26, 256  # bytes unpacked from an archive: so many, and so many per packed byte
_DEPTH, _DEEPEST = 64, 200  # containers in containers; and however far the budget is raised: Python recurses
_SECONDS = 60.0  # between two draws

_times: ContextVar[float] = ContextVar("times", default=1.0)


class FileRefusedError(ValueError):
    """Raised for a file that is damaged, foreign or too new; the message says what is wrong and what to do."""


class BudgetError(FileRefusedError):
    """Raised for a file that would cost more than its `Budget`."""


@contextlib.contextmanager
def raised(times: float) -> Iterator[None]:
    """Read files with so many times the budget in this block: what ``moe-route --budget`` does.

    Raises ``ValueError`` for a number below 1.
    """
    if not times >= 1:
        raise ValueError(f"the budget of a file is raised {times} times: give a number of at least 1")
    before = _times.set(times)
    try:
        yield
    finally:
        _times.reset(before)


class Budget:
    """What reading one file may make: 2^20 elements and 64 for each of its bytes, 64 levels of nesting.

    An element is a number or an object; an array counts as what it would hold if it were copied. Bytes of archives
    count unpacked, which may be 64 MiB and 256 times the packed ones. `raised` raises all of it.

    Args:
        path: the file, which must be a regular one: others have no size, and may not end. Or a folder of such files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        whole = Path(path)
        within = list(whole.iterdir()) if whole.is_dir() else [whole]
        status = [(one, one.stat()) for one in within if one == whole or not one.is_dir()]
        for one, its in status:
            if not stat.S_ISREG(its.st_mode):
                raise FileRefusedError(f"{one} is not a regular file: save what it gives to a file, and give that")
        self._begin(os.fspath(path), sum(its.st_size for _, its in status))

    def _begin(self, source: str, size: int) -> None:
        self.source, self._times, self._bytes = source, _times.get(), size
        self._unpacked, self._spent, self._last = 0, 0, time.monotonic()

    @property
    def depth(self) -> int:
        """Containers in containers that are read."""
        return int(min(_DEPTH * self._times, _DEEPEST))

    def spend(self, elements: int) -> None:
        """Draw elements that are made next. Raises `BudgetError` if they are too many, or nothing was drawn for 60 s.

        Call it in each step of long work.
        """
        now = time.monotonic()
        if now - self._last > _SECONDS * self._times:
            raise self._refused(f"reading it made no progress for {now - self._last:.0f} s")
        self._last = now
        self.afford(elements)
        self._spent += elements

    def afford(self, elements: int) -> None:
        """Raise `BudgetError` if so many more elements are too many; draws none."""
        size = self._bytes + self._unpacked
        if self._spent + elements > self._times * (_ELEMENTS + _PER_BYTE * size):
            wanted = min(self._spent + elements, 10**18)
            raise self._refused(f"its {size} bytes would become {wanted:.3g} numbers and objects")

    def unpack(self, packed: int, unpacked: int) -> None:
        """Draw bytes of an archive before they are unpacked. Raises `BudgetError` if they are too many."""
        if packed > self._bytes:
            raise self._refused(f"it has {self._bytes} bytes, and says that {packed} of them are packed")
        self._unpacked += unpacked
        if self._unpacked > self._times * (_UNPACKED + _RATIO * max(packed, 0)):
            raise self._refused(f"its {packed} packed bytes would become {unpacked}")
        self.spend(0)

    def enter(self, depth: int) -> None:
        """Raise `BudgetError` if a container in so many others is too deep."""
        if depth > self.depth:
            raise self._refused(f"its containers are nested deeper than {self.depth}, or hold themselves")

    @classmethod
    def of_text(cls, source: str, text: str | bytes) -> Budget:
        """What a text may make that is no file; `source` is what messages call it."""
        budget = cls.__new__(cls)
        budget._begin(source, len(text))
        return budget

    def json(self, text: str | bytes, **hooks: Any) -> Any:
        """Parse JSON, with hooks of ``json.loads``.

        Raises ``ValueError`` for what is none, `BudgetError` for what is nested too deeply.
        """
        try:
            value = json.loads(text, **hooks)
        except RecursionError as error:
            raise self._refused(f"its containers are nested deeper than {self.depth}") from error
        level, depth = [value], 0
        while level := [one for one in level if isinstance(one, (dict, list))]:
            self.enter(depth := depth + 1)
            level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
            self.spend(len(level))
        return value

    def _refused(self, problem: str) -> BudgetError:
        return BudgetError(
            f"{self.source}: {problem}, more than it may cost: check what it is, and raise the budget if it is right "
            "(moe-route --budget 8 COMMAND ...)"
        )


def extent(shape: Sequence[int]) -> int:
    """The numbers of an array; an axis of length 0 counts as 1, because the others may still be walked."""
    return math.prod(max(int(length), 1) for length in shape)

"""The groups that the user has named for the sequences of a batch, for modules that choose by group without a router.

`labels(groups=...)` of an attached model, of a recording and of adapters all name them here, so one block of labels
reaches all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np

__all__ = ["NamedGroups", "name_groups", "named_groups"]


class NamedGroups(NamedTuple):
    """Names, and int64 indices into them: for all sequences [], per sequence [N], or per token [N, S]."""

    names: Sequence[str]
    codes: np.ndarray


_named: ContextVar[NamedGroups | None] = ContextVar("moe_route groups", default=None)


def name_groups(groups: NamedGroups | None, *, named: ContextVar[NamedGroups | None] = _named) -> None:
    """Name the groups of the calls that follow in this thread; None ends it.

    Works at the end of a program too, when the names of this module are gone.
    """
    named.set(groups)


def named_groups() -> NamedGroups | None:
    """The groups named last, or None."""
    return _named.get()

"""What a warp holds while it runs: registers, predicates, and the groups its lanes have split into.

Registers of 32 lanes are rows ``[32]``, uniform ones rows ``[1]``, so that numpy spreads them over the lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

LANES = 32
WHOLE_WARP = 0xFFFFFFFF

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
# Executes one instruction. True: the lanes of the warp have to be sorted out anew.
Step: TypeAlias = "Callable[[Warp], bool | None]"
Read: TypeAlias = "Callable[[Warp], Array]"
Write: TypeAlias = "Callable[[Warp, Array], None]"

_ALL = np.ones(LANES, bool)
_ALL.flags.writeable = False


class SassError(Exception):
    """The machine code holds something that this interpreter does not know, or does what hardware would not allow."""


@dataclass
class Group:
    """Lanes of a warp that are at one place.

    Attributes:
        index: of the instruction they execute next.
        lanes: as bits.
        waits: why they cannot go on: ``("converge", barrier of the warp or None, lanes as bits)``,
            ``("barrier", number, threads)``, or None.
    """

    index: int
    lanes: int
    waits: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Access:
    """One executed load from global memory: bytes that all lanes asked for, and bytes of one lane."""

    at: int  # position in the trace
    bytes: int
    width: int


@dataclass
class Place:
    """Where a block lies in its grid."""

    block: tuple[int, int, int]
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]


@dataclass
class Warp:
    """One warp of a block.

    Attributes:
        trace: index of every instruction that was issued; ``~index`` where its guard held for no lane.
        bars: positions in the trace at which the warp had come to a barrier of the block.
    """

    number: int
    place: Place
    memory: Any
    shared: Any
    constants: dict[int, Array]  # by bank
    seed_ulps: int = 0
    groups: list[Group] = field(default_factory=list)
    trace: list[int] = field(default_factory=list)
    bars: list[int] = field(default_factory=list)
    loads: list[Access] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.r = list(np.zeros((256, LANES), np.uint32))
        self.u = list(np.zeros((64, 1), np.uint32))
        self.p = list(np.zeros((8, LANES), bool))
        self.up = list(np.zeros((8, 1), bool))
        self.p[7][:] = self.up[7][:] = True
        # Lanes that a lane's convergence barrier waits for, by barrier and lane.
        self.converging = np.zeros((16, LANES), np.uint32)
        threads = int(np.prod(self.place.threads))
        present = min(LANES, threads - self.number * LANES)
        self.groups.append(Group(0, (1 << present) - 1))
        self.group = self.groups[0]
        self.active: Array = _ALL
        self.next = 0

    @property
    def thread(self) -> Array:
        return np.arange(LANES) + self.number * LANES

    @property
    def live(self) -> int:
        """Lanes that have not exited."""
        return sum(group.lanes for group in self.groups)

    def focus(self, group: Group) -> None:
        """Make this group the one that executes."""
        self.group = group
        self.active = _ALL if group.lanes == WHOLE_WARP else lanes_of(group.lanes)

    def converge(self) -> None:
        """Let groups go on that have come together at the place where they wait for one another."""
        for group in list(self.groups):
            if group not in self.groups or group.waits is None or group.waits[0] != "converge":
                continue
            needed = group.waits[2] & self.live
            here = [other for other in self.groups if other.waits is not None and other.waits[0] == "converge"]
            here = [other for other in here if other.index == group.index and other.lanes & needed]
            together = sum(other.lanes for other in here)
            if needed & ~together == 0:
                self.groups = [other for other in self.groups if other not in here]
                self.groups.append(Group(group.index + 1, together))


def bits_of(lanes: Array) -> int:
    return int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")


def lanes_of(bits: int) -> Array:
    return np.unpackbits(np.frombuffer(bits.to_bytes(4, "little"), np.uint8), bitorder="little").view(bool)

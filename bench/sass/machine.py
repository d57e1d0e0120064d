"""Run the machine code of a kernel, block by block, and keep what every warp executed.

Blocks run one after the other and warps of a block in turns, each until it comes to a barrier of the block. Memory is
sequentially consistent. What is executed, on which values and how often is therefore that of hardware; when is not
(`cost` models it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

# Imported for the opcodes they enter into the table.
from bench.sass import accesses, bits, collectives, control, floats, integers  # noqa: F401
from bench.sass.disassembly import Kernel
from bench.sass.memory import GlobalMemory, SharedMemory
from bench.sass.opcodes import executable
from bench.sass.state import Array, Group, Place, SassError, Step, Warp

PARAMETERS = 0x210  # where the parameters of a kernel of sm_90 begin in constant bank 0
_GRID = 0xC  # and the size of the grid, behind that of the block
_MOST_STEPS = 20_000_000


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: sizes as (x, y, z), shared memory in bytes, static and dynamic, and the parameters' bytes."""

    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int
    parameters: bytes

    @property
    def blocks(self) -> int:
        return int(np.prod(self.grid))

    def constants(self) -> Array:
        """Constant bank 0."""
        bank = np.zeros(PARAMETERS + -(-len(self.parameters) // 16) * 16 + 16, np.uint8)
        bank[:12] = np.array(self.threads, np.uint32).view(np.uint8)
        bank[_GRID : _GRID + 12] = np.array(self.grid, np.uint32).view(np.uint8)
        bank[PARAMETERS : PARAMETERS + len(self.parameters)] = np.frombuffer(self.parameters, np.uint8)
        return bank


@dataclass
class Program:
    """A kernel whose instructions become functions the first time they are executed."""

    kernel: Kernel
    steps: list[Step | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = [None] * len(self.kernel.instructions)

    def step(self, index: int) -> Step:
        if index >= len(self.steps):
            raise SassError(f"{self.kernel.name} jumps behind its last instruction")
        found = self.steps[index]
        if found is None:
            found = self.steps[index] = executable(self.kernel.instructions[index])
        return found

    def run(
        self, launch: Launch, memory: GlobalMemory, blocks: Iterable[int] | None = None, seed_ulps: int = 0
    ) -> Iterator[list[Warp]]:
        """Run these blocks (default: all), and give the warps of each when it has ended.

        Args:
            launch: sizes and parameters.
            memory: what global addresses mean.
            blocks: numbers of blocks.
            seed_ulps: units by which the approximations of MUFU are off.

        Raises:
            SassError: an instruction is unknown, or does what hardware would not allow; the message names it.
        """
        tables = np.frombuffer(self.kernel.jumps or bytes(16), np.uint8)
        constants = {0: launch.constants(), 2: tables}
        x, y, _ = launch.grid
        for number in range(launch.blocks) if blocks is None else blocks:
            place = Place((number % x, number // x % y, number // (x * y)), launch.grid, launch.threads)
            shared = SharedMemory(launch.shared_bytes)
            count = -(-int(np.prod(launch.threads)) // 32)
            warps = [Warp(n, place, memory, shared, constants, seed_ulps) for n in range(count)]
            self._run_block(warps)
            yield warps

    def _run_block(self, warps: list[Warp]) -> None:
        with np.errstate(all="ignore"):
            while any(warp.groups for warp in warps):
                for warp in warps:
                    self._run_warp(warp)
                if not _release(warps):
                    raise SassError(f"{self.kernel.name}: {self._where(warps)} wait for one another")

    def _run_warp(self, warp: Warp) -> None:
        """Until no group of lanes can go on."""
        steps, trace = self.steps, warp.trace
        while (group := next((group for group in warp.groups if group.waits is None), None)) is not None:
            warp.focus(group)
            at = group.index
            try:
                while True:
                    step = steps[at] if at < len(steps) else None
                    if step is None:
                        step = self.step(at)
                    trace.append(at)
                    warp.next = at + 1
                    if step(warp):
                        break
                    at = warp.next
            except SassError as refused:
                text = self.kernel.instructions[at] if at < len(steps) else "the end"
                raise SassError(
                    f"{self.kernel.name}, {at * 16:#x} '{text}', warp {warp.number}: {refused}"
                ) from refused
            if len(trace) > _MOST_STEPS:
                raise SassError(f"{self.kernel.name}: a warp has executed {_MOST_STEPS} instructions and goes on")

    def _where(self, warps: list[Warp]) -> str:
        places = {(group.index * 16, str(group.waits)) for warp in warps for group in warp.groups}
        return ", ".join(f"{address:#x} {waits}" for address, waits in sorted(places))


def _release(warps: list[Warp]) -> bool:
    """Let the threads of complete barriers go on. False if all wait and no barrier is complete."""
    waiting: dict[tuple[int, int], list[tuple[Warp, Group]]] = {}
    live = 0
    for warp in warps:
        for group in warp.groups:
            live += group.lanes.bit_count()
            if group.waits is not None and group.waits[0] == "barrier":
                waiting.setdefault(group.waits[1:], []).append((warp, group))
    released = live == 0
    for (_, threads), groups in waiting.items():
        arrived = sum(group.lanes.bit_count() for _, group in groups)
        if arrived == (threads or live):
            for _, group in groups:
                group.waits = None
            released = True
    return released

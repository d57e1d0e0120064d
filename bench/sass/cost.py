"""A model of how long a block takes, alone on a multiprocessor. It is a model: good to about 30 %.

A warp issues in order. The compiler has written into every instruction how many cycles pass until the next one, and
which counters an instruction of unknown duration (a load, a shuffle, ...) raises, for later ones to wait for. Those
durations are assumed (`LATENCY`); everything else comes from the code. Between two barriers of the block its warps run
side by side: the longest of them, or the issue slots of the fullest of four schedulers, decides. There is no
instruction cache, no launch, no other block, no bank conflict, and no limit of bandwidth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.sass.disassembly import INSTRUCTION_BYTES, Instruction, Kernel
from bench.sass.state import Warp

SCHEDULERS = 4
BARRIER = 24  # cycles from the last arrival to the next instruction
TAKEN_BRANCH = 9
SOURCES_READ = 12  # cycles until an instruction of unknown duration has read its registers
# Cycles until a result can be used, on Hopper. Loads from global memory: out of the level-2 cache.
LATENCY = {
    "LDG": 280, "LD": 280, "LDGSTS": 280, "ATOM": 280, "ATOMG": 280, "LDS": 29, "LDC": 30, "ULDC": 12, "ATOMS": 50,
    "SHFL": 24, "REDUX": 24, "MATCH": 24, "VOTE": 12, "VOTEU": 12, "S2R": 25, "S2UR": 25, "MUFU": 22, "FCHK": 14,
    "POPC": 14, "UPOPC": 12, "FLO": 14, "UFLO": 12, "BREV": 14, "F2I": 24, "I2F": 20, "F2F": 24, "R2UR": 12,
    "DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16,
}  # fmt: skip
_OTHER_LATENCY = 14
_JUMPS = ("BRA", "BRX", "CALL", "RET", "BSYNC")
_COUNTERS, _NO_COUNTER = 6, 7


@dataclass(frozen=True)
class Schedule:
    """What the encoding says: cycles to the next instruction, and the counters that are raised and waited for."""

    stall: int
    result: int
    sources: int
    waits: tuple[int, ...]

    @staticmethod
    def of(instruction: Instruction) -> Schedule:
        bits = instruction.encoding >> 41
        mask = bits >> 11 & 0x3F
        waits = tuple(counter for counter in range(_COUNTERS) if mask >> counter & 1)
        return Schedule(max(1, bits & 15), bits >> 5 & 7, bits >> 8 & 7, waits)


@dataclass
class Cost:
    """What a block costs.

    Attributes:
        cycles: modelled.
        instructions: issued by all warps.
        longest: issued by the warp that issues most.
        loads: bytes that lanes load from global memory, by the bytes of one lane's load.
        in_flight: most bytes that are on their way to a warp at once, added up over the warps.
        touched: bytes of code that ran.
    """

    cycles: float
    instructions: int
    longest: int
    loads: Counter[int]
    in_flight: int
    touched: int


def block_cost(kernel: Kernel, warps: Sequence[Warp]) -> Cost:
    """The cost of a block that was run."""
    schedules = [Schedule.of(instruction) for instruction in kernel.instructions]
    clocks = [_Clock(kernel, schedules, warp) for warp in warps]
    time, pieces = 0.0, max(len(warp.bars) for warp in warps) + 1
    for piece in range(pieces):
        lengths = [clock.advance(piece, time) for clock in clocks]
        issued = [sum(clock.issued for clock in clocks[first::SCHEDULERS]) for first in range(SCHEDULERS)]
        time = max([time, *lengths, *(time + slots for slots in issued)]) + (BARRIER if piece + 1 < pieces else 0)
    loads: Counter[int] = Counter()
    for warp in warps:
        for access in warp.loads:
            loads[access.width] += access.bytes
    ran = {at if at >= 0 else ~at for warp in warps for at in warp.trace}
    sizes = [len(warp.trace) for warp in warps]
    most = sum(clock.most_in_flight for clock in clocks)
    return Cost(time, sum(sizes), max(sizes), loads, most, len(ran) * INSTRUCTION_BYTES)


class _Clock:
    """One warp's time."""

    def __init__(self, kernel: Kernel, schedules: list[Schedule], warp: Warp) -> None:
        self.kernel, self.schedules, self.warp = kernel, schedules, warp
        self.ready = [0.0] * _COUNTERS
        self.copies: list[float] = []  # ends of the groups of copies to shared memory
        self.last_copy = 0.0
        self.flying: list[tuple[float, int]] = []
        self.most_in_flight = self.issued = 0
        self.loads = {access.at: access.bytes for access in warp.loads}

    def advance(self, piece: int, start: float) -> float:
        """Issue the instructions up to the barrier behind this piece; the time when that is done."""
        bars, trace = [0, *self.warp.bars, len(self.warp.trace)], self.warp.trace
        if piece + 1 >= len(bars):
            self.issued = 0
            return start
        time, self.issued = start, bars[piece + 1] - bars[piece]
        for position in range(bars[piece], bars[piece + 1]):
            at = trace[position]
            follows = trace[position + 1] if position + 1 < len(trace) else at + 1
            time = self._issue(time, position, at, follows if follows >= 0 else ~follows)
        return time

    def _issue(self, time: float, position: int, at: int, follows: int) -> float:
        runs = at >= 0
        at = at if runs else ~at
        instruction, schedule = self.kernel.instructions[at], self.schedules[at]
        time = max([time, *(self.ready[counter] for counter in schedule.waits)])
        name = instruction.opcode
        end = time + (LATENCY.get(name, _OTHER_LATENCY) if runs else schedule.stall)
        if schedule.result != _NO_COUNTER:
            self.ready[schedule.result] = max(self.ready[schedule.result], end)
        if schedule.sources != _NO_COUNTER:
            self.ready[schedule.sources] = max(self.ready[schedule.sources], time + SOURCES_READ)
        if position in self.loads:
            self._fly(time, end, self.loads[position])
        if name == "LDGSTS":
            self.last_copy = max(self.last_copy, end)
        elif name == "LDGDEPBAR":
            self.copies.append(self.last_copy)
        elif name == "DEPBAR" and "LE" in instruction.modifiers:
            left = int(instruction.operands[1], 16)
            time = max([time, *self.copies[: len(self.copies) - left]])
        if name in _JUMPS and follows != at + 1:
            return time + TAKEN_BRANCH
        return time + schedule.stall

    def _fly(self, time: float, end: float, size: int) -> None:
        self.flying = [(until, each) for until, each in self.flying if until > time]
        self.flying.append((end, size))
        self.most_in_flight = max(self.most_in_flight, sum(each for _, each in self.flying))


# ---- how many at once -------------------------------------------------------------------------------------------

REGISTERS, REGISTER_UNIT, MOST_WARPS, MOST_BLOCKS = 65536, 256, 64, 32
SHARED_OF_MULTIPROCESSOR, SHARED_OF_HARDWARE = 233472, 1024


def warps_at_once(registers: int, threads: int, shared_bytes: int) -> int:
    """Warps that a multiprocessor of sm_90 holds, of blocks of this size."""
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // of_warp // warps
    by_shared = SHARED_OF_MULTIPROCESSOR // (shared_bytes + SHARED_OF_HARDWARE)
    return warps * min(by_registers, by_shared, MOST_WARPS // warps, MOST_BLOCKS)


def widths(loads: Counter[int]) -> str:
    """Share of the loaded bytes by the width of a load, as ``16 B 83 %, 4 B 17 %``."""
    total = sum(loads.values())
    if total == 0:
        return "none"
    parts: Iterable[tuple[int, int]] = sorted(loads.items(), reverse=True)
    return ", ".join(f"{width} B {100 * size / total:.0f} %" for width, size in parts if 200 * size >= total)

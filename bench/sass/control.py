"""Control flow: branches, calls, the barriers at which lanes of a warp come together, and those of a block.

Lanes that part stay apart until a BSYNC or WARPSYNC brings them together, as hardware has it; coming to the same
instruction by chance joins nothing. BRA.DIV branches where lanes of a warp are apart; here it waits for them instead,
which is what happens on hardware when the others arrive in time, so its slow path is never taken.
"""

from __future__ import annotations

import numpy as np

from bench.sass.disassembly import INSTRUCTION_BYTES, Instruction
from bench.sass.opcodes import opcode
from bench.sass.operands import integer, predicate
from bench.sass.state import WHOLE_WARP, Array, Group, Read, SassError, Step, Warp, bits_of


def _condition(*texts: str | None) -> Read:
    """The lanes of the group for which all of these predicates hold."""
    predicates = [predicate(text) for text in texts if text is not None]

    def holds(w: Warp) -> Array:
        lanes = w.active
        for each in predicates:
            lanes = lanes & each(w)
        return lanes

    return holds


def _index(text: str) -> int:
    address = int(text, 16)
    if address % INSTRUCTION_BYTES:
        raise SassError(f"a jump to {text}, inside an instruction")
    return address // INSTRUCTION_BYTES


def _part(w: Warp, there: int, index: int) -> bool | None:
    """Lanes ``there`` (bits) of the group go to ``index``, the others to the next instruction."""
    group = w.group
    if there == group.lanes:
        w.next = index
        return None
    if there == 0:
        return None
    group.lanes &= ~there
    group.index = w.next
    w.groups.append(Group(index, there))
    return True


@opcode("BRA", modifiers=("U", "DIV", "CONV", "ANY"), guards=True)
def _branch(instruction: Instruction) -> Step:
    if "DIV" in instruction.modifiers:
        return _whole_warp(instruction)
    if "CONV" in instruction.modifiers:
        return lambda w: None
    *conditions, target = instruction.operands
    index = _index(target)
    if not conditions and instruction.guard is None:

        def jump(w: Warp) -> None:
            w.next = index

        return jump
    holds = _condition(instruction.guard, *conditions)
    return lambda w: _part(w, bits_of(holds(w)), index)


@opcode("CALL", modifiers=("REL", "ABS", "NOINC"), guards=True)
def _call(instruction: Instruction) -> Step:
    holds, index = _condition(instruction.guard), _index(instruction.operands[-1])
    return lambda w: _part(w, bits_of(holds(w)), index)


@opcode("RET", "BRX", "BRXU", modifiers=("REL", "ABS", "NODEC"), guards=True)
def _return(instruction: Instruction) -> Step:
    """To the address in a register, which may differ between lanes."""
    holds = _condition(instruction.guard)
    register, _, offset = instruction.operands[0].partition(" ")
    source, base = integer(register), int(offset or "0", 16)
    if instruction.opcode != "RET":
        base += instruction.address + INSTRUCTION_BYTES

    def step(w: Warp) -> bool | None:
        lanes = holds(w)
        targets = np.broadcast_to(source(w), len(lanes)).view(np.int32)[lanes] + base
        places = sorted(set(targets.tolist()))
        if len(places) > 1:
            raise SassError(f"'{instruction}' goes to {len(places)} places at once")
        if not places:
            return None
        return _part(w, bits_of(lanes), places[0] // INSTRUCTION_BYTES)

    return step


@opcode("EXIT", guards=True)
def _exit(instruction: Instruction) -> Step:
    holds = _condition(instruction.guard, *instruction.operands)

    def step(w: Warp) -> bool:
        w.group.lanes &= ~bits_of(holds(w))
        w.group.index = w.next
        if w.group.lanes == 0:
            w.groups.remove(w.group)
        w.converge()
        return True

    return step


# ---- lanes of a warp --------------------------------------------------------------------------------------------


@opcode("BSSY", modifiers=("RECONVERGENT", "RELIABLE"))
def _set_convergence(instruction: Instruction) -> Step:
    which = int(instruction.operands[0][1:])

    def step(w: Warp) -> None:
        w.converging[which][w.active] = w.group.lanes

    return step


def _wait(w: Warp, lanes: int, index: int, needed: int, barrier: int | None = None) -> bool | None:
    """Lanes of the group wait at ``index`` for all of ``needed``, which a BREAK of ``barrier`` makes fewer."""
    if lanes == w.group.lanes and needed & w.live == lanes:
        return None
    group = w.group
    stay = group.lanes & ~lanes
    w.groups.remove(group)
    if stay:
        w.groups.append(Group(w.next, stay))
    w.groups.append(Group(index, lanes, ("converge", barrier, needed)))
    w.converge()
    return True


@opcode("BSYNC", modifiers=("RECONVERGENT", "RELIABLE"), guards=True)
def _converge(instruction: Instruction) -> Step:
    which, index, holds = int(instruction.operands[-1][1:]), instruction.index, _condition(instruction.guard)

    def step(w: Warp) -> bool | None:
        lanes = holds(w)
        if not lanes.any():
            return None
        return _wait(w, bits_of(lanes), index, int(w.converging[which][int(np.argmax(lanes))]), which)

    return step


@opcode("BREAK", modifiers=("RELIABLE",), guards=True)
def _leave_convergence(instruction: Instruction) -> Step:
    which = int(instruction.operands[-1][1:])
    holds = _condition(instruction.guard, *instruction.operands[:-1])

    def step(w: Warp) -> bool | None:
        leaving = bits_of(holds(w))
        w.converging[which] &= np.uint32(~leaving & WHOLE_WARP)
        waiting = [group for group in w.groups if group.waits is not None and group.waits[:2] == ("converge", which)]
        if not leaving or not waiting:
            return None
        w.group.index = w.next
        for group in waiting:
            first = (group.lanes & -group.lanes).bit_length() - 1
            group.waits = ("converge", which, int(w.converging[which][first]))
        w.converge()
        return True

    return step


def _whole_warp(instruction: Instruction) -> Step:
    index = instruction.index
    return lambda w: _wait(w, w.group.lanes, index, w.live)


@opcode("WARPSYNC", modifiers=("ALL",), guards=True)
def _synchronize_warp(instruction: Instruction) -> Step:
    if "ALL" in instruction.modifiers:
        return _whole_warp(instruction)
    mask, index = integer(instruction.operands[-1]), instruction.index

    def step(w: Warp) -> bool | None:
        named = np.broadcast_to(mask(w), 32)
        return _wait(w, w.group.lanes, index, int(named[int(np.argmax(w.active))]))

    return step


# ---- the block --------------------------------------------------------------------------------------------------


@opcode("BAR", modifiers=("SYNC", "DEFER_BLOCKING"), guards=True)
def _synchronize_block(instruction: Instruction) -> Step:
    if instruction.guard is not None:
        raise SassError(f"'{instruction}': a guarded barrier is unknown")
    number = integer(instruction.operands[0])
    threads = integer(instruction.operands[1]) if len(instruction.operands) > 1 else None

    def step(w: Warp) -> bool:
        w.group.index = w.next
        w.group.waits = ("barrier", int(number(w)[0]), 0 if threads is None else int(threads(w)[0]))
        w.bars.append(len(w.trace))
        return True

    return step


@opcode(
    "NOP", "YIELD", "NANOSLEEP", "ACQBULK", "PREEXIT", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "FENCE",
    "CCTL", "ENDCOLLECTIVE", "PMTRIG",
    modifiers=("LE", "SC", "ALL", "GPU", "SYS", "CTA", "VC", "IVALL", "VIEW", "ASYNC", "S"),
)  # fmt: skip
def _nothing(instruction: Instruction) -> Step:
    """No effect on values: memory is in order here, and copies to shared memory are done when they are issued."""
    return lambda w: None

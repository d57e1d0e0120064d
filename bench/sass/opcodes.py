"""The table of opcodes: which function makes an instruction executable, and which modifiers it knows.

An opcode or modifier that is not in the table is refused by name: a wrong guess would be a wrong result or count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from bench.sass.disassembly import Instruction
from bench.sass.operands import predicate
from bench.sass.state import SassError, Step, Warp

Decode: TypeAlias = Callable[[Instruction], Step]

_KNOWN: dict[str, tuple[Decode, frozenset[str], bool]] = {}


def opcode(*names: str, modifiers: Iterable[str] = (), guards: bool = False) -> Callable[[Decode], Decode]:
    """Enter a function for these opcodes. guards: it looks at the instruction's guard itself."""

    def enter(decode: Decode) -> Decode:
        for name in names:
            _KNOWN[name] = decode, frozenset(modifiers), guards
        return decode

    return enter


def executable(instruction: Instruction) -> Step:
    """The instruction as a function of a warp. SassError if it is unknown."""
    entry = _KNOWN.get(instruction.opcode)
    if entry is None:
        raise SassError(f"the opcode {instruction.opcode} is unknown (in '{instruction}')")
    decode, modifiers, guards = entry
    unknown = [name for name in instruction.modifiers if name not in modifiers]
    if unknown:
        raise SassError(f"the modifier {unknown[0]} of {instruction.opcode} is unknown (in '{instruction}')")
    try:
        step = decode(instruction)
    except (IndexError, ValueError, KeyError) as error:
        raise SassError(f"'{instruction}' is not written as expected: {error}") from error
    if guards or instruction.guard is None:
        return step
    return _uniform_guard(step, instruction.guard) if "UP" in instruction.guard else _guard(step, instruction.guard)


def _guard(step: Step, guard: str) -> Step:
    holds = predicate(guard)

    def guarded(w: Warp) -> bool | None:
        everyone = w.active
        w.active = everyone & holds(w)
        if w.active.any():
            step(w)
        else:
            w.trace[-1] = ~w.trace[-1]
        w.active = everyone
        return None

    return guarded


def _uniform_guard(step: Step, guard: str) -> Step:
    holds = predicate(guard)

    def guarded(w: Warp) -> bool | None:
        if holds(w)[0]:
            return step(w)
        w.trace[-1] = ~w.trace[-1]
        return None

    return guarded

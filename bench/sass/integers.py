"""Integer arithmetic and moves, and those of the uniform datapath, which do the same to one lane."""

from __future__ import annotations

import numpy as np

from bench.sass.disassembly import Instruction
from bench.sass.opcodes import opcode
from bench.sass.operands import (
    constant,
    destination,
    integer,
    is_predicate,
    predicate,
    predicate_destination,
    wide,
    wide_destination,
)
from bench.sass.state import LANES, Array, Read, SassError, Step, Warp, Write

_SHARED_WINDOW = 0x10000  # upper half of the generic addresses of shared memory: above all of a process


def _predicates_then_sources(instruction: Instruction) -> tuple[list[Write], list[str]]:
    """Predicates that are written after the result, and the operands behind them."""
    rest = list(instruction.operands[1:])
    written: list[Write] = []
    while is_predicate(rest[0]) and not rest[0].startswith("!"):
        written.append(predicate_destination(rest.pop(0)))
    return written, rest


def _wide_arithmetic(text: str) -> Read:
    """A term of a sum as uint64, so that carries show; ``-x`` is ``~x + 1`` in 32 bits."""
    source = integer(text)
    if text.startswith("-") and not text.startswith("-0x"):
        complement = integer("~" + text[1:])
        return lambda w: complement(w).astype(np.uint64) + np.uint64(1)
    return lambda w: source(w).astype(np.uint64)


@opcode("MOV", "UMOV")
def _move(instruction: Instruction) -> Step:
    write, source = destination(instruction.operands[0]), integer(instruction.operands[1])
    return lambda w: write(w, source(w))


@opcode("LDC", "ULDC", modifiers=("64", "U8", "U16"))
def _load_constant(instruction: Instruction) -> Step:
    to, text = instruction.operands
    size = {"64": 8, "U8": 1, "U16": 2}.get((*instruction.modifiers, "")[0], 4)
    write = wide_destination(to) if size == 8 else destination(to)
    source = constant(text, size)
    if to.startswith("U"):
        return lambda w: write(w, source(w)[:1])

    def load(w: Warp) -> None:
        value = source(w)
        write(w, value if len(value) == LANES else np.broadcast_to(value, LANES))

    return load


@opcode("S2R", "S2UR", "CS2R", modifiers=("32",))
def _special_register(instruction: Instruction) -> Step:
    to, name = instruction.operands
    if instruction.opcode == "CS2R":
        if name != "SRZ":
            raise SassError(f"special register {name} of CS2R is unknown")
        write = destination(to) if "32" in instruction.modifiers else wide_destination(to)
        zero = np.zeros(LANES, np.uint32 if "32" in instruction.modifiers else np.uint64)
        return lambda w: write(w, zero)
    write, source = destination(to), _special(name)
    if to.startswith("U"):
        return lambda w: write(w, source(w)[int(np.argmax(w.active)) :][:1].astype(np.uint32))
    return lambda w: write(w, source(w).astype(np.uint32))


def _special(name: str) -> Read:
    def same(value: int) -> Array:
        return np.full(LANES, value)

    def thread(w: Warp, axis: int) -> Array:
        x, y, _ = w.place.threads
        return np.asarray((w.thread % x, w.thread // x % y, w.thread // (x * y))[axis])

    lanes = np.arange(LANES)
    known: dict[str, Read] = {
        "SR_TID.X": lambda w: thread(w, 0),
        "SR_TID.Y": lambda w: thread(w, 1),
        "SR_TID.Z": lambda w: thread(w, 2),
        "SR_CTAID.X": lambda w: same(w.place.block[0]),
        "SR_CTAID.Y": lambda w: same(w.place.block[1]),
        "SR_CTAID.Z": lambda w: same(w.place.block[2]),
        "SR_CgaCtaId": lambda w: same(0),
        "SR_SWINHI": lambda w: same(_SHARED_WINDOW),
        "SR_LANEID": lambda w: lanes,
        "SR_EQMASK": lambda w: np.uint32(1) << lanes.astype(np.uint32),
        "SR_LTMASK": lambda w: (np.uint64(1) << lanes.astype(np.uint64)) - np.uint64(1),
        "SR_LEMASK": lambda w: (np.uint64(2) << lanes.astype(np.uint64)) - np.uint64(1),
        "SR_GTMASK": lambda w: ~((np.uint64(2) << lanes.astype(np.uint64)) - np.uint64(1)) & np.uint64(0xFFFFFFFF),
        "SR_GEMASK": lambda w: ~((np.uint64(1) << lanes.astype(np.uint64)) - np.uint64(1)) & np.uint64(0xFFFFFFFF),
    }
    if name not in known:
        raise SassError(f"special register {name} is unknown")
    return known[name]


# ---- sums and products ------------------------------------------------------------------------------------------


@opcode("IADD3", "UIADD3", modifiers=("X",))
def _add_three(instruction: Instruction) -> Step:
    written, rest = _predicates_then_sources(instruction)
    carries_in = [predicate(text) for text in rest[3:]] if "X" in instruction.modifiers else []
    write = destination(instruction.operands[0])
    if not written and not carries_in:
        a, b, c = (integer(text) for text in rest[:3])
        return lambda w: write(w, a(w) + b(w) + c(w))
    terms = [_wide_arithmetic(text) for text in rest[:3]]

    def add(w: Warp) -> None:
        total = terms[0](w) + terms[1](w) + terms[2](w)
        for carry in carries_in:
            total = total + carry(w)
        high = total >> np.uint64(32)
        write(w, total.astype(np.uint32))
        for least, put in enumerate(written, 1):
            put(w, high >= least)

    return add


@opcode("VIADD")
def _add(instruction: Instruction) -> Step:
    write, a, b = (
        destination(instruction.operands[0]),
        integer(instruction.operands[1]),
        integer(instruction.operands[2]),
    )
    return lambda w: write(w, a(w) + b(w))


@opcode("IMAD", "UIMAD", modifiers=("MOV", "U32", "S32", "IADD", "SHL", "WIDE", "HI", "X"))
def _multiply_add(instruction: Instruction) -> Step:
    written, rest = _predicates_then_sources(instruction)
    modifiers, to = instruction.modifiers, instruction.operands[0]
    a, b = integer(rest[0]), integer(rest[1])
    carry = predicate(rest[3]) if "X" in modifiers else None
    if "WIDE" in modifiers or "HI" in modifiers:
        return _wide_multiply_add(instruction, written, rest, carry)
    write, c = destination(to), integer(rest[2])
    if "MOV" in modifiers or rest[0] in ("RZ", "URZ"):
        if carry is None:
            return lambda w: write(w, c(w))
        return lambda w: write(w, c(w) + carry(w).astype(np.uint32))
    if carry is None:
        return lambda w: write(w, a(w) * b(w) + c(w))
    return lambda w: write(w, a(w) * b(w) + c(w) + carry(w).astype(np.uint32))


def _wide_multiply_add(instruction: Instruction, written: list[Write], rest: list[str], carry: Read | None) -> Step:
    a, b, c = integer(rest[0]), integer(rest[1]), wide(rest[2])
    unsigned = "U32" in instruction.modifiers
    high = "HI" in instruction.modifiers
    write = (destination if high else wide_destination)(instruction.operands[0])

    def step(w: Warp) -> None:
        if unsigned:
            product = a(w).astype(np.uint64) * b(w).astype(np.uint64)
        else:
            product = (a(w).view(np.int32).astype(np.int64) * b(w).view(np.int32).astype(np.int64)).view(np.uint64)
        total = product + c(w)
        over = total < product
        if carry is not None:
            more = total + carry(w).astype(np.uint64)
            over = over | (more < total)
            total = more
        write(w, (total >> np.uint64(32)).astype(np.uint32) if high else total)
        for put in written:
            put(w, over)

    return step


@opcode("LEA", "ULEA", modifiers=("HI", "X", "SX32"))
def _scaled_add(instruction: Instruction) -> Step:
    written, rest = _predicates_then_sources(instruction)
    modifiers = instruction.modifiers
    write, b = destination(instruction.operands[0]), _wide_arithmetic(rest[1])
    thirty_two, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    base = integer(rest[0])
    above: Read | None = None
    if "SX32" in modifiers:
        above = lambda w: (base(w).view(np.int32) >> 31).view(np.uint32)  # noqa: E731
        rest = rest[2:]
    elif "HI" in modifiers:
        above, rest = integer(rest[2]), rest[3:]
    else:
        rest = rest[2:]
    shift = np.uint64(int(rest[0], 16))
    carry = predicate(rest[1]) if "X" in modifiers else None

    def step(w: Warp) -> None:
        value = base(w).astype(np.uint64)
        if above is None:
            value = (value << shift) & mask
        else:
            value = ((value | (above(w).astype(np.uint64) << thirty_two)) << shift) >> thirty_two
        total = value + b(w)
        if carry is not None:
            total = total + carry(w)
        write(w, total.astype(np.uint32))
        for put in written:
            put(w, (total >> thirty_two) > 0)

    return step


@opcode("IABS")
def _absolute(instruction: Instruction) -> Step:
    write, a = destination(instruction.operands[0]), integer(instruction.operands[1])
    return lambda w: write(w, np.abs(a(w).view(np.int32)))


@opcode("VIMNMX", "VIADDMNMX", "IMNMX", "UIMNMX", modifiers=("U32", "S32"))
def _least_or_largest(instruction: Instruction) -> Step:
    *sources, least_text = instruction.operands[1:]
    values, least = [integer(text) for text in sources], predicate(least_text)
    write = destination(instruction.operands[0])
    kind = np.uint32 if "U32" in instruction.modifiers else np.int32
    added = instruction.opcode == "VIADDMNMX"

    def step(w: Warp) -> None:
        a = (values[0](w) + values[1](w) if added else values[0](w)).view(kind)
        b = values[-1](w).view(kind)
        write(w, np.where(least(w), np.minimum(a, b), np.maximum(a, b)))

    return step

"""Integer, logic and move instructions, and those of the uniform datapath, which do the same to one lane."""

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
from bench.sass.state import LANES, Array, Read, Refused, Step, Warp, Write, bits_of

_SHARED_WINDOW = 0x10000  # upper half of the generic addresses of shared memory: above all of a process
_COMPARISONS = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
}  # fmt: skip
_JOINS = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


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
            raise Refused(f"special register {name} of CS2R is unknown")
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
        raise Refused(f"special register {name} is unknown")
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
    write, a, b = destination(instruction.operands[0]), integer(instruction.operands[1]), integer(instruction.operands[2])
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


# ---- bits -------------------------------------------------------------------------------------------------------


@opcode("SHF", "USHF", modifiers=("L", "R", "U32", "S32", "U64", "S64", "HI", "W"))
def _funnel_shift(instruction: Instruction) -> Step:
    write = destination(instruction.operands[0])
    low, amount, high = (integer(text) for text in instruction.operands[1:4])
    modifiers = instruction.modifiers
    most = np.uint32(63 if {"U64", "S64"} & set(modifiers) else 32)
    wraps, takes_high, left = "W" in modifiers, "HI" in modifiers, "L" in modifiers
    signed = bool({"S32", "S64"} & set(modifiers))
    thirty_two = np.uint64(32)

    def step(w: Warp) -> None:
        by = amount(w) & (most if most == 63 else np.uint32(31)) if wraps else np.minimum(amount(w), most)
        value = low(w).astype(np.uint64) | (high(w).astype(np.uint64) << thirty_two)
        if left:
            moved = value << by.astype(np.uint64)
        elif signed:
            moved = (value.view(np.int64) >> by.astype(np.int64)).view(np.uint64)
        else:
            moved = value >> by.astype(np.uint64)
        write(w, (moved >> thirty_two if takes_high else moved).astype(np.uint32))

    return step


def _table_lookup(table: int, a: Array, b: Array, c: Array) -> Array:
    """The function of three bits whose values are the bits of ``table``."""
    simple = {0xC0: lambda: a & b, 0xFC: lambda: a | b, 0x3C: lambda: a ^ b, 0x33: lambda: ~b, 0x0F: lambda: ~a}
    simple[0xFE], simple[0x80], simple[0x30] = lambda: a | b | c, lambda: a & b & c, lambda: a & ~b
    if table in simple:
        return simple[table]()
    result = np.zeros_like(a & b & c)
    for row in range(8):
        if table >> row & 1:
            result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return result


@opcode("LOP3", "ULOP3", modifiers=("LUT", "PAND"))
def _logic(instruction: Instruction) -> Step:
    operands = list(instruction.operands)
    put = predicate_destination(operands.pop(0)) if is_predicate(operands[0]) else None
    write = destination(operands[0])
    a, b, c = (integer(text) for text in operands[1:4])
    table, joined = int(operands[4], 16), predicate(operands[5])
    join = np.logical_and if "PAND" in instruction.modifiers else np.logical_or

    def step(w: Warp) -> None:
        value = _table_lookup(table, a(w), b(w), c(w))
        write(w, value)
        if put is not None:
            put(w, join(value != 0, joined(w)))

    return step


@opcode("PLOP3", "UPLOP3", modifiers=("LUT",))
def _logic_of_predicates(instruction: Instruction) -> Step:
    operands = instruction.operands
    first, second = predicate_destination(operands[0]), predicate_destination(operands[1])
    a, b, c = (predicate(text) for text in operands[2:5])
    tables = int(operands[5], 16), int(operands[6], 16)

    def step(w: Warp) -> None:
        sources = a(w), b(w), c(w)
        one, other = (_table_lookup(table, *sources) for table in tables)
        first(w, one)
        second(w, other)

    return step


@opcode("PRMT", "UPRMT")
def _permute_bytes(instruction: Instruction) -> Step:
    write = destination(instruction.operands[0])
    low, select, high = (integer(text) for text in instruction.operands[1:4])

    def step(w: Warp) -> None:
        value = low(w).astype(np.uint64) | (high(w).astype(np.uint64) << np.uint64(32))
        chosen, result = select(w), np.zeros(1, np.uint32)
        for at in range(4):
            nibble = (chosen >> np.uint32(4 * at)) & np.uint32(15)
            byte = ((value >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | (np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * at))
        write(w, result)

    return step


def _bit_length(value: Array) -> Array:
    return np.frexp(value.astype(np.float64))[1].astype(np.uint32)  # exact: below 2^53


@opcode("POPC", "UPOPC")
def _count_bits(instruction: Instruction) -> Step:
    write, source = destination(instruction.operands[0]), integer(instruction.operands[1])

    def step(w: Warp) -> None:
        value = np.ascontiguousarray(source(w))
        write(w, np.unpackbits(value.view(np.uint8)).reshape(len(value), 32).sum(1).astype(np.uint32))

    return step


@opcode("FLO", "UFLO", modifiers=("U32", "SH"))
def _find_leading_one(instruction: Instruction) -> Step:
    write, source = destination(instruction.operands[0]), integer(instruction.operands[1])
    if "U32" not in instruction.modifiers:
        raise Refused(f"'{instruction}': signed FLO is unknown")
    from_above = "SH" in instruction.modifiers

    def step(w: Warp) -> None:
        length = _bit_length(source(w))
        at = np.uint32(32) - length if from_above else length - np.uint32(1)
        write(w, np.where(length == 0, np.uint32(0xFFFFFFFF), at).astype(np.uint32))

    return step


@opcode("BREV", "UBREV")
def _reverse_bits(instruction: Instruction) -> Step:
    write, source = destination(instruction.operands[0]), integer(instruction.operands[1])

    def step(w: Warp) -> None:
        value = np.ascontiguousarray(source(w))
        bits = np.unpackbits(value.view(np.uint8), bitorder="little").reshape(len(value), 32)
        write(w, np.packbits(bits[:, ::-1], axis=1, bitorder="little").reshape(-1).view(np.uint32))

    return step


# ---- comparing and choosing -------------------------------------------------------------------------------------


@opcode("ISETP", "UISETP", modifiers=(*_COMPARISONS, *_JOINS, "U32", "EX"))
def _compare(instruction: Instruction) -> Step:
    modifiers, operands = instruction.modifiers, instruction.operands
    compare = next(_COMPARISONS[name] for name in modifiers if name in _COMPARISONS)
    join = next(_JOINS[name] for name in modifiers if name in _JOINS)
    first, second = predicate_destination(operands[0]), predicate_destination(operands[1])
    a, b, joined = integer(operands[2]), integer(operands[3]), predicate(operands[4])
    kind = np.uint32 if "U32" in modifiers else np.int32
    below = predicate(operands[5]) if "EX" in modifiers else None
    no_second = operands[1] in ("PT", "UPT")

    def step(w: Warp) -> None:
        one, other = a(w).view(kind), b(w).view(kind)
        holds = compare(one, other)
        if below is not None:  # the upper halves decide unless they are equal
            equal = one == other
            holds = np.where(equal, below(w), holds) if compare is not np.not_equal else holds | below(w)
        also = joined(w)
        result = join(holds, also)
        if not no_second:
            second(w, join(~holds, also))
        first(w, result)

    return step


@opcode("SEL", "USEL")
def _select(instruction: Instruction) -> Step:
    write, a, b = destination(instruction.operands[0]), integer(instruction.operands[1]), integer(instruction.operands[2])
    which = predicate(instruction.operands[3])
    return lambda w: write(w, np.where(which(w), a(w), b(w)))


@opcode("P2R")
def _from_predicates(instruction: Instruction) -> Step:
    to, _, kept, mask_text = instruction.operands
    write, source, mask = destination(to), integer(kept), int(mask_text, 16)

    def step(w: Warp) -> None:
        value = source(w) & np.uint32(~mask & 0xFFFFFFFF)
        for which in range(7):
            if mask >> which & 1:
                value = value | (w.p[which].astype(np.uint32) << np.uint32(which))
        write(w, value)

    return step


@opcode("R2P")
def _to_predicates(instruction: Instruction) -> Step:
    _, source_text, mask_text = instruction.operands
    source, mask = integer(source_text), int(mask_text, 16)
    puts = [(which, predicate_destination(f"P{which}")) for which in range(7) if mask >> which & 1]

    def step(w: Warp) -> None:
        value = source(w)
        for which, put in puts:
            put(w, (value >> np.uint32(which) & np.uint32(1)).astype(bool))

    return step


@opcode("R2UR", modifiers=("OR",))
def _to_uniform(instruction: Instruction) -> Step:
    *_, to, source_text = [text for text in instruction.operands if not is_predicate(text)]
    write, source = destination(to), integer(source_text)
    if instruction.modifiers:
        return lambda w: write(w, np.bitwise_or.reduce(source(w)[w.active])[None])
    return lambda w: write(w, source(w)[int(np.argmax(w.active)) :][:1])


@opcode("VOTEU", modifiers=("ANY", "ALL", "EQ"))
@opcode("VOTE", modifiers=("ANY", "ALL", "EQ"))
def _vote(instruction: Instruction) -> Step:
    *targets, source_text = instruction.operands
    source = predicate(source_text)
    put = predicate_destination(targets[-1])
    write = destination(targets[0]) if len(targets) == 2 else None
    mode = instruction.modifiers[0]

    def step(w: Warp) -> None:
        held = source(w) & w.active
        if write is not None:
            write(w, np.array([bits_of(held)], np.uint32))
        alike = bool(held.any()) if mode == "ANY" else bool((held == w.active).all())
        put(w, np.array([alike or (mode == "EQ" and not held.any())]))

    return step

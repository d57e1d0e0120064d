"""Instructions on bits and predicates: shifts, tables, counts, comparisons, choices, votes."""

from __future__ import annotations

import numpy as np

from bench.sass.disassembly import Instruction
from bench.sass.opcodes import opcode
from bench.sass.operands import destination, integer, is_predicate, predicate, predicate_destination
from bench.sass.state import Array, SassError, Step, Warp, bits_of

_COMPARISONS = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
}  # fmt: skip
_JOINS = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


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
            byte = ((value >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(
                np.uint32
            )
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
        raise SassError(f"'{instruction}': signed FLO is unknown")
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
    write, a, b = (
        destination(instruction.operands[0]),
        integer(instruction.operands[1]),
        integer(instruction.operands[2]),
    )
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

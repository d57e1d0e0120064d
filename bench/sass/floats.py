"""Floating-point instructions, bit for bit as IEEE 754 has them.

The reciprocal and the reciprocal root of the hardware (MUFU) are approximations whose bits are not documented. They are
known to be right within one unit in the last place, and divisions and roots correct them: whatever the seed is, the
result is the rounded one. Here the seed is the rounded value, moved by ``Warp.seed_ulps`` units; tests move it both
ways. Every other MUFU function is refused.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math

import numpy as np

from bench.sass.disassembly import Instruction
from bench.sass.opcodes import opcode
from bench.sass.operands import (
    destination,
    double,
    integer,
    number,
    predicate,
    predicate_destination,
    single,
    wide,
    wide_destination,
)
from bench.sass.state import Array, Read, SassError, Step, Warp

_ROUNDINGS = ("RM", "RP", "RZ")
_ORDERED = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
}  # fmt: skip
_JOINS = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}
_INTEGERS = {"U32": "u4", "U64": "u8", "S64": "i8"}
_SMALLEST_NORMAL = np.float32(2.0**-126)

_fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
_fma.restype, _fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3


def _flushed(value: Array) -> Array:
    """Subnormals as zeros of their sign."""
    return np.where(np.abs(value) < _SMALLEST_NORMAL, np.copysign(np.float32(0), value), value).astype(np.float32)


def _sources(instruction: Instruction, first: int, count: int) -> list[Read]:
    sources = [single(text) for text in instruction.operands[first : first + count]]
    if "FTZ" not in instruction.modifiers:
        return sources
    return [lambda w, source=source: _flushed(source(w)) for source in sources]  # type: ignore[misc]


def _rounding(instruction: Instruction) -> str | None:
    return next((name for name in instruction.modifiers if name in _ROUNDINGS), None)


def _to_odd(total: Array, error: Array) -> Array:
    """total + error, of which total is the rounded sum, rounded to odd: rounding once more gives the right result."""
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & np.isfinite(error) & (bits & 1 == 0)
    if not inexact.any():
        return total
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + step, bits).view(np.float64)


def _sum(a: Array, b: Array) -> Array:
    """a + b of doubles, rounded to odd."""
    total = a + b
    part = total - a
    return _to_odd(total, (a - (total - part)) + (b - part))


def narrow(exact: Array, rounding: str | None) -> Array:
    """float32 of a double that was rounded to odd."""
    nearest = exact.astype(np.float32)
    if rounding is None:
        return nearest
    back = nearest.astype(np.float64)
    down, up = np.float32(-np.inf), np.float32(np.inf)
    if rounding == "RP":
        return np.where(back < exact, np.nextafter(nearest, up), nearest)
    if rounding == "RM":
        return np.where(back > exact, np.nextafter(nearest, down), nearest)
    return np.where(np.abs(back) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest)


def _finished(instruction: Instruction, value: Array) -> Array:
    return _flushed(value) if "FTZ" in instruction.modifiers else value


@opcode("FADD", modifiers=("FTZ", *_ROUNDINGS))
def _add(instruction: Instruction) -> Step:
    write, (a, b) = destination(instruction.operands[0]), _sources(instruction, 1, 2)
    rounding = _rounding(instruction)
    if rounding is None:
        return lambda w: write(w, _finished(instruction, a(w) + b(w)))
    return lambda w: write(w, narrow(_sum(a(w).astype(np.float64), b(w).astype(np.float64)), rounding))


@opcode("FMUL", modifiers=("FTZ", *_ROUNDINGS))
def _multiply(instruction: Instruction) -> Step:
    write, (a, b) = destination(instruction.operands[0]), _sources(instruction, 1, 2)
    rounding = _rounding(instruction)
    if rounding is None:
        return lambda w: write(w, _finished(instruction, a(w) * b(w)))
    return lambda w: write(w, narrow(a(w).astype(np.float64) * b(w).astype(np.float64), rounding))  # exact in double


@opcode("FFMA", modifiers=("FTZ", *_ROUNDINGS))
def _multiply_add(instruction: Instruction) -> Step:
    write, (a, b, c) = destination(instruction.operands[0]), _sources(instruction, 1, 3)
    rounding = _rounding(instruction)

    def step(w: Warp) -> None:
        product = a(w).astype(np.float64) * b(w).astype(np.float64)
        write(w, _finished(instruction, narrow(_sum(product, c(w).astype(np.float64)), rounding)))

    return step


@opcode("DADD", "DMUL", "DFMA")
def _of_doubles(instruction: Instruction) -> Step:
    write = wide_destination(instruction.operands[0])
    sources = [double(text) for text in instruction.operands[1:]]
    if instruction.opcode == "DADD":
        return lambda w: write(w, sources[0](w) + sources[-1](w))
    if instruction.opcode == "DMUL":
        return lambda w: write(w, sources[0](w) * sources[1](w))

    def fused(w: Warp) -> None:
        values = np.broadcast_arrays(*(source(w) for source in sources))
        write(w, np.array([_fma(*each) for each in zip(*(value.tolist() for value in values), strict=True)]))

    return fused


@opcode("FMNMX", modifiers=("FTZ", "NAN"))
def _least_or_largest(instruction: Instruction) -> Step:
    write, (a, b) = destination(instruction.operands[0]), _sources(instruction, 1, 2)
    least = predicate(instruction.operands[3])
    with_nan = "NAN" in instruction.modifiers

    def step(w: Warp) -> None:
        one, other = np.broadcast_arrays(a(w), b(w))
        # -0 counts as less than +0, which numpy leaves open: equal values differ in the sign at most.
        low, high = one.view(np.uint32) | other.view(np.uint32), one.view(np.uint32) & other.view(np.uint32)
        smaller = np.where(one == other, low.view(np.float32), (np.minimum if with_nan else np.fmin)(one, other))
        larger = np.where(one == other, high.view(np.float32), (np.maximum if with_nan else np.fmax)(one, other))
        value = np.where(least(w), smaller, larger)
        write(w, np.where(np.isnan(value), np.uint32(0x7FFFFFFF), value.view(np.uint32)).astype(np.uint32))

    return step


@opcode("FSEL", modifiers=("FTZ",))
def _select(instruction: Instruction) -> Step:
    write, (a, b) = destination(instruction.operands[0]), _sources(instruction, 1, 2)
    which = predicate(instruction.operands[3])
    return lambda w: write(w, np.where(which(w), a(w), b(w)))


def _comparison(instruction: Instruction, a: Read, b: Read) -> Read:
    """Whether a stands to b as the modifiers say; a trailing U also holds where one of them is NaN."""
    names = (*_ORDERED, *(f"{name}U" for name in _ORDERED), "NAN", "NUM")
    name = next(modifier for modifier in instruction.modifiers if modifier in names)
    if name in ("NAN", "NUM"):
        return lambda w: (np.isnan(a(w)) | np.isnan(b(w))) == (name == "NAN")
    compare, unordered = _ORDERED[name.removesuffix("U")], name.endswith("U")

    def holds(w: Warp) -> Array:
        one, other = a(w), b(w)
        missing = np.isnan(one) | np.isnan(other)
        return compare(one, other) | missing if unordered else compare(one, other) & ~missing

    return holds


_COMPARING = (*_ORDERED, *(f"{name}U" for name in _ORDERED), "NAN", "NUM", *_JOINS, "FTZ")


@opcode("FSETP", "DSETP", modifiers=_COMPARING)
def _compare(instruction: Instruction) -> Step:
    operands = instruction.operands
    first, second = predicate_destination(operands[0]), predicate_destination(operands[1])
    kind = _sources(instruction, 2, 2) if instruction.opcode == "FSETP" else [double(text) for text in operands[2:4]]
    holds, joined = _comparison(instruction, *kind), predicate(operands[4])
    join = next(_JOINS[name] for name in instruction.modifiers if name in _JOINS)

    def step(w: Warp) -> None:
        result, also = holds(w), joined(w)
        one, other = join(result, also), join(~result, also)
        first(w, one)
        second(w, other)

    return step


@opcode("FSET", modifiers=("BF", *_COMPARING))
def _compare_to_number(instruction: Instruction) -> Step:
    write, joined = destination(instruction.operands[0]), predicate(instruction.operands[3])
    holds = _comparison(instruction, *_sources(instruction, 1, 2))
    join = next(_JOINS[name] for name in instruction.modifiers if name in _JOINS)
    true = np.float32(1).view(np.uint32) if "BF" in instruction.modifiers else np.uint32(0xFFFFFFFF)
    return lambda w: write(w, np.where(join(holds(w), joined(w)), true, np.uint32(0)))


@opcode("FCHK", modifiers=("DIVIDE",))
def _check_division(instruction: Instruction) -> Step:
    """Whether a / b needs the slow path: exponents so far out that a step of the division could leave the range."""
    put, (a, b) = predicate_destination(instruction.operands[0]), _sources(instruction, 1, 2)

    def step(w: Warp) -> None:
        of_a, of_b = ((value.view(np.uint32) >> np.uint32(23) & np.uint32(255)).astype(int) for value in (a(w), b(w)))
        far = (of_b < 2) | (of_b > 252) | (of_a == 255) | (of_a < 24)
        put(w, far | (of_a - of_b > 125) | (of_a - of_b < -125))

    return step


@opcode("MUFU", modifiers=("RCP", "RSQ"))
def _seed(instruction: Instruction) -> Step:
    write, source = destination(instruction.operands[0]), single(instruction.operands[1])
    root = "RSQ" in instruction.modifiers

    def step(w: Warp) -> None:
        value = source(w).astype(np.float64)
        seed = (1 / (np.sqrt(value) if root else value)).astype(np.float32)
        usual = np.isfinite(seed) & (seed != 0)
        moved = seed.view(np.int32) + np.int32(w.seed_ulps)
        write(w, np.where(usual, moved.view(np.float32), seed))

    return step


# ---- between kinds of number ------------------------------------------------------------------------------------


@opcode("I2F", "I2FP", modifiers=("F32", "F64", "U16", "U32", "S32", "U64", "S64", *_ROUNDINGS))
def _from_integer(instruction: Instruction) -> Step:
    modifiers = instruction.modifiers
    if "S64" in modifiers or {"U64", "F64"} <= set(modifiers):
        raise SassError(f"'{instruction}': from 64 bits is unknown")
    source, rounding = integer(instruction.operands[1]), _rounding(instruction)
    if "U64" in modifiers:
        return _from_64_bits(instruction, rounding)
    if "U16" in modifiers:
        whole = source
        source = lambda w: whole(w) & np.uint32(0xFFFF)  # noqa: E731
    kind = np.uint32 if "U32" in modifiers else np.int32
    if "F64" in modifiers:
        write = wide_destination(instruction.operands[0])
        return lambda w: write(w, source(w).view(kind).astype(np.float64))
    write = destination(instruction.operands[0])
    return lambda w: write(w, narrow(source(w).view(kind).astype(np.float64), rounding))


def _from_64_bits(instruction: Instruction, rounding: str | None) -> Step:
    source, write = wide(instruction.operands[1]), destination(instruction.operands[0])
    last = np.uint64(0x7FF)  # what a double does not hold of 64 bits

    def step(w: Warp) -> None:
        value = source(w)
        # To odd: the bit above says that there was something below, so that one rounding is left.
        odd = (value & ~last) | ((value & last) != 0).astype(np.uint64) << np.uint64(11)
        write(w, narrow(np.where(value >> np.uint64(53) != 0, odd, value).astype(np.float64), rounding))

    return step


@opcode("F2I", modifiers=("FTZ", "U32", "S32", "U64", "S64", "F64", "TRUNC", "FLOOR", "CEIL", "NTZ"))
def _to_integer(instruction: Instruction) -> Step:
    modifiers = set(instruction.modifiers)
    text = instruction.operands[1]
    source = double(text) if "F64" in modifiers else _sources(instruction, 1, 1)[0]
    round_to = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}
    rounded = next((round_to[name] for name in round_to if name in modifiers), np.rint)
    kind = np.dtype(next((code for name, code in _INTEGERS.items() if name in modifiers), "i4"))
    write = wide_destination(instruction.operands[0]) if kind.itemsize == 8 else destination(instruction.operands[0])
    bits = 8 * kind.itemsize
    least, most = (0, (1 << bits) - 1) if kind.kind == "u" else (-(1 << bits - 1), (1 << bits - 1) - 1)
    of_nan = 0 if kind.itemsize == 4 else (1 << 63 if kind.kind == "u" else least)

    def whole(value: float) -> int:
        if math.isnan(value):
            return of_nan
        return least if value <= least else most if value >= most else int(value)

    def step(w: Warp) -> None:
        write(w, np.array([whole(value) for value in rounded(source(w).astype(np.float64)).tolist()], kind))

    return step


@opcode("F2F", modifiers=("F32", "F64", "F16", "FTZ"))
def _between_floats(instruction: Instruction) -> Step:
    to, source_text = instruction.operands
    kinds = [name for name in instruction.modifiers if name.startswith("F") and name != "FTZ"]
    if kinds == ["F64", "F32"]:
        write, source = wide_destination(to), _sources(instruction, 1, 1)[0]
        return lambda w: write(w, source(w).astype(np.float64))
    if kinds == ["F32", "F64"]:
        write, from_double = destination(to), double(source_text)
        return lambda w: write(w, from_double(w).astype(np.float32))
    if kinds == ["F16", "F32"]:
        write, source = destination(to), _sources(instruction, 1, 1)[0]
        return lambda w: write(w, source(w).astype(np.float16).view(np.uint16).astype(np.uint32))
    raise SassError(f"'{instruction}': this conversion is unknown")


def bfloat16_bits(value: Array) -> Array:
    """Rounded to the nearest, ties to even; a NaN becomes 0x7fff."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint32)


def _float16_bits(value: Array) -> Array:
    bits = value.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.where(np.isnan(value), np.uint32(0x7FFF), bits).astype(np.uint32)


@opcode("F2FP", modifiers=("BF16", "F16", "F32", "PACK_AB"))
def _pack(instruction: Instruction) -> Step:
    write, (high, low) = destination(instruction.operands[0]), _sources(instruction, 1, 2)
    bits = bfloat16_bits if "BF16" in instruction.modifiers else _float16_bits
    return lambda w: write(w, bits(high(w)) << np.uint32(16) | bits(low(w)))


@opcode("HADD2", modifiers=("F32",))
def _widen_half(instruction: Instruction) -> Step:
    to, zero, source_text = instruction.operands
    if zero != "-RZ" or "F32" not in instruction.modifiers:
        raise SassError(f"'{instruction}': only the conversion of a half to float32 is known")
    write, source = destination(to), integer(source_text)
    return lambda w: write(w, (source(w) & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float32))


@opcode("HFMA2", modifiers=("MMA",))
def _two_halves(instruction: Instruction) -> Step:
    to, a, b, *halves = instruction.operands
    if (a, b) != ("-RZ", "RZ") or len(halves) != 2:
        raise SassError(f"'{instruction}': only the constant of two halves is known")
    high, low = (int(np.float16(number(text)).view(np.uint16)) for text in halves)
    write, value = destination(to), np.array([high << 16 | low], np.uint32)
    return lambda w: write(w, value)

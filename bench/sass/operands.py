"""Turn operands as the disassembly writes them into functions that read and write a warp's registers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.sass.state import LANES, Array, Read, SassError, Warp, Write

_REGISTER = re.compile(r"^(U?)R(\d+|Z)(?:\.(64|H0_H0|H1_H1|H0|H1|B[0-3]))?$")
_PREDICATE = re.compile(r"^(!?)(U?)P(\d|T)$")
_CONSTANT = re.compile(r"^c\[0x(\w+)\]\[(?:(U?R\d+|RZ)\+?)?(-?0x\w+)?\]$")
_NUMBER = re.compile(r"^-?0x[0-9a-f]+$")
_PART = re.compile(r"[+-]?[^+-]+")
_DESCRIBED = re.compile(r"^desc\[UR\d+\]\[(.*)\]$")

_SHIFT_OF_PART = {"H0_H0": 0, "H1_H1": 16, "H0": 0, "H1": 16, "B0": 0, "B1": 8, "B2": 16, "B3": 24}
ZERO = np.zeros(1, np.uint32)
ZERO64 = np.zeros(1, np.uint64)


def is_predicate(text: str) -> bool:
    return _PREDICATE.match(text) is not None


def register_number(text: str) -> int | None:
    """Of a register of 32 lanes; None for RZ."""
    found = _REGISTER.match(text)
    if found is None or found[1]:
        raise SassError(f"'{text}' is no register of 32 lanes")
    return None if found[2] == "Z" else int(found[2])


# ---- reading ----------------------------------------------------------------------------------------------------


def integer(text: str) -> Read:
    """uint32 of a register, constant or number, with ``-``, ``~`` or ``|...|`` before it."""
    if text.startswith("~"):
        inner = integer(text[1:])
        return lambda w: ~inner(w)
    if text.startswith("-") and not _NUMBER.match(text):
        inner = integer(text[1:])
        return lambda w: np.negative(inner(w))
    if text.startswith("|"):
        inner = integer(text[1:-1])
        return lambda w: np.abs(inner(w).view(np.int32)).view(np.uint32)
    if _NUMBER.match(text):
        value = np.array([int(text, 16) & 0xFFFFFFFF], np.uint32)
        return lambda w: value
    if text in ("RZ", "URZ", "SRZ"):
        return lambda w: ZERO
    if register := _REGISTER.match(text):
        return _register(register)
    if text.startswith("c["):
        return constant(text, 4)
    raise SassError(f"operand '{text}' is unknown")


def _register(register: re.Match[str]) -> Read:
    number, part = int(register[2]), register[3]
    if part is None or part == "64":
        if register[1]:
            return lambda w: w.u[number]
        return lambda w: w.r[number]
    shift, mask = np.uint32(_SHIFT_OF_PART[part]), np.uint32(0xFF if part.startswith("B") else 0xFFFF)
    if register[1]:
        return lambda w: (w.u[number] >> shift) & mask
    return lambda w: (w.r[number] >> shift) & mask


def wide(text: str) -> Read:
    """uint64 of a register pair, constant or number."""
    if text.startswith("-") and not _NUMBER.match(text):
        inner = wide(text[1:])
        return lambda w: np.negative(inner(w))
    if _NUMBER.match(text):
        value = np.array([int(text, 16) & 0xFFFFFFFFFFFFFFFF], np.uint64)
        return lambda w: value
    if text.startswith("c["):
        return constant(text, 8)
    register = _REGISTER.match(text)
    if register is None:
        raise SassError(f"operand '{text}' is unknown")
    if register[2] == "Z":
        return lambda w: ZERO64
    low, thirty_two = int(register[2]), np.uint64(32)
    if register[1]:
        return lambda w: w.u[low].astype(np.uint64) | (w.u[low + 1].astype(np.uint64) << thirty_two)
    return lambda w: w.r[low].astype(np.uint64) | (w.r[low + 1].astype(np.uint64) << thirty_two)


def constant(text: str, size: int) -> Read:
    """``size`` bytes (4 or 8; 1 and 2 are extended by zeros) of a constant bank: the launch, or the kernel's tables."""
    found = _CONSTANT.match(text)
    if found is None or found[1] not in ("0", "2"):
        raise SassError(f"constant '{text}': only bank 0, of launch and parameters, and 2, of jumps, are known")
    bank = int(found[1])
    offset = int(found[3] or "0", 16)
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size]
    wanted = np.uint64 if size == 8 else np.uint32
    if found[2] is None or found[2] == "RZ":
        return lambda w: w.constants[bank][offset : offset + size].view(kind).astype(wanted)
    register = integer(found[2])

    def read(w: Warp) -> Array:
        at = register(w).view(np.int32).astype(np.int64) + offset
        columns = at[:, None] + np.arange(size)
        constants = w.constants[bank]
        held = np.where((columns >= 0) & (columns < len(constants)), columns, 0)
        return constants[held].view(kind)[:, 0].astype(wanted)

    return read


def single(text: str) -> Read:
    """float32, with ``-`` and ``|...|``; -0 and NaN keep their bits."""
    return _floating(text, np.float32, integer)


def double(text: str) -> Read:
    """float64 of a register pair, with ``-`` and ``|...|``."""
    return _floating(text, np.float64, wide)


def _floating(text: str, kind: type[np.floating[Any]], bits_of: Callable[[str], Read]) -> Read:
    if text.startswith("-") and (text[1:2] in "|cRU"):
        inner = _floating(text[1:], kind, bits_of)
        return lambda w: np.negative(inner(w))
    if text.startswith("|"):
        inner = _floating(text[1:-1], kind, bits_of)
        return lambda w: np.abs(inner(w))
    if text[0] in "RUc":
        bits = bits_of(text)
        return lambda w: bits(w).view(kind)
    value = np.array([number(text)], kind)
    return lambda w: value


def number(text: str) -> float:
    """A floating number as the disassembly writes it."""
    plain = text.lstrip("+")
    if "QNAN" in plain:
        return math.nan
    if plain in ("INF", "-INF"):
        return float(plain)
    try:
        return float(plain)
    except ValueError:
        raise SassError(f"operand '{text}' is unknown") from None


def predicate(text: str) -> Read:
    found = _PREDICATE.match(text)
    if found is None:
        raise SassError(f"'{text}' is no predicate")
    which = 7 if found[3] == "T" else int(found[3])
    if found[1]:
        return (lambda w: ~w.up[which]) if found[2] else (lambda w: ~w.p[which])
    return (lambda w: w.up[which]) if found[2] else (lambda w: w.p[which])


# ---- writing ----------------------------------------------------------------------------------------------------


def _nowhere(w: Warp, value: Array) -> None:
    return None


def destination(text: str) -> Write:
    """Writes 32 bits of any type for the active lanes."""
    register = _REGISTER.match(text)
    if register is None:
        raise SassError(f"'{text}' cannot be written to")
    if register[2] == "Z":
        return _nowhere
    which = int(register[2])
    if register[1]:

        def write_uniform(w: Warp, value: Array) -> None:
            w.u[which][:] = value.view(np.uint32)

        return write_uniform

    def write(w: Warp, value: Array) -> None:
        np.copyto(w.r[which], value.view(np.uint32), where=w.active)

    return write


def wide_destination(text: str) -> Write:
    """Writes 64 bits of any type into a register pair."""
    register = _REGISTER.match(text)
    if register is None:
        raise SassError(f"'{text}' cannot be written to")
    if register[2] == "Z":
        return _nowhere
    uniform, which = register[1], int(register[2])
    low, high = destination(f"{uniform}R{which}"), destination(f"{uniform}R{which + 1}")

    def write(w: Warp, value: Array) -> None:
        halves = np.ascontiguousarray(value).view(np.uint32)
        low(w, np.ascontiguousarray(halves[0::2]))
        high(w, np.ascontiguousarray(halves[1::2]))

    return write


def predicate_destination(text: str) -> Write:
    found = _PREDICATE.match(text)
    if found is None or found[1]:
        raise SassError(f"'{text}' cannot be written to")
    if found[3] == "T":
        return _nowhere
    which = int(found[3])
    if found[2]:

        def write_uniform(w: Warp, value: Array) -> None:
            w.up[which][:] = value

        return write_uniform

    def write(w: Warp, value: Array) -> None:
        np.copyto(w.p[which], value, where=w.active)

    return write


# ---- addresses --------------------------------------------------------------------------------------------------


def global_address(text: str) -> Read:
    """uint64 [32] of ``desc[UR][R.64+UR+0x10]`` or ``[R.64+0x10]``."""
    described = _DESCRIBED.match(text)
    inside = described[1] if described else text[1:-1]
    terms, offset = [], 0
    for part in _PART.findall(inside):
        plain = part.lstrip("+")
        if _NUMBER.match(plain):
            offset += int(plain, 16)
        elif plain.endswith(".64") or plain.startswith("UR"):
            terms.append(wide(plain.removesuffix(".64")))
        else:
            narrow = integer(plain.removesuffix(".U32"))
            terms.append(lambda w, narrow=narrow: narrow(w).astype(np.uint64))  # type: ignore[misc]
    fixed = np.full(LANES, offset & 0xFFFFFFFFFFFFFFFF, np.uint64)

    def read(w: Warp) -> Array:
        total = fixed
        for term in terms:
            total = total + term(w)
        return total

    return read


def shared_address(text: str) -> Read:
    """int64 [32]: offsets in the block's shared memory, of ``[R+UR+0x10]`` or ``[R.X4+0x10]``."""
    terms: list[tuple[Read, int]] = []
    offset = 0
    for part in _PART.findall(text[1:-1]):
        plain = part.lstrip("+")
        if _NUMBER.match(plain):
            offset += int(plain, 16)
            continue
        register, _, factor = plain.partition(".X")
        terms.append((integer(register), int(factor or "1")))
    fixed = np.full(LANES, offset, np.int64)

    def read(w: Warp) -> Array:
        total = fixed
        for term, factor in terms:
            total = total + term(w).view(np.int32).astype(np.int64) * factor
        return total & 0xFFFFFF

    return read

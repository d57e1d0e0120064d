"""Loads, stores and atomics, of global and shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from bench.sass.disassembly import Instruction
from bench.sass.opcodes import opcode
from bench.sass.operands import (
    global_address,
    integer,
    is_predicate,
    predicate,
    register_number,
    shared_address,
    wide,
)
from bench.sass.state import LANES, Access, Array, Read, SassError, Step, Warp

Cells: TypeAlias = list[tuple[Array, Array, Array]]
Locate: TypeAlias = Callable[[Warp, Array, int], Cells]

_SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "32": 4, "64": 8, "128": 16}
_CACHING = (
    "E", "CONSTANT", "STRONG", "WEAK", "GPU", "SYS", "CTA", "SM", "EF", "EL", "EN", "NA", "LU", "BYPASS", "ACCESS",
    "LTC64B", "LTC128B", "LTC256B", "ZFILL", "MMIO",
)  # fmt: skip
_SHARED_WINDOW = 0x10000


def size_of(instruction: Instruction) -> int:
    """Bytes that a lane moves."""
    return next((_SIZES[name] for name in instruction.modifiers if name in _SIZES), 4)


def _in_global(w: Warp, addresses: Array, size: int) -> Cells:
    return list(w.memory.cells(addresses.astype(np.uint64), size))


def _in_shared(w: Warp, addresses: Array, size: int) -> Cells:
    return list(w.shared.cells(addresses.astype(np.int64), size))


def _in_either(w: Warp, addresses: Array, size: int) -> Cells:
    """Generic addresses: the shared memory of the block has a window of its own."""
    windows = set((addresses >> np.uint64(32)).tolist())
    if windows == {_SHARED_WINDOW}:
        return _in_shared(w, addresses & np.uint64(0xFFFFFF), size)
    if _SHARED_WINDOW in windows:
        raise SassError("one access to both global and shared memory")
    return _in_global(w, addresses, size)


def _space(opcode_name: str, text: str) -> tuple[Read, Locate]:
    if opcode_name in ("LDS", "STS", "ATOMS"):
        return shared_address(text), _in_shared
    return global_address(text), _in_either if opcode_name in ("LD", "ST", "ATOM") else _in_global


@opcode("LDG", "LDS", "LD", modifiers=(*_SIZES, *_CACHING))
def _load(instruction: Instruction) -> Step:
    *targets, address_text = [text for text in instruction.operands if not is_predicate(text)]
    address, locate = _space(instruction.opcode, address_text)
    size, first = size_of(instruction), register_number(targets[0])
    signed = {"S8": np.int8, "S16": np.int16}.get(next((name for name in instruction.modifiers if name in _SIZES), ""))
    counted = instruction.opcode != "LDS"

    def step(w: Warp) -> None:
        lanes = np.flatnonzero(w.active)
        for cells, index, here in locate(w, address(w)[w.active], size):
            for word in range(max(1, size // 4)):
                if first is not None:
                    value = cells[index + word]
                    w.r[first + word][lanes[here]] = value if signed is None else value.view(signed).astype(np.int32)
        if counted:
            w.loads.append(Access(len(w.trace) - 1, size * len(lanes), size))

    return step


@opcode("STG", "STS", "ST", modifiers=(*_SIZES, *_CACHING))
def _store(instruction: Instruction) -> Step:
    address_text, source_text = instruction.operands
    address, locate = _space(instruction.opcode, address_text)
    size, first = size_of(instruction), None if source_text == "RZ" else register_number(source_text)

    def step(w: Warp) -> None:
        lanes = np.flatnonzero(w.active)
        for cells, index, here in locate(w, address(w)[w.active], size):
            for word in range(max(1, size // 4)):
                cells[index + word] = 0 if first is None else w.r[first + word][lanes[here]]

    return step


@opcode("LDGSTS", modifiers=(*_SIZES, *_CACHING))
def _copy_to_shared(instruction: Instruction) -> Step:
    """cp.async: done when it is issued. Lanes for which its predicate operand does not hold store zeros."""
    operands = list(instruction.operands)
    reads = predicate(operands.pop() if is_predicate(operands[-1]) else "PT")
    to, source = shared_address(operands[0]), global_address(operands[1])
    size = size_of(instruction)

    def step(w: Warp) -> None:
        lanes, reading = np.flatnonzero(w.active), w.active & reads(w)
        values = np.zeros((max(1, size // 4), LANES), np.uint32)
        for cells, index, here in _in_global(w, source(w)[reading], size):
            for word in range(len(values)):
                values[word, np.flatnonzero(reading)[here]] = cells[index + word]
        for cells, index, here in _in_shared(w, to(w)[w.active], size):
            for word in range(len(values)):
                cells[index + word] = values[word, lanes[here]]
        w.loads.append(Access(len(w.trace) - 1, size * int(reading.sum()), size))

    return step


# ---- atomics ----------------------------------------------------------------------------------------------------

_ATOMICS: dict[str, Callable[[int, int], int]] = {
    "ADD": lambda old, value: old + value,
    "MIN": min,
    "MAX": max,
    "AND": lambda old, value: old & value,
    "OR": lambda old, value: old | value,
    "XOR": lambda old, value: old ^ value,
    "EXCH": lambda old, value: value,
}


@opcode(
    "ATOMS", "ATOMG", "ATOM", "RED", "REDG",
    modifiers=(*_ATOMICS, "POPC", "INC", "CAS", "CAST", "SPIN", "S32", "U32", "S64", "U64", *_SIZES, *_CACHING),
)  # fmt: skip
def _atomic(instruction: Instruction) -> Step:
    """Lanes one after the other, first to last: one of the orders that hardware may take."""
    modifiers = set(instruction.modifiers)
    operands = list(instruction.operands)
    returned = None
    if instruction.opcode not in ("RED", "REDG"):
        if is_predicate(operands[0]):
            operands.pop(0)
        text = operands.pop(0)
        returned = None if text == "RZ" else register_number(text)
    address, locate = _space(instruction.opcode, operands[0])
    size = 8 if modifiers & {"64", "S64", "U64"} else 4
    if {"S32", "S64"} & modifiers and {"MIN", "MAX"} & modifiers:
        raise SassError(f"'{instruction}': signed minima and maxima are unknown")
    read = wide if size == 8 else integer
    compares = bool({"CAS", "CAST"} & modifiers)
    counts = {"POPC", "INC"} <= modifiers
    if "INC" in modifiers and not counts:
        raise SassError(f"'{instruction}': a counter that wraps is unknown")
    sources = [read(text) for text in operands[1:] if not is_predicate(text)]
    combine = _ATOMICS["ADD"] if counts else next((_ATOMICS[name] for name in _ATOMICS if name in modifiers), None)
    if combine is None and not compares:
        raise SassError(f"'{instruction}': this atomic is unknown")
    whole = (1 << (8 * size)) - 1

    def step(w: Warp) -> None:
        lanes = np.flatnonzero(w.active)
        values = [np.broadcast_to(source(w), LANES)[w.active].tolist() for source in sources]
        for cells, index, here in locate(w, address(w)[w.active], size):
            for which, at in zip(np.flatnonzero(here).tolist(), index.tolist(), strict=True):
                words = cells[at : at + size // 4]
                old = int.from_bytes(words.tobytes(), "little")
                if compares:
                    new = values[1][which] if old == values[0][which] else old
                else:
                    assert combine is not None
                    new = combine(old, 1 if counts else values[0][which]) & whole
                words[:] = np.frombuffer(new.to_bytes(size, "little"), np.uint32)
                if returned is not None:
                    w.r[returned][lanes[which]] = old & 0xFFFFFFFF
                    if size == 8:
                        w.r[returned + 1][lanes[which]] = old >> 32

    return step

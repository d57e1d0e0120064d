"""Instructions by which lanes of a warp see one another's values."""

from __future__ import annotations

import numpy as np

from bench.sass.disassembly import Instruction
from bench.sass.opcodes import opcode
from bench.sass.operands import destination, integer, predicate_destination, wide
from bench.sass.state import LANES, Array, Step, Warp, bits_of

_LANE = np.arange(LANES)


@opcode("SHFL", modifiers=("IDX", "UP", "DOWN", "BFLY"))
def _shuffle(instruction: Instruction) -> Step:
    inside_text, to, *sources = instruction.operands
    put, write = predicate_destination(inside_text), destination(to)
    value, lane, bounds = (integer(text) for text in sources)
    mode = instruction.modifiers[0]

    def step(w: Warp) -> None:
        by, clamp = lane(w).astype(np.int64) & 31, bounds(w).astype(np.int64)
        last, fixed = clamp & 31, clamp >> 8 & 31
        highest = (_LANE & fixed) | (last & ~fixed)
        if mode == "IDX":
            other = (_LANE & fixed) | (by & ~fixed)
        else:
            other = _LANE ^ by if mode == "BFLY" else _LANE - by if mode == "UP" else _LANE + by
        inside = other >= highest if mode == "UP" else other <= highest
        from_lane = np.where(inside, other, _LANE)
        held = np.broadcast_to(value(w), LANES)
        write(w, held[from_lane])
        put(w, inside)

    return step


@opcode("REDUX", modifiers=("MIN", "MAX", "SUM", "OR", "AND", "XOR", "S32", "U32"))
def _reduce(instruction: Instruction) -> Step:
    write, source = destination(instruction.operands[0]), integer(instruction.operands[1])
    modifiers = set(instruction.modifiers)
    kind = np.int32 if "S32" in modifiers else np.uint32
    reductions = {
        "MIN": np.minimum, "MAX": np.maximum, "OR": np.bitwise_or, "AND": np.bitwise_and, "XOR": np.bitwise_xor,
    }  # fmt: skip
    reduction = next((reductions[name] for name in reductions if name in modifiers), None)
    # Without a name it is AND for bits (REDUX UR, R) and SUM where the name says so.
    if reduction is None and "SUM" not in modifiers:
        reduction = np.bitwise_and

    def step(w: Warp) -> None:
        values = np.broadcast_to(source(w), LANES)[w.active].view(kind)
        result = values.sum(dtype=kind) if reduction is None else reduction.reduce(values)
        write(w, np.array([result], kind))

    return step


@opcode("MATCH", modifiers=("ANY", "ALL", "U64"))
def _match(instruction: Instruction) -> Step:
    *targets, source_text = instruction.operands
    value = wide(source_text) if "U64" in instruction.modifiers else integer(source_text)
    everywhere = "ALL" in instruction.modifiers
    put = predicate_destination(targets[0]) if len(targets) == 2 else None
    write = destination(targets[-1])

    def step(w: Warp) -> None:
        held = np.broadcast_to(value(w), LANES)
        same = (held[:, None] == held[None, :]) & w.active
        masks: Array = (same.astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum(1)
        if everywhere:
            alike = bool((masks[w.active] == bits_of(w.active)).all())
            masks = np.full(LANES, bits_of(w.active) if alike else 0)
            if put is not None:
                put(w, np.full(LANES, alike))
        write(w, masks.astype(np.uint32))

    return step

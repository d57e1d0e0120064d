"""Parse what `cuobjdump -sass` prints: kernels, and their instructions as opcode, modifiers and operands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

INSTRUCTION_BYTES = 16

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_ENCODING = re.compile(r"/\* (0x[0-9a-f]{16}) \*/\s*$")
_TABLES = re.compile(r"^\.nv\.constant2\.(\S+)$")
_WORDS = re.compile(r"^(0x[0-9a-f]{8}\s*)+$")
_GUARD = re.compile(r"^@(!?)(U?P\w+)\s+(.*)$")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: byte offset from the start of its kernel.
        opcode: the first part of the mnemonic, such as ``IMAD``.
        modifiers: the other parts, such as ``("WIDE", "U32")``.
        operands: as written, without ``.reuse``.
        guard: the predicate that lanes must have, such as ``"P0"`` or ``"!UP1"``, or None.
        encoding: the upper 64 bits of its code, which tell when it may issue (`cost.Schedule`).
    """

    address: int
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None = None
    encoding: int = 0

    @property
    def index(self) -> int:
        return self.address // INSTRUCTION_BYTES

    @property
    def mnemonic(self) -> str:
        return ".".join((self.opcode, *self.modifiers))

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{self.guard} "
        return f"{guard}{self.mnemonic} {', '.join(self.operands)}".rstrip()


@dataclass
class Kernel:
    """The machine code of one kernel, in the order of addresses, and its tables of jumps (constant bank 2)."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    jumps: bytes = b""

    @cached_property
    def code_bytes(self) -> int:
        """Without the padding: a branch to itself and what follows it."""
        used = len(self.instructions)
        while used and self.instructions[used - 1].opcode == "NOP":
            used -= 1
        last = self.instructions[used - 1] if used else None
        if last is not None and last.opcode == "BRA" and last.operands[-1] == hex(last.address):
            used -= 1
        return used * INSTRUCTION_BYTES


def kernels(text: str) -> Iterator[Kernel]:
    """The kernels of one disassembly."""
    kernel: Kernel | None = None
    for line in text.splitlines():
        if function := _FUNCTION.match(line):
            if kernel is not None:
                yield kernel
            kernel = Kernel(function[1])
        elif kernel is not None and (found := _LINE.match(line)):
            instruction = parse(found[2], int(found[1], 16))
            if instruction.index != len(kernel.instructions):
                raise ValueError(f"{kernel.name}: the instruction at {found[1]} is not the next one; listing cut?")
            kernel.instructions.append(instruction)
        elif kernel is not None and kernel.instructions and (upper := _ENCODING.search(line)):
            kernel.instructions[-1] = replace(kernel.instructions[-1], encoding=int(upper[1], 16))
    if kernel is not None:
        yield kernel


def jump_tables(text: str) -> dict[str, bytes]:
    """The tables of every kernel that has some, out of what `cuobjdump -elf` prints."""
    found: dict[str, bytes] = {}
    name = None
    for line in text.splitlines():
        if section := _TABLES.match(line):
            name = section[1]
            found[name] = b""
        elif name is not None and _WORDS.match(line):
            found[name] += b"".join(int(word, 16).to_bytes(4, "little") for word in line.split())
        else:
            name = None
    return found


def parse(text: str, address: int = 0) -> Instruction:
    """One instruction without its closing semicolon."""
    guard = None
    if guarded := _GUARD.match(text):
        guard, text = guarded[1] + guarded[2], guarded[3]
    mnemonic, _, rest = text.partition(" ")
    opcode, *modifiers = mnemonic.split(".")
    return Instruction(address, opcode, tuple(modifiers), tuple(_operands(rest)), guard)


def _operands(text: str) -> Iterator[str]:
    """Split at commas outside brackets."""
    depth, begin = 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            yield text[begin:at].strip().replace(".reuse", "")
            begin = at + 1
    if text[begin:].strip():
        yield text[begin:].strip().replace(".reuse", "")

"""Memory of the machine: the process's own for global addresses, a byte array for the shared memory of a block."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.sass.state import Array, SassError

# What a block of sm_90 has before its own shared memory.
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class Region:
    begin: int
    bytes: Array

    @property
    def end(self) -> int:
        return self.begin + len(self.bytes)


class GlobalMemory:
    """Addresses of this process that can be read and written; another address is an error, not a crash."""

    def __init__(self, regions: list[Region] | None = None) -> None:
        self.regions = _writable_regions() if regions is None else regions

    def cells(self, addresses: Array, size: int) -> list[tuple[Array, Array, Array]]:
        """(array of the words, index of each lane's first word, lanes) by region; words have min(size, 4) bytes."""
        if (addresses % np.uint64(size)).any():
            raise SassError(
                f"an address that is no multiple of {size}: {int(addresses[addresses % np.uint64(size) != 0][0]):#x}"
            )
        word = min(size, 4)
        left = np.ones(len(addresses), bool)
        found = []
        while left.any():
            region = self._region(int(addresses[left][0]), size)
            here = left & (addresses >= np.uint64(region.begin)) & (addresses <= np.uint64(region.end - size))
            index = ((addresses[here] - np.uint64(region.begin)) // np.uint64(word)).astype(np.int64)
            found.append((region.bytes.view(f"u{word}"), index, here))
            left &= ~here
        return found

    def _region(self, address: int, size: int) -> Region:
        for region in self.regions:
            if region.begin <= address and address + size <= region.end:
                return region
        raise SassError(f"no memory at address {address:#x}")


def _writable_regions() -> list[Region]:
    regions: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines():
        span, mode, *rest = line.split()
        if not mode.startswith("rw") or rest[-1] in ("[vvar]", "[vsyscall]"):
            continue
        begin, end = (int(part, 16) for part in span.split("-"))
        if regions and regions[-1][1] == begin:
            regions[-1] = regions[-1][0], end
        else:
            regions.append((begin, end))
    made = []
    for begin, end in regions:
        memory = (ctypes.c_uint8 * (end - begin)).from_address(begin)
        made.append(Region(begin, np.frombuffer(memoryview(memory), np.uint8)))
    return made


class SharedMemory:
    """Shared memory of one block; the kernel's own begins behind what the hardware keeps. It starts as 0xFF."""

    def __init__(self, bytes_of_kernel: int) -> None:
        self.size = RESERVED_SHARED + bytes_of_kernel
        self.bytes = np.full(-(-self.size // 16) * 16, 0xFF, np.uint8)
        self.views = {size: self.bytes.view(f"u{size}") for size in (1, 2, 4)}

    def cells(self, offsets: Array, size: int) -> list[tuple[Array, Array, Array]]:
        """As of global memory."""
        if (offsets % size).any():
            raise SassError(f"an offset in shared memory that is no multiple of {size}")
        if len(offsets) and (offsets.min() < RESERVED_SHARED or offsets.max() + size > self.size):
            raise SassError(
                f"offset {int(offsets.max()):#x} lies outside the block's shared memory, which ends at {self.size:#x}"
            )
        word = min(size, 4)
        return [(self.views[word], offsets // word, np.ones(len(offsets), bool))]

"""Which part of the kernels is at fault where bits differ: the problem again, with one part after the other off.

Every part has a switch (csrc/cuda/tunables.cu) that hands its work to another one under the same contract. A value with
which the bits are right again names the part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moe_route import _C

# In the order in which they are tried: the part, its switch, and the value that turns it off.
SWITCHES = (
    ("the tiles, a thread a row", "gate.tiles_from", 1 << 62),
    ("kernels of their own for the common router", "gate.common", 0),
    ("the lowest levels of the gate (plain)", "gate.level", 1),
    ("the middle levels of the gate (scored)", "gate.level", 2),
    ("the level for soft steering (soft)", "gate.level", 3),
    ("statistics of a block in shared memory", "gate.block_row", 0),
    ("rows in registers", "gate.registers", 0),
    ("dispatch in one launch", "dispatch.one_launch", 0),
)


def culprits(
    agrees: Callable[[], bool],
    tune: Callable[[str, int], None] = _C.tune,
    usual: Mapping[str, int] | None = None,
) -> list[str]:
    """The parts without which a problem agrees with the CPU; empty where no switch mends it.

    Args:
        agrees: runs the problem anew and says whether its bits are those of the CPU.
        tune: sets a switch.
        usual: the values to go back to; default those in force. A switch that is not among them is left out.
    """
    if usual is None:
        usual = {name: int(entry["now"]) for name, entry in _C.tunables().items()}
    found = []
    for part, switch, off in SWITCHES:
        if switch not in usual:
            continue
        tune(switch, off)
        try:
            if agrees():
                found.append(f"{part} ({switch}={off} agrees)")
        finally:
            tune(switch, usual[switch])
    return found


def verdict(found: list[str]) -> str:
    """One line for the message of a check that failed."""
    if not found:
        return "no switch of MOE_ROUTE_TUNING mends it: try objects compiled with -Xptxas -O1"
    return "at fault: " + ", or ".join(found)

"""Count the gate's instructions a row on AVX2 under valgrind: `python tests/gate_cost.py build/cpp/gate_cost`.

Each count is printed beside its ceiling, and one above it is an error: times on shared machines guard nothing, and the
same build takes the same instructions every time. Ceilings are a tenth above what GCC 12 makes; another compiler may
need others. Lower one where the gate got better, and raise one only with a reason. valgrind knows no AVX-512, and hides
it from the program.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

CEILINGS = {
    "128 8 1 float32 counts": 2_950,
    "8 2 256 float32 counts": 100,
    "8 2 256 bfloat16 statistics": 250,
    "16 2 256 float32 counts": 160,
    "32 4 256 float32 counts": 420,
    "64 8 256 float32 counts": 840,
    "128 8 256 float32 route": 930,
    "128 8 256 float32 counts": 1_050,
    "128 8 256 bfloat16 counts": 1_130,
    "128 8 256 float32 statistics": 2_400,
    "128 8 256 float32 steering": 1_800,
    "256 8 256 float32 counts": 1_370,
    "512 10 256 float32 counts": 2_800,
    "256 8 256 float32 biased": 3_000,
    "896 16 256 float32 biased": 9_750,
}
"""Experts, k, rows of the call, dtype, and what is asked for -> instructions a row."""

_INSIDE = "--toggle-collect=moe_route::cpu::gate_rows*"


def instructions(program: str, case: str) -> float:
    """Instructions a row of one call. Raises RuntimeError with valgrind's words if it counts none."""
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no", _INSIDE]
    # The first call of a function of another library is bound at the start, and not in the call that is counted.
    environment = {**os.environ, "MOE_ROUTE_ISA": "avx2", "LD_BIND_NOW": "1"}
    done = subprocess.run(
        [*valgrind, program, *case.split()], capture_output=True, text=True, env=environment, check=False
    )
    counted = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or counted is None or counted[1] == "0":
        raise RuntimeError(f"valgrind counted nothing in {case}: {done.stderr}")
    return int(counted[1]) / int(case.split()[2])


def main(program: str) -> int:
    """Print each count beside its ceiling. Returns how many are above theirs."""
    above = 0
    for case, ceiling in CEILINGS.items():
        number = instructions(program, case)
        above += number > ceiling
        print(f"{case:<32} {number:>8.0f} of at most {ceiling:,}{'  TOO MANY' if number > ceiling else ''}", flush=True)
    return above


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} PROGRAM, the target gate_cost of CMake (-DMOE_ROUTE_TESTS=ON)")
    sys.exit(bool(main(sys.argv[1])))

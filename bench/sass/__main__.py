"""`python -m bench.sass`: count the machine code of the CUDA kernels (sm_90), without a device.

Prints a table and writes results/sass.json. Compiles the kernels first (minutes); needs nvcc, cuobjdump and
nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm) and the emulated module (make emulated).
"""

from __future__ import annotations

import argparse
import re
import sys

from bench.sass import launches
from bench.sass.build import code
from bench.sass.cases import cases
from bench.sass.report import about, grown, load, measure, rows, save


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where instructions a row grew by 3 %%"
    )
    parser.add_argument("--only", default="", help="a regular expression: cases whose title it finds; writes nothing")
    options = parser.parse_args()
    try:
        why = launches.missing()  # first, since compiling takes minutes
        if why is not None:
            raise RuntimeError(why)
        compiled = code()
    except RuntimeError as error:
        sys.exit(str(error))
    wanted = [case for case in cases() if re.search(options.only, case.title)]
    found = {}
    for title, each in measure(compiled, wanted):
        print(
            f"{title}: {each.instructions_a_row} instructions a row, {each.cycles} cycles", file=sys.stderr, flush=True
        )
        found[title] = each
    print(rows(found))
    if options.check:
        committed = load()
        wrong = grown(found, committed, complete=not options.only)
        if wrong:
            ours, theirs = about()["nvcc"], committed["build"]["nvcc"]
            other = "" if ours == theirs else f"\nThe table is of nvcc {theirs}, this is {ours}."
            sys.exit("\n".join(wrong) + f"{other}\nIf that is meant, `python -m bench.sass` writes the table anew.")
    elif not options.only:
        save(found)


if __name__ == "__main__":
    main()

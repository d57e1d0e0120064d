"""`python -m bench.resources`: what every CUDA kernel takes of a multiprocessor, as ptxas says.

Writes results/cuda-resources.json. Needs nvcc, CMake and Ninja, and no device: the kernels are compiled anew in
a folder of their own (minutes), or `--log` names what such a configuration and build printed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench import RESULTS, ROOT
from bench.markdown import table
from moe_route.bench.results import commit

NAME = "cuda-resources"

# Of one multiprocessor of sm_80 and sm_90: registers are given to warps in units of 256.
REGISTERS, REGISTER_UNIT, MOST_WARPS, LANES = 65536, 256, 64, 32

_BUILD = re.compile(r"CUDA kernels: nvcc (\S+) for (\S+)")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\w+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(.*)")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """One instantiation for one architecture. Shared memory: what is static; a launch may ask for more."""

    name: str
    architecture: str
    registers: int
    barriers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def warps(self) -> int:
        """Warps that the registers of a multiprocessor hold at once."""
        each = -(-self.registers * LANES // REGISTER_UNIT) * REGISTER_UNIT
        return min(MOST_WARPS, REGISTERS // each)


def build_log(folder: Path) -> str:
    """Configures and compiles the kernels; what was printed."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DMOE_ROUTE_CUDA=ON"]
    build = ["cmake", "--build", str(folder), "--target", "moe_route_cuda", "-j", "2"]
    said = ""
    for command in (configure, build):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        said += done.stdout
        if done.returncode != 0:
            sys.exit(f"{done.stdout[-4000:]}\n{' '.join(command[:2])} failed; see its message above.")
    return said


def parse(log: str) -> list[tuple[str, Kernel]]:
    """(mangled name, figures without the name) of every kernel in a log of ptxas -v."""
    found: list[tuple[str, Kernel]] = []
    name = architecture = ""
    stack: tuple[int, ...] | None = None
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            name, architecture = entry.groups()
            stack = None
        elif (properties := _PROPERTIES.search(line)) and name and properties[1] != name:
            raise ValueError(f"the log mixes {name} and {properties[1]}: it is of several compilations at once")
        elif frame := _STACK.search(line):
            stack = tuple(int(number) for number in frame.groups())
        elif (used := _USED.search(line)) and name:
            if stack is None:
                raise ValueError(f"the log has no stack frame of {name}: ptxas was not asked for -v")
            shared = _SHARED.search(used[3])
            figures = int(used[1]), int(used[2] or 0), int(shared[1]) if shared else 0
            found.append((name, Kernel("", architecture, *figures, *stack)))
            name = ""
    return found


def demangled(names: Iterable[str]) -> list[str]:
    """As the sources write them, without namespaces and parameters."""
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    if filt is None:
        sys.exit("there is no c++filt; install binutils (Debian and Ubuntu: apt install binutils).")
    done = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True)
    return [_short(line) for line in done.stdout.splitlines()]


def _short(signature: str) -> str:
    text = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w*::|moe_route::|cuda::|^void ", "", signature)
    text = re.sub(r"\([\w: ]+\)(?=\d)", "", text)  # the type of a number
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return text[:at]
    return text


def kernels(log: str) -> list[Kernel]:
    found = parse(log)
    names = demangled(name for name, _ in found)
    made = [Kernel(**{**asdict(kernel), "name": name}) for name, (_, kernel) in zip(names, found, strict=True)]
    return sorted(made, key=lambda kernel: (kernel.architecture, kernel.name))


def held(content: Mapping[str, Any]) -> list[Kernel]:
    """The kernels of a results file."""
    names = [each.name for each in fields(Kernel)]
    return [Kernel(**{name: kernel[name] for name in names}) for kernel in content["kernels"]]


def summary(found: list[Kernel]) -> Iterator[tuple[str, ...]]:
    for architecture in dict.fromkeys(kernel.architecture for kernel in found):
        of = [kernel for kernel in found if kernel.architecture == architecture]
        spilled = sum(kernel.spill_stores + kernel.spill_loads > 0 for kernel in of)
        most = max(of, key=lambda kernel: kernel.registers)
        yield architecture, str(len(of)), f"{most.registers} ({most.name})", str(spilled)


def markdown(about: dict[str, str], found: list[Kernel]) -> str:
    parts = ["# What the CUDA kernels take\n", table(("", ""), about.items())]
    parts.append(table(("architecture", "kernels", "most registers", "kernels that spill"), summary(found)))
    parts.append(
        "Static shared memory, stack and spills in bytes; a launch may ask for dynamic shared memory. Warps: what the\n"
        "registers of a multiprocessor hold at once, of 64.\n"
    )
    head = ("kernel", "registers", "warps", "barriers", "shared", "stack", "spill stores", "spill loads")
    for architecture in dict.fromkeys(kernel.architecture for kernel in found):
        parts.append(f"## {architecture}\n")
        of = [kernel for kernel in found if kernel.architecture == architecture]
        parts.append(table(head, (_cells(kernel) for kernel in of)))
    return "\n".join(parts)


def _cells(kernel: Kernel) -> tuple[str, ...]:
    numbers = (kernel.registers, kernel.warps, kernel.barriers, kernel.shared, kernel.stack)
    return (f"`{kernel.name}`", *map(str, numbers), str(kernel.spill_stores), str(kernel.spill_loads))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument("--log", type=Path, help="what cmake and the build printed; default: compile now")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the file")
    options = parser.parse_args()
    if options.log is None:
        with tempfile.TemporaryDirectory() as folder:
            log = build_log(Path(folder))
    else:
        log = options.log.read_text(encoding="utf-8", errors="replace")
    build, found = _BUILD.search(log), kernels(log)
    if build is None or not found:
        sys.exit(
            "the log shows no CUDA kernels; it must be of a configuration with MOE_ROUTE_CUDA=ON and its whole build."
        )
    about = {"nvcc": build[1], "architectures": build[2], "commit": commit(ROOT)}
    content = {"build": about, "kernels": [{**asdict(kernel), "warps": kernel.warps} for kernel in found]}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{NAME}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(("architecture", "kernels", "most registers", "kernels that spill"), summary(found)))


if __name__ == "__main__":
    main()

"""Compile the kernels for sm_90 with the flags of the build, and read the machine code out of the objects.

The objects are those of the CMake target ``moe_route_cuda`` in ``build/sass/cmake``; Ninja compiles what is newer than
its object. Disassemblies lie beside them and are made anew where an object is newer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from bench import ROOT
from bench.resources import demangled
from bench.sass.disassembly import Kernel, jump_tables, kernels
from bench.sass.memory import RESERVED_SHARED

ARCHITECTURE = "sm_90"
FOLDER = ROOT / "build" / "sass" / "cmake"

_RESOURCES = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """A kernel as it was compiled.

    Attributes:
        kernel: its instructions.
        registers: of a thread.
        shared_bytes: static shared memory.
        stack_bytes: of a thread.
    """

    kernel: Kernel
    registers: int
    shared_bytes: int
    stack_bytes: int

    @property
    def spills(self) -> int:
        """Instructions that move registers to and from local memory."""
        return sum(instruction.opcode in ("LDL", "STL") for instruction in self.kernel.instructions)


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, beside nvcc, or of the packages that `missing` names."""
    compiler = nvcc()
    folders = [Path(compiler).resolve().parent] if compiler else []
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"), reverse=True)
    return shutil.which(name) or next((str(folder / name) for folder in folders if (folder / name).is_file()), None)


def missing() -> str | None:
    """What is needed and not here, or None."""
    if nvcc() is None:
        return "there is no nvcc: install CUDA 12 or newer and put nvcc on the PATH, or name it in CUDACXX"
    for name in ("cuobjdump", "nvdisasm"):
        if tool(name) is None:
            return f"there is no {name}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    for name in ("cmake", "ninja"):
        if _program(name) is None:
            return f"there is no {name}: pip install {name}"
    return None


def _program(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def build(folder: Path) -> list[Path]:
    """Compile what is out of date; the objects of the kernels.

    Raises:
        RuntimeError: with the end of what the compiler said.
    """
    cmake, ninja = _program("cmake"), _program("ninja")
    if cmake is None or ninja is None:
        raise RuntimeError(str(missing()))
    environment = {**os.environ, "CUDACXX": str(nvcc()), "CUDAARCHS": "90-real"}
    configure = ["-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    _run([cmake, *configure, "-DMOE_ROUTE_CUDA=ON"], environment)
    _run([cmake, "--build", str(folder), "--target", "moe_route_cuda"], environment)
    return sorted((folder / "CMakeFiles" / "moe_route_cuda.dir").rglob("*.cu.o"))


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:3])} ... failed:\n{done.stdout[-4000:]}")
    return done.stdout


def _listing(wanted: Path, of: Path, option: str) -> str:
    """What cuobjdump prints for an object, from the file beside it where that is not older."""
    if not wanted.is_file() or wanted.stat().st_mtime < of.stat().st_mtime:
        program, disassembler = tool("cuobjdump"), tool("nvdisasm")
        if program is None or disassembler is None:
            raise RuntimeError(str(missing()))
        path = os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])
        text = _run([program, option, "-arch", ARCHITECTURE, str(of)], {**os.environ, "PATH": path})
        fresh = wanted.with_name(f"{wanted.name}.{os.getpid()}")
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, wanted)
    return wanted.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Code:
    """The kernels of a build. Their instructions are read object by object, when one is asked for."""

    objects: tuple[Path, ...]

    def __post_init__(self) -> None:
        if not self.objects:
            raise RuntimeError(f"the build left no objects of kernels in {FOLDER}; remove that folder")

    @cache  # noqa: B019
    def names(self) -> dict[str, tuple[Path, str]]:
        """Object and mangled name by the name as the source has it, such as ``gate_kernel<4, 0, true>``."""
        found = [(path, match[1]) for path in self.objects for match in _RESOURCES.finditer(self._resources(path))]
        short = demangled([name for _, name in found])
        return dict(zip(short, found, strict=True))

    def kernel(self, name: str) -> Compiled:
        """The kernel with this name as the source has it."""
        names = self.names()
        if name not in names:
            raise KeyError(f"the build has no kernel {name}; it has {', '.join(sorted(names))}")
        path, mangled = names[name]
        return self._object(path)[mangled]

    def _resources(self, path: Path) -> str:
        return _listing(path.with_suffix(".resources"), path, "-res-usage")

    @cache  # noqa: B019
    def _object(self, path: Path) -> dict[str, Compiled]:
        jumps = jump_tables(_listing(path.with_suffix(".elf"), path, "-elf"))
        code = {
            kernel.name: replace(kernel, jumps=jumps.get(kernel.name, b""))
            for kernel in kernels(_listing(path.with_suffix(".sass"), path, "-sass"))
        }
        figures = {
            match[1]: [int(part) for part in match.groups()[1:]] for match in _RESOURCES.finditer(self._resources(path))
        }
        return {
            name: Compiled(kernel, figures[name][0], max(0, figures[name][2] - RESERVED_SHARED), figures[name][1])
            for name, kernel in code.items()
        }


@cache
def code() -> Code:
    """The kernels of this tree, compiled now where they are out of date.

    Raises:
        RuntimeError: something is missing, or the compiler failed.
    """
    why = missing()
    if why is not None:
        raise RuntimeError(why)
    return Code(tuple(build(FOLDER)))

"""Catch the launches of the operators, and run them on the machine code.

The emulated module (tests/emulated) has the host code of the kernels: it decides which kernel runs, with which grid and
parameters. While `interpreted` is in force its launches come here instead of to the emulator. Tensors are where they
are: an address in the parameters is one of this process.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

from bench import ROOT
from bench.resources import demangled
from bench.sass.build import Code, Compiled
from bench.sass.machine import Launch, Program
from bench.sass.memory import GlobalMemory
from bench.sass.state import Warp

_SETTER = "moe_route_emulated_set_machine"
_FAILURE = 719  # cudaErrorLaunchFailure


class _Parameter(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_void_p), ("size", ctypes.c_uint64), ("alignment", ctypes.c_uint64))


class _Launch(ctypes.Structure):
    """emulator::Launch."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("blocks", ctypes.c_uint64 * 3),
        ("threads", ctypes.c_uint64 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("parameter_count", ctypes.c_uint64),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


@dataclass(frozen=True)
class Run:
    """One launch that was run: the warps of its blocks, with what they executed."""

    name: str
    compiled: Compiled
    launch: Launch
    blocks: list[list[Warp]]


def _emulated_module() -> Path:
    """The module, which the tests' harness loads. tests/ is put on the path where a test has not done so."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from harness.backends import EMULATED

    return Path(EMULATED)


def missing() -> str | None:
    """Why no launch can be caught, or None."""
    path = _emulated_module()
    from harness.backends import BACKENDS

    if not path.is_file():
        return f"{path.name} is not built: make emulated"
    why = next(backend.missing for backend in BACKENDS if backend.emulated)
    if why is None:
        try:
            _kernels_of_module(path)
        except RuntimeError as error:
            why = str(error)
    return why


@cache
def _kernels_of_module(path: Path) -> tuple[dict[int, str], int]:
    """(names of the functions, as the source has them, by their offsets; the offset of the setter)."""
    listing = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in listing.splitlines()]
    functions = [(int(offset, 16), name) for offset, kind, name in symbols if kind in "tTwW"]
    setter = next((offset for offset, name in functions if name == _SETTER), None)
    if setter is None:
        raise RuntimeError(f"{path.name} cannot hand its launches over; build it anew: make emulated")
    ours = [(offset, name) for offset, name in functions if name.startswith("_ZN9moe_route4cuda")]
    return dict(zip([offset for offset, _ in ours], demangled([name for _, name in ours]), strict=True)), setter


def _caught(facts: _Launch, shared_bytes: int) -> Launch:
    parameters = b""
    for n in range(facts.parameter_count):
        each = facts.parameters[n]
        parameters += bytes(-len(parameters) % each.alignment) + ctypes.string_at(each.bytes, each.size)
    x, y, z = facts.blocks
    a, b, c = facts.threads
    dynamic = -(-shared_bytes // 16) * 16 if facts.shared_bytes else shared_bytes
    return Launch((x, y, z), (a, b, c), dynamic + facts.shared_bytes, parameters)


@dataclass
class Interpreter:
    """Runs launches on the machine code; kernels are made executable once.

    Attributes:
        code: the compiled kernels.
        choose: the blocks of a launch that are run, of how many there are; None: all.
        seed_ulps: see `Program.run`.
        keeps: whether `runs` keeps what was executed.
        runs: the launches since `interpreted` began.
    """

    code: Code
    choose: Callable[[str, int], Iterable[int]] | None = None
    seed_ulps: int = 0
    keeps: bool = True

    def __post_init__(self) -> None:
        self.runs: list[Run] = []
        self._programs: dict[str, Program] = {}

    def run(self, name: str, facts: _Launch) -> None:
        compiled = self.code.kernel(name)
        program = self._programs.setdefault(name, Program(compiled.kernel))
        launch = _caught(facts, compiled.shared_bytes)
        chosen = None if self.choose is None else self.choose(name, launch.blocks)
        blocks = program.run(launch, GlobalMemory(), chosen, self.seed_ulps)
        if self.keeps:
            self.runs.append(Run(name, compiled, launch, list(blocks)))
        else:
            for _ in blocks:
                pass


@contextmanager
def interpreted(interpreter: Interpreter, multiprocessors: int | None = None) -> Iterator[Interpreter]:
    """`moe_route.ops` runs on the machine code. One thread at a time.

    Args:
        interpreter: what runs the launches.
        multiprocessors: of the device that the host code sees; None: what the emulator's setting says.

    Raises:
        SassError: in place of the operator's own error, what stopped the machine.
    """
    path = _emulated_module()
    from harness.backends import emulated

    names, setter_offset = _kernels_of_module(path)
    failures: list[BaseException] = []

    def on_launch(facts: ctypes._Pointer[_Launch]) -> int:
        try:
            address = int(facts.contents.kernel or 0)
            interpreter.run(names[address - base], facts.contents)
        except BaseException as error:  # handed on below: nothing may leave a C callback
            failures.append(error)
            return _FAILURE
        return 0

    interpreter.runs = []
    setting = {} if multiprocessors is None else {"MOE_ROUTE_EMULATOR_MULTIPROCESSORS": str(multiprocessors)}
    callback = _Callback(on_launch)
    with emulated(), mock.patch.dict(os.environ, setting):
        setter = getattr(ctypes.CDLL(str(path)), _SETTER)
        base = int(ctypes.cast(setter, ctypes.c_void_p).value or 0) - setter_offset
        setter(callback)
        try:
            yield interpreter
        except RuntimeError as error:
            if failures:
                raise failures[0] from error
            raise
        finally:
            setter(_Callback())

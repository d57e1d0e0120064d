"""The figures of a case, the committed table of them, and the comparison with it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import RESULTS, ROOT
from bench.markdown import table
from bench.sass.build import Code, nvcc
from bench.sass.cases import Case
from bench.sass.cost import block_cost, warps_at_once, widths
from bench.sass.launches import Interpreter, Run, interpreted
from moe_route.base.files import write_text
from moe_route.bench.results import commit

NAME = "sass"
MULTIPROCESSORS = 132  # of an H100 and an H200
ALLOWED_GROWTH = 0.03


@dataclass(frozen=True)
class Figures:
    """Of one launch of a case; what depends on a block is that of the middle one.

    Attributes:
        kernel: as the source names it.
        blocks: of the launch, of ``threads`` each.
        instructions_a_row: warp instructions of that block times blocks, over rows.
        longest: instructions of its longest warp.
        cycles: of the block alone, modelled (`cost`).
        loads: share of loaded bytes by width.
        in_flight: bytes on their way to a multiprocessor that holds as many such blocks as it can and the launch has.
        registers, warps: of a thread; at once on a multiprocessor.
        code, touched: bytes of the kernel, and of what ran.
        spills: instructions that use local memory.
    """

    kernel: str
    blocks: int
    threads: int
    instructions_a_row: float
    longest: int
    cycles: int
    loads: str
    in_flight: int
    registers: int
    warps: int
    code: int
    touched: int
    spills: int


def measure(code: Code, wanted: Iterable[Case]) -> Iterator[tuple[str, Figures]]:
    """(title, figures) of every launch."""
    for case in wanted:
        call = case.prepare()

        def choose(name: str, blocks: int, case: Case = case) -> Iterable[int]:
            return range(blocks) if name.startswith(case.whole or "-") else [blocks // 2]

        with interpreted(Interpreter(code, choose), MULTIPROCESSORS) as interpreter:
            call()
        for suffix, run in zip(
            names_of_launches([run.name for run in interpreter.runs]), interpreter.runs, strict=True
        ):
            yield case.title + suffix, figures(run, case.rows)


def names_of_launches(names: list[str]) -> list[str]:
    """What tells the launches of one call apart: nothing, the kernel without its arguments, or that and a number."""
    if len(names) == 1:
        return [""]
    short = [name.split("<")[0] for name in names]
    if len(set(short)) == len(short):
        return [f" ({name})" for name in short]
    return [f" ({name}, launch {at})" for at, name in enumerate(short, 1)]


def figures(run: Run, rows: int) -> Figures:
    compiled, launch = run.compiled, run.launch
    middle = run.blocks[len(run.blocks) // 2]
    cost = block_cost(compiled.kernel, middle)
    threads = launch.threads[0] * launch.threads[1] * launch.threads[2]
    warps = warps_at_once(compiled.registers, threads, launch.shared_bytes)
    blocks = min(warps // len(middle), -(-launch.blocks // MULTIPROCESSORS))
    return Figures(
        run.name,
        launch.blocks,
        threads,
        round(cost.instructions * launch.blocks / rows, 1),
        cost.longest,
        round(cost.cycles),
        widths(cost.loads),
        cost.in_flight * blocks,
        compiled.registers,
        warps,
        compiled.kernel.code_bytes,
        cost.touched,
        compiled.spills,
    )


def about() -> dict[str, str]:
    done = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if "release" in line]
    release = lines[-1].rsplit(",", 1)[-1].strip() if lines else "unknown"
    return {"nvcc": release, "code": "sm_90", "multiprocessors": str(MULTIPROCESSORS), "commit": commit(ROOT)}


def save(found: dict[str, Figures], folder: Path = RESULTS) -> None:
    """Write the table as sass.json."""
    content = {"build": about(), "cases": {name: asdict(each) for name, each in found.items()}}
    write_text(folder / f"{NAME}.json", json.dumps(content, indent=1) + "\n")


def load(folder: Path = RESULTS) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    return content


def markdown(facts: dict[str, str], found: dict[str, Figures]) -> str:
    text = (
        "Instructions are those of warps, counted while the compiled code ran on numpy.\n"
        "Cycles are of one block, and modeled: no figure is measured on a device.\n"
        "[bench/README.md](../README.md#the-machine-code-counted) says how to read them.\n"
    )
    return "\n".join(
        ["# The machine code of the CUDA kernels, counted\n", table(("", ""), facts.items()), text, rows(found)]
    )


def rows(found: dict[str, Figures]) -> str:
    head = (
        "case", "kernel", "blocks", "instructions a row", "longest warp", "cycles", "loads", "KB in flight",
        "registers", "warps", "KB of code", "KB run", "spills",
    )  # fmt: skip
    return table(head, ((name, *_cells(each)) for name, each in found.items()))


def _cells(each: Figures) -> tuple[str, ...]:
    return (
        f"`{each.kernel}`", f"{each.blocks} x {each.threads}", f"{each.instructions_a_row:.1f}", str(each.longest),
        str(each.cycles), each.loads, f"{each.in_flight / 1024:.1f}", str(each.registers), str(each.warps),
        f"{each.code / 1024:.1f}", f"{each.touched / 1024:.1f}", str(each.spills),
    )  # fmt: skip


def grown(found: dict[str, Figures], committed: dict[str, Any], complete: bool = True) -> list[str]:
    """What is wrong: launches whose instructions a row grew by more than 3 %, and those the table does not know.

    Args:
        found: figures of now.
        committed: the content of sass.json.
        complete: whether ``found`` has every case, so that one that it lacks is an error.
    """
    wrong, before = [], committed["cases"]
    for name, each in found.items():
        if name not in before:
            wrong.append(f"{name}: the table does not have it")
            continue
        old, new = before[name]["instructions_a_row"], each.instructions_a_row
        if new > old * (1 + ALLOWED_GROWTH):
            growth = 100 * (new / old - 1)
            wrong.append(f"{name}: {each.kernel} took {old} instructions a row and takes {new} (+{growth:.1f} %)")
        if each.spills:
            wrong.append(f"{name}: {each.kernel} has {each.spills} instructions that spill registers")
    if complete:
        wrong += [f"{name}: the table has it, and it is not launched any more" for name in before if name not in found]
    return wrong

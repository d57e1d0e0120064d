"""`bench.resources`: figures of kernels out of what ptxas prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("bench.resources", reason="needs the source tree")

from bench import pages, resources

GATE = "_ZN9moe_route4cuda39_GLOBAL__N__fd39a3ba_7_gate_cu_a5ef0b0711gate_kernelILi8ELb1EEEvNS0_10GateLaunchE"
SORT = "_ZN9moe_route4cuda11count_spansIxEEvNS0_7ProblemE"


def of_ptxas(name: str, architecture: str, frame: str, used: str) -> str:
    return f"""ptxas info    : Compiling entry function '{name}' for '{architecture}'
ptxas info    : Function properties for {name}
    {frame}
ptxas info    : {used}
ptxas info    : Compile time = 7.3 ms
"""


CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
LOG = (
    "-- CUDA kernels: nvcc 13.0.88 for 80-real,90\n[1/2] Building CUDA object gate.cu.o\nptxas info    : 0 bytes gmem\n"
    + of_ptxas(GATE, "sm_80", CLEAN, "Used 79 registers, used 1 barriers, 656 bytes cmem[0]")
    + of_ptxas(GATE, "sm_90", CLEAN, "Used 128 registers, used 1 barriers")
    + of_ptxas(
        SORT, "sm_90", "40 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads",
        "Used 16 registers, used 2 barriers, 384 bytes smem, 400 bytes cmem[0]",
    )
)  # fmt: skip


def test_every_kernel_is_read() -> None:
    found = resources.kernels(LOG)
    assert [(kernel.name, kernel.architecture, kernel.registers, kernel.warps) for kernel in found] == [
        ("gate_kernel<8, true>", "sm_80", 79, 25),
        ("count_spans<long long>", "sm_90", 16, 64),
        ("gate_kernel<8, true>", "sm_90", 128, 16),
    ]
    spilled = found[1]
    assert (spilled.barriers, spilled.shared, spilled.stack) == (2, 384, 40)
    assert (spilled.spill_stores, spilled.spill_loads) == (24, 16)


@pytest.mark.parametrize(
    ("log", "problem"),
    [
        (LOG.replace(f"properties for {GATE}", f"properties for {SORT}", 1), "several compilations at once"),
        (LOG.replace(f"    {CLEAN}\n", "", 1), "not asked for -v"),
    ],
)
def test_a_log_that_cannot_be_read_says_why(log: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        resources.parse(log)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "build.log"
    log.write_text(LOG, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["resources", "--log", str(log), "--out", str(tmp_path)])
    resources.main()
    content = json.loads((tmp_path / "cuda-resources.json").read_text(encoding="utf-8"))
    assert content["build"]["nvcc"] == "13.0.88"
    assert len(content["kernels"]) == 3
    page = pages.page(tmp_path / "cuda-resources.json")
    assert "| `gate_kernel<8, true>` | 79 | 25 | 1 | 0 | 0 | 0 | 0 |" in page
    assert "| sm_90 | 2 | 128 (gate_kernel<8, true>) | 1 |" in page
    log.write_text("nothing was compiled\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="MOE_ROUTE_CUDA=ON"):
        resources.main()

"""`mr.doctor`: it says what is there, why, what is missing, and it notices kernels that compute wrongly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_route as mr
from moe_route import _C, description, ops


def test_it_is_plain_data_and_healthy() -> None:
    diagnosis = mr.doctor()
    found = diagnosis.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["moe-route"] == _C.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["instruction_set"]["in_use"] == _C.instruction_set()
    assert found["instruction_set"]["in_use"] in found["instruction_set"]["supported"]
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["cuda"]["built"] == _C.build_info()["cuda"]
    names = ["route", "same bits", "dispatch", *(["cuda"] if found["cuda"]["usable"] else [])]
    assert [check["name"] for check in found["checks"]] == names
    assert diagnosis.ok
    assert all(check["ok"] for check in found["checks"])
    assert _C.instruction_set() == found["instruction_set"]["in_use"]  # the checks put it back


def test_it_prints_everything() -> None:
    found = mr.doctor()
    for word in (found.versions["torch"], found.instruction_set["why"], found.cuda["why"], *description.EXTRAS):
        assert str(word) in str(found)
    assert repr(found) == str(found)
    assert "FAILED" not in str(found)


def test_the_name_stays_a_function() -> None:
    """However the module that it lives in is imported."""
    program = "import moe_route as mr, moe_route.description, moe_route.cli.describe; print(mr.doctor().ok)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_missing_extras_are_named_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    real = description.util.find_spec
    monkeypatch.setattr(description.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    found = mr.doctor()
    assert found.extras["plot"]["missing"] == ["matplotlib"]
    assert "matplotlib missing: pip install 'moe-route[plot]'" in str(found)


@pytest.mark.parametrize(
    ("break_it", "check"),
    [
        (lambda weights, ids: (weights, ids.flip(1)), "route"),
        (lambda weights, ids: (weights * 1.01, ids), "route"),
        (lambda weights, ids: (weights + len(_C.instruction_set()) * 1e-7, ids), "same bits"),
    ],
)
def test_wrong_kernels_are_noticed(break_it: Any, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if check == "same bits" and len(_C.supported_instruction_sets()) == 1:
        pytest.skip("one instruction set agrees with itself")
    real = ops.route
    monkeypatch.setattr(ops, "route", lambda *args, **kwargs: break_it(*real(*args, **kwargs)))
    found = mr.doctor()
    assert not found.ok
    assert check in [entry["name"] for entry in found.checks if not entry["ok"]]
    assert "FAILED" in str(found)


def test_a_wrong_combine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.combine
    monkeypatch.setattr(ops, "combine", lambda rows, weights, slots: real(rows.flip(0), weights, slots))
    assert [entry["name"] for entry in mr.doctor().checks if not entry["ok"]] == ["dispatch"]


@pytest.mark.parametrize("asked", ["portable", "avx512"])
def test_instruction_set_of_the_environment(asked: str) -> None:
    program = "import moe_route as mr; import json; print(json.dumps(mr.doctor().instruction_set))"
    environment = {**os.environ, "MOE_ROUTE_ISA": asked}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    found = json.loads(done.stdout)
    assert found["MOE_ROUTE_ISA"] == asked
    assert "MOE_ROUTE_ISA" in found["why"]
    assert (found["in_use"] == asked) == (asked in _C.supported_instruction_sets())


def test_why_names_what_the_processor_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "avx512" not in _C.build_info()["instruction_sets"]:
        pytest.skip("every processor runs all that a build for another architecture than x86 has")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : sse2 avx2 fma f16c avx512f avx512bw\n", encoding="utf-8")
    monkeypatch.delenv("MOE_ROUTE_ISA", raising=False)
    monkeypatch.setattr(description, "_CPUINFO", cpuinfo)
    for name, value in (("instruction_set", "avx2"), ("best_instruction_set", "avx2")):
        monkeypatch.setattr(_C, name, lambda value=value: value)
    monkeypatch.setattr(_C, "supported_instruction_sets", lambda: ["portable", "avx2"])
    found = description._instruction_set()
    assert found["lacking"] == {"avx512": ["avx512dq", "avx512vl", "avx512cd"], "avx512_bf16": ["avx512_bf16"]}
    assert "avx512 needs avx512dq, avx512vl, avx512cd" in found["why"]


# ---- CUDA -------------------------------------------------------------------------------------------------------

H200 = {"name": "NVIDIA H200", "capability": (9, 0)}
OLD = {"name": "Tesla T4", "capability": (7, 5)}


def cuda_of(
    monkeypatch: pytest.MonkeyPatch,
    *,
    built: bool = True,
    torch_cuda: str | None = "13.0",
    devices: tuple[dict[str, Any], ...] = (),
    problem: str = "",
    driver: int = 13000,
) -> dict[str, Any]:
    """The section of a machine like that."""
    build = {
        **_C.build_info(),
        "cuda": built,
        "cuda_architectures": ["80-real", "90"] if built else [],
        "nvcc": "13.0.88",
    }
    runtime = {"runtime": 13000, "driver": driver, "devices": list(devices), "problem": problem}
    monkeypatch.setattr(_C, "build_info", lambda: build)
    monkeypatch.setattr(_C, "cuda_runtime", lambda: runtime)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_cuda is not None and bool(devices))
    found = description._cuda()
    assert json.loads(json.dumps(found)) == found
    return found


def test_a_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda_of(monkeypatch, devices=(H200,), driver=13010)
    assert found["usable"]
    assert found["why"] == "kernels built by nvcc 13.0.88 for 80-real, 90, 1 device(s): NVIDIA H200 (9.0)"
    assert (found["runtime"], found["driver"]) == ("13.0", "13.1")


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"built": False, "torch_cuda": None}, ["no CUDA kernels in this build", "no CUDA device"]),
        ({"built": False}, ["no CUDA kernels in this build", "CUDA 13.0", "MOE_ROUTE_CUDA=ON pip install"]),
        ({"torch_cuda": None, "problem": "no driver"}, ["torch is a CPU build", "install a CUDA build", "no driver"]),
        ({"torch_cuda": None, "devices": (H200,)}, ["torch is a CPU build", "NVIDIA H200 (9.0)"]),
        ({"problem": "no device"}, ["there is no device: no device"]),
        (
            {"problem": "CUDA driver version is insufficient", "driver": 12040},
            ["need a driver of CUDA 13.0 or newer, and this one is of CUDA 12.4", "the nvcc of a CUDA 12.x toolkit"],
        ),
        ({"devices": (OLD,)}, ["do not run on Tesla T4", "CUDAARCHS=native"]),
    ],
)
def test_why_there_is_no_cuda(machine: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = cuda_of(monkeypatch, **machine)
    assert not found["usable"]
    for word in words:
        assert word in found["why"]


@pytest.mark.parametrize(
    ("architectures", "runs_on"),
    [
        (["80-real", "90"], {(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)}),
        (["80-real"], {(8, 0), (8, 6)}),
        (["90-virtual"], {(9, 0), (10, 0), (12, 0)}),
        (["90a-real"], {(9, 0)}),
        ([], set()),
    ],
)
def test_which_devices_an_architecture_covers(architectures: list[str], runs_on: set[tuple[int, int]]) -> None:
    every = {(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)}
    assert {capability for capability in every if description._covers(architectures, capability)} == runs_on


def test_a_driver_that_is_older_than_the_toolkit_compiles_no_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one major version it runs machine code, and nothing else."""
    b200 = {"name": "NVIDIA B200", "capability": (10, 0)}
    runtime = {"runtime": 13020, "driver": 13000, "devices": [H200, b200], "problem": ""}
    cuda_of(monkeypatch, devices=(H200, b200))
    assert all(device["covered"] for device in description._cuda()["devices"])
    monkeypatch.setattr(_C, "cuda_runtime", lambda: runtime)
    found = description._cuda()
    assert [device["covered"] for device in found["devices"]] == [True, False]
    assert "do not run on NVIDIA B200 (a driver of CUDA 13.0 cannot compile their PTX)" in found["why"]


def test_wrong_bits_on_a_device_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert description.device_difference("cpu") == ""
    real, calls = ops.route, []

    def second_is_off(*args: Any, **kwargs: Any) -> Any:
        weights, ids = real(*args, **kwargs)
        calls.append(weights)
        return (weights * (1 + 1e-6), ids) if len(calls) == 2 else (weights, ids)

    monkeypatch.setattr(ops, "route", second_is_off)
    assert description.device_difference("cpu") == "not the bits of the CPU"


@pytest.mark.parametrize(
    ("program", "ok", "words"),
    [
        ("print('')", True, "as torch computes"),
        ("print('gate kernels were taken out of service')", False, "gate kernels were"),
        ("raise RuntimeError('an illegal access')", False, "an illegal access"),
        ("import os; os._exit(9)", False, "ended with code 9"),
    ],
)
def test_kernels_are_checked_in_a_process_of_their_own(
    program: str, ok: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(description, "_CUDA_PROGRAM", program)
    check = description._check_cuda()
    assert check["ok"] == ok
    assert words in check["detail"]

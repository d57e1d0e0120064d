"""What a run on a device was made with: names, versions, commit. `python -m bench.device.environment` checks it all."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from bench import ROOT

# What the module is made of; anything else may differ between two runs of the same code.
SOURCES = ("CMakeLists.txt", "setup.py", "csrc/**/*", "moe_route/**/*.py")
# Python package -> what cannot be done without it. pybind11 may come from torch's own headers.
NEEDED = {
    "torch": "anything",
    "setuptools": "the build",
    "numpy": "anything",
    "safetensors": "anything",
    "tqdm": "anything",
}
FOR_TESTS = ("pytest", "hypothesis", "pytest_timeout")
FOR_MODEL = ("transformers",)


def output(*command: str) -> str:
    """The last line that a command prints; '' where it cannot run."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else ""


def sources_hash() -> str:
    """A hash of the module's sources, so that a result names its code even where there is no git."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        if "__pycache__" not in path.parts:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def driver() -> str:
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def describe() -> dict[str, str]:
    """Device and versions, as text."""
    import torch

    from moe_route.bench.results import commit

    about = {
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "nvcc": output("nvcc", "--version") or "not found",
        "commit": commit(ROOT),
        "hash of the sources": sources_hash(),
    }
    if not torch.cuda.is_available():
        return {"device": "none", **about}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": found.name,
        "compute capability": f"{found.major}.{found.minor}",
        "multiprocessors": str(found.multi_processor_count),
        "level-2 cache": f"{found.L2_cache_size / 1e6:.0f} MB",
        "memory": f"{found.total_memory / 1e9:.0f} GB",
        "driver": driver(),
        **about,
    }


def problems(device_needed: bool) -> list[str]:
    """What stands in the way of building and running here, each with the mend."""
    found = []
    for name, what in NEEDED.items():
        if importlib.util.find_spec(name) is None:
            found.append(f"the Python package {name} is missing, which {what} needs: {bring(name)}")
    for program, mend in (
        ("nvcc", "install the CUDA toolkit (12.0 or newer) and put its bin folder on the PATH"),
        ("cmake", bring("cmake")),
        ("ninja", bring("ninja")),
    ):
        if shutil.which(program) is None:
            found.append(f"{program} is not on the PATH: {mend}")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        found.append(f"{header} is missing: install Python's headers (Debian and Ubuntu: apt install python3-dev)")
    return found + _old_setuptools() + (_no_device() if device_needed and not found else [])


def _old_setuptools() -> list[str]:
    """pyproject.toml names its licence in the form of PEP 639."""
    if importlib.util.find_spec("setuptools") is None:
        return []
    version = metadata.version("setuptools")
    if int(version.split(".")[0]) >= 77:
        return []
    return [f"setuptools {version} is too old, the build takes 77 or newer: {bring('setuptools')}"]


def _no_device() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return []
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} was built without CUDA: name a Python with a CUDA build in PYTHON"]
    return ["torch sees no CUDA device here; `bench/gpu.sh --dry` does all that needs none"]


def bring(name: str) -> str:
    return (
        f"pip install {name}; without a network, `pip download --no-deps {name}` elsewhere and "
        "`pip install --no-index --find-links FOLDER` here"
    )


def main() -> int:
    if importlib.util.find_spec("torch") is not None:
        for name, value in describe().items():
            print(f"{name:20} {value}")
    for name in (*FOR_TESTS, *FOR_MODEL):
        if importlib.util.find_spec(name) is None:
            print(f"without {name} some stages are left out: {bring(name)}")
    found = problems(device_needed="--device" in sys.argv[1:])
    for line in found:
        print(f"missing: {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

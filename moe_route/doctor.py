"""What this installation is made of, which code is at work and why, and whether it computes what it should."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from moe_route import _C, ops

__all__ = ["EXTRAS", "report", "text"]

EXTRAS: dict[str, dict[str, str]] = {
    "hf": {"transformers": "transformers", "accelerate": "accelerate"},
    "analysis": {"pandas": "pandas", "pyarrow": "pyarrow", "scipy": "scipy"},
    "plot": {"matplotlib": "matplotlib"},
}
"""Extra -> importable module -> the distribution that brings it."""

_REQUIRED = ("torch", "numpy", "safetensors", "tqdm")
_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"),
}


def report() -> dict[str, Any]:
    """Everything that `text` shows, as plain data: versions, build, instruction_set, threads, cuda, extras, checks."""
    extras = {name: _extra(modules) for name, modules in EXTRAS.items()}
    versions = {name: _version(name) for name in _REQUIRED}
    versions |= {name: extra["versions"][name] for extra in extras.values() for name in extra["versions"]}
    return {
        "versions": {"moe-route": _C.__version__, "python": platform.python_version(), **versions},
        "platform": {"system": platform.platform(), "machine": platform.machine(), "executable": sys.executable},
        "build": dict(_C.build_info()),
        "instruction_set": _instruction_set(),
        "threads": {
            "torch": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        },
        "cuda": _cuda(),
        "extras": extras,
        "checks": _checks(),
    }


def text(found: dict[str, Any] | None = None) -> str:
    """`report` for a reader. ``found``: what `report` returned; default: ask it."""
    found = report() if found is None else found
    build, isa, threads = found["build"], found["instruction_set"], found["threads"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    sets = ", ".join(build["instruction_sets"])
    lines = [
        f"versions      {versions}",
        f"platform      {found['platform']['system']}",
        f"build         {build['compiler']}, against torch {build['torch']}, instruction sets {sets}",
        f"kernels       {isa['in_use']}: {isa['why']}",
        f"threads       {threads['torch']} of {threads['usable']} usable processors",
        f"cuda          {found['cuda']['why']}",
    ]
    lines += [f"extra         {line}" for line in map(_extra_line, found["extras"], found["extras"].values())]
    for check in found["checks"]:
        lines.append(f"check         {'ok    ' if check['ok'] else 'FAILED'}  {check['name']}: {check['detail']}")
    return "\n".join(lines)


def _extra_line(name: str, extra: dict[str, Any]) -> str:
    state = "installed" if not extra["missing"] else f"{', '.join(extra['missing'])} missing: {extra['install']}"
    return f"{name:9} {state}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _extra(modules: dict[str, str]) -> dict[str, Any]:
    name = next(extra for extra, content in EXTRAS.items() if content is modules)
    return {
        "versions": {distribution: _version(distribution) for distribution in modules.values()},
        "missing": [distribution for module, distribution in modules.items() if util.find_spec(module) is None],
        "install": f"pip install 'moe-route[{name}]'",
    }


def _instruction_set() -> dict[str, Any]:
    in_use, asked = _C.instruction_set(), os.environ.get("MOE_ROUTE_ISA") or None
    built, runs = _C.build_info()["instruction_sets"], _C.supported_instruction_sets()
    lacking = {name: _lacking_flags(flags) for name, flags in _FLAGS.items() if name in built and name not in runs}
    if in_use != _C.best_instruction_set():
        why = "set by set_instruction_set"
    elif asked and asked != in_use:
        why = f"MOE_ROUTE_ISA={asked} was asked for, but this processor or build does not have it"
    elif asked:
        why = f"asked for by MOE_ROUTE_ISA; this processor runs {', '.join(runs)}"
    elif in_use == built[-1]:
        why = "the widest that this build has, and the processor runs it"
    else:
        gaps = "; ".join(f"{name} needs {', '.join(flags) or 'what it lacks'}" for name, flags in lacking.items())
        why = f"the widest that this processor runs ({gaps})" if gaps else "the widest that this processor runs"
    return {"in_use": in_use, "why": why, "built": built, "supported": runs, "lacking": lacking, "MOE_ROUTE_ISA": asked}


def _lacking_flags(flags: tuple[str, ...]) -> list[str]:
    """Those of ``flags`` that the processor does not name; empty where the system does not say."""
    if not _CPUINFO.is_file():
        return []
    lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    present = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set(flags))
    return [flag for flag in flags if flag not in present]


def _cuda() -> dict[str, Any]:
    built, seen = _C.build_info()["cuda"], torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if seen else []
    if built and seen:
        why = f"kernels built, {len(devices)} device(s): {', '.join(devices)}"
    elif built:
        why = "kernels built, but torch sees no CUDA device"
    elif seen:
        why = "this version has no CUDA kernels; the operators run on the CPU, moe_route.reference on any device"
    else:
        why = "no CUDA kernels in this build and no CUDA device; the operators run on the CPU"
    return {"built": built, "available": seen, "torch_cuda": torch.version.cuda, "devices": devices, "why": why}


def _checks() -> list[dict[str, Any]]:
    """Small problems with known answers, run on the spot."""
    return [_check_route(), _check_bits(), _check_round_trip()]


def _problem() -> tuple[torch.Tensor, ops.RouterSpec]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 60, generator=generator), ops.RouterSpec(renormalise="sum")


def _check_route() -> dict[str, Any]:
    from moe_route import reference

    logits, spec = _problem()
    tables = [ops.StatisticsTables.zeros(60, groups=1) for _ in range(2)]
    weights, ids = ops.route(logits, 4, spec, statistics=tables[0])
    expected, expected_ids = reference.route(logits.double(), 4, spec, statistics=tables[1])
    same = torch.equal(ids, expected_ids) and torch.equal(tables[0].plane("counts"), tables[1].plane("counts"))
    error = float((weights - expected).abs().max())
    return {
        "name": "route",
        "ok": same and error < 1e-6,
        "detail": f"ids and counts {'equal' if same else 'differ from'} the reference, weights within {error:.1e}",
    }


def _check_bits() -> dict[str, Any]:
    logits, spec = _problem()
    before, found = _C.instruction_set(), []
    try:
        for name in _C.supported_instruction_sets():
            _C.set_instruction_set(name)
            found.append(ops.route(logits, 4, spec))
    finally:
        _C.set_instruction_set(before)
    same = all(torch.equal(a, b) for result in found[1:] for a, b in zip(found[0], result, strict=True))
    names = ", ".join(_C.supported_instruction_sets())
    return {"name": "same bits", "ok": same, "detail": f"{names} {'agree' if same else 'disagree'}"}


def _check_round_trip() -> dict[str, Any]:
    logits, spec = _problem()
    weights, ids = ops.route(logits, 4, spec)
    slots = ops.dispatch(ids, 60)
    back = ops.combine(ops.permute(logits, slots), weights, slots)
    error = float((back - logits * weights.sum(1, keepdim=True)).abs().max())
    return {
        "name": "dispatch",
        "ok": error < 1e-5,
        "detail": f"permute and combine return the tokens within {error:.1e}",
    }

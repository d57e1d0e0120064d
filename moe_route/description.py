"""Describe a model's routers and how moe-route would attach to them (``describe``); diagnose the installation
(``doctor``)."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_route import __version__, ops
from moe_route.base.identity import identity_of, version_of
from moe_route.base.table import ShownAsTables, Table
from moe_route.experts.interface import experts_implementations, experts_paths
from moe_route.ops import library
from moe_route.patching.attachment import attachment_of
from moe_route.routers.discovery import find_routers


@dataclass(frozen=True)
class LayerDescription:
    """One MoE layer of a model: its router, and how moe-route would attach to it."""

    layer: int
    name: str
    router: str
    role: str  # kind of router: "text", "vision", "encoder", ...; "" in a model with one kind
    experts: int
    top_k: int
    family: str
    score: str
    order: str
    engine: str
    experts_implementation: str  # what runs the experts: "grouped_mm", "moe_route", ...; or "own forward"
    experts_paths: str  # where that is "moe_route": its ways, and up to how many slots (tokens times top-k) each
    reason: str
    steerable: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Description(ShownAsTables):
    """The result of ``describe``; prints as a table, and ``to_dict()`` is JSON-able."""

    model: str
    name: str | None
    config_hash: str
    attached: bool
    layers: tuple[LayerDescription, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> Sequence[Table]:
        """A row for each run of equal layers; below the rows, notes on single layers."""
        name = f" ({self.name})" if self.name else ""
        title = f"{self.model}{name}: {len(self.layers)} MoE layers, configuration {self.config_hash[:12]}"
        head = ("layers", "router", "experts", "top-k", "routing", "engine", "experts run by", "steerable", "why")
        rows = []
        notes: dict[str, list[str]] = {}  # note -> the layers that it is about
        for _, alike in groupby(self.layers, key=_kind_of_layer):
            layers = list(alike)
            first, last = layers[0], layers[-1]
            span = f"{first.layer}" if first is last else f"{first.layer}-{last.layer}"
            router = f"{first.router} ({first.role})" if first.role else first.router
            steerable = "yes" if first.steerable else "no"
            routing = (first.family, first.engine, first.experts_implementation, steerable, first.reason)
            rows.append((span, router, first.experts, first.top_k, *routing))
            paths = [f"without gradients, experts run {first.experts_paths}"] if first.experts_paths else []
            for note in (*first.notes, *paths):
                notes.setdefault(note, []).append(span)
        below = "\n".join(f"{_layers(spans)}: {note}" for note, spans in notes.items())
        return [Table(head, rows, title, below)]


def _layers(spans: Sequence[str]) -> str:
    return f"layer {spans[0]}" if len(spans) == 1 and spans[0].isdecimal() else f"layers {', '.join(spans)}"


def _kind_of_layer(layer: LayerDescription) -> tuple[Any, ...]:
    return tuple(value for key, value in asdict(layer).items() if key not in ("layer", "name"))


def describe(model: nn.Module) -> Description:
    """Describe the routers of a model, attached or not, without changing it.

    Raises ``ModelNotSupportedError`` like ``attach``.
    """
    attachment = attachment_of(model)
    routers = find_routers(model) if attachment is None else attachment.routers
    identity = identity_of(model)
    layers = tuple(
        LayerDescription(
            layer=router.layer,
            name=router.name,
            router=type(router.module).__name__,
            role=router.role,
            experts=router.num_experts,
            top_k=router.top_k,
            family=router.family.name,
            score=router.spec.score,
            order=router.spec.order,
            engine=router.engine,
            experts_implementation=", ".join(experts_implementations(router.block)),
            experts_paths=experts_paths(router.block),
            reason=router.reason or "keeps every bit of the model's own choice",
            steerable=router.steerable,
            notes=tuple(router.notes),
        )
        for router in routers
    )
    return Description(identity["class"], identity["name"], identity["config_hash"], attachment is not None, layers)


# ---- an installation: its versions, the kernels in use and why, and whether they compute correct results

EXTRAS: dict[str, dict[str, str]] = {
    "hf": {"transformers": "transformers", "accelerate": "accelerate"},
    "analysis": {"pandas": "pandas", "pyarrow": "pyarrow"},
    "plot": {"matplotlib": "matplotlib"},
    "eval": {"lm_eval": "lm-eval"},
}
"""Extra -> importable module -> the distribution that contains it."""

_REQUIRED = ("torch", "numpy", "scipy", "safetensors", "tqdm")
_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"),
    "avx512_bf16": ("avx512_bf16",),
}


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """The result of `doctor`; prints as lines, and `to_dict` is plain data for JSON."""

    versions: dict[str, str | None]
    platform: dict[str, str]
    build: dict[str, Any]
    instruction_set: dict[str, Any]
    backends: dict[str, dict[str, str]]  # device -> what serves the operators there, and why where torch does
    threads: dict[str, Any]
    cuda: dict[str, Any]
    extras: dict[str, dict[str, Any]]
    checks: list[dict[str, Any]]  # name, ok, detail

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check["ok"] for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        isa, threads = self.instruction_set, self.threads
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        sets = ", ".join(self.build["instruction_sets"])
        made = f"{self.build['compiler']}, against torch {self.build['torch']}, instruction sets {sets}"
        lines = [
            f"versions      {versions}",
            f"platform      {self.platform['system']}",
            f"build         {made if self.build['compiler'] else 'no compiled library'}",
            f"kernels       {isa['in_use']}: {isa['why']}",
            *(f"serves        {place}: {one['backend']}" for place, one in self.backends.items()),
            f"threads       {threads['torch']} of {threads['usable']} usable processors",
            f"cuda          {self.cuda['why']}",
        ]
        lines += [f"extra         {_extra_line(name, extra)}" for name, extra in self.extras.items()]
        for check in self.checks:
            lines.append(f"check         {'ok    ' if check['ok'] else 'FAILED'}  {check['name']}: {check['detail']}")
        return "\n".join(lines)

    __repr__ = __str__


def doctor() -> Diagnosis:
    """Report the versions of this installation and the kernels in use with the reason, and check their results.

    Takes a few milliseconds, and on a CUDA device the time to start the runtime. Changes nothing.
    """
    extras = {name: _extra(modules) for name, modules in EXTRAS.items()}
    versions = {name: _version(name) for name in _REQUIRED}
    versions |= {name: extra["versions"][name] for extra in extras.values() for name in extra["versions"]}
    return Diagnosis(
        versions={"moe-route": __version__, "python": platform.python_version(), **versions},
        platform={"system": platform.platform(), "machine": platform.machine(), "executable": sys.executable},
        build=_build(),
        instruction_set=_instruction_set(),
        backends=_backends(),
        threads={
            "torch": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        },
        cuda=_cuda(),
        extras=extras,
        checks=_checks(),
    )


def _extra_line(name: str, extra: dict[str, Any]) -> str:
    state = "installed" if not extra["missing"] else f"{', '.join(extra['missing'])} missing: {extra['install']}"
    return f"{name:9} {state}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # not installed, or loaded from a source tree
        return version_of(distribution) if distribution in sys.modules else None


def _extra(modules: dict[str, str]) -> dict[str, Any]:
    name = next(extra for extra, content in EXTRAS.items() if content is modules)
    return {
        "versions": {distribution: _version(distribution) for distribution in modules.values()},
        "missing": [distribution for module, distribution in modules.items() if util.find_spec(module) is None],
        "install": f"pip install 'moe-route[{name}]'",
    }


def _build() -> dict[str, Any]:
    """What the compiled library was built with; without one, the same keys with nothing in them, and why."""
    native = library.native()
    if native is not None:
        return dict(native.build_info())
    nothing = dict.fromkeys(("version", "compiler", "torch", "nvcc"), "")
    return nothing | {"instruction_sets": [], "cuda": False, "cuda_architectures": [], "absent": library.why_absent()}


def _instruction_set() -> dict[str, Any]:
    native, asked = library.native(), os.environ.get("MOE_ROUTE_ISA") or None
    in_use, built = library.instruction_set(), _build()["instruction_sets"]
    runs = [] if native is None else native.supported_instruction_sets()
    lacking = {name: _lacking_flags(flags) for name, flags in _FLAGS.items() if name in built and name not in runs}
    if native is None:
        why = library.why_absent()
    elif in_use != library.best_instruction_set():
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
    """The ``flags`` that the processor does not report; empty if the system reports none."""
    if not _CPUINFO.is_file():
        return []
    lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    present = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set(flags))
    return [flag for flag in flags if flag not in present]


def _cuda() -> dict[str, Any]:
    native, build = library.native(), _build()
    nothing: dict[str, Any] = {"runtime": 0, "driver": 0, "devices": [], "problem": library.why_absent()}
    runtime = nothing if native is None else native.cuda_runtime()
    toolkit, driver = runtime["runtime"], runtime["driver"]
    devices = [
        {
            "name": device["name"],
            "capability": list(device["capability"]),
            "covered": _covers(build["cuda_architectures"], device["capability"], ptx=driver >= toolkit),
        }
        for device in runtime["devices"]
    ]
    facts = {
        "built": build["cuda"],
        "architectures": build["cuda_architectures"],
        "nvcc": build["nvcc"],
        "runtime": _cuda_version(toolkit),
        "driver": _cuda_version(driver),
        "driver_too_old": toolkit // 1000 > driver // 1000 > 0,  # an older major version refuses every launch
        "driver_compiles_ptx": driver >= toolkit,
        "torch_cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "devices": devices,
        "problem": runtime["problem"],
    }
    return {**facts, "usable": _cuda_usable(facts), "why": _why_cuda(facts)}


def _cuda_version(number: int) -> str | None:
    """A CUDA version number (1000 * major + 10 * minor) as text; None for 0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _covers(architectures: list[str], capability: tuple[int, int], *, ptx: bool = True) -> bool:
    """Whether code for ``architectures`` (CMake names) runs on a device of this compute capability.

    Machine code runs on later devices with the same major number. PTX runs on every later device whose driver can
    compile it (``ptx`` is False if the driver is older than the toolkit). Code for a single architecture (90a) runs on
    that one only.
    """
    for architecture in architectures:
        number, _, kind = architecture.partition("-")
        major, minor = divmod(int(number.rstrip("af")), 10)
        if not number.isdecimal():
            covered = tuple(capability) == (major, minor)
        else:
            machine_code = kind != "virtual" and capability[0] == major and capability[1] >= minor
            covered = machine_code or (ptx and kind != "real" and tuple(capability) >= (major, minor))
        if covered:
            return True
    return False


def _cuda_usable(facts: dict[str, Any]) -> bool:
    return facts["built"] and facts["available"] and any(device["covered"] for device in facts["devices"])


def _why_cuda(facts: dict[str, Any]) -> str:
    names = ", ".join(f"{device['name']} ({'.'.join(map(str, device['capability']))})" for device in facts["devices"])
    if not facts["built"]:
        if facts["torch_cuda"] is None:
            return "no CUDA kernels in this build and no CUDA device"
        return (
            f"no CUDA kernels in this build, and torch is one for CUDA {facts['torch_cuda']}: with nvcc on the PATH, "
            "MOE_ROUTE_CUDA=ON pip install --force-reinstall --no-deps . in the sources; until then torch computes the "
            "operators there"
        )
    built = f"kernels built by nvcc {facts['nvcc']} for {', '.join(facts['architectures'])}"
    if facts["torch_cuda"] is None:
        seen = names or f"no device ({facts['problem']})"
        return f"{built}, but torch is a CPU build: install a CUDA build of torch; seen without it: {seen}"
    if facts["driver_too_old"]:
        return (
            f"{built}, which need a driver of CUDA {facts['runtime']} or newer, and this one is of CUDA "
            f"{facts['driver']}: update the driver, or install again with CUDACXX naming the nvcc of a CUDA "
            f"{facts['driver'].partition('.')[0]}.x toolkit and MOE_ROUTE_CUDA=ON"
        )
    if not facts["devices"] or not facts["available"]:
        return f"{built}, but there is no device: {facts['problem'] or 'torch sees none'}"
    alien = [device["name"] for device in facts["devices"] if not device["covered"]]
    if alien:
        old = "" if facts["driver_compiles_ptx"] else f" (a driver of CUDA {facts['driver']} cannot compile their PTX)"
        return (
            f"{built}, which do not run on {', '.join(alien)}{old}: install again with CUDAARCHS=native "
            "MOE_ROUTE_CUDA=ON (compute capability 8.0 or higher)"
        )
    return f"{built}, {len(facts['devices'])} device(s): {names}"


def _backends() -> dict[str, dict[str, str]]:
    """What serves the operators on the CPU and on the accelerator that torch sees, and why where torch does."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    places = ["cpu", *([] if accelerator is None else [accelerator.type])]
    return {place: {"backend": ops.backend(place), "why": library.why_torch(place)} for place in places}


def _checks() -> list[dict[str, Any]]:
    """Run small problems with known answers."""
    checks = [_check_route(), _check_bits(), _check_round_trip()]
    return [*checks, _check_cuda()] if _cuda_usable(_cuda()) and not library.serves_cuda() else checks


def _problem() -> tuple[torch.Tensor, ops.RouterSpec]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 60, generator=generator), ops.RouterSpec(renormalize="sum")


def _check_route() -> dict[str, Any]:
    from moe_route import reference

    logits, spec = _problem()
    tables = [ops.StatisticsTables.zeros(60, groups=1) for _ in range(2)]
    weights, ids = ops.route(logits, 4, spec, statistics=tables[0])
    expected, expected_ids = reference.route(logits.double(), 4, spec, statistics=tables[1])
    same = torch.equal(ids, expected_ids) and torch.equal(tables[0].metric("counts"), tables[1].metric("counts"))
    error = float((weights - expected).abs().max())
    return {
        "name": "route",
        "ok": same and error < 1e-6,
        "detail": f"ids and counts {'equal' if same else 'differ from'} the reference, weights within {error:.1e}",
    }


def _check_bits() -> dict[str, Any]:
    native = library.native()
    if native is None:
        return {"name": "same bits", "ok": True, "detail": f"no kernels to compare: {library.why_absent()}"}
    logits, spec = _problem()
    before, results = native.instruction_set(), []
    try:
        for name in native.supported_instruction_sets():
            native.set_instruction_set(name)
            results.append(ops.route(logits, 4, spec))
    finally:
        native.set_instruction_set(before)
    same = all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))
    names = ", ".join(native.supported_instruction_sets())
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


_CUDA_PROGRAM = "from moe_route.description import device_difference; print(device_difference('cuda'))"


def _check_cuda() -> dict[str, Any]:
    """Check the CUDA kernels in a process of its own: an error that ends the device's context ends that process."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", _CUDA_PROGRAM], capture_output=True, text=True)
    said = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines()
    ended = "" if ran.returncode == 0 else f"the check ended with code {ran.returncode}"
    differs = said[-1] if said else ended
    return {
        "name": "cuda",
        "ok": not differs,
        "detail": differs or "as torch computes, with the same bits as on the CPU",
    }


def device_difference(device: str) -> str:
    """In what the kernels of a device differ from torch, or their bits from the CPU's; "" for nothing."""
    ops.load_kernels(60, torch.empty(0, device=device).device)
    if library.withdrawn:
        return "; ".join(library.withdrawn.values())
    logits, spec = _problem()
    results = []
    for place in ("cpu", device):
        statistics = ops.StatisticsTables.zeros(60, groups=1, device=place)
        weights, ids = ops.route(logits.to(place), 4, spec, statistics=statistics)
        slots = ops.dispatch(ids, 60)
        out = ops.combine(ops.permute(logits.to(place), slots), weights, slots)
        results.append([result.cpu() for result in (weights, ids, statistics.groups, *slots, out)])
    same = all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    return "" if same else "not the bits of the CPU"

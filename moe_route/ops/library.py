"""The compiled library, where there is one, and which backend serves the operators on a device.

This is the one module that imports `moe_route._C`. Importing the library registers its CPU kernels; those of CUDA are
registered where they can run. Every other device, and every device without the library, is served by torch
(`torch_backend`). ``MOE_ROUTE_BACKEND`` chooses: ``auto`` (default), ``native`` (an error where no kernel runs) or
``torch`` (the library is not loaded).
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from importlib import import_module
from types import ModuleType

import torch  # loads the libraries that _C is linked with

logger = logging.getLogger(__name__)

VARIABLE = "MOE_ROUTE_BACKEND"
_CHOICES = ("auto", "native", "torch")
_INSTALL = "install moe-route from its sources with a C++20 compiler (MOE_ROUTE_NATIVE=ON pip install .)"

withdrawn: dict[str, str] = {}
"""Kernels that the check on a CUDA device took out of service -> why."""


def asked() -> str:
    """The backend that ``MOE_ROUTE_BACKEND`` asks for. ValueError for an unknown one."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in _CHOICES:
        raise ValueError(f"{VARIABLE}={wanted!r} is not one of {', '.join(_CHOICES)}")
    return wanted


def _loaded() -> tuple[ModuleType | None, str]:
    """The library, or None and why."""
    wanted = asked()
    if wanted == "torch":
        return None, f"{VARIABLE}=torch asks for it"
    try:
        return import_module("moe_route._C"), ""
    except ModuleNotFoundError as error:
        why = f"this installation has no compiled library for Python {sys.version_info[0]}.{sys.version_info[1]} here"
        if error.name != "moe_route._C":
            raise
    except ImportError as error:
        why = f"the compiled library does not load ({error})"
    if wanted == "native":
        raise ImportError(f"{VARIABLE}=native, but {why}: {_INSTALL}, or unset {VARIABLE}")
    return None, why


_library, _why_absent = _loaded()


def native() -> ModuleType | None:
    """The compiled library, None where torch serves the CPU too."""
    return _library


def why_absent() -> str:
    """Why there is no compiled library; "" where there is one."""
    return _why_absent


def required() -> ModuleType:
    """The compiled library. RuntimeError, with how to get it, where there is none."""
    if _library is None:
        raise RuntimeError(f"this needs the compiled library, and {_why_absent}: {_INSTALL}")
    return _library


def instruction_set() -> str:
    """The instruction set of the CPU kernels in force ("avx2", ...); "torch" without the library."""
    return "torch" if _library is None else str(_library.instruction_set())


def best_instruction_set() -> str:
    """The widest that this build and this processor have; "torch" without the library."""
    return "torch" if _library is None else str(_library.best_instruction_set())


@cache
def serves_cuda() -> str:
    """Register the CUDA kernels where this torch can launch them: "" if so, else why not."""
    if _library is None:
        return _why_absent
    if torch.version.hip is not None:
        return "the kernels are for CUDA, and this torch is for ROCm"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if not _library.build_info()["cuda"]:
        return "this installation has no CUDA kernels (with nvcc: MOE_ROUTE_CUDA=ON pip install . in the sources)"
    _library.set_required(os.environ.get("MOE_ROUTE_SELF_CHECK", "1") != "0")
    _library.register_cuda()
    return ""


def why_torch(device: torch.device | str) -> str:
    """Why torch serves operators on ``device``; "" where kernels serve all of them."""
    kind = torch.device(device).type
    if kind == "cpu":
        return _why_absent
    if kind == "cuda":
        return serves_cuda() or "; ".join(withdrawn.values())
    return "" if kind == "meta" else _why_absent or f"there are no kernels for {kind} devices"


def backend(device: torch.device | str) -> str:
    """What serves the operators on ``device``: "cpu avx2" (the kernels' instruction set), "cuda" or "torch".

    Where a check took some CUDA kernels out of service, it names them: "cuda, torch for combine".
    """
    kind = torch.device(device).type
    if kind == "cuda" and not serves_cuda():
        return f"cuda, torch for {', '.join(withdrawn)}" if withdrawn else "cuda"
    if why_torch(device):
        return "torch"
    return f"cpu {instruction_set()}" if kind == "cpu" else kind


def served(device: torch.device) -> str:
    """ "kernels" or "torch": what recordings say of the device. Kernels give the same bits wherever they run."""
    return "torch" if why_torch(device) else "kernels"


@cache
def tell(device: torch.device) -> None:
    """Say once for a kind of device that torch serves it, and why."""
    if why := why_torch(device):
        logger.warning("torch computes the routing operators on %s, since %s", device, why)


def refuse_torch(device: torch.device) -> None:
    """RuntimeError where kernels were asked for (``MOE_ROUTE_BACKEND=native``) and torch would serve ``device``."""
    if asked() == "native" and (why := why_torch(device)):
        raise RuntimeError(
            f"{VARIABLE}=native, but {why}: move the tensors to a device with kernels, or unset {VARIABLE}"
        )

"""The backends every operator test runs on, each with the same functions.

Tests that have no meaning on one of them say so in `HARD_CASES.md`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moe_route import ops, reference
from moe_route.contract.experts import Dispatch
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.ops import library
from moe_route.ops.registration import register
from moe_route.ops.self_check import Checked

_C: Any = library.native()  # None where torch serves the CPU

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: what test ids show.
        module: has the functions.
        native: computes with the project's own numerics; all native backends give the same bits.
        missing: why it cannot run here, or None.
        within: makes the context that every call runs in.
        instruction_set: the one in force during a call; None: the library's own choice.
        float64: takes float64 logits.
        emulated: runs kernels on an emulated device, thread by thread.
    """

    name: str
    module: Any
    native: bool
    missing: str | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    instruction_set: str | None = None
    float64: bool = True
    emulated: bool = False

    def times(self, wanted: int) -> int:
        """How often a test does again what costs time: an emulated device does a fifth of it."""
        return max(1, wanted // 5) if self.emulated else wanted

    def _call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        with self.within():
            return getattr(self.module, function)(*args, **kwargs)

    def route(self, logits: Tensor, k: int, spec: RouterSpec, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._call("route", logits, k, spec, **kwargs)

    def observe(
        self,
        logits: Tensor,
        ids: Tensor,
        weights: Tensor | None,
        spec: RouterSpec,
        *,
        statistics: StatisticsTables,
        **kwargs: Any,
    ) -> None:
        self._call("observe", logits, ids, weights, spec, statistics=statistics, **kwargs)

    def observe_layers(
        self,
        logits: Sequence[Tensor],
        ids: Sequence[Tensor],
        weights: Sequence[Tensor],
        spec: RouterSpec,
        *,
        statistics: Sequence[StatisticsTables],
        **kwargs: Any,
    ) -> None:
        self._call("observe_layers", logits, ids, weights, spec, statistics=statistics, **kwargs)

    def route_weights(self, logits: Tensor, ids: Tensor, spec: RouterSpec, **kwargs: Any) -> Tensor:
        return self._call("route_weights", logits, ids, spec, **kwargs)

    def dispatch(self, ids: Tensor, num_experts: int, *, block: int = 1) -> Dispatch:
        return self._call("dispatch", ids, num_experts, block=block)

    def permute(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        return self._call("permute", x, dispatch)

    def combine(self, rows: Tensor, weights: Tensor, dispatch: Dispatch, residual: Tensor | None = None) -> Tensor:
        return self._call("combine", rows, weights, dispatch, residual)

    def expert_rows(self, x: Tensor, dispatch: Dispatch, up: Tensor, down: Tensor, **kwargs: Any) -> Tensor:
        return self._call("expert_rows", x, dispatch, up, down, **kwargs)

    def expert_activation(self, rows: Tensor, dispatch: Dispatch, **kwargs: Any) -> Tensor:
        return self._call("expert_activation", rows, dispatch, **kwargs)


# ---- one instruction set ----------------------------------------------------------------------------------------


@contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    before = _C.instruction_set()
    _C.set_instruction_set(name)
    try:
        yield
    finally:
        _C.set_instruction_set(before)


def _cpu(name: str) -> Backend:
    missing = None if name in _C.supported_instruction_sets() else f"this processor or build has no {name}"
    return Backend(
        name, ops, native=True, missing=missing, within=partial(_instruction_set, name), instruction_set=name
    )


# ---- the CUDA kernels, emulated ---------------------------------------------------------------------------------

EMULATED = Path(os.environ.get("MOE_ROUTE_EMULATED") or ROOT / "build" / "cpp" / "moe_route_emulated.so")
_EMULATED_SOURCES = ("csrc/cuda", "csrc/include", "csrc/torch", "tests/emulated", "tests/emulator/source")


def _why_not_emulated() -> str | None:
    """Why the emulated kernels cannot be tested, or None. MOE_ROUTE_REQUIRE_EMULATED=1 makes that an error."""
    why = None
    if not EMULATED.is_file():
        why = f"the emulated CUDA kernels are not built ({EMULATED.name}): make emulated"
    elif "MOE_ROUTE_EMULATED" not in os.environ:
        files = [path for folder in _EMULATED_SOURCES for path in (ROOT / folder).rglob("*") if path.is_file()]
        newer = [path for path in files if path.stat().st_mtime > EMULATED.stat().st_mtime]
        if newer:
            why = f"the emulated CUDA kernels are older than {newer[0].relative_to(ROOT)}: make emulated"
    if why and os.environ.get("MOE_ROUTE_REQUIRE_EMULATED") == "1":
        raise RuntimeError(why)
    return why


class _EmulatedModule:
    """The functions of csrc/torch/self_check.h, as `moe_route._C` has them."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(ctypes.CDLL(str(EMULATED)), f"moe_route_emulated_{name}")
        function.restype = None

        def call(*values: Any) -> None:
            function(*(value.encode() if isinstance(value, str) else value for value in values))

        return call


EMULATED_KERNELS = Checked("moe_route_emulated", lambda index: torch.device("cpu"), _EmulatedModule, {})


@cache
def _emulated_operators() -> Any:
    register("moe_route_emulated", EMULATED_KERNELS)
    torch.ops.load_library(str(EMULATED))
    return torch.ops.moe_route_emulated


def emulated() -> AbstractContextManager[None]:
    """`moe_route.ops` calls the emulated operators. One thread at a time."""
    return served_by(_emulated_operators())


@contextmanager
def served_by(operators: Any) -> Iterator[None]:
    """`moe_route.ops` calls the operators of this namespace. One thread at a time."""
    gate, dispatch = sys.modules["moe_route.ops.gate"], sys.modules["moe_route.ops.dispatch"]
    experts = sys.modules["moe_route.ops.experts"]
    of_gate = {f"_{name}": getattr(operators, name).default for name in _GATE_OPERATORS}
    of_dispatch = {f"_{name}": getattr(operators, name).default for name in _DISPATCH_OPERATORS}
    of_experts = {f"_{name}": getattr(operators, name).default for name in _EXPERTS_OPERATORS}
    with (
        mock.patch.multiple(gate, **of_gate),
        mock.patch.multiple(dispatch, **of_dispatch),
        mock.patch.multiple(experts, **of_experts),
    ):
        yield


@contextmanager
def emulated_tuning(tuning: dict[str, int]) -> Iterator[None]:
    """Emulated kernels are launched as these tunables (csrc/cuda/tunables.cu) say. ValueError as tune() words it."""
    _emulated_operators()
    tune = ctypes.CDLL(str(EMULATED)).moe_route_emulated_tune
    tune.argtypes, tune.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_char_p
    usual = {name: usual for name, (usual, _, _) in emulated_tunables().items()}

    def set_all(values: dict[str, int]) -> None:
        for name, value in values.items():
            if problem := tune(name.encode(), value):
                raise ValueError(problem.decode())

    try:
        set_all(tuning)
        yield
    finally:
        set_all({name: usual[name] for name in tuning if name in usual})


@cache
def emulated_tunables() -> dict[str, tuple[int, int, int]]:
    """Name to (usual value, least, most)."""
    rows = ctypes.CDLL(str(EMULATED)).moe_route_emulated_tunables
    rows.restype = ctypes.c_char_p
    table = [line.split() for line in rows().decode().splitlines()]
    return {name: (int(usual), int(least), int(most)) for name, usual, least, most in table}


_GATE_OPERATORS = ("route", "observe", "observe_layers", "route_weights")
_DISPATCH_OPERATORS = ("dispatch", "permute", "combine")
_EXPERTS_OPERATORS = ("expert_rows", "expert_activation")


# ---- a real device ----------------------------------------------------------------------------------------------


class MovedTo:
    """The operators with their tensors moved to a device, each in its own layout, and the results moved back."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __getattr__(self, function: str) -> Callable[..., Any]:
        return partial(self._call, getattr(ops, function))

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        there = {name: self._moved(value) for name, value in kwargs.items()}
        result = function(*(self._moved(value) for value in args), **there)
        self._bring_back(kwargs.get("statistics"), there.get("statistics"))
        return self._returned(result)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._moved_tensor(value)
        if isinstance(value, SteeringTables):
            return value.to(self.device)
        if isinstance(value, StatisticsTables):
            tables = [None if table is None else table.to(self.device) for table in (value.groups, value.segments)]
            return StatisticsTables(*tables, value.num_experts, value.metrics, value.entropy)
        if isinstance(value, Dispatch):
            return Dispatch(*(self._moved_tensor(tensor) for tensor in value))
        return [self._moved(one) for one in value] if isinstance(value, list) else value

    def _moved_tensor(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad or (tensor.is_contiguous() and tensor.storage_offset() == 0):
            return tensor.to(self.device)
        storage = tensor.untyped_storage().to(device=self.device)
        empty = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _bring_back(self, here: Any, there: Any) -> None:
        if isinstance(here, list):
            for one, other in zip(here, there, strict=True):
                self._bring_back(one, other)
        elif here is not None:
            here.groups.copy_(there.groups)
            if here.segments is not None:
                here.segments.copy_(there.segments)

    def _returned(self, result: Any) -> Any:
        if isinstance(result, Dispatch):
            return Dispatch(*(tensor.cpu() for tensor in result))
        if isinstance(result, tuple):
            return tuple(tensor.cpu() for tensor in result)
        return None if result is None else result.cpu()


def _why_no_cuda() -> str | None:
    if not _C.build_info()["cuda"]:
        return "this build has no CUDA kernels"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _compiled() -> tuple[Backend, ...]:
    """All that the compiled library runs on."""
    return (
        *map(_cpu, _C.build_info()["instruction_sets"]),
        # The operators as a user calls them: the instruction set the library chose for this processor.
        Backend("operators", ops, native=True),
        Backend(
            "emulated", ops, native=True, missing=_why_not_emulated(), within=emulated, float64=False, emulated=True
        ),
        Backend("cuda", MovedTo("cuda"), native=True, missing=_why_no_cuda(), float64=False),
    )


BACKENDS: tuple[Backend, ...] = (
    Backend("reference", reference, native=False),
    # The reference behind the operators' arguments and checks: what serves where no kernels do.
    Backend("torch", ops, native=False, within=lambda: served_by(torch.ops.moe_route_torch)),
    *(() if _C is None else _compiled()),
)


def available(choose: Callable[[Backend], bool] = lambda backend: True) -> list[Backend]:
    """The backends that can run here and that `choose` accepts."""
    return [backend for backend in BACKENDS if backend.missing is None and choose(backend)]

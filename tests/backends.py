"""The backends every operator test runs on, each with the same six functions.

A further backend (an emulated or a real CUDA device) is one more entry of `BACKENDS`; tests that have no meaning there
say so in `HARD_CASES.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_route import _C, ops, reference
from moe_route.ops import Dispatch, RouterSpec, StatisticsTables


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: what test ids show.
        native: computes with the project's own numerics; all native backends give the same bits.
        missing: why it cannot run here, or None.
        instruction_set: what to set before every call, or None to leave the library's own choice.
    """

    name: str
    module: Any
    native: bool
    missing: str | None = None
    instruction_set: str | None = None

    def _call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        if self.instruction_set is None:
            return getattr(self.module, function)(*args, **kwargs)
        before = _C.instruction_set()
        _C.set_instruction_set(self.instruction_set)
        try:
            return getattr(self.module, function)(*args, **kwargs)
        finally:
            _C.set_instruction_set(before)

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

    def route_weights(self, logits: Tensor, ids: Tensor, spec: RouterSpec, **kwargs: Any) -> Tensor:
        return self._call("route_weights", logits, ids, spec, **kwargs)

    def dispatch(self, ids: Tensor, num_experts: int, *, block: int = 1) -> Dispatch:
        return self._call("dispatch", ids, num_experts, block=block)

    def permute(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        return self._call("permute", x, dispatch)

    def combine(self, rows: Tensor, weights: Tensor, dispatch: Dispatch, residual: Tensor | None = None) -> Tensor:
        return self._call("combine", rows, weights, dispatch, residual)


def _instruction_set(name: str) -> Backend:
    missing = None if name in _C.supported_instruction_sets() else f"this processor or build has no {name}"
    return Backend(name, ops, native=True, missing=missing, instruction_set=name)


BACKENDS: tuple[Backend, ...] = (
    Backend("reference", reference, native=False),
    _instruction_set("portable"),
    _instruction_set("avx2"),
    _instruction_set("avx512"),
    # The operators as a user calls them: the instruction set the library chose for this processor.
    Backend("operators", ops, native=True),
)

NATIVE = tuple(backend for backend in BACKENDS if backend.native)


def available(choose: Callable[[Backend], bool] = lambda backend: True) -> list[Backend]:
    """The backends that can run here and that `choose` accepts."""
    return [backend for backend in BACKENDS if backend.missing is None and choose(backend)]

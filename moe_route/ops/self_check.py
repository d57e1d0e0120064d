"""Compare kernels with torch on a device that they have not run on before, and take out of service those that differ.

The CUDA kernels were developed without a device. So the first call of each on a device, for each number of experts,
runs a few problems through the kernel and through torch (`moe_route_torch`), in each dtype and with each kind of
tables. ``MOE_ROUTE_SELF_CHECK`` chooses what a difference does: ``1`` (default) warns, and torch serves the operator
from then on; ``raise`` raises; ``0`` turns the check off.

Equal must be: ids, counts, the order of slots. Weights and rows may differ by the rounding of their sums.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_route.base.devices import capturing
from moe_route.contract.limits import MAX_EXPERTS
from moe_route.contract.spec import NUMBERS, RouterSpec
from moe_route.contract.tables import FIXED_POINT, SCALARS, StatisticsTables, SteeringTables, token_table
from moe_route.ops import library

_TOKENS = 33
_HIDDEN = 40
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_SPECS = (RouterSpec(renormalize="sum"), RouterSpec(score="sigmoid", renormalize="sum", scale=2.5))
_REPORT = (
    "please report it with what `moe-route doctor --json` prints; MOE_ROUTE_BACKEND=torch never uses these kernels"
)


class SelfCheckError(RuntimeError):
    """A kernel gives other numbers than torch, or cannot run, and ``MOE_ROUTE_SELF_CHECK=raise`` asks for an error."""


@dataclass
class Checked:
    """The kernels of one library, on the devices of one kind.

    Attributes:
        namespace: ``torch.ops.<namespace>`` runs them.
        place: makes the device of an index.
        module: the functions of csrc/torch/self_check.h.
        withdrawn: kernels that were taken out of service -> why.
    """

    namespace: str
    place: Callable[[int], torch.device]
    module: Callable[[], Any]
    withdrawn: dict[str, str]
    _passed: dict[tuple[object, int], None] = field(default_factory=dict)

    def check(self, index: int, experts: int) -> None:
        """Check the kernels for this many experts on a device, once; 0: those that do not depend on the number."""
        device = self.place(index)
        key = (_kind_of(device), experts)
        if key not in self._passed:
            self._compare(device, experts)
            self._passed[key] = None
        self.module().mark(index, experts)

    def operator(self, index: int, experts: int) -> None:
        """The operator ``check_kernels``, which a kernel calls before its first run; it reports instead of raising."""
        try:
            if capturing(self.place(index)):
                raise RuntimeError(
                    f"the kernels have not been checked on {self.place(index)}, and a CUDA graph is being captured: "
                    f"call moe_route.ops.load_kernels({max(experts, 1)}, '{self.place(index)}') before"
                )
            self.check(index, experts)
        except Exception as error:
            self.module().report(str(error))

    def forget(self) -> None:
        """Check everything anew from here on. For tests."""
        self._passed.clear()
        self.withdrawn.clear()
        self.module().forget()

    def _compare(self, device: torch.device, experts: int) -> None:
        with self._unchecked(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            if device.type == "cuda":
                self._load(device, experts)
            problems = _of_gate(experts) if experts else _of_rows()
            for kernels, problem in problems:
                if kernels in self.withdrawn:
                    continue
                try:
                    difference = problem(device, getattr(torch.ops, self.namespace))
                except RuntimeError as error:
                    difference = str(error).partition("\n")[0]
                    self._refuse_dead(device, kernels, difference)
                if difference:
                    self._withdraw(kernels, device, difference)

    def _load(self, device: torch.device, experts: int) -> None:
        try:
            self.module().load_kernels(device.index, max(experts, 1))
        except RuntimeError as error:
            for kernels in (
                ("gate", "dispatch") if experts else ("permute", "combine", "expert_rows", "expert_activation")
            ):
                if kernels not in self.withdrawn:
                    self._withdraw(kernels, device, str(error))

    def _withdraw(self, kernels: str, device: torch.device, why: str) -> None:
        words = f"moe-route's {kernels} kernels on {_named(device)} were taken out of service: {why}"
        if os.environ.get("MOE_ROUTE_SELF_CHECK") == "raise":
            raise SelfCheckError(f"{words}; {_REPORT}")
        self.module().withdraw(kernels)
        self.withdrawn[kernels] = words
        warnings.warn(
            f"{words}. torch computes in their place, right and slower; {_REPORT}", RuntimeWarning, stacklevel=2
        )

    @staticmethod
    def _refuse_dead(device: torch.device, kernels: str, why: str) -> None:
        """Raise if the error ended the device's context, in which torch cannot compute either."""
        try:
            torch.ones(1, device=device).sum().item()
        except RuntimeError:
            raise RuntimeError(
                f"moe-route's {kernels} kernels ended the context of {_named(device)} ({why}): start the process "
                f"again with MOE_ROUTE_BACKEND=torch, and {_REPORT}"
            ) from None

    @contextmanager
    def _unchecked(self) -> Iterator[None]:
        """This thread's calls run kernels that were not checked yet."""
        self.module().set_allowed_here(True)
        try:
            yield
        finally:
            self.module().set_allowed_here(False)


def _kind_of(device: torch.device) -> object:
    """What decides which machine code runs: compute capability and driver."""
    if device.type != "cuda":
        return device.type
    return (torch.cuda.get_device_capability(device), library.required().cuda_runtime()["driver"])


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    driver = library.required().cuda_runtime()["driver"]
    return f"{device} ({torch.cuda.get_device_name(device)}, driver of CUDA {driver // 1000}.{driver % 1000 // 10})"


CUDA = Checked("moe_route", lambda index: torch.device("cuda", index), library.required, library.withdrawn)
"""The kernels of the compiled library."""


def load_kernels(num_experts: int, device: torch.device | str) -> None:
    """Load every CUDA kernel that a later call with this many experts may launch, and check them on the device.

    Its first call can then be captured into a CUDA graph. Otherwise the first launch loads a kernel, which may wait for
    the device or be refused during a capture, and which kernels a call launches depends on what it steers and counts.
    Attaching, recording and steering call this function themselves. It takes a part of a second the first time for a
    device (see above), and nothing afterwards.

    Args:
        num_experts: E, 1..4096.
        device: a CUDA device. For other devices, and where torch serves CUDA, this does nothing.

    Raises:
        ValueError: num_experts is out of range.
        RuntimeError: the device cannot be used.
    """
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts = {num_experts} is outside 1..{MAX_EXPERTS}")
    place = torch.device(device)
    if place.type != "cuda" or library.serves_cuda() or not torch.cuda.is_initialized():
        return
    index = torch.cuda.current_device() if place.index is None else place.index
    for experts in (0, num_experts):
        CUDA.check(index, experts)


# ---- problems: each runs through the kernels and through torch, and says what differs, "" for nothing -------------

Problem = Callable[[torch.device, Any], str]


def _of_gate(experts: int) -> Iterator[tuple[str, Problem]]:
    for spec in _SPECS:
        for dtype in _DTYPES:
            for kind in ("counts", "statistics", "steering", "given", "weights"):
                yield "gate", _gate_problem(experts, spec, dtype, kind)
    for dtype in (torch.int32, torch.int64):
        yield "dispatch", _dispatch_problem(experts, dtype)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _gate_problem(experts: int, spec: RouterSpec, dtype: torch.dtype, kind: str) -> Problem:
    k = min(experts, 8)

    def problem(device: torch.device, operators: Any) -> str:
        logits = _random(experts, _TOKENS, experts).to(dtype).to(device)
        arguments = _gate_arguments(experts, k, spec, kind, device)
        both = []
        for ops in (torch.ops.moe_route_torch, operators):
            tables = StatisticsTables.zeros(
                experts,
                groups=2,
                segments=3,
                metrics=("counts",) if kind == "counts" else ("counts", "probability", "weight", "natural_counts"),
                entropy=kind != "counts",
                device=device,
            )
            if kind == "weights":
                ids = arguments["choice_ids"]
                weights = ops.route_weights(logits, ids, spec.policy, None, *spec.numbers)
                ops.observe(logits, ids, weights, spec.policy, arguments["tokens"], *tables.arguments, *spec.numbers)
            else:
                rest = dict(zip(NUMBERS, spec.numbers, strict=True))
                groups, layout, segments = tables.arguments
                counted = {"group_statistics": groups, "statistics": layout, "segment_statistics": segments}
                weights, ids = ops.route(logits, k, spec.policy, **counted, **rest, **arguments)
            both.append((weights, ids, tables))
        (expected, expected_ids, expected_tables), (weights, ids, tables) = both
        where = f"{experts} experts, {str(dtype).removeprefix('torch.')}, {spec.score}, with {kind}"
        if not torch.equal(ids, expected_ids):
            return f"other experts are chosen ({where})"
        if not _close(weights, expected, 2e-6):
            return f"weights differ by {_error(weights, expected):.1e} ({where})"
        return _table_difference(tables, expected_tables, where)

    return problem


def _gate_arguments(experts: int, k: int, spec: RouterSpec, kind: str, device: torch.device) -> Mapping[str, Any]:
    """Arguments of `route` beside logits, k, policy, numbers and statistics."""
    number = torch.arange(_TOKENS)
    tokens = token_table(
        _TOKENS,
        steering_row=number % 3 - 1 if kind == "steering" else None,
        group=number % 2,
        segment=number % 3,
        valid=number != 5,
    ).to(device)
    arguments: dict[str, Any] = {"tokens": tokens}
    if spec.score == "sigmoid":
        arguments["correction_bias"] = (_random(1, experts) / 8).to(device)
    if kind == "steering":
        force = torch.zeros(2, experts)
        force[0, 0], force[1, -1] = 1, -1
        steering = SteeringTables(
            2,
            experts,
            scale=1 + _random(2, 2, experts) / 8,
            bias=_random(3, 2, experts),
            force=force if experts > k else None,
            temperature=torch.tensor([0.5, 2.0]),
        ).to(device)
        arguments |= dict(zip(("steering", "steering_planes", "row_params", "remap"), steering.packed, strict=True))
    if kind in ("given", "weights"):
        ids = _random(4, _TOKENS, experts).topk(k).indices.to(torch.int32)
        ids[7] = -1
        arguments |= {"choice_ids": ids.to(device), "choice_mode": 2}
    return arguments


def _table_difference(tables: StatisticsTables, expected: StatisticsTables, where: str) -> str:
    for part in ("groups", "segments"):
        for name in (*tables.metrics, *SCALARS):
            metric = name in tables.metrics
            ours, theirs = (
                table.metric(name, part) if metric else table.scalar(name, part) for table in (tables, expected)
            )
            exact = name not in ("probability", "weight", "entropy", "moved")
            if exact and not torch.equal(ours, theirs):
                return f"the {name} of {part} differ ({where})"
            if not exact and not _close(ours * FIXED_POINT, theirs * FIXED_POINT, 2e-6 * _TOKENS):
                return f"the {name} of {part} differs ({where})"
    return ""


def _dispatch_problem(experts: int, dtype: torch.dtype) -> Problem:
    def problem(device: torch.device, operators: Any) -> str:
        ids = torch.randint(-1, experts, (_TOKENS, 3), generator=torch.Generator().manual_seed(experts))
        ids = ids.to(dtype).to(device)
        for block in (1, 16):
            ours, theirs = (ops.dispatch(ids, experts, block) for ops in (operators, torch.ops.moe_route_torch))
            if not all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)):
                return f"slots are sorted in another order ({experts} experts, block {block})"
        return ""

    return problem


def _of_rows() -> Iterator[tuple[str, Problem]]:
    for dtype in _DTYPES:
        yield "permute", _rows_problem(dtype, "permute")
        yield "combine", _rows_problem(dtype, "combine")
        yield "expert_rows", _rows_problem(dtype, "expert_rows")
        yield "expert_activation", _rows_problem(dtype, "expert_activation")


def _rows_problem(dtype: torch.dtype, operation: str) -> Problem:
    experts, hidden, k = 5, _HIDDEN, 2

    def problem(device: torch.device, operators: Any) -> str:
        x = _random(5, _TOKENS, hidden).to(dtype).to(device)
        ids = torch.randint(-1, experts, (_TOKENS, k), generator=torch.Generator().manual_seed(6)).to(device)
        offsets, _, counts, order, inverse = torch.ops.moe_route_torch.dispatch(ids, experts, 1)
        rows = torch.ops.moe_route_torch.permute(x, order, inverse)
        weights = _random(7, _TOKENS, k).to(device)
        up, down = (
            (_random(seed, experts, *shape) / 8).to(dtype).to(device)
            for seed, shape in ((8, (2 * hidden, hidden)), (9, (hidden, hidden)))
        )
        between = (1, 1, 1.0, float("inf"), 0.0)
        calls: Mapping[str, tuple[Any, ...]] = {
            "permute": (x, order, inverse),
            "combine": (rows, weights, order, inverse, x),
            "expert_rows": (x, offsets, counts, order, k, up, down, None, None, *between),
            "expert_activation": (rows, offsets, None, *between),
        }
        arguments = calls[operation]
        ours, theirs = (getattr(ops, operation)(*arguments) for ops in (operators, torch.ops.moe_route_torch))
        used = (
            (order >= 0)[:, None]
            if operation in ("expert_rows", "expert_activation")
            else torch.ones_like(ours, dtype=torch.bool)
        )
        ours, theirs = (torch.where(used, one, 0).float() for one in (ours, theirs))
        if not _close(ours, theirs, _TOLERANCE[dtype]):
            return f"rows differ by {_error(ours, theirs):.1e} ({str(dtype).removeprefix('torch.')})"
        return ""

    return problem


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return bool(((ours - theirs).abs() <= tolerance * theirs.abs().clamp(min=1)).all())


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())

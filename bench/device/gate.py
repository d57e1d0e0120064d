"""The gate on a device: `moe_route.bench.gate`'s contenders, the kernel without torch's dispatcher, and the floors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.device import floors
from bench.device.place import GRAPH, Place
from moe_route import _C, ops
from moe_route.bench.gate import SPEC, Gate
from moe_route.bench.timing import Contender, Race, Shape, race
from moe_route.contract.spec import ORDERS, RENORMALIZATIONS, SCORES

FULL = ("counts", "probability", "weight")
ROUTE, COUNTED, ALL = "route", "route + counts", "route + counts + probability + weight + entropy"
SOFT, FORCED, ALL_SOFT = f"{COUNTED}, soft steering", f"{COUNTED}, forced", f"{ALL}, soft steering"
BARE = ", without the dispatcher"
PEERS = {
    ROUTE: "torch",
    COUNTED: "torch",
    ALL: "torch + p.sum(0)",
    SOFT: "torch, soft steering",
    FORCED: "torch",
    ALL_SOFT: "torch, soft steering",
    COUNTED + BARE: "torch",
    ALL_SOFT + BARE: "torch, soft steering",
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of gate.h
# Below, a call moves so little that being launched is its floor.
LAUNCH_BOUND_TOKENS = 2048


def moved_bytes(shape: Shape) -> int:
    """Logits read, weights and ids written, each once."""
    return shape.tokens * (shape.experts * shape.dtype.itemsize + shape.k * 8)


def floor_of(shape: Shape) -> str:
    return floors.LAUNCH if shape.tokens < LAUNCH_BOUND_TOKENS else floors.COPY


class DeviceGate(Gate):
    """The contenders over one shape at one place; in a graph, torch counts with `scatter_add_`: `bincount` waits for
    the device, which cannot be captured."""

    def __init__(self, shape: Shape, place: Place, mode: str):
        super().__init__(shape, place.inputs((shape.tokens, shape.experts), shape.dtype))
        self.place, self.captured = place, mode == GRAPH
        self.ones = torch.ones(shape.tokens * shape.k, dtype=torch.int64, device=self.device)

    def count(self, ids: torch.Tensor) -> None:
        if self.captured:
            self.torch_counts.scatter_add_(0, ids.flatten(), self.ones)
        else:
            super().count(ids)

    def bare(
        self, *, metrics: Sequence[str], entropy: bool = False, steering: ops.SteeringTables | None = None
    ) -> Contender:
        """The same as `routed`, launched from prepared arguments into tensors that exist: the kernel and its launch."""
        shape = self.shape
        tables = ops.StatisticsTables.zeros(
            shape.experts, groups=1, metrics=tuple(metrics), entropy=entropy, device=self.device
        )
        groups, layout, _ = tables.arguments
        more: dict[str, int] = {
            "score": SCORES.index(SPEC.score),
            "order": ORDERS.index(SPEC.order),
            "renormalize": RENORMALIZATIONS.index(SPEC.renormalize),
            "group_statistics": groups.data_ptr(),
            "num_groups": 1,
            "statistics_planes": layout & 0xFFFF,
            "entropy": entropy,
        }
        kept = [groups]
        if steering is not None:
            packed, steered, _, _ = steering.packed
            assert packed is not None
            tokens = ops.token_table(shape.tokens, steering_row=0, device=self.device)
            more |= {"steering": packed.data_ptr(), "steering_planes": steered, "steering_rows": steering.rows}
            more |= {"token_table": tokens.data_ptr()}
            kept += [packed, tokens]
        launches = [Launch(logits, shape, more, kept) for logits in self.logits.inputs]
        return lambda index: launches[index % len(launches)]()

    def contenders(self) -> dict[str, Contender]:
        soft = self.soft_steering()
        out = {
            floors.LAUNCH: floors.launching(self.place),
            floors.COPY: floors.copying(moved_bytes(self.shape), self.place),
            "torch": self.torch_gate,
            "torch + p.sum(0)": self.torch_gate_and_mass,
            "torch, soft steering": self.torch_soft,
            ROUTE: self.routed(),
            COUNTED: self.routed(metrics=("counts",)),
            ALL: self.routed(metrics=FULL, entropy=True),
            SOFT: self.routed(metrics=("counts",), steering=soft),
            FORCED: self.routed(metrics=("counts",), steering=self.forced_steering()),
            ALL_SOFT: self.routed(metrics=FULL, entropy=True, steering=soft),
        }
        if not self.captured:  # a graph holds no dispatcher anyway
            out[COUNTED + BARE] = self.bare(metrics=("counts",))
            out[ALL_SOFT + BARE] = self.bare(metrics=FULL, entropy=True, steering=soft)
        return out

    def race(self, mode: str, rounds: int) -> Race:
        burst = self.place.calls(mode, len(self.logits))
        return race(self.contenders(), rounds=rounds, warmup=2, burst=burst, clock=self.place.clocks[mode])


class Launch:
    """One prepared launch on the current stream; `kept` are the tensors behind the addresses of `more`."""

    def __init__(self, logits: torch.Tensor, shape: Shape, more: dict[str, int], kept: list[torch.Tensor]):
        self.device = logits.device
        self.weights = torch.empty(shape.tokens, shape.k, device=self.device)
        self.ids = torch.empty(shape.tokens, shape.k, dtype=torch.int32, device=self.device)
        self.kept = [logits, *kept]
        sizes = (shape.tokens, shape.experts, shape.k)
        addresses = (self.weights.data_ptr(), self.ids.data_ptr())
        self.args = _C.GateArgs(logits.data_ptr(), DTYPES[logits.dtype], *sizes, *addresses, **more)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.device.type == "cuda":
            self.args.run_cuda(torch.cuda.current_stream(self.device).cuda_stream)
        else:
            self.args.run()
        return self.weights, self.ids

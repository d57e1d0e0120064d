"""The gate against the torch operations it replaces: softmax, top-k, renormalize, bincount."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_route import ops
from moe_route.bench.results import Measured, Target, rows
from moe_route.bench.timing import Contender, Effort, Pool, Race, Shape, race
from moe_route.ops import library

SPEC = ops.RouterSpec(score="softmax", renormalize="sum")

# Experts and top-k of public models; the last one goes beyond them.
MODELS = {
    "Mixtral-8x7B": (8, 2),
    "Phi-3.5-MoE": (16, 2),
    "gpt-oss-20b": (32, 4),
    "Qwen1.5-MoE-A2.7B": (60, 4),
    "OLMoE-1B-7B": (64, 8),
    "Qwen3-30B-A3B": (128, 8),
    "DeepSeek-V3": (256, 8),
    "Kimi-K2": (384, 8),
    "512 experts": (512, 8),
}
KIMI_K3 = (896, 16)  # routes by a sigmoid with a correction bias, its rows do too
IN_BFLOAT16 = ("Mixtral-8x7B", "Phi-3.5-MoE", "OLMoE-1B-7B", "Qwen3-30B-A3B", "DeepSeek-V3")
SHAPES: Sequence[Shape] = (
    *(Shape(experts, k) for experts, k in MODELS.values()),
    Shape(*KIMI_K3, score="sigmoid", biased=True),
    *(Shape(*MODELS[name], torch.bfloat16) for name in IN_BFLOAT16),
    Shape(*KIMI_K3, torch.bfloat16, score="sigmoid", biased=True),
)

READ = "read the logits"
PEERS = {
    "route": "torch",
    "route + counts": "torch",
    "route + counts + probability": "torch + p.sum(0)",
    "route + counts + probability + weight + entropy": "torch + p.sum(0)",
    "route + counts, soft steering": "torch, soft steering",
    "route + counts, forced": "torch, forced",
}
ONE_ROW = ("torch", "route", "route + counts")
COUNTS, ALL = "route + counts", "route + counts + probability + weight + entropy"
SOFT, FORCED = "route + counts, soft steering", "route + counts, forced"
WANTED_ON = {"avx2": 0, "avx512": 1, "avx512_bf16": 1}
WANTED = {
    (8, 2): {COUNTS: (15, 45), ALL: (8, 15)},
    (16, 2): {COUNTS: (12, 25), ALL: (8, 15)},
    (32, 4): {COUNTS: (12, 12)},
    (64, 8): {COUNTS: (15, 15)},
    (128, 8): {COUNTS: (19, 25), ALL: (11, 15), SOFT: (20, 28), FORCED: (14, 18)},
    (256, 8): {COUNTS: (20, 20)},
    KIMI_K3: {COUNTS: (25, 25)},
}
"""Experts and top-k -> how many times as fast as torch a contender is wanted to be, on AVX2 and on AVX-512."""
IN_HALF = 0.8  # the part of it that is wanted of bfloat16 logits
ONE_ROW_WANTED = 4


class Gate:
    """The contenders over one shape. Every one of them takes the number of an input and returns (weights, ids)."""

    def __init__(self, shape: Shape, logits: Pool | None = None):
        self.shape = shape
        self.spec = replace(SPEC, score=shape.score)
        self.logits = Pool((shape.tokens, shape.experts), shape.dtype) if logits is None else logits
        self.device = self.logits[0].device
        generator = torch.Generator().manual_seed(1)
        bias = torch.randn(shape.experts, generator=generator).to(self.device) * 0.1
        self.bias = bias if shape.biased else None
        self.torch_counts = torch.zeros(shape.experts, dtype=torch.int64, device=self.device)
        self.torch_mass = torch.zeros(shape.experts, device=self.device)
        self.std = torch.zeros(1, shape.experts, device=self.device)
        self.std[0, : max(1, min(4, shape.experts // 4))] = 0.5
        self.forced = 1 % shape.experts, 2 % shape.experts  # on, off

    def torch_gate(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._torch(self.logits[index])

    def torch_gate_and_mass(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._torch(self.logits[index], mass=True)

    def torch_soft(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Soft steering of all tokens, as a user of torch would write it."""
        z = self.logits[index].float()
        return self._torch(z + self.std * z.std(dim=-1, correction=0, keepdim=True))

    def torch_forced(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert to the maximum of the row, one to its minimum."""
        z = self.logits[index].float()
        low, high = torch.aminmax(z, dim=-1)
        z = z.clone()
        on, off = self.forced
        z[:, on], z[:, off] = high, low
        return self._torch(z)

    def _torch(self, logits: torch.Tensor, *, mass: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        softmax = self.shape.score == "softmax"
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32) if softmax else torch.sigmoid(logits.float())
        if self.bias is None:
            weights, ids = torch.topk(scores, self.shape.k, dim=-1)
        else:
            ids = torch.topk(scores + self.bias, self.shape.k, dim=-1).indices
            weights = scores.gather(1, ids)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        self.count(ids)
        if mass:
            self.torch_mass += (scores if softmax else scores / scores.sum(dim=-1, keepdim=True)).sum(0)
        return weights, ids

    def count(self, ids: torch.Tensor) -> None:
        self.torch_counts += torch.bincount(ids.flatten(), minlength=self.shape.experts)

    def routed(
        self, *, metrics: Sequence[str] = (), entropy: bool = False, steering: ops.SteeringTables | None = None
    ) -> Contender:
        """`ops.route` with these statistics (none where `metrics` is empty) and every token steered, if at all."""
        statistics = None
        if metrics:
            statistics = ops.StatisticsTables.zeros(
                self.shape.experts, groups=1, metrics=tuple(metrics), entropy=entropy, device=self.device
            )
        tokens = None if steering is None else ops.token_table(self.shape.tokens, steering_row=0, device=self.device)

        def contender(index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return ops.route(
                self.logits[index],
                self.shape.k,
                self.spec,
                correction_bias=self.bias,
                steering=steering,
                tokens=tokens,
                statistics=statistics,
            )

        return contender

    def soft_steering(self) -> ops.SteeringTables:
        """Four experts raised by half a standard deviation [arXiv 2510.04694 eq. 4]."""
        return ops.SteeringTables(1, self.shape.experts, std=self.std)

    def forced_steering(self) -> ops.SteeringTables:
        """One expert forced on, one off [arXiv 2510.04694 eq. 5]."""
        force = torch.zeros(1, self.shape.experts, device=self.device)
        on, off = self.forced
        force[0, off], force[0, on] = float(ops.Force.OFF_PAPER), float(ops.Force.ON_PAPER)
        return ops.SteeringTables(1, self.shape.experts, force=force)

    def read(self, index: int) -> torch.Tensor:
        """The floor: reading the logits once and nothing else."""
        return torch.sum(self.logits[index])

    def contenders(self) -> dict[str, Contender]:
        full = ("counts", "probability", "weight")
        return {
            READ: self.read,
            "torch": self.torch_gate,
            "torch + p.sum(0)": self.torch_gate_and_mass,
            "torch, soft steering": self.torch_soft,
            "torch, forced": self.torch_forced,
            "route": self.routed(),
            "route + counts": self.routed(metrics=("counts",)),
            "route + counts + probability": self.routed(metrics=("counts", "probability")),
            "route + counts + probability + weight + entropy": self.routed(metrics=full, entropy=True),
            "route + counts, soft steering": self.routed(metrics=("counts",), steering=self.soft_steering()),
            "route + counts, forced": self.routed(metrics=("counts",), steering=self.forced_steering()),
        }


def measure(effort: Effort) -> Measured:
    """Every shape, with its targets; or the one shape that is asked for."""
    measured = Measured()
    for shape in SHAPES if effort.shape is None else (effort.shape,):
        run = race(Gate(shape).contenders(), rounds=effort.rounds, within=effort.within)
        measured.rows += rows("Gate", shape.title, run, peers=PEERS, floors=dict.fromkeys(PEERS, READ))
        measured.targets += targets(shape, run, library.instruction_set())
    return measured


def targets(shape: Shape, run: Race, instruction_set: str) -> list[Target]:
    """What `WANTED` asks of this shape on these kernels: times as fast as the torch operations of the same run."""
    if shape.tokens != Shape.tokens or instruction_set not in WANTED_ON:
        return []
    half = shape.dtype is not torch.float32
    out = []
    for name, wanted in WANTED.get((shape.experts, shape.k), {}).items():
        least = wanted[WANTED_ON[instruction_set]] * (IN_HALF if half else 1)
        times = run.ratio(PEERS[name], name)
        out.append(
            Target(f"{shape.title}: {name}", f">= {least:g} times {PEERS[name]}", f"{times:.1f}", times >= least)
        )
    return out


def measure_one_row(effort: Effort) -> Measured:
    """A call of one row, which is what decoding has; more rounds, for such calls are short."""
    shape = replace(effort.shape or Shape(), tokens=1)
    contenders = {name: call for name, call in Gate(shape).contenders().items() if name in ONE_ROW}
    run = race(contenders, rounds=effort.rounds * 5, warmup=10, burst=20, within=effort.within)
    ratio = run.ratio("torch", "route + counts")
    wanted = f">= {ONE_ROW_WANTED} times torch"
    target = Target(f"{shape.title}: {COUNTS}", wanted, f"{ratio:.1f}", ratio >= ONE_ROW_WANTED)
    peers = {name: PEERS[name] for name in ONE_ROW if name in PEERS}
    targets = [target] if effort.shape is None else []
    return Measured(rows("One row a call", shape.title, run, peers=peers), targets=targets)
